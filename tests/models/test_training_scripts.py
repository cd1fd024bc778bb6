"""What other people's training scripts and tools ask of a model: logits as a tensor, encoders' own arguments, timm's names."""

import copy
import inspect
import itertools
import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint, model_parameters, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy, dispatch_clip_grad
from tiny_fusion import CLASSES, DETERMINISTIC, close, make_bert, make_dinov2, make_fusion, make_images, make_text, trained
from torch import nn
from transformers import Trainer, TrainingArguments

from mope_fast import MoPEFusion, PromptedEncoder, PromptTuned

LABELS = torch.tensor([0, 4, 2])


def make_vit(**settings):
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, **settings)


def make_tuned(**settings):
    return PromptTuned(make_vit(), 4, CLASSES, dropout=0.0, return_logits=True, **settings).double().eval()


def make_pictures(batch=3):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


def test_logits_alone_are_those_of_all_outputs_for_folded_models_too():
    torch.manual_seed(0)
    model, inputs = make_fusion(), (make_text(3), make_images(3))
    expected = model(*inputs)
    model.return_logits = True
    close(model(*inputs), expected.logits, 0)
    close(model.fold()(*inputs), expected.logits)
    close(model.fold().for_export("scores")(*inputs), expected.scores)
    with pytest.raises(ValueError, match="return_logits=True returns logits and no loss"):
        model(*inputs, LABELS)
    with pytest.raises(ValueError, match="return_logits=True returns logits, no feature maps and no tokens"):
        model(*inputs, feature_maps=True)
    model.reset_classifier(0)
    close(model(*inputs), expected.features, 0)
    with pytest.raises(ValueError, match="num_classes must be an integer >= 0, got -1"):
        model.reset_classifier(-1)
    with pytest.raises(TypeError, match="return_logits must be True or False"):
        PromptTuned(make_bert(), 2, return_logits="no")


def test_the_importance_loss_of_a_step_is_taken_once_and_makes_the_models_own_loss():
    torch.manual_seed(1)
    whole = make_fusion(**DETERMINISTIC, importance_weight=3.0, importance_threshold=0.0).train()
    model, inputs = copy.deepcopy(whole), (make_text(3), make_images(3))
    model.return_logits = True
    loss = F.cross_entropy(model(*inputs), LABELS) + model.auxiliary_loss()
    expected = whole(*inputs, LABELS).loss
    close(loss, expected, 1e-12)
    loss.backward()
    expected.backward()
    for name, parameter in trained(model).items():
        close(parameter.grad, trained(whole)[name].grad, 1e-12)
    with pytest.raises(RuntimeError, match="call the model first"):
        model.auxiliary_loss()
    with pytest.raises(RuntimeError, match=r"read output\.loss"):
        whole.auxiliary_loss()
    with torch.no_grad():
        model.eval()(*inputs)
    close(model.auxiliary_loss(), whole.eval()(*inputs).importance_loss * 3.0, 1e-12)
    model.train()(*inputs)
    with pytest.raises(ValueError, match="complementary_inputs is None"):
        model(inputs[0])
    with pytest.raises(RuntimeError, match="call the model first"):
        model.auxiliary_loss()  # of a forward that failed there is none


def test_an_importance_loss_that_nobody_takes_is_said():
    torch.manual_seed(2)
    model, inputs = make_fusion().train(), (make_text(3), make_images(3))
    model.return_logits = True
    model(*inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(*inputs)  # it isn't the copy's
    with pytest.warns(UserWarning, match=r"criterion\(model\(x\), y\) \+ model\.auxiliary_loss\(\)"):
        model(*inputs)
    with pytest.warns(UserWarning, match="was not taken"):
        model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for without in (make_fusion(importance_weight=0.0), make_fusion(use_dynamic=False)):
            without.return_logits = True
            without.train()(*inputs)
            without(*inputs)
            assert without.auxiliary_loss() == 0.0


@pytest.mark.parametrize("batch", [1, 4])
def test_a_trace_of_a_model_of_logits_runs_without_us(tmp_path, batch):
    model, images = make_tuned(), make_pictures()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, on sizes that it holds for fixed
        torch.jit.save(torch.jit.trace(nn.Sequential(model, nn.Softmax(-1)), images), tmp_path / "traced.pt")
    images = make_pictures(batch)
    close(torch.jit.load(tmp_path / "traced.pt")(images), model(images).softmax(-1), 1e-12)


def test_a_model_of_logits_exports_and_compiles_whole():
    model, images = make_tuned(), make_pictures()
    exported = torch.export.export(model, (images,)).module()
    close(exported(images), model(images), 1e-12)
    compiled = torch.compile(make_fusion(), backend="eager", fullgraph=True)
    compiled.return_logits = True
    compiled.train()
    text = make_text(3)
    assert compiled(**text, pixel_values=make_images(3)).shape == (3, CLASSES)
    assert compiled.auxiliary_loss().requires_grad


def test_inputs_go_to_the_encoder_that_names_them():
    torch.manual_seed(3)
    model, text, images = make_fusion(), make_text(3), make_images(3)
    expected = model(text, images, LABELS)
    for given in (
        {**text, "pixel_values": images, "labels": LABELS}, {"main_inputs": text, "pixel_values": images, "labels": LABELS},
        {**text, "complementary_inputs": images, "labels": LABELS},
    ):  # fmt: skip
        close(model(**given).loss, expected.loss, 0)
    close(model.fold()(**text, pixel_values=images).logits, expected.logits)
    tuned = PromptTuned(make_bert(), 2, CLASSES).double().eval()
    close(tuned(**text).logits, tuned(text).logits, 0)
    features = make_fusion(complementary=None, cross_dim=6)
    cross = torch.randn(3, 6, dtype=torch.float64)
    close(features(**text, complementary_inputs=cross).logits, features(text, cross).logits, 0)
    black_box = make_fusion(complementary=lambda sound: sound.mean(-1), cross_dim=6)
    close(black_box(**text, sound=cross[..., None]).logits, black_box(text, cross[..., None]).logits, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "main encoder's inputs are missing: .*input_ids"),
        ({"pixel_values": 0}, "main encoder's inputs are missing"),
        ({"input_ids": 0, "sound": 0}, r"neither side takes sound by name .*main side .*input_ids.*: pass main_inputs"),
        ({"main_inputs": 0, "input_ids": 0}, "neither side takes input_ids"),
    ],
)
def test_names_that_fit_no_side_are_refused(given, message):
    with pytest.raises(TypeError, match=message):
        make_fusion()(**given)


def test_names_that_fit_both_sides_or_none_are_refused():
    with pytest.raises(TypeError, match=r"input_ids and attention_mask could belong to either encoder: pass main_inputs"):
        make_fusion("bert", make_bert())(**make_text(3))
    tuned = PromptTuned(make_bert(), 2)
    for given, message in (
        ({}, "inputs are missing"),
        ({"inputs": make_text(3), **make_text(3)}, "as a dict or each by its own name"),
    ):
        with pytest.raises(TypeError, match=message):
            tuned(**given)


@pytest.mark.parametrize("model", [PromptTuned, MoPEFusion])
def test_the_signature_has_what_encoders_take(model):
    names = inspect.signature(model.forward).parameters
    encoders = [make_bert(), make_dinov2(), make_vit()]
    for encoder in encoders:
        assert PromptedEncoder(encoder).input_names & names.keys()
    assert {"input_ids", "attention_mask", "token_type_ids", "pixel_values", "x", "labels"} <= names.keys()


class Sentences(torch.utils.data.Dataset):
    """Ragged, as a tokenizer leaves them."""

    def __init__(self, labelled=True):
        self.labelled = labelled

    def __len__(self):
        return 6

    def __getitem__(self, index):
        ids = list(range(1, 4 + index))
        sample = {"input_ids": ids, "attention_mask": [1] * len(ids), "sentence": "dropped", "idx": index}
        return sample | ({"label": index % 2} if self.labelled else {})


class Padding:
    """A collator as transformers makes them, for what is left of a sample."""

    def __call__(self, samples):
        assert all("sentence" not in sample for sample in samples)
        length = max(len(sample["input_ids"]) for sample in samples)
        batch = {
            name: torch.tensor([sample[name] + [0] * (length - len(sample[name])) for sample in samples])
            for name in ("input_ids", "attention_mask")
        }
        labels = {"labels": torch.tensor([sample["label"] for sample in samples])} if "label" in samples[0] else {}
        return batch | labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_trainer_trains_evaluates_keeps_the_best_and_predicts_on_ordinary_columns(tmp_path, smoothing):
    torch.manual_seed(4)
    bert = make_bert().float()
    bert.config.label2id = {"no": 0, "yes": 1}
    model = PromptTuned(bert, 2, 2)
    assert model.config is bert.config
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=2, per_device_train_batch_size=3, use_cpu=True, report_to="none", disable_tqdm=True,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="accuracy",
        learning_rate=0.01, label_smoothing_factor=smoothing,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Sentences(), eval_dataset=Sentences(), data_collator=Padding(),
        compute_metrics=lambda found: {"accuracy": (np.argmax(found.predictions, axis=1) == found.label_ids).mean()},
    )  # fmt: skip
    trainer.train()
    trainer.train(resume_from_checkpoint=True)
    measured = trainer.evaluate()
    predicted = trainer.predict(Sentences(labelled=False)).predictions
    with torch.no_grad():
        rows = [Sentences()[index] for index in range(6)]
        batch = Padding()([{name: value for name, value in row.items() if name != "sentence"} for row in rows])
        labels = batch.pop("labels")
        logits = model.eval()(**batch).logits
    np.testing.assert_allclose(predicted, logits.numpy(), atol=1e-5)
    assert measured["eval_accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert measured["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=smoothing).item(), rel=1e-4)


def test_a_prediction_of_a_fused_model_is_its_logits(tmp_path):
    model = make_fusion().float()
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", disable_tqdm=True)
    rows = [{"input_ids": torch.arange(1, 5), "pixel_values": torch.randn(3, 12, 12), "name": "dropped"} for _ in range(3)]
    predicted = Trainer(model, arguments).predict(rows).predictions
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "pixel_values")}
    np.testing.assert_allclose(predicted, model.eval()(**batch).logits.detach().numpy(), atol=1e-5)


def test_what_timms_script_does_to_a_model():
    torch.manual_seed(5)
    encoder = make_vit()
    model = PromptTuned(encoder, prompt_length=4, num_classes=CLASSES, return_logits=True)
    assert (model.num_classes, model.num_features, model.head_hidden_size, model.in_chans) == (CLASSES, 48, 48, 3)
    assert model.pretrained_cfg is model.default_cfg is encoder.pretrained_cfg
    weight = model.get_classifier().weight.clone()
    with torch.no_grad():
        model.get_classifier().weight.mul_(0.5)  # --head-init-scale
    close(model.head.weight, 0.5 * weight, 0)
    model.set_grad_checkpointing(enable=True)
    assert model.main.gradient_checkpointing
    model.set_grad_checkpointing(enable=False)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.01, weight_decay=0.05)
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert given == {id(parameter) for parameter in trained(model).values()}
    average = ModelEmaV3(model, decay=0.5)
    before, images = copy.deepcopy(average.module), make_pictures().float()
    F.cross_entropy(model.train()(images), LABELS).backward()
    optimizer.step()
    average.update(model)
    prompts, of_before, now = (each.bank.stacks["48"].static_prompt for each in (average.module, before, model))
    close(prompts, (of_before + now) / 2, 1e-6)
    features = model.eval().forward_features(images)
    close(model.forward_head(features), model(images), 1e-6)
    close(model.forward_head(features, pre_logits=True), features, 0)
    model.reset_classifier(7)
    assert model(images).shape == (3, 7)
    assert model.num_classes == 7


def timm_script(root, resume="", epochs=2):
    """Train as timm's train.py does, with its loaders, mixup, schedule, clipping, average and checkpoints; (model, average)."""
    encoder = make_vit(num_classes=2)
    model = PromptTuned(encoder, prompt_length=4, num_classes=encoder.num_classes, return_logits=True)  # the line that is ours
    data_config = resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    shared = {"input_size": data_config["input_size"], "batch_size": 4, "num_workers": 0, "device": torch.device("cpu")}
    mixup = FastCollateMixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=model.num_classes)
    loaders = {
        split: create_loader(
            create_dataset("", root=root, split=split), is_training=train, collate_fn=mixup if train else None, **shared
        )
        for split, train in (("train", True), ("validation", False))
    }
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.02, weight_decay=0.05)
    start = resume_checkpoint(model, resume, optimizer) if resume else 0
    average = ModelEmaV3(model, decay=0.5)
    if resume:
        load_checkpoint(average.module, resume, use_ema=True)
    saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=str(root), recovery_dir=str(root))
    schedule, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=0, cooldown_epochs=0)
    criterion = SoftTargetCrossEntropy()
    for epoch in range(start, epochs):
        model.train()
        for images, target in loaders["train"]:
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model_parameters(model, exclude_head=True), value=1.0, mode="norm")
            optimizer.step()
            average.update(model)
        model.eval()
        with torch.no_grad():
            right = [accuracy(average.module(images), target)[0].item() for images, target in loaders["validation"]]
        saver.save_checkpoint(epoch, metric=sum(right) / len(right))
        schedule.step(epoch + 1)
    return model, average.module


def test_a_script_after_timms_train_py_trains_averages_saves_and_resumes(tmp_path):
    for split, colour in itertools.product(("train", "validation"), ("red", "blue")):
        (tmp_path / split / colour).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (40, 36), colour).save(tmp_path / split / colour / f"{index}.png")
    torch.manual_seed(0)
    model, average = timm_script(tmp_path)
    last = str(tmp_path / "last.pth.tar")
    again, average_again = timm_script(tmp_path, resume=last)  # all epochs are done: what was saved, in a new model
    for name, parameter in model.state_dict().items():
        close(again.state_dict()[name], parameter, 0)
        close(average_again.state_dict()[name], average.state_dict()[name], 0)
    resumed, _ = timm_script(tmp_path, resume=last, epochs=3)
    moved = {name for name, value in resumed.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert moved == set(trained(model))


def test_what_can_not_be_done_for_timms_script_is_said():
    model = make_tuned()
    with pytest.raises(ValueError, match="layer decay gives each layer its own learning rate, but the layers are frozen"):
        create_optimizer_v2(model, opt="adamw", lr=0.01, layer_decay=0.75)
    with pytest.raises(TypeError, match=r"torch\.jit\.script can't compile a model .* torch\.jit\.trace"):
        torch.jit.script(model)
    with pytest.raises(ValueError, match="global_pool='avg' is not supported: choose pooling when you create the model"):
        model.reset_classifier(3, global_pool="avg")
    with pytest.raises(ValueError, match="complementary has return_logits=True"):
        MoPEFusion(make_bert(), model, 3)


def test_a_main_input_may_come_first_and_the_others_by_name():
    torch.manual_seed(6)
    model, text, images = make_fusion(), make_text(3), make_images(3)
    ids, mask = text["input_ids"], text["attention_mask"]
    expected = model(text, images).logits
    close(model(ids, images, attention_mask=mask).logits, expected, 0)
    close(model(ids, attention_mask=mask, pixel_values=images).logits, expected, 0)
    tuned = PromptTuned(make_bert(), 2, CLASSES).double().eval()
    close(tuned(ids, attention_mask=mask).logits, tuned(text).logits, 0)
    with pytest.raises(TypeError, match="input_ids is given twice"):
        tuned(ids, input_ids=ids)
    with pytest.raises(TypeError, match="the encoder takes no attention_masks by name: it takes attention_mask, "):
        tuned(ids, attention_masks=mask)


def test_a_frozen_encoder_that_somebody_trains_stays_in_eval_mode_and_says_that_it_is_thawed():
    bert = make_bert(hidden_dropout_prob=0.5)
    model, holder = PromptTuned(bert, 2, CLASSES, dropout=0.0).double(), nn.ModuleList([bert])
    text = make_text(3)
    expected = model.eval()(text).logits
    holder.train()
    close(model(text).logits, expected, 0)
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match="all parameters of the frozen BertModel require a gradient"):
        model.train()


def test_layers_that_others_checkpoint_without_gradients_are_an_error():
    encoder = make_vit()
    model = PromptTuned(encoder, 2, CLASSES).double().train()
    block = encoder.blocks[0]
    forward = block.forward
    block.forward = lambda *args: torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=True)
    images = make_pictures().requires_grad_()
    with pytest.raises(RuntimeError, match="layer 0 of this VisionTransformer runs with gradients disabled in a forward"):
        model(images)
    with torch.no_grad():
        model(images)
    model.fold()(images.detach())


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel copies modules .* use DistributedDataParallel"):
        PromptTuned(make_bert(), 2).main._replicate_for_data_parallel()


def test_a_checkpoint_of_the_plain_encoder_loads_into_the_model_in_its_place():
    torch.manual_seed(7)
    plain, images = nn.ModuleDict({"v": make_vit(num_classes=7)}).double(), make_pictures()
    holder = nn.ModuleDict({"v": PromptTuned(make_vit(num_classes=7), 0, CLASSES, return_logits=True)}).double().eval()
    found = holder.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert sorted(found.missing_keys) == ["v.head.bias", "v.head.weight"]
    features = plain["v"].eval().forward_head(plain["v"].forward_features(images), pre_logits=True)
    close(holder["v"].forward_features(images), features, 1e-10)
    again = copy.deepcopy(holder)
    assert again.load_state_dict(holder.state_dict())


@pytest.mark.parametrize("classes", [CLASSES, 7])
def test_a_save_is_not_taken_for_a_checkpoint_of_an_encoder_that_has_a_head_too(tmp_path, classes):
    torch.manual_seed(8)
    images = make_pictures().float()
    model = PromptTuned(make_vit(num_classes=classes), 2, CLASSES).eval()
    expected, kept = model(images).logits, copy.deepcopy(model.main.encoder.state_dict())
    model.save_pretrained(tmp_path)
    encoder = model.unwrap()
    loaded = PromptTuned.from_pretrained(tmp_path, encoder)
    close(loaded(images).logits, expected, 1e-6)
    assert all(torch.equal(kept[name], value) for name, value in encoder.state_dict().items())
    loaded.leave_frozen_out_of_state_dict()
    other = PromptTuned(copy.deepcopy(encoder), 2, CLASSES).eval()
    other.leave_frozen_out_of_state_dict()
    other.load_state_dict(loaded.state_dict())
    close(other(images).logits, expected, 1e-6)


def test_torchinfo_and_fvcore_read_a_model_of_logits():
    from fvcore.nn import FlopCountAnalysis
    from torchinfo import summary

    fused = make_fusion(complementary=None, cross_dim=6)
    fused.return_logits = True
    features = torch.randn(3, 6, dtype=torch.float64)
    for model, inputs in ((make_tuned(), (make_pictures(),)), (fused, (make_text(3)["input_ids"], features))):
        found = summary(model, input_data=inputs, verbose=0)
        assert found.trainable_params == sum(parameter.numel() for parameter in trained(model).values())
        assert FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total() > 0

"""transformers' own Trainer around a fused model: the loss that is minimised is the model's, or an error says why not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_baf import make_baf, make_inputs
from tiny_fusion import CLASSES, DETERMINISTIC, close, make_bert, make_fusion, make_images, make_text, trained
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, SequentialSampler, default_collate
from transformers import Trainer, TrainingArguments

from mope_fast import PromptTuned

SETTINGS = {**DETERMINISTIC, "mapper_norm": "layer", "importance_weight": 1000.0, "importance_threshold": 0.0}


class Samples(Dataset):
    def __init__(self, labels):
        self.batch = {"main_inputs": make_text(len(labels)), "complementary_inputs": make_images(len(labels)), "labels": labels}

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, index):
        return tree_map(lambda tensor: tensor[index], self.batch)


def make_trainer(model, samples, tmp_path, **settings):
    settings = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 1, **settings}
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_grad_norm=0.0, **settings
    )
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = Trainer(
        model, arguments, train_dataset=samples, eval_dataset=samples, data_collator=default_collate,
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer._get_train_sampler = lambda *_: SequentialSampler(samples)
    return trainer


def stepped(model, losses):
    """Trained parameters behind one step on the mean of these losses."""
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.01)
    torch.stack(losses).mean().backward()
    optimizer.step()
    return trained(model)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_trainers_step_is_one_on_the_models_own_loss_smoothing_and_importance_included(tmp_path, accumulated):
    torch.manual_seed(0)
    model, samples = make_fusion(**SETTINGS), Samples(torch.tensor([0, 4, 2, 1]))
    model.label_smoothing = 0.1
    by_hand = copy.deepcopy(model).train()
    size = 4 // accumulated
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
    trainer = make_trainer(model, samples, tmp_path, **settings)
    batches = [default_collate([samples[start + i] for i in range(size)]) for start in range(0, 4, size)]
    expected = stepped(by_hand, [by_hand(**batch).loss for batch in batches])
    trainer.train()
    for name, parameter in trained(model).items():
        close(parameter, expected[name], 1e-8)
    output = by_hand.eval()(**samples.batch)
    smoothed = F.cross_entropy(output.logits, samples.batch["labels"], label_smoothing=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx((smoothed + 1000 * output.importance_loss).item(), rel=1e-6)


@pytest.mark.parametrize("step", ["train", "evaluate"])
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_a_trainers_own_label_smoothing_is_refused_where_it_would_drop_a_part_of_the_loss(tmp_path, step, problem):
    samples = Samples(torch.zeros(4, CLASSES, dtype=torch.long) if problem.startswith("multi") else torch.arange(4))
    weight = {"importance_weight": 0.0} if problem.startswith("multi") else {}
    model = make_fusion(**{**SETTINGS, **weight}, problem_type=problem)
    trainer = make_trainer(model, samples, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(RuntimeError, match=r"output\[0\].*label_smoothing_factor.*create the model with label_smoothing="):
        getattr(trainer, step)()


def test_a_trainers_own_label_smoothing_beside_the_models_is_refused(tmp_path):
    model = make_fusion(**{**SETTINGS, "importance_weight": 0.0})
    model.label_smoothing = 0.3
    trainer = make_trainer(model, Samples(torch.arange(4)), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(RuntimeError, match=r"output\[0\].*label_smoothing_factor"):
        trainer.evaluate()


def test_a_trainers_own_label_smoothing_is_right_where_the_loss_is_cross_entropy(tmp_path):
    torch.manual_seed(0)
    samples, model = Samples(torch.tensor([0, 4, 2, 1])), make_fusion(**{**SETTINGS, "importance_weight": 0.0})
    output = model(**samples.batch)
    expected = F.cross_entropy(output.logits, samples.batch["labels"], label_smoothing=0.1).item()
    trainer = make_trainer(model, samples, tmp_path, label_smoothing_factor=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_loss_of_ones_own_reads_logits_by_name(tmp_path):
    torch.manual_seed(0)
    samples, model = Samples(torch.tensor([0, 4, 2, 1])), make_fusion(**SETTINGS)
    output = model(**samples.batch)
    trainer = make_trainer(model, samples, tmp_path)
    trainer.compute_loss_func = lambda out, labels, **_: F.cross_entropy(out.logits, labels) + 1000 * out["importance_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-6)


def test_labels_lost_on_the_way_are_an_error_and_no_loss():
    model = make_fusion(num_classes=1, problem_type="regression")
    output = model(make_text(1), make_images(1))  # logits (1, 1), which backward() would take for a loss
    with pytest.raises(RuntimeError, match=r"read output\.logits"):
        output[0]
    assert output.to_tuple()[0] is output["logits"] is output.logits
    joint = PromptTuned(make_bert(), 2, 3).double().train()
    assert joint(make_text(3))[0].shape == (3, 3)
    joint.use_joint_batch()
    with pytest.raises(RuntimeError, match=r"read output\.logits"):
        joint(make_text(3))[0]
    with pytest.raises(RuntimeError, match=r"read output\.logits"):
        make_baf(problem_type="multi_label_classification")(**make_inputs())[0]

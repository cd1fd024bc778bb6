"""Two processes train as one would on both of their batches."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from op_recorder import Recorder
from tiny_baf import make_baf, make_inputs, make_vlmo
from tiny_fusion import CLASSES, DETERMINISTIC, close, make_bert, make_dinov2, make_fusion, make_images, make_text
from tiny_fusion import SETTINGS as TINY
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import RANKS, UNEVEN, cut, gradients, part, run_in_two_processes

from mope_fast import MoPEConfig, MoPEFusion, PromptTuned, Side

SETTINGS = {**DETERMINISTIC, "mapper_norm": "layer", "importance_weight": 0.5}


def make_batch(sizes=UNEVEN):
    return make_text(sum(sizes)), make_images(sum(sizes)), torch.arange(sum(sizes)) % CLASSES


def joint_and_alone(**settings):
    """A model that joins the ranks' batches, one that sees all samples itself and its output and gradients, and the samples."""
    model = make_fusion(**{**SETTINGS, **settings}).train()
    alone, batch = copy.deepcopy(model), make_batch()
    output = alone(*batch)
    output.loss.backward()
    model.use_joint_batch()
    return model, alone, output, batch


def losses(output):
    return [value.detach() for value in (output.loss, output.task_loss, output.importance_loss)]


def check_ddp_has_losses_and_gradients_of_the_joint_batch(rank, folder):
    for static in (False, True):
        for checkpointing in (False, True):
            model, alone, expected, batch = joint_and_alone()
            assert expected.importance_loss > 0.1
            if checkpointing:
                model.gradient_checkpointing_enable()
            parallel = DistributedDataParallel(model, static_graph=static)
            for _ in range(2):
                model.zero_grad()
                output = parallel(*cut(batch, part(rank)))
                output.loss.backward()
                close(losses(output), losses(expected))
                close(gradients(model), gradients(alone))


def check_ddp_alone_does_not(rank, folder):
    _, alone, expected, batch = joint_and_alone()
    model = copy.deepcopy(alone)
    model.zero_grad()
    parallel = DistributedDataParallel(model)  # nothing is averaged once it is gone
    output = parallel(*cut(batch, part(rank)))
    output.loss.backward()
    moved = {name: (grad - gradients(alone)[name]).abs().max() for name, grad in gradients(model).items()}
    assert all(distance > 1e-4 for distance in moved.values())
    assert (output.importance_loss - expected.importance_loss).abs() > 1e-4


def check_compiled_models(rank, folder):
    model = make_fusion(make_bert(num_hidden_layers=1), None, **{**SETTINGS, "cross_dim": 6}).train()
    alone, (text, _, labels) = copy.deepcopy(model), make_batch()
    batch = text, torch.randn(len(labels), 6).double(), labels
    expected = alone(*batch)
    expected.loss.backward()
    model.use_joint_batch()
    inner = DistributedDataParallel(torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True))
    outer = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    for parallel in (inner, outer):
        output = parallel(*cut(batch, part(rank)))
        output.loss.backward()
        close(losses(output), losses(expected))
        close(gradients(parallel), gradients(alone))


def check_accumulation_without_synchronisation(rank, folder):
    model, alone, _, first = joint_and_alone()
    second = make_batch()
    alone(*second).loss.backward()
    parallel = DistributedDataParallel(model)
    with parallel.no_sync():
        parallel(*cut(first, part(rank))).loss.backward()
    parallel(*cut(second, part(rank))).loss.backward()
    close(gradients(model), gradients(alone))


def check_training_with_adamw(rank, folder):
    model, alone, *_ = joint_and_alone()
    alone.zero_grad()
    parallel = DistributedDataParallel(model)
    optimizers = [torch.optim.AdamW(m.parameter_groups(1e-2, 3e-3)) for m in (model, alone)]
    sizes = [(4, 4), (6, 2), (3, 1), (1, 7), (2, 2)]
    for step in sizes:
        batch = make_batch(step)
        for optimizer, m, rows in zip(optimizers, (parallel, alone), (part(rank, step), slice(None)), strict=True):
            optimizer.zero_grad()
            m(*cut(batch, rows)).loss.backward()
            optimizer.step()
    close(model.trained_state_dict(), alone.trained_state_dict(), 1e-8)


def check_every_kind_of_labels(rank, folder):
    images = make_images(sum(UNEVEN))
    some = torch.arange(7) % CLASSES
    some[part(1)] = -100  # one rank has no label at all
    cases = {
        "single_label_classification": [some, torch.rand(7, CLASSES).softmax(1).double()],
        "multi_label_classification": [torch.rand(7, CLASSES).round()],
        "regression": [torch.randn(7, CLASSES)],
    }
    for problem_type, kinds in cases.items():
        head = nn.Sequential(nn.Linear(48, 8), nn.GELU(), nn.Linear(8, CLASSES))
        model = PromptTuned(make_dinov2(), 2, head=head, problem_type=problem_type, dropout=0.0).double().train()
        model.use_joint_batch()
        for labels in kinds:
            parallel = DistributedDataParallel(copy.deepcopy(model))
            got = parallel(images[part(rank)], labels[part(rank)])
            got.loss.backward()
            logits = model(images).logits
            loss = {
                "single_label_classification": F.cross_entropy,
                "multi_label_classification": F.binary_cross_entropy_with_logits,
                "regression": F.mse_loss,
            }[problem_type](logits, labels if labels.dtype == torch.long else labels.double())
            model.zero_grad()
            loss.backward()
            close(got.loss, loss)
            close(gradients(parallel), gradients(model))


def check_mope_baf(rank, folder):
    for frozen in (True, False):
        model = make_baf(make_vlmo(drop_path_rate=0.0), freeze_backbone=frozen).train()
        alone, inputs = copy.deepcopy(model), {**make_inputs(sum(UNEVEN)), "labels": torch.arange(sum(UNEVEN)) % 3}
        model.use_joint_batch()
        # joint passes have no use for some of VLMo's weights
        parallel = DistributedDataParallel(model, find_unused_parameters=not frozen)
        for _ in range(2):
            model.zero_grad()
            parallel(**cut(inputs, part(rank))).loss.backward()
        alone(**inputs).loss.backward()
        close(gradients(model), gradients(alone))


def check_one_rank_can_evaluate_alone(rank, folder):
    model, _, _, batch = joint_and_alone()
    model.eval()
    if rank == 0:
        output = model(*batch)
        close(output.task_loss, F.cross_entropy(output.logits, batch[2]))


def check_a_group_outlives_copies_and_pickles(rank, folder):
    pairs = [dist.new_group([rank]) for rank in range(RANKS)], dist.new_group([0, 1])
    batch = make_batch()
    for group, samples in ((pairs[0][rank], part(rank)), (pairs[1], slice(None))):
        model = make_fusion(**SETTINGS, num_classes=CLASSES).train()
        expected = copy.deepcopy(model)(*cut(batch, samples))
        model.use_joint_batch(group)
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            close(losses(twin(*cut(batch, part(rank)))), losses(expected))


def check_features_alone_have_the_joint_importance(rank, folder):
    model, _, expected, batch = joint_and_alone()
    text, images, _ = cut(batch, part(rank))
    output = model(text, images)
    assert output.loss is None
    close(output.importance_loss.detach(), expected.importance_loss.detach())


def check_one_all_reduce_a_step_and_no_wait_for_the_device(rank, folder):
    model, _, _, batch = joint_and_alone()
    mine = cut(batch, part(rank))
    with Recorder() as recorder:
        model(*mine).loss.backward()
    assert recorder.names.count("allreduce_") == 1
    assert not recorder.waits()


def check_sides_missing_for_some_samples_are_those_of_the_joint_batch(rank, folder):
    torch.manual_seed(0)
    sides = {"picture": Side(make_dinov2(), optional=True), "given": Side(width=4, optional=True)}
    model = MoPEFusion(make_bert(), sides, CLASSES, MoPEConfig(**TINY, **SETTINGS)).double().train()
    alone, count = copy.deepcopy(model), sum(UNEVEN)
    text, labels = make_text(count), torch.arange(count) % CLASSES
    # the second rank's samples have all pictures and lack all that is given
    present = {"picture": torch.arange(count) != 1, "given": torch.arange(count) < UNEVEN[0]}
    others = {"picture": make_images(count), "given": torch.randn(count, 4, dtype=torch.float64)}
    expected = alone(text, {**others, "present": present}, labels)
    expected.loss.backward()
    model.use_joint_batch()
    mine = part(rank)
    own = {**cut(others, mine), "present": cut(present, mine)}
    parallel = DistributedDataParallel(model)
    output = parallel(cut(text, mine), own, labels[mine])
    output.loss.backward()
    close(losses(output), losses(expected))
    close(gradients(model), gradients(alone))


QUICK = [check_a_group_outlives_copies_and_pickles, check_one_all_reduce_a_step_and_no_wait_for_the_device]
OTHERS = [check for name, check in globals().items() if name.startswith("check_") and check not in QUICK]


@pytest.mark.parametrize("checks", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["quick", "others"])
def test_two_processes_train_as_one(checks, tmp_path):
    run_in_two_processes(checks, tmp_path)


def test_one_process_is_a_joint_batch_of_its_own():
    model, alone, expected, batch = joint_and_alone()
    output = model(*batch)
    output.loss.backward()
    close(losses(output), losses(expected))
    close(gradients(model), gradients(alone))


def test_anything_but_a_process_group_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch.distributed.ProcessGroup of this rank, or None; got list"):
        make_fusion().use_joint_batch([0, 1])


def test_losses_of_a_joint_batch_have_float32_at_least_and_leave_out_what_has_no_label():
    model, (text, images, labels) = make_fusion(**DETERMINISTIC).bfloat16().train(), make_batch()
    labels[1] = -100
    expected = model(text, images.bfloat16(), labels)
    model.use_joint_batch()
    output = model(text, images.bfloat16(), labels)
    assert output.task_loss.dtype == torch.float32
    torch.testing.assert_close(output.task_loss, torch.nn.functional.cross_entropy(expected.logits.float(), labels))


def test_labels_need_a_head():
    model = make_fusion(num_classes=None).train()
    model.use_joint_batch()
    with pytest.raises(ValueError, match="labels need a head"):
        model(*make_batch())


def test_the_mappers_batch_norm_can_be_a_synchronised_one():
    model, batch = make_fusion(**DETERMINISTIC, mapper_norm="batch"), make_batch()
    model.train()(*batch)
    expected, state = model.eval()(*batch).logits, model.trained_state_dict()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(synchronised.bank.mapper.norm, nn.SyncBatchNorm)
    assert torch.equal(synchronised(*batch).logits, expected)
    assert synchronised.trained_state_dict().keys() == state.keys()

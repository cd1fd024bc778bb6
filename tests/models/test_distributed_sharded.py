"""Two processes that hold half of every weight (FSDP2) train as one that holds all."""

import copy

import torch
from tiny_baf import make_baf, make_inputs
from tiny_fusion import CLASSES, DETERMINISTIC, close, make_bert, make_dinov2, make_fusion, make_images, make_text
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from two_processes import run_in_two_processes

from mope_fast import PromptTuned

SETTINGS = {**DETERMINISTIC, "mapper_norm": "layer", "importance_weight": 0.5}
UNEVEN = (5, 2)


def part(rank, sizes=UNEVEN):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def cut(inputs, rows):
    """Of a tensor, or of a dict of them."""
    return {name: value[rows] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[rows]


def shard(model, **settings):
    for side in (model.main, getattr(model.complementary, "main", None)):
        for layer in () if side is None else side.layers:
            fully_shard(layer.module, **settings)
    return fully_shard(model, **settings)

def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value

def gradients(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def check_bert(rank, folder):
  for main, other in (("bert","dinov2"),("dinov2","bert")):
   for mixing in ("kv","prompt"):
    for checkpointing in (False,True):
     for reshard in (None, True,False):
      print(main, mixing, checkpointing, reshard)
      inputs = {"bert": make_text(7), "dinov2": make_images(7)}
      batch = inputs[main], inputs[other], torch.arange(7) % CLASSES
      model = make_fusion(main, other, mixing=mixing, **SETTINGS).train()
      alone = copy.deepcopy(model)
      opt = [torch.optim.AdamW(alone.parameter_groups(1e-2))]
      model.use_joint_batch()
      shard(model, reshard_after_forward=reshard)
      opt.append(torch.optim.AdamW(model.parameter_groups(1e-2)))
      if checkpointing: model.gradient_checkpointing_enable()
      for step in range(3):
        for m in (model,alone): m.zero_grad()
        expected = alone(*batch)
        expected.loss.backward()
        out = model(*(cut(x, part(rank)) for x in batch))
        out.loss.backward()
        close(out.loss, expected.loss)
        close(gradients(model), gradients(alone))
        for o in opt: o.step()
        close(model.trained_state_dict(), alone.trained_state_dict(), 1e-8)


def test_two_processes_train_as_one(tmp_path):
    checks = [check for name, check in globals().items() if name.startswith("check_")]
    run_in_two_processes(checks, tmp_path)

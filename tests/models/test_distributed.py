"""Two processes train as one would on both halves of the batch."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from tiny_fusion import make_fusion, make_text, make_images, DETERMINISTIC, CLASSES
from torch.nn.parallel import DistributedDataParallel
rank, static, checkpointing = int(sys.argv[2]), sys.argv[4] == "static", sys.argv[5] == "checkpointing"
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)
torch.manual_seed(0)
# neither batch statistics nor the importance loss are averages over samples
model = make_fusion(**DETERMINISTIC, mapper_norm="layer", importance_weight=0.0).train()
text, images, labels = make_text(8), make_images(8), torch.arange(8) % CLASSES
model(text, images, labels).loss.backward()
expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
model.zero_grad()
if checkpointing:
    model.gradient_checkpointing_enable()
parallel = DistributedDataParallel(model, static_graph=static)
half = slice(4 * rank, 4 * rank + 4)
for _ in range(2):
    model.zero_grad()
    parallel({k: v[half] for k, v in text.items()}, images[half], labels[half]).loss.backward()
for name, parameter in model.named_parameters():
    if name in expected:
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-9, msg=lambda text: f"{name}: {text}")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("graph", ["static", "dynamic"])
@pytest.mark.parametrize("checkpointing", ["checkpointing", "plain"])
def test_ddp_averages_the_gradients_of_both_halves(tmp_path, request, graph, checkpointing):
    folder = str(request.path.parent)
    command = [sys.executable, "-c", PROGRAM, folder]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), graph, checkpointing],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)

"""The programs of docs/distributed.md run as they stand, in two processes."""

import os
import re
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model
from two_processes import RANKS, run_in_two_processes

from mope_fast import MoPEFusion

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
PROGRAMS = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)


def check_programs(rank, folder):
    os.chdir(folder)
    for program in PROGRAMS:
        names = {"__name__": "__main__"}
        # the processes have met already, and meet again behind this
        with (
            patch.dict(os.environ, LOCAL_RANK=str(rank)),
            patch.object(dist, "init_process_group"),
            patch.object(dist, "destroy_process_group"),
        ):
            exec(compile(program, PAGE.name, "exec"), names)
        model = names["model"]
        trained = model.trained_state_dict()
        everywhere = [None] * RANKS
        dist.all_gather_object(everywhere, {name: value.tolist() for name, value in trained.items()})
        assert everywhere[0] == everywhere[1]
        assert names["loss"].isfinite()


def test_programs_run_in_two_processes(tmp_path):
    assert len(PROGRAMS) == 2
    run_in_two_processes([check_programs], tmp_path)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = BertModel(BertConfig(**sizes, intermediate_size=128))
    MoPEFusion.from_pretrained(tmp_path / "adapter", bert).unwrap()
    MoPEFusion.from_pretrained(tmp_path / "sharded_adapter", bert, Dinov2Model(Dinov2Config(**sizes, image_size=28)))

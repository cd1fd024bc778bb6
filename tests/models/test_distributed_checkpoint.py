"""Trained parts go between models that are plain, compiled, in DDP and sharded, bit by bit."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_fusion import CLASSES, SETTINGS, make_bert, make_dinov2, make_images, make_text
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from two_processes import run_in_two_processes, whole

from mope_fast import MoPEConfig, MoPEFusion
from mope_fast.models import checkpoint


def encoders():
    torch.manual_seed(1)
    return make_bert().float(), make_dinov2(num_hidden_layers=1).float()


def make_model(seed):
    main, complementary = encoders()
    torch.manual_seed(seed)
    return MoPEFusion(main, complementary, CLASSES, MoPEConfig(**SETTINGS)).eval()


def compiled(model):
    return torch.compile(model, backend="aot_eager")


def compiled_in_place(model):
    model.compile(backend="aot_eager")
    return model


def with_a_compiled_part(model):
    model.head = compiled(model.head)
    return model


def sharded(model):
    for layer in (*model.main.layers, *model.complementary.main.layers):
        fully_shard(layer.module)
    fully_shard(model.head)
    fully_shard(model)
    with torch.no_grad():
        model(make_text(2), make_images(2).float())  # leaves what is the model's own whole
    return model


def replicated(model):
    return DistributedDataParallel(model)


def compiled_in_ddp(model):
    return DistributedDataParallel(compiled(model))


def compiled_ddp(model):
    return compiled(DistributedDataParallel(model))


WRAPPERS = (
    lambda model: model,
    compiled,
    compiled_in_place,
    with_a_compiled_part,
    replicated,
    compiled_in_ddp,
    compiled_ddp,
    sharded,
)


def as_users_reach_it(wrapped):
    """What ``save_pretrained`` is called on."""
    while isinstance(module := getattr(wrapped, "module", None), nn.Module):
        wrapped = module
    return wrapped


def equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert not isinstance(got[name], DTensor)
        assert torch.equal(got[name], value), name


def check_every_save_loads_into_every_model(rank, folder):
    source = make_model(seed=7).trained_state_dict()
    for number, save in enumerate(WRAPPERS):
        wrapped = as_users_reach_it(save(make_model(seed=7)))
        equal(wrapped.trained_state_dict(), source)
        path = folder / f"saved_{number}"
        wrapped.save_pretrained(path)
        dist.barrier()
        files = sorted(path.iterdir())
        assert [file.suffix for file in files] == [".safetensors", ".json"]
        equal(load_file(files[0]), source)
    contents = {file.read_bytes() for number in range(len(WRAPPERS)) for file in folder.glob(f"saved_{number}/*.safetensors")}
    assert len(contents) == 1, "all weights are the same"
    for load in WRAPPERS:
        wrapped = as_users_reach_it(load(make_model(seed=8).train()))
        assert not torch.equal(wrapped.trained_state_dict()["head.weight"], source["head.weight"])
        wrapped.load_pretrained(folder / "saved_0")
        equal(wrapped.trained_state_dict(), source)
        assert wrapped.training
    equal(MoPEFusion.from_pretrained(folder / f"saved_{len(WRAPPERS) - 1}", *encoders()).trained_state_dict(), source)


def check_only_the_first_rank_writes_what_is_sharded_and_all_wait(rank, folder):
    model = sharded(make_model(seed=7))
    assert any(isinstance(value, DTensor) for value in model.state_dict().values())
    with patch.object(checkpoint, "save", wraps=checkpoint.save) as save:
        model.save_pretrained(folder / "first")
    assert save.call_count == (rank == 0)
    (folder / "file").touch()
    if rank == 0:
        with pytest.raises(NotADirectoryError):
            model.save_pretrained(folder / "file")
    else:  # nobody waits for the one that failed
        model.save_pretrained(folder / "file")
    MoPEFusion.from_pretrained(folder / "first", *encoders())


def check_ranks_that_save_at_once_leave_one_whole_save(rank, folder):
    for seed in range(12):
        model = make_model(seed)
        dist.barrier()
        model.save_pretrained(folder / "together")
        dist.barrier()
        assert len(list((folder / "together").iterdir())) == 2
        equal(MoPEFusion.from_pretrained(folder / "together", *encoders()).trained_state_dict(), model.trained_state_dict())
        dist.barrier()


def check_state_dicts_without_frozen_parts(rank, folder):
    source = make_model(seed=7).trained_state_dict()
    for wrapper in WRAPPERS:
        models = make_model(seed=7), make_model(seed=8)
        for model in models:
            model.leave_frozen_out_of_state_dict()
        first, second = (nn.ModuleDict({"inner": wrapper(model)}) for model in models)
        frozen = {name: whole(p.detach()).clone() for name, p in second.named_parameters() if not p.requires_grad}
        state = first.state_dict()
        assert not any(".encoder." in key for key in state)
        second.load_state_dict(state)
        equal(as_users_reach_it(second["inner"]).trained_state_dict(), source)
        equal({name: whole(p.detach()) for name, p in second.named_parameters() if not p.requires_grad}, frozen)


def check_torchs_own_whole_state_dicts(rank, folder):
    options = StateDictOptions(full_state_dict=True)
    models = make_model(seed=7), make_model(seed=8)
    for model in models:
        model.leave_frozen_out_of_state_dict()
        sharded(model)
    state = get_model_state_dict(models[0], options=options)
    equal(state, make_model(seed=7).trained_state_dict())
    models[1].reshard()  # torch takes weights that are whole for those of a model that isn't sharded
    set_model_state_dict(models[1], state, options=options)
    equal(models[1].trained_state_dict(), make_model(seed=7).trained_state_dict())


def test_two_processes_save_and_load(tmp_path):
    run_in_two_processes([check for name, check in globals().items() if name.startswith("check_")], tmp_path)

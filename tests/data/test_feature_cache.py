import contextlib
import copy
import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from interrupts import interrupt
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

import mope_fast
from mope_fast import FeatureCache, MoPEConfig, MoPEFusion, _files, encoders
from mope_fast._modes import evaluating
from mope_fast.data import feature_store
from mope_fast.data.fingerprint import encoder_fingerprint

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
WIDTH = 4


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Element by element, so that a row doesn't depend on its batch."""
    return x.flatten(1)[:, :WIDTH] * 3 + 1


class Spy:
    """An encoder that keeps what it was asked for."""

    def __init__(self, function=rows_of):
        self.batches, self.function = [], function

    def __call__(self, *args, **keywords):
        self.batches.append(args[0] if args else keywords)
        return self.function(*args, **keywords)


def make_cache(folder, encoder=rows_of, **settings):
    return FeatureCache(folder, encoder, **{"fingerprint": "rows", **settings})


def make_encoder(seed=0, **settings):
    torch.manual_seed(seed)
    linear = nn.Linear(6, WIDTH, **settings)
    return nn.Sequential(linear, nn.Dropout(0.5), nn.LayerNorm(WIDTH))


def make_bert(seed=0, **settings):
    torch.manual_seed(seed)
    defaults = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**{**defaults, "intermediate_size": 40, "max_position_embeddings": 24, **settings})
    return BertModel(config).requires_grad_(False).eval()


def make_text(batch=3, tokens=8):
    ids = torch.randint(1, 50, (batch, tokens))
    lengths = torch.randint(2, tokens - 1, (batch, 1))
    mask = (torch.arange(tokens) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def padded(text, more, **values):
    return {name: nn.functional.pad(tensor, (0, more), value=values.get(name, 0)) for name, tensor in text.items()}


def segments(folder):
    return sorted(Path(folder).glob("features.2-*.safetensors"))


def forked(function, *args):
    process = multiprocessing.get_context("fork").Process(target=_child, args=(function, *args))
    process.start()
    return process


def _child(function, *args):
    torch.set_num_threads(1)
    function(*args)


def finish(*processes):
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


# lookup


def test_rows_come_in_order_and_each_distinct_sample_is_encoded_once_in_one_batch(tmp_path):
    spy, x = Spy(), torch.randn(6, 2, 3)
    cache = make_cache(tmp_path, spy)
    cache(x[[1]])
    order = [3, 1, 3, 0, 5, 0]
    assert torch.equal(cache(x[order]), rows_of(x[order]))
    assert len(spy.batches) == 2
    assert torch.equal(spy.batches[1], x[[3, 0, 5]])
    assert torch.equal(cache(x), rows_of(x))
    assert torch.equal(spy.batches[2], x[[2, 4]])
    assert len(cache) == 6
    assert cache.width == WIDTH


def test_a_stored_row_never_changes(tmp_path):
    spy = Spy(lambda x: rows_of(x) + len(spy.batches))
    x, cache = torch.randn(5, 6), make_cache(tmp_path, spy, flush_every=3)
    first = cache(x[:2])
    assert torch.equal(cache(x)[:2], first)
    assert torch.equal(cache(x), make_cache(tmp_path, spy)(x))
    assert len(spy.batches) == 2


def test_a_row_stays_the_same_when_another_process_stores_its_own(tmp_path):
    x, y = torch.zeros(1, 6), torch.ones(4, 6).cumsum(0)
    here, there = make_cache(tmp_path, flush_every=2), make_cache(tmp_path, lambda x: rows_of(x) + 1e-6)
    expected = here(x)
    there(x)
    there(y[:2])
    there.flush()
    here(y[:2])  # a miss: it sees the other's rows
    assert torch.equal(here(x), expected)
    here.flush()
    assert torch.equal(here(x), expected)
    late = make_cache(tmp_path, lambda x: rows_of(x) + 1e-6)
    late._store._index.clear()
    late(x)
    late.flush()
    here(y[2:])
    assert torch.equal(here(x), expected)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x + torch.eye(6)[:1] * 1e-6,
        lambda x: x.double(),
        lambda x: x.view(torch.int32),
        lambda x: x.view(-1, 2, 3),
        lambda x: {"x": x},
        lambda x: torch.cat([x, x[:, :1]], 1),
    ],
)
def test_another_content_is_another_sample(tmp_path, other):
    spy = Spy(lambda *args, **keywords: torch.ones(1, 2))
    cache, x = make_cache(tmp_path, spy), torch.randn(1, 6)
    cache(x)
    cache(other(x))
    cache(x.clone())
    assert len(spy.batches) == 2


def test_names_count_and_their_order_does_not(tmp_path):
    spy = Spy(lambda **tensors: torch.ones(2, 3))
    cache, a, b = make_cache(tmp_path, spy), torch.randn(2, 3), torch.randn(2, 3)
    cache({"a": a, "b": b})
    cache({"b": b, "a": a})
    cache(a=a, b=b)
    assert len(spy.batches) == 1
    cache({"a": b, "b": a})
    cache({"a": a, "c": b})
    assert len(spy.batches) == 3


@pytest.mark.parametrize(
    "view", [lambda x: x.t(), lambda x: x[::2], lambda x: x[0].expand(3, 6), lambda x: torch.complex(x, x).conj()]
)
def test_strides_do_not_count(tmp_path, view):
    spy = Spy(lambda x: torch.ones(len(x), 2))
    cache, x = make_cache(tmp_path, spy), torch.randn(6, 6)
    cache(view(x))
    cache(view(x).resolve_conj().contiguous())
    assert len(spy.batches) == 1
    cache(torch.complex(x, x))
    assert len(spy.batches) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.uint8])
def test_inputs_of_other_dtypes(tmp_path, dtype):
    spy = Spy(lambda x: rows_of(x.float()))
    cache, x = make_cache(tmp_path, spy), (torch.randn(8, 6) * 3).to(dtype)
    assert torch.equal(cache(x), rows_of(x.float()))
    assert torch.equal(cache(x.flip(0)), rows_of(x.flip(0).float()))
    assert len(spy.batches) == 1


# padding


@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.float32])
def test_the_same_text_padded_to_another_length_is_the_same_sample(tmp_path, mask_dtype):
    spy, text = Spy(lambda **tensors: torch.randn(3, 2)), make_text()
    text["boxes"] = text["attention_mask"][..., None].expand(-1, -1, 4)
    text["image"] = torch.randn(3, 3, 8, 8)
    text["attention_mask"] = text["attention_mask"].to(mask_dtype)
    cache = make_cache(tmp_path, spy, padded_inputs=("input_ids", "attention_mask", "boxes"))
    longer = padded({k: v for k, v in text.items() if v.dim() == 2}, 5, input_ids=1)
    longer |= {"boxes": nn.functional.pad(text["boxes"], (0, 0, 0, 5), value=2), "image": text["image"]}
    expected = cache(text)
    longest = int(text["attention_mask"].ne(0).sum(1).max())
    shorter = {name: tensor if name == "image" else tensor[:, :longest] for name, tensor in text.items()}
    assert torch.equal(cache(longer), expected)
    assert torch.equal(copy.copy(cache)(shorter), expected)
    assert len(spy.batches) == 1


def test_padding_before_and_between_real_tokens_counts(tmp_path):
    spy = Spy(lambda **tensors: torch.ones(1, 2))
    cache = make_cache(tmp_path, spy, padded_inputs=("input_ids", "attention_mask"))
    ids = torch.tensor([[5, 6, 7, 0]])
    for mask in ([1, 1, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]):
        cache({"input_ids": ids, "attention_mask": torch.tensor([mask])})
    assert len(spy.batches) == 5


def test_samples_without_a_real_token_are_told_apart(tmp_path):
    spy = Spy(lambda **tensors: torch.ones(len(tensors["input_ids"]), 2))
    cache = make_cache(tmp_path, spy, padded_inputs=("input_ids", "attention_mask"))
    cache({"input_ids": torch.tensor([[1, 1], [3, 3]]), "attention_mask": torch.zeros(2, 2)})
    assert len(cache) == 2


@pytest.mark.parametrize(
    ("name", "shape", "padded_inputs"),
    [("values", (4, 1), None), ("pixel_values", (4, 4), None), ("values", (4, 1), ("input_ids", "attention_mask"))],
)
def test_what_only_looks_like_padding_is_content(tmp_path, name, shape, padded_inputs):
    """Three real tokens of four, and something else of length four."""
    cache = make_cache(tmp_path, lambda **inputs: inputs[name].flatten(1).double(), padded_inputs=padded_inputs)
    text = {"input_ids": torch.tensor([[1, 2, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    value = torch.arange(1, 5)[:, None].expand(shape)
    for sample in (value, torch.cat([value[:3], value[3:] * 100])):
        assert torch.equal(cache({**text, name: sample[None]}), sample.flatten()[None].double())


def test_an_encoder_that_reads_padding_gets_its_own_feature(tmp_path):
    mean = make_cache(tmp_path, lambda input_ids, attention_mask: input_ids.float().mean(1, keepdim=True))
    mask = torch.tensor([[1, 1, 0, 0]])
    for ids in ([[5, 6, 0, 0]], [[5, 6, 7, 7]]):
        assert mean({"input_ids": torch.tensor(ids), "attention_mask": mask}).item() == sum(ids[0]) / 4
    assert mean({"input_ids": torch.tensor([[5, 6]]), "attention_mask": mask[:, :2]}).item() == 5.5


def test_what_was_cut_is_never_taken_for_what_was_not(tmp_path):
    text = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    make_cache(tmp_path, lambda **inputs: torch.ones(1, 2), padded_inputs=text)(text)
    short = {name: tensor[:, :2] for name, tensor in text.items()}
    assert torch.equal(make_cache(tmp_path, lambda **inputs: torch.zeros(1, 2))(short), torch.zeros(1, 2))


def test_padding_is_left_out_by_itself_only_where_the_feature_is_known_not_to_see_it(tmp_path, monkeypatch):
    class ReadsAll(BertModel):
        def forward(self, input_ids, attention_mask):
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            output.last_hidden_state = output.last_hidden_state.mean(1, keepdim=True)
            return output

    bert, text = make_bert(), make_text()
    others = padded(text, 3)
    FeatureCache(tmp_path / "bert", bert)(text)
    cache = FeatureCache(tmp_path / "bert", bert)
    cache(others)
    assert len(cache) == 3
    cache = FeatureCache(tmp_path / "subclass", ReadsAll(bert.config).eval())
    cache(text)
    cache(others)
    assert len(cache) == 6
    family = encoders.find_family(bert)
    monkeypatch.setattr(encoders.families, "_FAMILIES", dict(encoders.families._FAMILIES))
    mean = dataclasses.replace(family, feature=lambda encoder, output, inputs: output.last_hidden_state.mean(1))
    encoders.register_encoder(mean)
    cache = FeatureCache(tmp_path / "mean", bert)
    with torch.no_grad():
        expected = bert(**others).last_hidden_state.mean(1)
    cache(text)
    assert torch.equal(cache(others), expected)


def test_an_end_of_text_behind_the_mask_counts(tmp_path):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    config = CLIPTextConfig(**sizes, max_position_embeddings=24, bos_token_id=48, eos_token_id=49, pad_token_id=49)
    clip = CLIPTextModel(config).requires_grad_(False).eval()
    cache, mask = FeatureCache(tmp_path, clip), torch.tensor([[1, 1, 1, 0]])
    for last in (49, 0):
        text = {"input_ids": torch.tensor([[48, 3, 4, last]]), "attention_mask": mask}
        torch.testing.assert_close(cache(text), clip(**text).pooler_output)


def test_a_mask_of_another_shape_cuts_nothing(tmp_path):
    cache = make_cache(tmp_path, lambda **tensors: torch.ones(2, 2), padded_inputs=["input_ids", "attention_mask"])
    ids = torch.tensor([[1, 2, 0], [1, 2, 3]])
    cache({"input_ids": ids, "attention_mask": ids.ne(0)[:, None, None].expand(2, 1, 3, 3)})
    cache({"input_ids": ids, "attention_mask": torch.ones(2, 0)})
    assert len(cache) == 4


# encoders


def test_a_module_runs_frozen_and_is_left_as_it_was(tmp_path):
    encoder, x = make_encoder().train(), torch.randn(5, 6, requires_grad=True)
    encoder[1].eval()
    expected = copy.deepcopy(encoder).eval()(x).detach()
    cache = FeatureCache(tmp_path, encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = cache(x)
    assert torch.equal(features, expected)
    assert not features.requires_grad
    assert [m.training for m in encoder.modules()] == [True, True, False, True]
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())


def test_a_function_runs_without_gradient(tmp_path):
    weight = nn.Parameter(torch.ones(6))
    cache = make_cache(tmp_path, lambda x: x * weight if not torch.is_grad_enabled() else None)
    assert not cache(torch.randn(2, 6)).requires_grad


def test_features_of_inference_mode_can_enter_a_trained_graph(tmp_path):
    cache, x, weight = FeatureCache(tmp_path, make_encoder()), torch.randn(5, 6), nn.Parameter(torch.ones(WIDTH))
    with torch.inference_mode():
        cache(x)
    (cache(x) * weight).sum().backward()
    assert weight.grad is not None


def test_a_supported_encoder_gives_its_global_feature(tmp_path):
    bert, text = make_bert(), make_text()
    cache = FeatureCache(tmp_path, bert)
    assert cache.width == 32
    with torch.no_grad():
        expected = encoders.encode(bert, text)
    assert torch.equal(cache(text), expected)
    assert torch.equal(cache(padded(text, 4)), expected)
    ids = torch.randint(1, 50, (2, 5))
    with torch.no_grad():
        assert torch.equal(cache(ids), encoders.encode(bert, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_features_keep_their_dtype_and_bits(tmp_path, dtype):
    encoder, x = make_encoder().to(dtype).eval(), torch.randn(5, 6, dtype=dtype)
    expected = encoder(x).detach()
    with FeatureCache(tmp_path, encoder) as cache:
        assert torch.equal(cache(x), expected)
    reopened = FeatureCache(tmp_path, encoder)
    assert reopened(x).dtype == dtype
    assert torch.equal(reopened(x), expected)


def test_what_an_encoder_returns_may_be_its_own_memory(tmp_path):
    own = torch.empty(1, 6)
    cache, x = make_cache(tmp_path, own.copy_), torch.randn(2, 6)
    for sample in x.split(1):
        cache(sample).zero_()
    assert torch.equal(cache(x), x)


@pytest.mark.parametrize("wanted", ["features", "cache", "copy", "pickled"])
def test_as_the_complementary_side_it_equals_the_features(tmp_path, wanted):
    images, text, labels = torch.randn(3, 6), make_text(), torch.arange(3)
    cache = FeatureCache(tmp_path, make_encoder())
    features = cache.precompute(images.split(2), progress=False)
    losses, gradients = [], []
    for complementary, inputs in ((None, features), (cache, images)):
        torch.manual_seed(1)
        config = MoPEConfig(cross_dim=cache.width, num_experts=4, dropout=0.0, noise_std=0.0)
        model = MoPEFusion(make_bert(), complementary, 3, config)
        if complementary is not None and wanted == "copy":
            model = copy.deepcopy(model)
        if complementary is not None and wanted == "pickled":
            model = pickle.loads(pickle.dumps(model))
        loss = model(text, inputs, labels).loss
        loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert not any("complementary" in name for name in model.state_dict())
    assert torch.equal(*losses)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_dict_inputs_reach_the_encoder_through_a_fused_model(tmp_path):
    cache = FeatureCache(tmp_path, make_bert(seed=3))
    model = MoPEFusion(make_bert(), cache, 3, MoPEConfig(cross_dim=cache.width)).eval()
    text = make_text()
    assert torch.equal(model.complementary_feature(text), cache(text))


def test_a_compiled_step_leaves_it_out_of_the_graph(tmp_path):
    spy, x = Spy(), torch.randn(4, 6)
    cache = make_cache(tmp_path, spy)
    step = torch.compile(lambda x: cache(x + 1) * 2, backend="eager", dynamic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in (x, x, x[:3]):
            assert torch.equal(step(batch), rows_of(batch + 1) * 2)
    assert len(spy.batches) == 1


# fingerprints


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e[0].weight.data[0, 0].add_(1e-6),
        lambda e: e.bfloat16(),
        lambda e: e.__setitem__(1, nn.GELU()),
        lambda e: e.__setitem__(2, nn.LayerNorm(WIDTH, eps=1e-3)),
        lambda e: e.register_buffer("shift", torch.zeros(1)),
        lambda e: e.register_buffer("shift", torch.zeros(1), persistent=False),
        lambda e: e.append(nn.Identity()),
    ],
)
def test_another_encoder_has_another_fingerprint(change):
    encoder = make_encoder()
    change(encoder)
    assert encoder_fingerprint(encoder) != encoder_fingerprint(make_encoder())


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.train(),
        lambda e: e.requires_grad_(False),
        lambda e: setattr(e[0], "weight", nn.Parameter(e[0].weight.data.t().contiguous().t())),
        lambda e: e[0].register_forward_hook(print),
    ],
)
def test_the_same_encoder_has_the_same_fingerprint(change):
    encoder = make_encoder()
    change(encoder)
    assert encoder_fingerprint(encoder) == encoder_fingerprint(make_encoder())


def test_the_configuration_counts_but_not_how_it_is_run():
    expected = encoder_fingerprint(make_bert())
    other = make_bert()
    other.set_attn_implementation("eager")
    other.config._name_or_path, other.config.transformers_version = "somewhere", "9.9"
    assert encoder_fingerprint(other) == expected
    assert encoder_fingerprint(make_bert(layer_norm_eps=1e-5)) != expected
    assert encoder_fingerprint(make_bert(seed=1)) != expected
    wrapped = nn.Sequential(make_bert())
    assert encoder_fingerprint(wrapped) == encoder_fingerprint(nn.Sequential(make_bert())) != expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.int8])
def test_every_dtype_has_a_fingerprint(dtype):
    def make(value):
        module = nn.Module()
        module.register_buffer("table", torch.full((3, 2), value).to(dtype).t())
        return module

    assert encoder_fingerprint(make(1)) == encoder_fingerprint(make(1))
    assert encoder_fingerprint(make(1)) != encoder_fingerprint(make(2))


@pytest.mark.parametrize("encoder", [rows_of, Spy(), nn.Flatten()])
def test_an_encoder_without_parameters_must_be_named(tmp_path, encoder):
    with pytest.raises(ValueError, match=r"has no parameters or buffers.*fingerprint="):
        FeatureCache(tmp_path / "new", encoder)
    assert not (tmp_path / "new").exists()
    assert FeatureCache(tmp_path, encoder, fingerprint="mine").fingerprint == "mine"


def test_a_trained_encoder_is_refused_until_it_is_back(tmp_path):
    encoder, x = make_encoder(), torch.randn(2, 6)
    cache = FeatureCache(tmp_path, encoder)
    expected = cache(x)
    encoder[0].weight.data = encoder[0].weight.data.clone()  # as .to(device) does it
    assert torch.equal(cache(x), expected)
    before = copy.deepcopy(encoder.state_dict())
    with torch.no_grad():
        encoder[0].weight.add_(1)
    for use in (lambda: cache(x), lambda: copy.deepcopy(cache)):
        with pytest.raises(ValueError, match=r"Sequential was changed .*another folder"):
            use()
    encoder.load_state_dict(before)
    assert torch.equal(cache(x), expected)


def test_the_cache_of_another_encoder_is_refused(tmp_path):
    with FeatureCache(tmp_path, make_encoder()) as cache:
        expected = cache(torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"meta.2.json is of another encoder: expected Sequential .* use another folder"):
        FeatureCache(tmp_path, make_encoder(seed=1))
    (tmp_path / "meta.2.json").unlink()
    with pytest.raises(ValueError, match=r"safetensors is of another encoder"):
        FeatureCache(tmp_path, make_encoder(seed=1))
    assert torch.equal(FeatureCache(tmp_path, make_encoder())(torch.ones(1, 6)), expected)


def test_of_two_encoders_that_start_at_once_one_gets_the_folder(tmp_path):
    first, second = make_cache(tmp_path), make_cache(tmp_path, fingerprint="other")
    first(torch.ones(1, 6))
    second(torch.ones(1, 6))
    first.flush()
    with pytest.raises(ValueError, match="of another encoder"):
        second.flush()
    second._store.pending.clear()
    assert len(make_cache(tmp_path)) == len(segments(tmp_path)) == 1


# storage


def test_reopened_it_encodes_nothing(tmp_path):
    x, spy = torch.randn(10, 6), Spy()
    with make_cache(tmp_path, flush_every=3) as cache:
        cache.precompute(x.split(2), progress=False)
    assert len(segments(tmp_path)) == 3
    reopened = make_cache(tmp_path, spy)
    assert len(reopened) == 10
    assert torch.equal(reopened(x), rows_of(x))
    assert not spy.batches
    assert json.loads((tmp_path / "meta.2.json").read_text()) == {
        "format": 2,
        "fingerprint": "rows",
        "encoder": "rows_of",
        "width": WIDTH,
        "dtype": "float32",
    }
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_rows_are_written_every_so_many_and_on_flush(tmp_path):
    cache = make_cache(tmp_path, flush_every=4)
    cache(torch.randn(3, 6))
    assert not segments(tmp_path)
    cache(torch.randn(2, 6))
    assert len(segments(tmp_path)) == 1
    cache.flush()
    assert len(segments(tmp_path)) == 1
    cache(torch.randn(1, 6))
    cache.flush()
    assert len(segments(tmp_path)) == 2
    assert len(make_cache(tmp_path)) == 6


def test_a_dropped_cache_is_written(tmp_path):
    make_cache(tmp_path)(torch.randn(3, 6))
    assert len(make_cache(tmp_path)) == 3


def test_copies_and_pickles_reopen_the_folder(tmp_path, monkeypatch):
    x, encoder = torch.randn(3, 6), make_encoder()
    monkeypatch.chdir(tmp_path)
    cache = FeatureCache("features", encoder, flush_every=7)
    expected = cache(x)
    assert cache.folder == tmp_path / "features"
    monkeypatch.chdir("/")
    monkeypatch.setattr(nn.Sequential, "forward", None)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(other(x), expected)
        assert (other.folder, other.fingerprint, len(other)) == (cache.folder, cache.fingerprint, 3)
        assert other.encoder is not encoder


def test_its_text_says_what_it_holds(tmp_path):
    cache = make_cache(tmp_path)
    assert repr(cache) == f"FeatureCache('{tmp_path}', rows_of, 0 features)"
    cache(torch.randn(3, 6))
    assert repr(cache) == f"FeatureCache('{tmp_path}', rows_of, 3 features of width 4)"


def refused(*args):
    raise OSError(28, "No space left on device")


def test_a_full_disk_loses_no_row(tmp_path, monkeypatch):
    x, spy = torch.randn(3, 6), Spy()
    cache = make_cache(tmp_path, spy)
    cache(x)
    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OSError, match="No space"):
        cache.flush()
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    assert torch.equal(cache(x), rows_of(x))
    cache.flush()
    assert torch.equal(make_cache(tmp_path, spy)(x), rows_of(x))
    assert len(spy.batches) == 1


def test_precompute_goes_on_where_it_was_interrupted(tmp_path, capsys):
    x, spy = torch.randn(10, 6), Spy()

    def interrupted():
        yield from x[:6].split(2)
        raise KeyboardInterrupt

    stopped = make_cache(tmp_path, spy)
    with pytest.raises(KeyboardInterrupt):
        stopped.precompute(interrupted(), progress=False)
    features = make_cache(tmp_path, spy).precompute(torch.utils.data.DataLoader(x, batch_size=5))
    assert torch.equal(features, rows_of(x))
    assert torch.equal(torch.cat(spy.batches), x)
    *_, last, end = capsys.readouterr().err.split("\n")
    assert last.startswith("features of Spy: 100%")
    assert "2/2" in last
    assert "\r" not in last + end, "a file gets lines"


def test_a_deleted_folder_is_made_again(tmp_path):
    cache = make_cache(tmp_path / "a" / "b")
    cache(torch.randn(2, 6))
    shutil.rmtree(tmp_path / "a")
    assert len(cache(torch.randn(1, 6))) == 1
    cache.flush()
    assert len(make_cache(tmp_path / "a" / "b")) == 3


@linux
def test_stored_rows_are_read_through_a_mapping(tmp_path):
    x = torch.randn(5, 6)
    make_cache(tmp_path)(x)
    cache = make_cache(tmp_path)
    [segment] = segments(tmp_path)
    assert str(segment) in Path("/proc/self/maps").read_text()
    cache(x).zero_()
    assert torch.equal(cache(x), rows_of(x))


def test_rows_of_another_format_are_computed_again_and_its_processes_go_on(tmp_path, monkeypatch):
    """A store of the first format, whose keys left out what only looked like padding."""
    x, spy = torch.randn(3, 6), Spy()
    with monkeypatch.context() as context:
        for name, value in (("FORMAT", 1), ("META", "meta.json"), ("PREFIX", "features-")):
            context.setattr(feature_store, name, value)
        old = make_cache(tmp_path, lambda x: rows_of(x) * 0, flush_every=1)
        old(x)
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.warns(UserWarning, match=r"1 files of another version of mope_fast \(features-.*rows are not used but computed"):
        cache = make_cache(tmp_path, spy, flush_every=1)
    assert torch.equal(cache(x), rows_of(x))
    assert torch.equal(spy.batches[0], x)
    assert all(file.read_bytes() == data for file, data in before.items())
    with monkeypatch.context() as context, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in (("FORMAT", 1), ("META", "meta.json"), ("PREFIX", "features-")):
            context.setattr(feature_store, name, value)
        assert torch.equal(old(x + 1), rows_of(x) * 0)
        assert len(make_cache(tmp_path)) == 6


# merging


def fill(folder, count, first=0):
    for i in range(first, first + count):
        make_cache(folder, flush_every=1)(torch.full((1, 6), float(i)))


def all_right(cache, count):
    x = torch.arange(count)[:, None].expand(-1, 6).float()
    assert torch.equal(cache(x), rows_of(x))


def test_many_small_segments_become_one(tmp_path, monkeypatch):
    fill(tmp_path, feature_store.MANY - 1)
    before = make_cache(tmp_path, Spy())
    assert len(segments(tmp_path)) == feature_store.MANY - 1
    fill(tmp_path, 1, first=feature_store.MANY - 1)
    merged = make_cache(tmp_path, Spy())
    assert len(segments(tmp_path)) == 1
    for cache in (before, merged):
        all_right(cache, feature_store.MANY)
        assert not cache.encoder.batches


def test_duplicate_rows_are_harmless_and_go_when_merged(tmp_path, monkeypatch):
    caches, x = [make_cache(tmp_path) for _ in range(3)], torch.randn(4, 6)
    for cache in caches:
        cache(x)
    for cache in caches:
        cache.flush()
    assert len(segments(tmp_path)) == 3
    assert len(make_cache(tmp_path)) == 4
    monkeypatch.setattr(feature_store, "MANY", 2)
    assert torch.equal(make_cache(tmp_path)(x), rows_of(x))
    [segment] = segments(tmp_path)
    assert len(load_file(segment)["keys"]) == 4


def test_a_merged_segment_keeps_rows_that_others_have_too(tmp_path, monkeypatch):
    """Another process may be merging those away at the same time."""
    caches = [make_cache(tmp_path) for _ in range(3)]
    for cache, rows in zip(caches, (5, 1, 2), strict=True):
        cache(torch.arange(rows)[:, None].expand(-1, 6).float())
    for cache in caches:
        cache.flush()
    big = max(segments(tmp_path), key=lambda file: file.stat().st_size)
    big.rename(tmp_path / "features.2-0.safetensors")
    monkeypatch.setattr(feature_store, "MANY", 2)
    monkeypatch.setattr(feature_store, "SMALL", 4 * WIDTH * 5)
    make_cache(tmp_path)
    assert sorted(len(load_file(segment)["keys"]) for segment in segments(tmp_path)) == [2, 5]


def test_a_segment_merged_by_another_process_at_once_is_found(tmp_path, monkeypatch):
    cache, x, spy = make_cache(tmp_path), torch.randn(3, 6), Spy()
    fill(tmp_path, 1)
    cache(x)
    write = feature_store.write_atomically

    def write_and_merge(*args, **keywords):
        write(*args, **keywords)
        with monkeypatch.context() as context:
            context.setattr(feature_store, "MANY", 2)
            context.setattr(feature_store, "write_atomically", write)
            make_cache(tmp_path)

    monkeypatch.setattr(feature_store, "write_atomically", write_and_merge)
    cache.flush()
    assert len(segments(tmp_path)) == 1
    cache.encoder = spy
    assert torch.equal(cache(x), rows_of(x))
    assert not spy.batches


@pytest.mark.parametrize("links", [True, False])
def test_the_first_meta_file_stays(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", refused)
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        _files.publish_first(tmp_path / name, tmp_path / "meta")
    assert (tmp_path / "meta").read_text() == ("a" if links else "b")


def test_merged_segments_have_a_size_limit(tmp_path, monkeypatch):
    fill(tmp_path, 10)
    monkeypatch.setattr(feature_store, "MANY", 2)
    monkeypatch.setattr(feature_store, "SMALL", 4 * WIDTH * 3)
    all_right(make_cache(tmp_path, Spy()), 10)
    assert sorted(len(load_file(segment)["keys"]) for segment in segments(tmp_path)) == [1, 3, 3, 3]


def test_an_interrupt_at_any_moment_gives_the_encoder_its_modes_back():
    encoder = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    encoder[1].eval()
    event, interrupted = 1, True

    def use():
        with evaluating(encoder):
            pass

    while interrupted:
        interrupted = interrupt(use, event) >= event
        assert [part.training for part in encoder.modules()] == [True, True, False], event
        event += 1
    assert event > 20


@pytest.mark.parametrize("where", ["replace", "unlink", "fsync"])
def test_a_kill_while_merging_loses_nothing(tmp_path, monkeypatch, where):
    fill(tmp_path, 6)
    for calls in range(8):
        monkeypatch.setattr(feature_store, "MANY", 2)
        target, name = (Path, "unlink") if where == "unlink" else (os, where)
        real, done = getattr(target, name), []

        def killed(*args, real=real, done=done, calls=calls, **keywords):
            done.append(args)
            if len(done) > calls:
                raise KeyboardInterrupt
            return real(*args, **keywords)

        monkeypatch.setattr(target, name, killed)
        with contextlib.suppress(KeyboardInterrupt):
            make_cache(tmp_path)
        monkeypatch.undo()
        spy = Spy()
        all_right(make_cache(tmp_path, spy), 6)
        assert not spy.batches


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_folder_that_can_not_be_written_can_be_read(tmp_path, monkeypatch, name):
    fill(tmp_path, feature_store.MANY)
    monkeypatch.setattr(os, name, refused)
    spy = Spy()
    all_right(make_cache(tmp_path, spy), feature_store.MANY)
    assert not spy.batches
    assert len(segments(tmp_path)) == feature_store.MANY


def test_leftovers_of_killed_processes_are_ignored_and_removed_when_old(tmp_path):
    fill(tmp_path, 2)
    old, new, foreign = (tmp_path / name for name in (".features.2-a.safetensors.b.tmp", ".meta.2.json.c.tmp", "mine.tmp"))
    for file in (old, new, foreign):
        file.write_bytes(b"half")
    for file in (old, foreign):
        os.utime(file, (time.time() - 7200,) * 2)
    all_right(make_cache(tmp_path, Spy()), 2)
    assert not old.exists()
    assert new.exists()
    assert foreign.exists()


def test_a_clock_that_runs_ahead_makes_no_leftovers(tmp_path, monkeypatch):
    fill(tmp_path, 2)
    written = tmp_path / ".features-a.safetensors.b.tmp"
    written.write_bytes(b"half")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86_400)
    all_right(make_cache(tmp_path, Spy()), 2)
    assert written.exists()


# errors


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([torch.ones(2, 3)], TypeError, "a tensor or a dict of tensors, got list: select them"),
        (None, ValueError, "at least one sample"),
        ({}, ValueError, "at least one sample"),
        ({"a": torch.ones(2), "b": None}, TypeError, "'b' is NoneType: leave it out"),
        ({1: torch.ones(2)}, TypeError, "but 1 is Tensor"),
        (torch.ones(()), ValueError, r"inputs must be \(B, ...\) with at least one sample, got \(\)"),
        (torch.ones(0, 3), ValueError, r"at least one sample, got \(0, 3\)"),
        ({"a": torch.ones(2, 3), "b": torch.ones(3, 3)}, ValueError, r"same batch size B, got \{'a': \(2, 3\), 'b': \(3, 3\)\}"),
    ],
)
def test_wrong_inputs_are_refused(tmp_path, inputs, error, message):
    with pytest.raises(error, match=message):
        make_cache(tmp_path)(inputs)


@pytest.mark.parametrize(
    ("gives", "error", "message"),
    [
        (lambda x: (x,), TypeError, "gave tuple, expected a floating-point tensor"),
        (lambda x: x.long(), TypeError, "gave torch.int64, expected a floating-point tensor"),
        (lambda x: x[None], ValueError, r"gave features \(1, 2, 6\) for 2 samples, expected \(2, D\)"),
        (lambda x: x[:1], ValueError, r"gave features \(1, 6\) for 2 samples"),
        (lambda x: x[:, :0], ValueError, r"gave features \(2, 0\)"),
        (lambda x: x[:, :5], ValueError, "gave features of width 5 .* holds width 6 .*another folder"),
        (lambda x: x.double(), ValueError, "in torch.float64, but .* in torch.float32"),
        (lambda x: x / torch.tensor([[1.0], [0.0]]), ValueError, "NaN or infinite features for 1 of 2 samples; none .* is stored"),
    ],
)
@pytest.mark.parametrize("flushed", [True, False])
def test_wrong_features_are_refused_and_nothing_stored_is_lost(tmp_path, gives, error, message, flushed):
    cache, x = make_cache(tmp_path, lambda x: x), torch.randn(3, 6)
    cache(x)
    if flushed:
        cache.flush()
    cache.encoder = gives
    with pytest.raises(error, match=message):
        cache(torch.randn(2, 6))
    assert len(cache) == 3
    assert torch.equal(cache(x), x)
    cache.flush()
    assert torch.equal(make_cache(tmp_path, Spy())(x), x)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"encoder": "dinov2"}, TypeError, "a callable that returns .* got str"),
        ({"flush_every": 0}, ValueError, "flush_every must be an integer >= 1, got 0"),
        ({"flush_every": 1.5}, ValueError, "got 1.5"),
        ({"flush_every": True}, ValueError, "got True"),
        ({"fingerprint": ""}, ValueError, "a non-empty string that names the encoder"),
        ({"fingerprint": 3}, ValueError, "got 3"),
        ({"padded_inputs": "input_ids"}, TypeError, r"must be names of inputs, such as .*, got 'input_ids'"),
        ({"padded_inputs": [0]}, TypeError, r"must be names of inputs, .* got \[0\]"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        make_cache(tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_the_width_of_an_unknown_encoder_comes_with_its_first_feature(tmp_path):
    cache = make_cache(tmp_path)
    with pytest.raises(ValueError, match="call the cache on a sample"):
        _ = cache.width
    cache(torch.ones(1, 6))
    assert cache.width == WIDTH


def test_a_loader_without_batches_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the loader yielded no batch"):
        make_cache(tmp_path).precompute([], progress=False)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"file is a file, expected the folder of a feature cache"):
        make_cache(tmp_path / "file")


def change_meta(folder, **values):
    file = folder / "meta.2.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "meta.2.json").write_text(""),
        lambda f: (f / "meta.2.json").write_text("[1]"),
        lambda f: (f / "meta.2.json").write_bytes(b"\xff\xfe\x00"),
        lambda f: change_meta(f, format=0),
        lambda f: (f / "meta.2.json").write_text("[" * 100_000),
        lambda f: change_meta(f, width="4"),
        lambda f: change_meta(f, width=-1),
        lambda f: change_meta(f, width=True),
        lambda f: change_meta(f, dtype="nn"),
        lambda f: change_meta(f, dtype="int8"),
        lambda f: change_meta(f, fingerprint=None),
    ],
)
def test_a_damaged_meta_file_can_be_deleted(tmp_path, damage):
    fill(tmp_path, 2)
    damage(tmp_path)
    with pytest.raises(ValueError, match=r"meta.2.json is damaged .*delete this one file"):
        make_cache(tmp_path)
    (tmp_path / "meta.2.json").unlink()
    all_right(make_cache(tmp_path, Spy()), 2)
    fill(tmp_path, 1, first=2)
    assert json.loads((tmp_path / "meta.2.json").read_text())["width"] == WIDTH


def test_segments_of_another_width_are_refused(tmp_path):
    make_cache(tmp_path / "a")(torch.ones(1, 6))
    make_cache(tmp_path / "b", lambda x: x)(torch.ones(1, 6))
    shutil.copy(*segments(tmp_path / "b"), tmp_path / "a")
    with pytest.raises(ValueError, match=r"features of width 6 in torch.float32, but .* width 4"):
        make_cache(tmp_path / "a")


def rewrite(file, **changes):
    with feature_store.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file({**tensors, **changes}, file, metadata)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:100]),
        lambda file: file.write_bytes(file.read_bytes()[:-4]),
        lambda file: file.write_bytes(random.Random(0).randbytes(500)),
        lambda file: save_file({"features": torch.ones(2, 2)}, file),
        lambda file: save_file({"features": torch.ones(2, 2)}, file, {"mope_fast": "{}"}),
        lambda file: rewrite(file, keys=torch.zeros(1, 16, dtype=torch.uint8)),
        lambda file: rewrite(file, checks=torch.zeros(2)),
        lambda file: rewrite(file, features=torch.ones(2, WIDTH + 1)),
        lambda file: rewrite(file, features=torch.ones(())),
    ],
)
def test_a_damaged_segment_is_named_and_can_be_deleted(tmp_path, damage):
    x, spy = torch.randn(5, 6), Spy()
    for part in (x[:2], x[2:]):
        make_cache(tmp_path)(part)
    file = next(s for s in segments(tmp_path) if len(load_file(s)["keys"]) == 2)
    damage(file)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*delete this one file. That is safe: .*computed"):
        make_cache(tmp_path)
    file.unlink()
    assert torch.equal(make_cache(tmp_path, spy)(x), rows_of(x))
    assert torch.equal(spy.batches[0], x[:2])


def test_a_damaged_row_is_found_when_it_is_read(tmp_path, monkeypatch):
    x, spy = torch.randn(4, 6), Spy()
    for part in (x[:2], x[2:]):
        make_cache(tmp_path)(part)
    file = segments(tmp_path)[0]
    features = load_file(file)["features"]
    data = file.read_bytes()
    at = data.index(bytes(features[1].view(torch.uint8).tolist()))
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    cache = make_cache(tmp_path, spy)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{file.name} is damaged \(row 1 doesn't match its checksum\): delete"):
            cache(x)
    with monkeypatch.context() as context:
        context.setattr(feature_store, "MANY", 2)
        with pytest.raises(ValueError, match=rf"{file.name} is damaged"):
            make_cache(tmp_path)
    assert len(segments(tmp_path)) == 2
    file.unlink()
    assert torch.equal(cache(x), rows_of(x))
    assert len(spy.batches[0]) == 2


# threads


def test_threads_share_a_cache(tmp_path):
    x, errors, encoded = torch.randn(40, 6), [], []

    def slow(batch):
        encoded.extend(map(tuple, batch.tolist()))
        time.sleep(0.001)
        return rows_of(batch)

    cache = make_cache(tmp_path, slow, flush_every=3)
    start = threading.Barrier(4)

    def serve(seed):
        try:
            start.wait()
            for index in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(2):
                assert torch.equal(cache(x[index]), rows_of(x[index]))
                copy.copy(cache) if seed == 0 and 0 in index else len(cache)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert sorted(encoded) == sorted(map(tuple, x.tolist()))
    cache.flush()
    assert torch.equal(make_cache(tmp_path, Spy())(x), rows_of(x))


def test_an_encoder_that_several_threads_evaluate_keeps_its_mode_until_the_last_one_is_done():
    encoder = make_encoder().train()
    encoder[1].eval()
    first, second, inner = evaluating(encoder), evaluating(encoder), evaluating(encoder[0])
    for block in (first, second, inner):
        block.__enter__()
    for block in (first, inner):
        block.__exit__(None, None, None)
        assert not any(module.training for module in encoder.modules())
    second.__exit__(None, None, None)
    assert [module.training for module in encoder.modules()] == [True, True, False, True]


@linux
def test_a_process_forked_while_a_thread_encodes_is_not_blocked(tmp_path):
    entered, go, x = threading.Event(), threading.Event(), torch.randn(2, 6)

    def waits(batch):
        if threading.current_thread() is thread:
            entered.set()
            assert go.wait(60)
        return rows_of(batch)

    cache = make_cache(tmp_path, waits)
    thread = threading.Thread(target=cache, args=(x,))
    thread.start()
    assert entered.wait(60)
    process = forked(lambda: cache(x + 1) is not None)
    process.join(20)
    blocked = process.exitcode is None
    process.kill()
    go.set()
    thread.join(60)
    assert not blocked
    assert torch.equal(cache(x), rows_of(x))


# processes


def report_durable(folder, connection, batches):
    cache = make_cache(folder, flush_every=3)
    for i, x in enumerate(batches):
        cache(x)
        if i % 2:
            cache.flush()
            connection.send(i)
    connection.send("done")


@linux
def test_killed_at_any_moment_every_flushed_row_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "MANY", 5)
    draw, batches, durable = random.Random(0), list(torch.randn(1000, 2, 6).unbind(0)), -1
    kills = 0
    for _ in range(30):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = forked(report_durable, tmp_path, sender, batches)
        sender.close()
        process.join(draw.uniform(0.01, 0.15))
        process.kill()
        process.join()
        said = []
        with contextlib.suppress(EOFError):
            while receiver.poll():
                said.append(receiver.recv())
        kills += "done" not in said
        durable = max([durable, *(i for i in said if i != "done")])
        if durable < 0:
            continue
        spy, x = Spy(), torch.cat(batches[: durable + 1])
        assert torch.equal(make_cache(tmp_path, spy)(x), rows_of(x))
        assert not spy.batches
        if "done" in said:
            shutil.rmtree(tmp_path)
            durable = -1
    assert kills > 10


def fill_in_order(folder, x, seed):
    generator = torch.Generator().manual_seed(seed)
    for index in torch.randperm(len(x), generator=generator).split(4):
        # opened again and again: some merge while others write and read
        cache = make_cache(folder, flush_every=4)
        assert torch.equal(cache(x[index]), rows_of(x[index]))
    assert torch.equal(cache(x), rows_of(x))


@linux
@pytest.mark.parametrize("many", [2, 16])
def test_processes_fill_one_folder_at_once(tmp_path, monkeypatch, many):
    monkeypatch.setattr(feature_store, "MANY", many)
    x, spy = torch.randn(120, 6), Spy()
    finish(*[forked(fill_in_order, tmp_path / "new" / "folder", x, seed) for seed in range(4)])
    assert torch.equal(make_cache(tmp_path / "new" / "folder", spy)(x), rows_of(x))
    assert not spy.batches
    assert {file.suffix for file in (tmp_path / "new" / "folder").iterdir()} == {".json", ".safetensors"}


def expect_hits(folder, start, x):
    spy = Spy()
    cache = make_cache(folder, spy)
    assert len(cache) == 0
    start.send("open")
    start.recv()
    assert torch.equal(cache(x), rows_of(x))
    assert not spy.batches


@linux
def test_a_running_process_finds_what_another_one_writes(tmp_path):
    x = torch.randn(5, 6)
    here, there = multiprocessing.Pipe()
    process = forked(expect_hits, tmp_path, there, x)
    assert here.recv() == "open"
    make_cache(tmp_path, flush_every=1)(x)
    here.send("written")
    finish(process)


class Dataset(torch.utils.data.Dataset):
    def __init__(self, cache, x):
        self.cache, self.x = cache, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.cache(self.x[i : i + 1])[0]


@linux
def test_workers_of_a_loader_keep_what_they_computed(tmp_path):
    x, cache = torch.randn(6, 6), make_cache(tmp_path)
    cache(x[:1])
    loader = torch.utils.data.DataLoader(Dataset(cache, x), batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), rows_of(x))
    cache.flush()
    assert len(make_cache(tmp_path)) == 6


def test_rows_are_written_at_the_end_of_the_interpreter(tmp_path):
    program = f"""
import torch, mope_fast
cache = mope_fast.FeatureCache({str(tmp_path)!r}, lambda x: (x.flatten(1)[:, :4] * 3 + 1).bfloat16(), fingerprint="rows")
cache(torch.ones(3, 6))
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    spy = Spy(lambda x: rows_of(x).bfloat16())
    cache = make_cache(tmp_path, spy)
    assert torch.equal(cache(torch.ones(2, 6)), rows_of(torch.ones(2, 6)).bfloat16())
    assert not spy.batches


def test_it_is_public():
    assert mope_fast.FeatureCache is FeatureCache


def test_a_fusion_infers_the_width_of_the_features_it_caches(tmp_path):
    cache = FeatureCache(tmp_path, make_bert())
    model = MoPEFusion(make_bert(), cache, 3, MoPEConfig(num_experts=2, prompt_length=2))
    assert model.config.cross_dim == cache.width == cache.feature_width
    unknown = FeatureCache(tmp_path / "other", torch.nn.Linear(3, 5))
    assert unknown.feature_width is None
    with pytest.raises(ValueError, match=r"can't be inferred: set MoPEConfig\(cross_dim=...\)"):
        MoPEFusion(make_bert(), unknown, 3)
    unknown(torch.ones(1, 3))
    assert MoPEFusion(make_bert(), unknown, 3).config.cross_dim == 5


def test_a_setting_that_shows_in_no_parameter_makes_another_encoder(tmp_path):
    class Pooled(torch.nn.Module):
        def __init__(self, pool):
            super().__init__()
            self.linear, self.pool = torch.nn.Linear(4, 4), pool

        def forward(self, x):
            return self.linear(x)

    mean, largest = Pooled("mean"), Pooled("max")
    largest.load_state_dict(mean.state_dict())
    FeatureCache(tmp_path, mean)(torch.ones(1, 4))
    with pytest.raises(ValueError, match="another encoder"):
        FeatureCache(tmp_path, largest)(torch.ones(1, 4))


@pytest.mark.parametrize(("attribute", "other"), [([1, 2], [1, 3]), ({"pool": "mean"}, {"pool": "max"}), (torch.relu, torch.tanh)])
def test_lists_and_functions_are_settings_too(attribute, other):
    one, two, same = (make_encoder() for _ in range(3))
    one.setting, two.setting, same.setting = attribute, other, copy.copy(attribute)
    assert encoder_fingerprint(one) == encoder_fingerprint(same)
    assert encoder_fingerprint(one) != encoder_fingerprint(two)

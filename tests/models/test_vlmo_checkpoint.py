"""Official VLMo and BEiT files, with random tensors in them: what is read, fitted, left out, reported and refused."""

import os
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Beit, checkpoint_filter_fn
from tiny_vlmo import close, make_config, make_images, make_inputs, make_vlmo
from vlmo_files import mlm_shapes, official_shapes, other_heads, random_state, tiny_shapes

from mope_fast import VLMo, VLMoConfig
from mope_fast.models.vlmo.checkpoint import recognised

TABLE, POSITIONS = "relative_position_bias_table", "transformer.pos_embed"
TEXT_POSITIONS, TYPES = "text_embeddings.position_embeddings.weight", "token_type_embeddings.weight"
TEXT_ROWS = 394


@pytest.fixture
def load(tmp_path):
    """Save a content, read it as a VLMo."""

    def load(content, config, *, suffix=".pt", **settings):
        path = tmp_path / f"vlmo{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(content, path)
        return VLMo.from_checkpoint(path, config, **settings)

    return load


def refusal(load, content, config, **settings):
    with pytest.raises(ValueError, match=r"doesn't fit this VLMo:\n") as error:
        load(content, config, **settings)
    return str(error.value).splitlines()[1:]


def official(name, *shapes):
    config = make_config(name)
    state = tiny_shapes(config)
    for more in shapes:
        state |= more
    return config, random_state(state)


def assert_holds(model, state):
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


WRAPPERS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "model": {"other": 1}},
    "module": lambda state: {"module": {f"module.{key}": value for key, value in state.items()}, "lr": 0.1},
    "of a parallel module": lambda state: {f"module.{key}": value for key, value in state.items()},
    "module without its prefix": lambda state: {"module": state},
    "model": lambda state: {"model": state, "optimizer": [1, 2]},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["base_plus", "base"])
def test_tensors_are_found_in_every_wrapper(load, name, wrapper):
    config, state = official(name)
    assert_holds(load(WRAPPERS[wrapper](state), config), state)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_a_saved_model_comes_back_to_the_bit(load, suffix):
    model = make_vlmo("base").float()
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in make_inputs().items()}
    loaded = load(model.state_dict(), model.config, suffix=suffix).eval()
    assert_holds(loaded, model.state_dict())
    for got, expected in zip(loaded(**inputs), model(**inputs), strict=True):
        assert torch.equal(got, expected)


def test_heads_and_indices_are_left_out_without_a_word(load):
    config, state = official("base", mlm_shapes(24, 30), other_heads(24))
    extra = {"text_embeddings.position_ids": torch.arange(7)[None], "relative_position_index": torch.zeros(10, 10)}
    extra |= {"text_relative_position_index": torch.zeros(7, 7), "text_imag_relative_position_index": torch.zeros(17, 17)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(load(state | extra, config), state)


def test_the_head_for_masked_words_is_read_on_request(load):
    config, state = official("base_plus", mlm_shapes(68, 30))
    model = load(state, config, mlm_head=True)
    assert_holds(model, state)
    x, state = torch.randn(2, 5, 68).double(), {key: value.double() for key, value in state.items()}
    hidden = F.layer_norm(
        F.gelu(x @ state["mlm_score.transform.dense.weight"].T + state["mlm_score.transform.dense.bias"]),
        (68,),
        state["mlm_score.transform.LayerNorm.weight"],
        state["mlm_score.transform.LayerNorm.bias"],
        1e-12,
    )
    expected = hidden @ state["mlm_score.decoder.weight"].T + state["mlm_score.bias"]
    close(model.double().mlm_score(x), expected)
    without = {key: value for key, value in state.items() if not key.startswith("mlm_score.decoder")}
    assert refusal(load, without, config, mlm_head=True)[0] == "  missing: mlm_score.decoder.weight"


def test_text_positions_are_cut_and_types_of_a_second_image_dropped(load):
    config, state = official("base_plus", {TEXT_POSITIONS: (196, 68), TYPES: (3, 68)})
    model = load(state, config)
    assert_holds(model, state | {TEXT_POSITIONS: state[TEXT_POSITIONS][:7], TYPES: state[TYPES][:2]})
    model = load(state, config, max_text_length=5)
    assert torch.equal(model.text_embeddings.position_embeddings.weight, state[TEXT_POSITIONS][:5])
    with pytest.raises(ValueError, match=r"weight: the file has \(196, 68\), the model \(300, 68\) \(max_text_length can be"):
        load(state, config, max_text_length=300)


@pytest.mark.parametrize("side", [4, 8, 20])
def test_image_positions_are_interpolated(load, side):
    config, state = official("base_plus")
    grid = side // 4
    patches = state[POSITIONS][:, 1:].reshape(1, 3, 3, 68).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert_holds(load(state, config, image_size=side), state | {POSITIONS: torch.cat([state[POSITIONS][:, :1], patches], dim=1)})


@pytest.mark.parametrize("side", [4, 8, 20])
def test_the_bias_table_is_resized_as_beits(load, side):
    config, state = official("base")
    grid, image = side // 4, state[TABLE][:-TEXT_ROWS]
    rows = (2 * grid - 1) ** 2
    table = load(state, config, image_size=side).relative_position_bias_table
    assert table.shape == (rows + 3 + TEXT_ROWS, 9)
    assert torch.equal(table[rows:], state[TABLE][25:])  # three of class tokens, those of text
    assert torch.equal(table[: rows + 3], resize_rel_pos_bias_table(image, (grid, grid), (rows + 3, 9)))
    if side == 20:
        centre = rows // 2
        torch.testing.assert_close(table[centre], image[12])  # no offset is still no offset
        torch.testing.assert_close(table[[0, 8, 72, 80]], image[[0, 4, 20, 24]], rtol=1e-3, atol=1e-3)  # the farthest ones


def test_a_constant_bias_table_stays_constant(load):
    config, state = official("base")
    state[TABLE][:25] = torch.arange(9.0)
    table = load(state, config, image_size=20).relative_position_bias_table
    torch.testing.assert_close(table[:81], torch.arange(9.0).expand(81, -1))


def test_what_is_missing_unexpected_or_misshapen_comes_in_one_message(load):
    config, state = official("base_plus")
    del state["pooler.dense.bias"], state["transformer.norm.weight"]
    state |= {"decoder.weight": torch.zeros(2, 3), "transformer.blocks.3.norm1.weight": torch.zeros(68)}
    wrong = ["missing: transformer.norm.weight", "missing: pooler.dense.bias"]
    wrong += ["unexpected: decoder.weight (2, 3)", "unexpected: transformer.blocks.3.norm1.weight (68,)"]
    lines = refusal(load, state, config)
    assert sorted(lines[:-1]) == sorted(f"  {line}" for line in wrong)
    assert lines[-1] == "strict=False loads the rest and leaves missing parameters random"
    with pytest.warns(UserWarning, match="was loaded in part") as record:
        model = load(state, config, strict=False)
    assert record[0].filename == __file__
    assert all(line in str(record[0].message) for line in wrong)
    assert torch.equal(model.pooler.dense.weight, state["pooler.dense.weight"])

    state["transformer.blocks.1.attn.q_bias"] = torch.zeros(3)
    shape = "  transformer.blocks.1.attn.q_bias: the file has (3,), the model (68,)"
    for strict in (True, False):
        lines = refusal(load, state, config, strict=strict)
        assert sorted(lines) == sorted([shape, *(f"  {line}" for line in wrong)])


@pytest.mark.parametrize(
    "shape", [(), (0,), (3,), (5, 25), (394, 9), (397, 9), (398, 9), (400, 9), (1, 6, 24), (1, 0, 24), (2, 3, 4, 5)]
)
@pytest.mark.parametrize("key", [TABLE, POSITIONS, TEXT_POSITIONS, TYPES, "transformer.cls_token"])
def test_misshapen_positions(load, key, shape):
    name = "odd" if key == POSITIONS else "base"
    config, state = official(name, {key: shape})
    assert refusal(load, state, config)[0].startswith(f"  {key}: the file has (")


@pytest.mark.parametrize(
    ("name", "width", "layers", "first"), [("base", 768, 12, 10), ("base_plus", 544, 24, 21), ("large", 1024, 24, 21)]
)
def test_known_sizes_are_recognised(name, width, layers, first):
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in official_shapes(width, layers, first).items()}
    assert recognised(state, "file", None, {}) == VLMoConfig.named(name)
    assert recognised(state, "file", None, {"image_size": 384}) == VLMoConfig.named(name, image_size=384)
    # what a size is found by, and what only that size may have, can be overridden
    assert recognised(state, "file", None, {"num_layers": layers - 1}).num_layers == layers - 1
    if name == "base_plus":
        assert recognised(state, "file", None, {"max_text_length": 300}).max_text_length == 300


def test_other_sizes_need_a_configuration(load):
    _, state = official("base")
    with pytest.raises(
        ValueError, match=r"has 3 layers of width 24, which is no known VLMo size: if it is a VLMo, pass config=VLMoConfig"
    ):
        load(state, None)
    for odd in ("transformer.blocks.x.norm", "transformer.blocks.", "transformer.blocks"):
        with pytest.raises(ValueError, match="3 layers of width 24"):
            load({**state, odd: torch.zeros(1)}, None)
    with pytest.raises(ValueError, match="0 layers of width None"):
        load({"transformer.cls_token": torch.zeros(())}, None)
    with pytest.raises(
        TypeError, match=r"config must be a VLMoConfig \(VLMoConfig.named returns the known ones\) or None, got 'base'"
    ):
        load(state, "base")


CONTENTS = {
    "an empty dict": ({}, "holds nothing: expected a dict of tensors, or one under state_dict, module, model"),
    "nothing in a wrapper": ({"state_dict": {}}, "holds nothing"),
    "a list": ([torch.zeros(2)], "holds list"),
    "a tensor": (torch.zeros(2), "holds Tensor"),
    "numbers as names": ({1: torch.zeros(2)}, "has 1 of type Tensor"),
    "numbers": ({"epoch": 3}, "has 'epoch' of type int"),
    "lists": ({"model": {"cls_token": [1.0]}}, "has 'cls_token' of type list"),
    "two wrappers": ({"state_dict": {"model": {}}}, "has 'model' of type dict"),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_other_contents(load, content):
    content, message = CONTENTS[content]
    with pytest.raises(ValueError, match=message):
        load(content, make_config("base"))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vlmo.pt does not exist: expected a VLMo checkpoint file"):
        VLMo.from_checkpoint(tmp_path / "vlmo.pt")
    with pytest.raises(FileNotFoundError, match="is a folder: expected a VLMo checkpoint file"):
        VLMo.from_checkpoint(str(tmp_path))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    path, trap = tmp_path / "vlmo.pt", tmp_path / "trap"
    _, state = official("base")
    torch.save({"model": state, "args": Malicious(trap)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"contains more than tensors.* It is not loaded, because that could run code"):
        VLMo.from_checkpoint(path, make_config("base"))
    path.write_bytes(pickle.dumps(Malicious(trap)))
    with pytest.raises(ValueError, match="It is not loaded"):
        VLMo.from_checkpoint(path, make_config("base"))
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_cut_files(tmp_path, kind):
    path = tmp_path / f"vlmo.{'safetensors' if kind == 'safetensors' else 'pt'}"
    config, state = official("base")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    for size in (0, 1, 7, 50, 100, 101, 102, 103, 500, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            VLMo.from_checkpoint(path, config)


def test_a_number_that_is_not_what_was_saved(tmp_path):
    path = tmp_path / "vlmo.pt"
    config, state = official("base")
    torch.save(state, path)
    data = bytearray(path.read_bytes())
    data[data.index(state["pooler.dense.bias"].numpy().tobytes()) + 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"vlmo\.pt is damaged.*the checksum of vlmo/data/\d+ in it doesn't match"):
        VLMo.from_checkpoint(path, config)


@pytest.mark.parametrize("data", [b"hello world\n" * 9, b"<html>Not found</html>", bytes(range(256))])
def test_files_of_something_else(tmp_path, data):
    path = tmp_path / "vlmo.pt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"not a torch\.save"):
        VLMo.from_checkpoint(path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "vlmo.pt"
    path.touch()

    def refuse(*args, **kwargs):
        raise PermissionError("not yours")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(PermissionError, match="not yours"):
        VLMo.from_checkpoint(path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_file_that_asks_for_too_much_memory(tmp_path, monkeypatch, error):
    def load(*args, **kwargs):
        raise error

    path = tmp_path / "vlmo.pt"
    path.touch()
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ValueError, match=r"vlmo.pt is damaged, .*, or needs more memory than available: "):
        VLMo.from_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda value: value.to(torch.int8), "torch.int8"),
        (lambda value: value.to(torch.complex64), "torch.complex64"),
        (lambda value: value.to_sparse(), "torch.sparse_coo"),
        (lambda value: value.to("meta"), "a tensor without values"),
    ],
)
def test_tensors_that_are_no_plain_numbers_are_refused(load, change, kind):
    config, state = official("base")
    state |= {key: change(state[key]) for key in (TABLE, "transformer.cls_token")}
    lines = refusal(load, state, config, image_size=20, strict=False)
    expected = f": the file has {kind}, the model floating-point numbers"
    assert sorted(lines) == sorted(f"  {key}{expected}" for key in (TABLE, "transformer.cls_token"))


def test_nested_tensors_are_refused(load):
    config, state = official("base")
    state[TABLE] = torch.nested.nested_tensor([state[TABLE]])
    # by torch's own reader from 2.15 on
    with pytest.raises(ValueError, match=r"the file has a nested tensor|contains more than tensors[^\x1b]*It is not loaded"):
        load(state, config, image_size=20, strict=False)


def test_numbers_that_are_not_finite_are_a_warning(load):
    config, state = official("base")
    state["transformer.cls_token"][0, 0, :2] = float("nan")
    with pytest.warns(UserWarning, match=r"not finite, in transformer.cls_token \(2 of 24\): outputs will be NaN"):
        load(state, config)


def make_beit(side=12, **settings):
    """Its last norm is in front of pooling, as that of the BEiT files that VLMo starts from."""
    torch.manual_seed(3)
    sizes = {"img_size": side, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2}
    settings = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1, "num_classes": 5, **settings}
    beit = Beit(**sizes, **settings, global_pool="token")
    with torch.no_grad():
        for parameter in beit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return beit.eval()


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("side", [12, 20])
def test_beit_is_the_image_side(load, side, wrapped):
    beit = make_beit()
    state = beit.state_dict()
    state |= {f"blocks.{i}.attn.relative_position_index": torch.zeros(10, 10).long() for i in range(3)}
    with pytest.raises(ValueError, match=r"missing: text_embeddings\.word_embeddings"):
        load(state, make_config("base"))
    with pytest.warns(UserWarning, match="was loaded in part") as record:
        model = load({"model": state} if wrapped else state, make_config("base"), strict=False, image_size=side).double().eval()
    (message,) = (str(w.message) for w in record if "in part" in str(w.message))
    missing = {line.removeprefix("  missing: ") for line in message.splitlines()[1:]}
    not_of_beit = ("text", "token_type", "pooler", "mlp_vl", "norm2_vl")
    assert missing == {key for key in model.state_dict() if any(part in key for part in not_of_beit)}
    if side != 12:
        resized = make_beit(side)
        resized.load_state_dict(checkpoint_filter_fn(dict(beit.state_dict()), resized))
        beit = resized
    with torch.no_grad():
        model.token_type_embeddings.weight.zero_()  # BEiT has none
        images = make_images(2, side)
        close(model(**images).image, beit.double().forward_features(images["pixel_values"]))
    assert not model.relative_position_bias_table[-TEXT_ROWS:].any()


@pytest.mark.parametrize("shapes", [[(28, 3), (28, 4), (28, 3)], [(28,), (28,), (28,)], [(28, 3), (5, 3), (28, 3)]])
def test_uneven_bias_tables_of_beit(load, shapes):
    state = make_beit().state_dict()
    state |= {f"blocks.{i}.attn.relative_position_bias_table": torch.zeros(shape) for i, shape in enumerate(shapes)}
    assert f"  missing: {TABLE}" in refusal(load, state, make_config("base"))


def of_pretraining():
    """BEiT as its pre-training saves it: one bias table for all layers, a mask token, a head for visual words."""
    beit = make_beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, num_classes=0)
    heads = {"mask_token": torch.zeros(1, 1, 24), "lm_head.weight": torch.zeros(9, 24), "lm_head.bias": torch.zeros(9)}
    index = {"rel_pos_bias.relative_position_index": torch.zeros(10, 10).long()}
    return beit, beit.state_dict() | heads | index


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("own", [True, False])
def test_the_bias_table_that_layers_of_beit_share_is_each_ones(load, prefix, own):
    beit, state = of_pretraining()
    if own:  # as BEiT adds them up
        tables = {f"blocks.{i}.attn.{TABLE}": torch.randn(28, 3) for i in range(3)}
        beit = make_beit(use_rel_pos_bias=True)
        beit.load_state_dict(state | {k: v + state[f"rel_pos_bias.{TABLE}"] for k, v in tables.items()}, strict=False)
        state |= tables
    with pytest.warns(UserWarning, match="was loaded in part") as record:
        model = load({"model": {f"{prefix}{k}": v for k, v in state.items()}}, make_config("base"), strict=False).double().eval()
    (message,) = (str(w.message) for w in record if "in part" in str(w.message))
    assert TABLE not in message
    assert "unexpected" not in message
    with torch.no_grad():
        model.token_type_embeddings.weight.zero_()
        images = make_images(2, 12)
        close(model(**images).image, beit.double().forward_features(images["pixel_values"]))


def test_a_shared_table_of_another_shape_is_no_table(load):
    state = of_pretraining()[1] | {f"blocks.{i}.attn.{TABLE}": torch.zeros(5, 3) for i in range(3)}
    assert f"  missing: {TABLE}" in refusal(load, state, make_config("base"))

"""A receptive field as text, as a key, as blocks and as the integers that the kernels read."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mope_fast import ReceptiveField
from mope_fast.ops import prompt_attention as ops
from mope_fast.receptive_field import Slice

CPU = torch.device("cpu")
LENGTHS = {"lp": 2, "text": 3, "image": 4, "vp": 1}
# MoPE-BAF's single-modal layers: every group sees its neighbours in the sequence
CHAIN = {"lp": ["lp", "text"], "text": ["lp", "text", "image"], "image": ["text", "image", "vp"], "vp": ["image", "vp"]}
# its cross-modal ones: each modality sees its own prompt and the other's
GAPS = {"lp": ["lp", "image"], "text": ["lp", "text", "vp"], "image": ["image", "vp"], "vp": []}


def chain() -> ReceptiveField:
    return ReceptiveField(LENGTHS, CHAIN)


def gaps() -> ReceptiveField:
    return ReceptiveField(LENGTHS, GAPS)


def test_an_interval_field_prints_as_a_table():
    assert repr(chain()) == (
        "ReceptiveField of 10 positions, intervals\n"
        "sees  |  length | lp text image vp | keys\n"
        "lp    |       2 |  x    x     .  . | 0-4\n"
        "text  |       3 |  x    x     x  . | 0-8\n"
        "image |       4 |  .    x     x  x | 2-9\n"
        "vp    |       1 |  .    .     x  x | 5-9"
    )


def test_a_field_with_gaps_prints_them_and_what_sees_nothing():
    assert repr(gaps()) == (
        "ReceptiveField of 10 positions, bit rows\n"
        "sees  |  length | lp text image vp | keys\n"
        "lp    |       2 |  x    .     x  . | 0-8 with gaps\n"
        "text  |       3 |  x    x     .  x | 0-9 with gaps\n"
        "image |       4 |  .    .     x  x | 5-9\n"
        "vp    |       1 |  .    .     .  . | none"
    )


def test_short_names_leave_room_for_the_header():
    assert repr(ReceptiveField({"a": 1}, {"a": ["a"]})) == (
        "ReceptiveField of 1 positions, intervals\nsees |  length | a | keys\na    |       1 | x | 0-0"
    )


def test_fields_are_equal_whatever_the_order_or_repetition_of_what_they_see():
    other = ReceptiveField(LENGTHS, {group: [*reversed(CHAIN[group]), CHAIN[group][0]] for group in reversed(CHAIN)})
    assert other == chain()
    assert hash(other) == hash(chain())
    assert {chain(): 1}[other] == 1


@pytest.mark.parametrize(
    ("lengths", "visible"),
    [
        ({**LENGTHS, "vp": 2}, CHAIN),
        (LENGTHS, {**CHAIN, "vp": ["vp"]}),
        (dict(reversed(LENGTHS.items())), CHAIN),
        (
            {"lq": 2, **{g: n for g, n in LENGTHS.items() if g != "lp"}},
            {{"lp": "lq"}.get(g, g): ["lq" if s == "lp" else s for s in seen] for g, seen in CHAIN.items()},
        ),
    ],
    ids=["length", "visible", "order of the sequence", "name"],
)
def test_fields_differ_if_anything_differs(lengths, visible):
    assert ReceptiveField(lengths, visible) != chain()


def test_a_field_differs_from_other_things():
    assert chain() != CHAIN


@pytest.mark.parametrize("make", [chain, gaps])
@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["copy", "deep", "pickle"]
)
def test_copies_are_equal_and_carry_no_tensor(make, again):
    field = make()
    tensor = field.lowered(CPU)
    copied = again(field)
    assert copied == field
    assert repr(copied) == repr(field)
    assert copied.lowered(CPU) is not tensor
    assert torch.equal(copied.lowered(CPU), tensor)


def test_a_change_of_the_arguments_afterwards_changes_nothing():
    lengths, visible = dict(LENGTHS), {group: list(seen) for group, seen in CHAIN.items()}
    field = ReceptiveField(lengths, visible)
    lengths["lp"] = 7
    visible["vp"].append("lp")
    assert field == chain()
    assert torch.equal(field.mask(), chain().mask())


def test_the_mask_has_a_row_for_each_query():
    mask = ReceptiveField({"a": 2, "b": 0, "c": 1}, {"a": ["a", "b"], "b": ["c"], "c": ["a", "c"]}).mask()
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False], [True, True, False], [True, True, True]]


@pytest.mark.parametrize(
    ("lengths", "visible", "is_interval"),
    [
        (LENGTHS, CHAIN, True),
        (LENGTHS, GAPS, False),
        # an empty group between two visible ones is no gap, and neither is what an empty group would see
        ({"a": 2, "b": 0, "c": 1}, {"a": ["a", "c"], "b": [], "c": ["c"]}, True),
        ({"a": 1, "b": 0, "c": 1, "d": 1}, {"a": ["a"], "b": ["a", "d"], "c": [], "d": ["c", "d"]}, True),
        ({"a": 1, "b": 1, "c": 1}, {"a": ["a", "c"], "b": [], "c": []}, False),
        ({"a": 0}, {"a": ["a"]}, True),
    ],
)
def test_a_field_finds_out_whether_it_is_made_of_intervals(lengths, visible, is_interval):
    assert ReceptiveField(lengths, visible).is_interval is is_interval


def test_slices_are_one_block_for_each_group():
    assert chain().slices() == [
        Slice(slice(0, 2), slice(0, 5)),
        Slice(slice(2, 5), slice(0, 9)),
        Slice(slice(5, 9), slice(2, 10)),
        Slice(slice(9, 10), slice(5, 10)),
    ]


def test_neighbours_that_see_the_same_are_one_slice():
    field = ReceptiveField(
        {"a": 2, "b": 3, "empty": 0, "c": 1, "d": 1, "e": 2},
        {"a": ["a", "b"], "b": ["a", "b"], "empty": ["e"], "c": ["a", "b"], "d": [], "e": ["a", "b"]},
    )
    assert field.slices() == [
        Slice(slice(0, 6), slice(0, 5)),
        Slice(slice(6, 7), None),
        Slice(slice(7, 9), slice(0, 5)),
    ]


def test_neighbours_that_see_nothing_are_one_slice():
    field = ReceptiveField({"a": 2, "b": 3, "c": 1}, {"a": [], "b": [], "c": ["a", "b", "c"]})
    assert field.slices() == [Slice(slice(0, 5), None), Slice(slice(5, 6), slice(0, 6))]


def test_a_field_with_gaps_has_no_slices():
    with pytest.raises(ValueError, match=r"not made of intervals, so it has no slices; use mask\(\)"):
        gaps().slices()


def test_intervals_lower_to_four_rows():
    lowered = chain().lowered(CPU)
    assert lowered.dtype == torch.int32
    assert lowered.is_contiguous()
    assert lowered.tolist() == [
        [0, 0, 0, 0, 0, 2, 2, 2, 2, 5],
        [5, 5, 9, 9, 9, 10, 10, 10, 10, 10],
        [0, 0, 0, 0, 0, 2, 2, 2, 2, 5],
        [5, 5, 9, 9, 9, 10, 10, 10, 10, 10],
    ]


def test_gaps_lower_to_hulls_groups_and_bits():
    lowered = gaps().lowered(CPU)
    assert lowered.dtype == torch.int32
    assert lowered.is_contiguous()
    # vp sees nothing: (size, 0), neutral for min and max
    assert lowered.tolist() == [
        [0, 0, 0, 0, 0, 5, 5, 5, 5, 10],
        [9, 9, 10, 10, 10, 10, 10, 10, 10, 0],
        [0, 0, 2, 2, 2, 0, 0, 0, 0, 2],
        [5, 5, 5, 5, 5, 9, 9, 9, 9, 9],
        [0, 0, 1, 1, 1, 2, 2, 2, 2, 3],
        [0b0101, 0b0101, 0b1011, 0b1011, 0b1011, 0b1100, 0b1100, 0b1100, 0b1100, 0],
    ]


def test_what_nobody_sees_has_no_queries():
    lowered = ReceptiveField({"a": 2, "b": 1}, {"a": ["a"], "b": ["a"]}).lowered(CPU)
    assert lowered.tolist() == [[0, 0, 0], [2, 2, 2], [0, 0, 3], [3, 3, 0]]


def test_the_last_of_32_groups_is_the_sign_bit():
    names = [f"g{i}" for i in range(32)]
    visible = {name: [name] for name in names}
    visible["g0"] = ["g0", "g31"]
    visible["g31"] = names[:1] + names[30:]
    lowered = ReceptiveField(dict.fromkeys(names, 1), visible).lowered(CPU)
    assert lowered.dtype == torch.int32
    assert lowered[4].tolist() == list(range(32))
    assert lowered[5].tolist() == [1 - 2**31, *(1 << i for i in range(1, 31)), 1 + 2**30 - 2**31]
    assert torch.equal((lowered[5][:, None] >> lowered[4]) & 1 != 0, ReceptiveField(dict.fromkeys(names, 1), visible).mask())


def test_lowered_is_made_once_for_each_device():
    field = chain()
    assert field.lowered(CPU) is field.lowered(CPU)
    assert field.lowered(torch.device("meta")).device.type == "meta"
    assert field.lowered(CPU).device.type == "cpu"
    assert chain().lowered(CPU) is not field.lowered(CPU)


@pytest.mark.gpu
def test_a_capture_keeps_nothing_of_its_own_and_takes_what_was_kept_before():
    field, device = gaps(), torch.device("cuda", 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = field.lowered(device)
    graph.replay()
    assert field.lowered(device) is not captured, "what is captured belongs to the graph"
    assert field.lowered(device) is field.lowered(device)
    assert captured.tolist() == field.lowered(device).tolist() == field.lowered(CPU).tolist()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert field.lowered(device) is field._kept["lowered", device]


def test_what_a_compiler_traces_is_not_kept():
    field = gaps()
    compiled = torch.compile(lambda x: x + field.lowered(x.device)[0], fullgraph=True, backend="aot_eager")
    traced = compiled(torch.zeros(10))
    assert not field._kept
    assert type(field.lowered(CPU)) is torch.Tensor
    assert torch.equal(traced, field.lowered(CPU)[0].float())


@pytest.mark.parametrize("used_before", [False, True])
def test_fake_tensors_get_a_fake_one_that_is_not_kept(used_before):
    field = gaps()
    if used_before:
        field.lowered(CPU)
    with FakeTensorMode():
        fake = field.lowered(CPU)
        assert isinstance(fake, FakeTensor)
        out, _ = ops.prompt_attention_forward(
            *(torch.empty(1, 2, 10, 4) for _ in range(3)), None, None, None, None, fake, None, None, 0.5, None, None
        )
        assert out.shape == (1, 2, 10, 4)
    assert type(field.lowered(CPU)) is torch.Tensor
    assert fake.shape == field.lowered(CPU).shape


def test_a_field_first_used_in_inference_mode_can_be_saved_for_a_gradient():
    field = gaps()
    with torch.inference_mode():
        field.lowered(CPU)
    assert not field.lowered(CPU).is_inference()
    q, k, v = (torch.randn(1, 2, 10, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    settings = {"window": (None, None), "key_padding_mask": None, "bias": None, "scale": None}
    out = ops.prompt_attention(q, k, v, (), field=field.lowered(CPU), **settings)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), upstream)
    expected = torch.autograd.grad(ops.prompt_attention(q, k, v, (), field=gaps().lowered(CPU), **settings), (q, k, v), upstream)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


BAD = {
    "lengths": (([2, 3], {}), TypeError, "lengths must be a dict with a group's name as key, got list"),
    "visible": (({"a": 1}, ["a"]), TypeError, "visible must be a dict with a group's name as key, got list"),
    "no group": (({}, {}), ValueError, "a receptive field has 1 to 32 groups, got 0"),
    "33 groups": (
        ({f"g{i}": 1 for i in range(33)}, {f"g{i}": [] for i in range(33)}),
        ValueError,
        "a receptive field has 1 to 32 groups, got 33",
    ),
    "number as name": (({0: 3, 1: 2}, {0: [0], 1: [1]}), TypeError, "a group's name must be a string, got 0"),
    "fraction": (({"a": 1.0}, {"a": []}), TypeError, r"the length of group 'a' must be an int, got 1\.0"),
    "bool": (({"a": True}, {"a": []}), TypeError, "the length of group 'a' must be an int, got True"),
    "text": (({"a": "1"}, {"a": []}), TypeError, "the length of group 'a' must be an int, got '1'"),
    "negative": (({"a": 1, "b": -1}, {"a": [], "b": []}), ValueError, "the length of group 'b' must be >= 0, got -1"),
    "missing": (
        ({"a": 1, "b": 1}, {"a": ["b"]}),
        ValueError,
        r"visible says nothing about group 'b': give it the list of groups it sees, \[\] for none",
    ),
    "unknown": (
        ({"a": 1}, {"a": [], "b": []}),
        ValueError,
        r"visible has group 'b', which lengths does not have; the groups are \['a'\]",
    ),
    "unknown seen": (
        ({"a": 1, "b": 1}, {"a": ["c"], "b": []}),
        ValueError,
        r"visible\['a'\] has group 'c', which lengths does not have; the groups are \['a', 'b'\]",
    ),
    "one name": (({"a": 1}, {"a": "a"}), TypeError, r"visible\['a'\] must be a list of groups, got 'a'"),
    "set": (({"a": 1}, {"a": {"a"}}), TypeError, r"visible\['a'\] must be a list of groups, got \{'a'\}"),
    "none": (({"a": 1}, {"a": None}), TypeError, r"visible\['a'\] must be a list of groups, got None"),
}


@pytest.mark.parametrize(("args", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_clear_error(args, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        ReceptiveField(*args)


def test_32_groups_are_allowed():
    names = [f"g{i}" for i in range(32)]
    assert ReceptiveField(dict.fromkeys(names, 1), dict.fromkeys(names, names)).size == 32

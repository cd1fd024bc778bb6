"""Labels, masks, ids and features of any dtype, shape and value; the right loss is computed by hand in float64."""

import contextlib
import functools
import math

import numpy as np
import torch
from judge import Contact, Refusal, judge, same
from tiny_baf import make_baf, make_vlmo
from tiny_baf import make_inputs as make_joint
from tiny_fusion import make_bert, make_fusion, make_text
from torch import nn

from mope_fast import FusionCollator, PromptTuned
from mope_fast.data import Post

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CROSS = 20
TEXT = 6


def run(contact: Contact) -> str:
    use = contact.random.choices((loss, inputs, features, not_finite, collate), (6, 2, 1, 1, 1))[0]
    contact.note(use.__name__)
    return use(contact)


@functools.cache
def a_model(kind: str, problem: str, classes: int, dtype: torch.dtype, joint: bool):
    """A model of this kind."""
    torch.manual_seed(1)
    if kind == "tuned":
        model = PromptTuned(make_bert(), 2, classes, problem_type=problem, dropout=0.0).double().eval()
    elif kind == "fused":
        settings = {"dropout": 0.0, "noise_std": 0.0, "importance_weight": 3.0, "importance_threshold": 0.0, "mapper_norm": "layer"}
        model = make_fusion(make_bert(), None, cross_dim=CROSS, num_classes=classes, problem_type=problem, **settings)
    else:
        vlmo = make_vlmo(hidden_size=20, num_layers=3, first_fusion_layer=2, image_size=32, mlp_ratio=1)
        model = make_baf(vlmo, classes, problem_type=problem, num_blocks=2)
    model = model.to(dtype)
    if joint:
        model.train().use_joint_batch()
    return model


def batch_for(kind: str, size: int, dtype: torch.dtype):
    """Positional and keyword arguments."""
    if kind == "baf":
        batch = make_joint(size, image_size=32, seed=torch.randint(1 << 30, ()).item())
        return (), {**batch, "pixel_values": batch["pixel_values"].to(dtype)}
    text = make_text(size, TEXT)
    return (text, torch.randn(size, CROSS, dtype=dtype)) if kind == "fused" else (text,), {}


# losses


def loss(contact: Contact) -> str:
    kind, problem = contact.choose(("tuned", "tuned", "fused", "baf")), contact.choose((SINGLE, SINGLE, MULTI, REGRESSION))
    classes, size = contact.choose((1, 2, 3, 5)), contact.random.randint(2, 5)
    dtype, joint = contact.choose((torch.float64, torch.float32, torch.bfloat16)), contact.chance(0.25)
    model = a_model(kind, problem, classes, dtype, joint)
    positional, named = batch_for(kind, size, dtype)
    labels = some_labels(contact, problem, size, classes)
    smoothing = contact.random.random() if problem == SINGLE and contact.chance(0.3) else 0.0
    autocast = contact.choose((torch.bfloat16, torch.float16)) if dtype == torch.float32 and contact.chance(0.4) else None
    shown = f"{labels.dtype} {tuple(labels.shape)} {labels.flatten()[:6].tolist()}" if isinstance(labels, torch.Tensor) else labels
    contact.note(
        f"{kind} {problem}, {classes} classes, {size} samples, {dtype}, {joint=}, {autocast=}, {smoothing=}; labels {shown}"
    )

    def use():
        model.label_smoothing = smoothing
        try:
            with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                return model(*positional, labels=labels, **named)
        finally:
            model.label_smoothing = 0.0

    def right(output):
        logits = output.logits.detach()
        tolerance = 1e-9 if dtype == torch.float64 else 3e-5
        expected = loss_by_hand(problem, logits.double().numpy(), labels, smoothing)
        got = output.task_loss.item()
        assert math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance), f"task loss {got}, expected {expected}"
        importance = 0.0
        if kind == "fused":
            importance = 3.0 * importance_by_hand(output.scores.detach().double().numpy())
        whole = output.loss.item()
        assert math.isclose(whole, expected + importance, rel_tol=2 * tolerance, abs_tol=2 * tolerance), (
            whole,
            expected,
            importance,
        )

    valid = are_labels(problem, labels, size, classes)
    contact.note(f"{valid=}")
    verdict = judge(use, right if valid else None, None if valid else Refusal((TypeError, ValueError), ("labels",)))
    check_still_works(kind, problem, classes, dtype, joint)
    return verdict


def some_labels(contact: Contact, problem: str, size: int, classes: int):
    """Mostly what the problem takes, sometimes anything."""
    if contact.chance(0.04):
        return contact.choose(([0, 1], "positive", 1, np.zeros(size, np.int64), (0.5,)))
    shapes = {SINGLE: ((size,), (size, classes)), MULTI: ((size, classes),), REGRESSION: ((size, classes), (size,))}[problem]
    shape = contact.choose(shapes)
    if contact.chance(0.15):
        shape = contact.choose(
            ((), (size, 1), (size + 1,), (1, size), (size, classes + 1), (size, classes, 1), (classes, size), (0,))
        )
    floats = {SINGLE: len(shape) == 2, MULTI: contact.chance(0.6), REGRESSION: contact.chance(0.8)}[problem]
    if contact.chance(0.1):
        floats = not floats
    dtype = contact.choose(FLOATS if floats else INTEGERS)
    if contact.chance(0.08):
        dtype = contact.choose((torch.bool, torch.complex64))
    if floats:
        values = contact.numbers.random(shape) if problem != REGRESSION else contact.numbers.normal(size=shape) * 30
        if problem == SINGLE and contact.chance(0.5) and values.ndim == 2 and values.shape[1]:
            values = values / values.sum(1, keepdims=True)
        if contact.chance(0.3):
            values = np.round(values)
    else:
        values = contact.numbers.integers(0, 2 if problem == MULTI else classes, shape)
    values = np.asarray(values, np.float64).reshape(shape)
    if values.size and contact.chance(0.25):
        bad = contact.choose((-100, -1, classes, 255, 156, 1.5, math.nan, math.inf, -math.inf, 2, 1e4, 1e6))
        where = contact.numbers.random(values.shape) < contact.choose((0.3, 1.0))
        finite = math.isfinite(bad) and (dtype.is_floating_point or dtype.is_complex or bad == int(bad))
        if finite or dtype.is_floating_point:
            values[where] = bad
    if not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool:
        info = torch.iinfo(dtype)
        values = np.clip(values, info.min, min(info.max, 1 << 52))
    return torch.from_numpy(np.array(values).reshape(-1)).view(shape).to(dtype)


def are_labels(problem: str, labels, size: int, classes: int) -> bool:
    """What the documentation of ``problem_type`` says."""
    if not isinstance(labels, torch.Tensor) or labels.is_complex():
        return False
    shape, values = tuple(labels.shape), labels.double().numpy()
    if problem == SINGLE:
        if labels.dtype == torch.bool or classes == 1:
            return False
        if labels.is_floating_point():
            return shape == (size, classes) and bool(((values >= 0) & (values <= 1)).all())
        return shape == (size,) and bool((((values >= 0) & (values < classes)) | (values == -100)).all())
    if problem == MULTI:
        return shape == (size, classes) and bool(((values >= 0) & (values <= 1)).all())
    return shape in ((size, classes), *(((size,),) if classes == 1 else ())) and bool(np.isfinite(values).all())


def loss_by_hand(problem: str, logits: np.ndarray, labels: torch.Tensor, smoothing: float) -> float:
    values = labels.double().numpy()
    if problem == REGRESSION:
        return float(np.mean((logits - values.reshape(logits.shape)) ** 2))
    if problem == MULTI:
        positive, negative = np.logaddexp(0, -logits), np.logaddexp(0, logits)
        return float(np.mean(values * positive + (1 - values) * negative))
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    classes = logits.shape[1]
    if labels.is_floating_point():
        targets, counts = values, np.ones(len(values), bool)
    else:
        counts = values != -100
        targets = np.eye(classes)[np.where(counts, values, 0).astype(int)]
    targets = (1 - smoothing) * targets + smoothing / classes
    each = -(targets * log_p).sum(1)
    return float(each[counts].mean()) if counts.any() else 0.0


def importance_by_hand(scores: np.ndarray) -> float:
    """Squared coefficient of variation of the summed scores (N, B, K), mean over layers."""
    sums = scores.sum(1)
    return float(np.mean(sums.var(1, ddof=1) / sums.mean(1) ** 2))


@functools.cache
def an_ordinary_use(kind: str, problem: str, classes: int, dtype: torch.dtype, joint: bool):
    torch.manual_seed(2)
    positional, named = batch_for(kind, 2, dtype)
    model = a_model(kind, problem, classes, dtype, joint)
    expected = model.eval()(*positional, **named).logits.detach()
    model.train(joint)
    return positional, named, expected


def check_still_works(*which) -> None:
    positional, named, expected = an_ordinary_use(*which)
    model = a_model(*which)
    same(model.eval()(*positional, **named).logits.detach(), expected)
    model.train(which[-1])


# what goes in beside labels


def inputs(contact: Contact) -> str:
    """Ids and masks."""
    which = ("fused", SINGLE, 3, torch.float64, False)
    model, size = a_model(*which), contact.random.randint(2, 4)
    (text, cross), _ = batch_for("fused", size, torch.float64)
    real = text["attention_mask"].bool()
    if contact.chance(0.3):  # padded on the left, or in a sample of padding alone
        real = real.flip(1)
    good = {"bool": real, **{str(dtype): real.to(dtype) for dtype in (torch.int64, torch.int32, torch.uint8, torch.int8)}}
    good |= {"float": real.double(), "half": real.half()}
    bad = {
        "additive": torch.where(real, 0.0, torch.finfo(torch.float32).min),
        "(B, 1, 1, S)": real[:, None, None].long(),
        "(B, S + 1)": torch.cat([real, real[:, :1]], 1).long(),
        "(B, S - 1)": real[:, 1:].long(),
        "(S,)": real[0].long(),
        "(1, S)": real[:1].long(),
        "(B + 1, S)": torch.cat([real, real[:1]]).long(),
        "list": real.tolist(),
        "numpy": real.numpy(),
    }
    ids = {
        "float ids": text["input_ids"].double(),
        "ids (S,)": text["input_ids"][0],
        "ids (B, S, 1)": text["input_ids"][..., None],
        "no ids": text["input_ids"][:0],
    }
    name = contact.choose([*good, *bad, *ids, "int32 ids"])
    contact.note(name, tuple(real.shape))
    given = {"input_ids": text["input_ids"], "attention_mask": {**good, **bad}.get(name, real)}
    if name in ids or name == "int32 ids":
        given["input_ids"] = ids.get(name, text["input_ids"].int())
    refusal = Refusal((TypeError, ValueError), ("attention_mask", "input_ids", "batch")) if name in bad or name in ids else None

    def right(logits):
        for i in range(size):  # each alone, without its padding
            ids_alone = text["input_ids"][i : i + 1]
            expected = model({"input_ids": ids_alone, "attention_mask": real[i : i + 1].long()}, cross[i : i + 1]).logits
            same(logits[i : i + 1], expected)

    verdict = judge(lambda: model(given, cross).logits, None if refusal else right, refusal)
    check_still_works(*which)
    return verdict


def features(contact: Contact) -> str:
    """The complementary side's."""
    which = ("fused", SINGLE, 3, torch.float64, False)
    model, size = a_model(*which), contact.random.randint(2, 4)
    (text, cross), _ = batch_for("fused", size, torch.float64)
    good = {
        "float32": cross.float(),
        "float16": cross.half(),
        "strided": cross.t().contiguous().t(),
        "repeated": cross[:1].expand(size, -1),
    }
    bad = {
        "(B + 1, D)": torch.cat([cross, cross[:1]]),
        "(B, D - 1)": cross[:, 1:],
        "(B, 1, D)": cross[:, None],
        "(D,)": cross[0],
        "None": None,
        "integers": cross.long(),
        "complex": cross + 0j,
        "list": cross.tolist(),
        "numpy": cross.numpy(),
        "(B, 0)": cross[:, :0],
    }
    name = contact.choose([*good, *bad])
    contact.note(name)
    given = {**good, **bad}[name]
    refusal = Refusal((TypeError, ValueError), ("complementary", "feature", "cross")) if name in bad else None

    def right(logits):
        same(logits, model(text, given.double().contiguous()).logits)

    verdict = judge(lambda: model(text, given).logits, None if refusal else right, refusal)
    check_still_works(*which)
    return verdict


def not_finite(contact: Contact) -> str:
    """Into training steps that are skipped: nothing of it stays."""
    size, steps = contact.random.randint(3, 6), contact.random.randint(2, 3)
    kind = contact.choose(("batch", "batch", "layer"))
    contact.note(f"{steps} steps, {kind} norm")
    torch.manual_seed(3)
    model = make_fusion(make_bert(), None, cross_dim=CROSS, num_classes=3, mapper_norm=kind).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    norm = next((part for part in model.modules() if isinstance(part, nn.BatchNorm1d)), None)
    mean, var, seen = np.zeros(CROSS // 2), np.ones(CROSS // 2), 0
    for step in range(steps):
        (text, cross), _ = batch_for("fused", size, torch.float64)
        if contact.chance(0.6):
            where = contact.numbers.random(cross.shape) < contact.choose((0.01, 0.3, 1.0))
            where[0, 0] = True
            cross[torch.from_numpy(where)] = contact.choose((math.nan, math.inf, -math.inf, 1e308))
        with torch.no_grad():
            down = next(part for name, part in model.named_modules() if name.endswith("mapper.down"))
            hidden = down(cross).numpy()
        with np.errstate(all="ignore"):
            moments = np.stack([hidden.mean(0), hidden.var(0, ddof=1)])
            moved = np.stack([0.9 * mean + 0.1 * moments[0], 0.9 * var + 0.1 * moments[1]])
        if np.isfinite(moved).all():
            mean, var, seen = *moved, seen + 1
        output = model(text, cross, torch.randint(3, (size,)))
        bad_inputs = not torch.isfinite(cross).all()
        assert not (bad_inputs and torch.isfinite(output.loss)), "the loss doesn't show features that are not finite"
        optimizer.zero_grad()
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if torch.isfinite(output.loss) and all(torch.isfinite(gradient).all() for gradient in gradients):
            optimizer.step()
        contact.note(f"step {step}: finite inputs {not bad_inputs}, loss {output.loss.item()}")
    for name, value in model.trained_state_dict().items():
        assert torch.isfinite(value).all(), name
    if norm is not None:
        same(norm.running_mean, torch.from_numpy(mean), 1e-9)
        same(norm.running_var, torch.from_numpy(var), 1e-9)
        assert norm.num_batches_tracked == seen
    poisoned = contact.chance(0.3)
    name, parameter = contact.choose([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    if poisoned:
        parameter.data.view(-1)[0] = math.nan
    refusal = Refusal((ValueError,), (name,)) if poisoned else None

    def right(_):
        model.eval()
        (text, cross), _ = batch_for("fused", size, torch.float64)
        expected = model(text, cross).logits
        assert torch.isfinite(expected).all()
        before = model.trained_state_dict()
        model.load_pretrained(contact.folder / "save", strict=True)
        same(model.trained_state_dict(), before, 0)
        same(model(text, cross).logits, expected)

    return judge(lambda: model.save_pretrained(contact.folder / "save"), None if poisoned else right, refusal)


def collate(contact: Contact) -> str:
    """Labels of samples, made into a batch."""
    size = contact.random.randint(1, 4)
    several = contact.chance(0.4)
    values: list = [
        contact.choose(([0, 1, 1], [1, 0, 0], [0, 0, 0])) if several else contact.random.randint(0, 4) for _ in range(size)
    ]
    if contact.chance(0.3):
        values = [[float(v) for v in value] if several else float(value) + 0.5 for value in values]
    valid = True
    if contact.chance(0.4):
        bad = contact.choose((None, "pizza", math.nan, math.inf, [1, 0], [[0, 1, 1]], 1j, {"a": 1}, 1e39, 1 << 70))
        values[contact.random.randrange(size)] = bad
        valid = size == 1 and bad in (None, [1, 0], [[0, 1, 1]])
    dicts = contact.chance(0.5) or any(not isinstance(value, (int, tuple, type(None))) for value in values)
    contact.note(values, f"{dicts=} {valid=}")
    if dicts:
        samples = [{"text": torch.ones(2) * i, "image": torch.ones(3) * i, "label": value} for i, value in enumerate(values)]
        collator = FusionCollator(None, None)
    else:
        samples = [Post(str(i), "a", None, value) for i, value in enumerate(values)]
        collator = FusionCollator(
            lambda texts: torch.arange(len(texts)).float()[:, None] * torch.ones(2),
            lambda images: torch.arange(len(images)).float()[:, None] * torch.ones(3),
        )

    def right(batch):
        same(batch["main_inputs"], torch.arange(size).float()[:, None] * torch.ones(2))
        same(batch["complementary_inputs"], torch.arange(size).float()[:, None] * torch.ones(3))
        if values[0] is None:
            assert "labels" not in batch
            return
        array = np.array(values)
        assert batch["labels"].dtype == (torch.int64 if array.dtype.kind == "i" else torch.float32)
        same(batch["labels"].double(), torch.from_numpy(array.astype(np.float32).astype(np.float64)))

    refusal = None if valid else Refusal((TypeError, ValueError), ("label", "labels"))
    return judge(lambda: collator(samples), right if valid else None, refusal)

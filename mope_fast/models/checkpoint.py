"""Trained parts on disk: one JSON description that names one safetensors file, replaced together or not at all."""

import hashlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from .._distributed import shard_like
from .._files import make_names_durable, remove_leftovers, write_atomically
from ..encoders.weights import Samples, differences, plain_name

DESCRIPTION = "mope_fast.json"
FORMAT = 2
KEYS = ("model", "main", "config", "head", "num_classes", "problem_type", "weights")
TRAINING_SETTINGS = frozenset((
    "noise_std", "dropout", "dynamic_dropout", "mixing", "importance_weight", "importance_threshold",
    "prompt_init", "prompt_init_std", "expert_spread", "side_dropout",
))  # fmt: skip
"""Settings that don't change results in eval mode, except for rounding."""
BEFORE = {
    "pooling": None, "router_pooling": None, "complementary_pooling": None, "head_inputs": "main", "expert_spread": 1.0,
    "side_dims": None, "combine": "concat", "side_dropout": 0.0,
}  # fmt: skip
"""Values of settings that older saves don't contain yet, independent of the current defaults."""


class Loadable(Protocol):
    """What a save is read into: a :class:`TaskModel`."""

    def description(self) -> dict[str, Any]: ...
    def frozen_parts(self) -> list[str]: ...
    def sampled_encoders(self) -> dict[str, Samples | None]: ...
    def trained_keys(self, state: Mapping[str, Tensor]) -> dict[str, str]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = ...) -> Any: ...


def _content_name(data: bytes) -> str:
    """Return the prefix of the names of all weights files with this content."""
    return f"mope_fast-{hashlib.sha256(data).hexdigest()[:16]}"


NAME = re.compile(r"(mope_fast-[0-9a-f]{16})(-\w{1,16})?\.safetensors", re.ASCII)
"""Names of weights files; earlier versions had no suffix after the hash."""


def _is_name_of(name: str, data: bytes) -> bool:
    return (match := NAME.fullmatch(name)) is not None and match[1] == _content_name(data)


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Return the name of each tensor with NaN or infinities, and their number."""
    bad = {name: (~value.isfinite()).sum().item() for name, value in state.items() if value.is_floating_point()}
    return [f"{name} ({count} of {state[name].numel()})" for name, count in bad.items() if count]


def save(path: str | os.PathLike[str], state: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write the weights, then the description that names them, then delete the files that they replace.

    Several processes may save into one folder at the same time; the last save stays. If the same content is already saved, nothing
    changes.

    Raises:
        ValueError: a tensor holds NaN or infinities; nothing is written.
        NotADirectoryError: the path is a file.
    """
    folder = Path(path)
    if problems := not_finite(state):
        raise ValueError(
            f"nothing was saved to {folder}: numbers that are not finite are in\n  " + "\n  ".join(problems) + "\nTraining has "
            "diverged, or an input was not finite: continue from an earlier save (load_pretrained). If only the statistics of a "
            "norm are affected, call its reset_running_stats(). A buffer that is intentionally not finite needs persistent=False"
        )
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give save_pretrained a folder")
    folder.mkdir(parents=True, exist_ok=True)
    data = serialize({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, {"format": "pt"})
    description = json.loads(json.dumps({"format": FORMAT, **description}))
    if _is_saved(folder, data, description):
        return
    try:
        _publish(folder, data, description)
    except FileNotFoundError:
        # this process was paused for an hour, and another one removed its files as leftovers of a killed process
        folder.mkdir(parents=True, exist_ok=True)
        _publish(folder, data, description)
    remove_leftovers(folder, folder.glob(".mope_fast*.tmp"))
    _drop_replaced(folder)


def _publish(folder: Path, data: bytes, description: dict[str, Any]) -> None:
    """Write the weights and the description that names them; the description waits in a temporary file until they exist.

    A name is used only once: weights that no waiting or published description names will never be named again. The first weights of
    a folder are named by their content alone.
    """
    name = _content_name(data)
    if (folder / DESCRIPTION).exists() or not _publish_as(name, folder, data, description, first=True):
        _publish_as(f"{name}-{uuid.uuid4().hex[:8]}", folder, data, description)


def _publish_as(name: str, folder: Path, data: bytes, description: dict[str, Any], *, first: bool = False) -> bool:
    """Publish under this name and return whether that succeeded.

    With ``first`` it succeeds only if no other process is saving the same weights and nothing has been saved in the folder yet.
    """
    weights = folder / f"{name}.safetensors"
    waiting = _waiting(weights)
    try:
        descriptor = os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "wb") as file:
            file.write(json.dumps({**description, "weights": weights.name}, indent=2).encode())
            file.flush()
            os.fsync(file.fileno())
        if first and (folder / DESCRIPTION).exists():
            waiting.unlink()
            return False
        write_atomically(weights, data)
        os.replace(waiting, folder / DESCRIPTION)
    except BaseException:
        waiting.unlink(missing_ok=True)
        raise
    make_names_durable(weights)
    return True


def _waiting(weights: Path) -> Path:
    """Return the path of the description of these weights until they are published."""
    return weights.with_name(f".{weights.stem}.tmp")


def _drop_replaced(folder: Path) -> None:
    for weights in folder.glob("mope_fast-*.safetensors"):
        # check in this order: a description that is no longer waiting has been published
        if not _waiting(weights).exists() and _named_weights(folder) not in (None, weights.name):
            weights.unlink(missing_ok=True)


def _is_saved(folder: Path, data: bytes, description: dict[str, Any]) -> bool:
    name = _named_weights(folder)
    if name is None or not _is_name_of(name, data):
        return False
    try:
        saved = json.loads((folder / DESCRIPTION).read_bytes())
        return saved == {**description, "weights": name} and (folder / name).read_bytes() == data
    except (OSError, ValueError):  # replaced or damaged
        return False


def _named_weights(folder: Path) -> str | None:
    """Return the weights file that the folder's description names, or None if it can't be read."""
    try:
        name = json.loads((folder / DESCRIPTION).read_bytes())["weights"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def read_description(path: str | os.PathLike[str], model: str, settings: set[str]) -> dict[str, Any]:
    """Return the JSON description of a saved model of this class, whose settings have these names.

    Raises:
        FileNotFoundError: the description, or the weights file that it names, doesn't exist.
        ValueError: it was not written by this library, is damaged, or comes from a newer version.
        OSError: it can't be read.
    """
    file, description = Path(path) / DESCRIPTION, _read_json(path, model)
    if description["model"] != model:
        raise ValueError(f"{file} was saved by {description['model']}, not by {model}: load it with {description['model']}")
    types = {
        "config": dict,
        "weights": str,
        "problem_type": str,
        "num_classes": (int, type(None)),
        "label_smoothing": float,
        "encoders": dict,
        "sources": dict,
        "predictor": str,
    }
    wrong = [
        key
        for key, kind in types.items()
        if key in description and (not isinstance(description[key], kind) or isinstance(description[key], bool))
    ]
    if wrong:
        raise ValueError(f"{file} is damaged: {wrong} have the wrong type; restore it, or save the model again")
    if not NAME.fullmatch(description["weights"]):
        raise ValueError(
            f"{file} names {description['weights']!r:.99} as its weights, which is not a name that mope_fast writes: don't trust it"
        )
    if unknown := [key for key in description["config"] if key not in settings]:
        raise ValueError(f"{file} has settings that this version doesn't know: {unknown}; update mope_fast")
    before = {name: value for name, value in BEFORE.items() if name in settings}
    description["config"] = {**before, **description["config"]}
    weights = file.with_name(description["weights"])
    try:
        most = weights.stat().st_size
    except PermissionError:
        raise
    except OSError:
        if _named_weights(file.parent) != description["weights"]:  # the description has been replaced since it was read
            return read_description(path, model, settings)
        raise FileNotFoundError(f"{weights} does not exist, but {DESCRIPTION} names it: copy the whole folder") from None
    # each of these is a dimension of some weight; don't build a model from damaged sizes, because it may not fit in memory
    sizes = {**description["config"], "num_classes": description["num_classes"]}
    if large := [key for key, value in sizes.items() if re.match(r"num_|.*_(length|dim)$", key) and _exceeds(value, most)]:
        raise ValueError(
            f"{file} is damaged: {large} are larger than the size of {weights.name}; restore it, or save the model again"
        )
    return description


def saved_by(path: str | os.PathLike[str]) -> Any:
    """Return the class name of a saved model; raises the errors of :func:`read_description`."""
    return _read_json(path, "model")["model"]


def _read_json(path: str | os.PathLike[str], model: str) -> dict[str, Any]:
    file = Path(path) / DESCRIPTION
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: expected a folder written by {model}.save_pretrained")
    try:
        description = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): expected a file written by {model}.save_pretrained") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        got = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"{file} has format {got!r}, expected {FORMAT}: save it again with this version, or update mope_fast")
    if missing := [key for key in KEYS if key not in description]:
        raise ValueError(f"{file} lacks {missing}: restore it, or save the model again")
    return description


def _exceeds(value: Any, most: int) -> bool:
    return isinstance(value, int) and value > most


@contextmanager
def settings_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a TypeError or ValueError about settings within the block into a ValueError that names the damaged save."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{Path(path) / DESCRIPTION} is damaged: {error}; restore it, or save the model again") from None


def task_settings(description: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of the model's class that define its loss."""
    # saves of older versions have no label smoothing
    return {"problem_type": description["problem_type"], "label_smoothing": description.get("label_smoothing", 0.0)}


def _check_encoders(path: Path, model: Loadable, saved: dict[str, Any], strict: bool, refused: Collection[str]) -> None:
    """Warn if the model's frozen encoders have other weights than in training.

    Raise ValueError instead with ``strict``, and for encoders in ``refused``.
    """
    held = {plain_name(name) for name in model.frozen_parts()}
    for name, own in model.sampled_encoders().items():
        if (samples := saved.get(name)) is None or own is None:
            # only newer saves contain the encoder of a function
            if strict and name in held:
                whose = (
                    "the save holds no samples of it" if samples is None else "its weights can't be read here (sharded, quantised?)"
                )
                raise ValueError(
                    f"{path}: can't check that {name!r} has the weights that the save was trained on, because {whose}: pass "
                    "strict=False"
                )
            continue
        try:
            found = differences(samples, own)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{path / DESCRIPTION} is damaged: it has no valid samples of {name!r}; restore it") from None
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            message = f"{path} was trained on other weights of {name!r} than it is loaded onto: {'; '.join(found[:3])}{more}"
            if strict or name in refused:
                hint = (
                    "load the encoder that it was trained on, or pass strict=False"
                    if strict
                    else ("the saved encoder name now refers to other weights; pass the encoder that it was trained on")
                )
                raise ValueError(f"{message}: {hint}")
            warnings.warn(message + ". Results will differ; strict=True refuses this", stacklevel=5)


def load(
    path: str | os.PathLike[str],
    model: Loadable,
    description: dict[str, Any],
    *,
    strict: bool,
    refused: Collection[str] = (),
) -> None:
    """Load the weights that the description names into a model; warn if they were trained on other encoder weights.

    Raises:
        FileNotFoundError, ValueError: the weights are missing, damaged or don't fit; the message lists every difference. With
            ``strict`` also if encoders have other weights or can't be compared. Other weights of encoders in ``refused`` always
            raise.
        OSError: the weights can't be read.
    """
    own = json.loads(json.dumps(model.description()))
    problems = [
        f"{name}: saved with {description.get(name)}, got {found}"
        for name, found in own.items()
        if name in ("main", "complementary", "head", "problem_type") and description.get(name) != found
    ]
    problems += [
        f"config.{name}: saved with {value!r}, got {own['config'][name]!r}"
        for name, value in description["config"].items()
        if name not in TRAINING_SETTINGS and value != own["config"][name]
    ]
    saved = _read_weights(Path(path), description)
    state = model.state_dict()
    expected = {name: (key, state[key]) for name, key in model.trained_keys(state).items()}
    problems += [f"missing: {name}" for name in expected if name not in saved]
    problems += [f"unexpected: {name}" for name in saved if name not in expected]
    problems += [
        f"{name}: saved {tuple(saved[name].shape)}, expected {tuple(value.shape)}"
        for name, (_, value) in expected.items()
        if name in saved and saved[name].shape != value.shape
    ]
    problems += [
        f"{name}: saved as {saved[name].dtype}, expected {value.dtype}"
        for name, (_, value) in expected.items()
        if name in saved and saved[name].is_floating_point() != value.is_floating_point()
    ]
    if "complementary" in own and (description.get("complementary") is None) != (own["complementary"] is None):
        problems.append(
            "hint: the complementary side is None if features, or a function, cache or black box that returns them, were passed "
            "in; functools.partial(mope_fast.encoders.encode, encoder) is such a function"
        )
    if problems:
        raise ValueError(f"{Path(path)} doesn't fit this model:\n  " + "\n  ".join(problems))
    _check_encoders(Path(path), model, description.get("encoders", {}), strict, refused)
    if problems := not_finite(saved):
        warnings.warn(
            f"{Path(path)} holds numbers that are not finite, in {', '.join(problems)}: outputs will be NaN", stacklevel=4
        )
    model.load_state_dict({key: shard_like(saved[name], value) for name, (key, value) in expected.items()}, strict=False)


def _read_weights(folder: Path, description: dict[str, Any]) -> dict[str, Tensor]:
    """Read the weights that the description names.

    If another process has just replaced the save by one that differs only in weights, read that one.
    """
    while True:
        weights = folder / description["weights"]
        try:
            data = weights.read_bytes()
            break
        except FileNotFoundError:
            newer = read_description(folder, description["model"], set(description["config"]))
        if {**newer, "weights": None} != {**description, "weights": None}:
            raise ValueError(f"{folder} was replaced by another model's save while it was read: load it again")
        description = newer
    if not _is_name_of(weights.name, data):
        raise ValueError(f"{weights} is damaged (its content doesn't match its name): restore it, or save the model again")
    try:
        return deserialize(data)
    except Exception as error:  # safetensors' errors, and torch's for dtypes that it doesn't support
        raise ValueError(f"{weights} is not a safetensors file ({error}): restore it, or save the model again") from None

"""The preprocessing of a model's inputs, stored in a subfolder of its save."""

import hashlib
import json
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from .._files import make_names_durable, write_atomically
from ..data import EachFrame, preprocessing
from ..encoders import find_family
from ..models import checkpoint
from .found import Found, argument

DESCRIPTION = "predictor.json"
FORMAT = 1
_NAME = re.compile("predictor-[0-9a-f]{16}")


def content_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_subfolder(whole: Path, content: dict[str, bytes]) -> None:
    """Write the subfolder under a temporary name and rename it when complete; another process may be writing the same one."""
    temporary = whole.with_name(f".{whole.name}-{uuid.uuid4().hex}.tmp")
    try:
        for file, data in content.items():
            (temporary / file).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(temporary / file, data)
        if whole.exists():  # damaged
            shutil.rmtree(whole)
        temporary.rename(whole)
        make_names_durable(whole)
    except OSError:
        if not is_whole(whole):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_whole(subfolder: Path) -> bool:
    try:
        read_kept(subfolder.parent, subfolder.name)
    except (OSError, ValueError):
        return False
    return True


def read_kept(folder: Path, name: str) -> dict[str, Any]:
    """Read the description in a save's subfolder, after checking that each of its files is unchanged."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{folder / checkpoint.DESCRIPTION} names {name!r:.99}, which is not a name that mope_fast writes: don't trust it"
        )
    try:
        data = (folder / name / DESCRIPTION).read_bytes()
        kept = json.loads(data) if content_hash(data)[:16] == name.rpartition("-")[2] else {}
        if kept.get("format", FORMAT) != FORMAT:
            raise ValueError(f"{folder / name} has format {kept['format']!r}, expected {FORMAT}: update mope_fast")
        if not kept or any(content_hash((folder / name / file).read_bytes()) != content for file, content in kept["files"].items()):
            raise ValueError(f"{folder / name} is damaged (its content doesn't match its name): restore it, or save it again")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} does not exist, but {folder} needs it: copy the whole folder") from None
    return kept


class Inputs(NamedTuple):
    """The preprocessing of one side's inputs."""

    field: str | None
    preprocess: Callable[..., Any] | None
    known: bool


def kept_inputs(folder: Path, side: str, given: Callable[..., Any] | None, saved: dict[str, Any], kept: dict[str, Any]) -> Inputs:
    """Return the given preprocessing, or the saved one."""
    kept = kept["sides"].get(side)
    field = None if kept is None else kept["field"]
    if given is not None or kept is None or kept["inputs"] is None:
        return Inputs(field, given, given is not None or kept is not None)
    if kept["inputs"]["kind"] == "function":
        raise ValueError(
            f"{folder} was saved with your own preprocessing function for the {side} encoder, {kept['inputs']['name']}, of which "
            f"only the name could be saved: pass that function, {argument(side, '_inputs')}"
        )
    try:
        return Inputs(field, preprocessing.read(kept["inputs"], folder / saved["predictor"] / side), True)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / saved['predictor']} can't be read ({type(error).__name__}: {error}): save it again") from error


def completed(folder: Path, inputs: dict[str, Inputs], found: dict[str, Found], of_frames: Collection[str]) -> dict[str, Inputs]:
    """Fill in unknown preprocessing with that of the encoders' libraries, and warn about it. Sides ``of_frames`` take videos."""
    words = []
    for side, (field, preprocess, known) in inputs.items():
        encoder = found[side].encoder
        if field is None and side in of_frames:
            field = "frames"
        elif field is None and encoder is not None:
            field = preprocessing.FIELDS.get(find_family(encoder).input_name)
        if field is None or (not known and encoder is None):
            raise ValueError(
                f"{folder} was saved by the model alone, so the preprocessing of its {side} side is unknown: create "
                "Predictor(model, FusionCollator(...)) from model = MoPEFusion.from_pretrained(...) or PromptTuned's"
            )
        if not known:
            try:
                preprocess, what = preprocessing.own_preprocessing(encoder, found[side].source)
            except (ImportError, OSError, ValueError) as error:
                raise ValueError(
                    f"{folder} was saved by the model alone, and no preprocessing was found for its {side} encoder "
                    f"({error}): pass {argument(side, '_inputs')}, a tokenizer, an image processor or a function of a list of "
                    "values"
                ) from error
            preprocess = EachFrame(preprocess) if side in of_frames else preprocess
            words.append(f"for the {side} encoder by {what}, from the field {field!r}")
        inputs[side] = Inputs(field, preprocess, True)
    if words and len({each.field for each in inputs.values()}) < len(inputs):
        raise ValueError(
            f"{folder} was saved by the model alone, and two of its encoders would read the same field: create "
            "Predictor(MoPEFusion.from_pretrained(...), FusionCollator(..., main_field=..., complementary_field=...))"
        )
    if words:
        warnings.warn(
            f"{folder} was saved by the model alone: inputs are made {'; '.join(words)}. If training used other preprocessing, "
            "pass main_inputs and complementary_inputs; Predictor(model, collate).save_pretrained(folder) saves them",
            stacklevel=3,
        )
    return inputs

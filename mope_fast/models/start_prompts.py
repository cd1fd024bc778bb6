"""Data-dependent initialisation of prompts near the tokens of their layer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._distributed import is_sharded
from .._progress import tracked
from ..encoders import Pool
from .fusion import MoPEFusion
from .inputs import one_side, two_sides
from .prompt_tuned import PromptTuned
from .prompting import Inputs
from .sides import Sides, sources_of

SPREAD = 0.3
"""Standard deviation of rows around the mean token, relative to that of the tokens: tried, not tuned."""
_SEVERAL = "complementary_inputs["


def start_prompts(model: MoPEFusion | PromptTuned, batches: Iterable[Mapping[str, Any]], *, progress: bool = True) -> None:
    """Initialise a model's prompts near the tokens of their layers, before training.

    A pre-norm encoder normalises prompts like tokens. However small their initial values are, untrained prompts then carry as much
    weight as tokens and change the encoder's feature; the effect is larger the fewer tokens there are. Prompts near the mean token
    have a smaller effect. Static prompts and experts are redrawn around the mean token, with 0.3 times the tokens' standard
    deviation. The mapped prompt starts at the mean token for every sample. This follows SPT (arXiv 2402.02382), whose prompts start
    as prototypes of tokens. Post-norm encoders (BERT) are left unchanged, because there small prompts stay small. A
    ``PromptTuned`` that was passed in is left unchanged too; initialise it with a separate call.

    Encoders run once on each batch, without prompts, in eval mode and without gradient; a few hundred samples are enough.

    Args:
        model: a new model, neither compiled nor in DDP or FSDP. With several processes every one must call this with the same
            batches and the same state of torch's generator.
        batches: keyword arguments of the model; ``labels`` may be among them.
        progress: show a progress bar.

    Raises:
        TypeError: the model is of another class, ``batches`` doesn't yield dicts, or a batch lacks the main encoder's inputs.
        ValueError: there are no batches, a batch lacks the other encoder's inputs, or weights are sharded.
        FloatingPointError: a mean was NaN or infinite.

    Examples:
        >>> start_prompts(model, itertools.islice(loader, 10))
        >>> fit_head(model, loader)
        >>> for batch in loader: ...                            # train as usual
    """
    if not isinstance(model, (MoPEFusion, PromptTuned)):
        raise TypeError(f"start_prompts takes a MoPEFusion or PromptTuned, neither compiled nor in DDP, got {type(model).__name__}")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError("weights are sharded: call start_prompts before fully_shard, with the same batches on every rank")
    sides = [_Side(name, part) for name, part in _prompted_parts(model).items() if part.main.layers[0].norm is not None]
    if not sides:
        return
    with torch.no_grad():
        for batch in tracked(batches, "mean tokens for the prompts", "batch", shown=progress):
            if not isinstance(batch, Mapping):
                raise TypeError(f"batches must yield dicts of the model's keyword arguments, got {type(batch).__name__}")
            given = _inputs(model, batch)
            for side in sides:
                if given.get(side.name) is not None:
                    side.see(given[side.name])
                elif not side.name.startswith(_SEVERAL):  # with several sides, missing ones have been checked already
                    raise ValueError(f"a batch has no {side.name}, only {list(batch)}: prompts start at the mean token of these")
    if not any(side.samples for side in sides):
        raise ValueError("batches is empty: it needs at least one batch (an iterator can be used only once)")
    sides = [side for side in sides if side.samples]
    found = [side.mean_and_std() for side in sides]  # all of them, before any is changed
    for side, (means, stds) in zip(sides, found, strict=True):
        side.bank.start_at(means, [SPREAD * std for std in stds])


def _inputs(model: MoPEFusion | PromptTuned, batch: Mapping[str, Any]) -> dict[str, Inputs | None]:
    """Return the inputs of each side, however the batch names them."""
    named = {name: value for name, value in batch.items() if name != "labels"}
    if isinstance(model, PromptTuned):
        return {"inputs": one_side(model.main, named.pop("inputs", None), named)}
    given = [named.pop(name, None) for name in ("main_inputs", "complementary_inputs")]
    main, other = two_sides(model.main, model.complementary, *given, named)
    if not isinstance(model.complementary, Sides):
        return {"main_inputs": main, "complementary_inputs": other}
    others = {name: model.complementary.encoder_inputs(name, {} if other is None else other) for name in model.made_sides}
    return {"main_inputs": main, **{_of(name): inputs for name, inputs in others.items()}}


def _of(side: str) -> str:
    return f"{_SEVERAL}{side!r}]"


def _prompted_parts(model: MoPEFusion | PromptTuned) -> dict[str, MoPEFusion | PromptTuned]:
    """Return the parts that hold this model's own prompts, by the name of their inputs."""
    if isinstance(model, PromptTuned):
        parts = {"inputs": model}
    else:
        several, sources = isinstance(model.complementary, Sides), sources_of(model.complementary)
        made = {name: source.value for name, source in sources.items() if name in model.made_sides}
        parts = {"main_inputs": model, **{_of(name) if several else "complementary_inputs": part for name, part in made.items()}}
    return {name: part for name, part in parts.items() if part.bank is not None}


class _Side:
    """One prompted encoder, with sums over samples of each layer's mean token and mean squared token."""

    def __init__(self, name: str, part: MoPEFusion | PromptTuned):
        self.name, self.encoder, self.bank = name, part.main, part.bank
        self.sums = [torch.zeros(2, width, dtype=torch.float64) for width in self.encoder.widths]
        self.samples = 0

    def see(self, inputs: Inputs) -> None:
        family = self.encoder.family
        arguments = family.keyword_arguments(inputs)
        # families without "mean" (wav2vec2) use their own pooling
        mean = family.router_pool(self.encoder.encoder, arguments, "mean" if "mean" in family.pools else None)

        def record(index: int, hidden_states: Tensor, pool: Pool) -> tuple[tuple[()], None]:
            states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
            moments = torch.stack([mean(states), mean(states.square())])
            self.sums[index] += moments.sum(1, dtype=torch.float64).cpu()
            self.samples += moments.shape[1] if index == 0 else 0
            return (), None

        self.encoder(arguments, record)

    def mean_and_std(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the mean and standard deviation of tokens, (D,) for each layer."""
        means, squares = zip(*(total / self.samples for total in self.sums), strict=True)
        if not all(square.isfinite().all() for square in squares):
            raise FloatingPointError(f"the mean token of a layer isn't finite: look for non-finite values in {self.name}")
        return means, [(square - mean.square()).clamp(min=0).sqrt() for mean, square in zip(means, squares, strict=True)]

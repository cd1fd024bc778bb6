"""Where prompts start, by data: among the tokens of their layer."""

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
"""Of rows around the mean token, over the tokens' standard deviation: tried, not tuned."""
_SEVERAL = "complementary_inputs["


def start_prompts(model: MoPEFusion | PromptTuned, batches: Iterable[Mapping[str, Any]], *, progress: bool = True) -> None:
    """Put a model's prompts where the tokens of their layers are, before it is trained.

    A pre-norm encoder norms prompts as it norms tokens: however small they are drawn, untrained ones weigh as much as tokens and
    move its feature, the more the fewer tokens there are. Prompts near the mean token do less. Static prompts and experts are drawn
    anew around it, at 0.3 of the tokens' standard deviation; the mapped prompt starts at it for every sample. After SPT (arXiv
    2402.02382), whose prompts start as prototypes of tokens. Encoders whose layers have their norm behind them (BERT) are left as
    they are: there small prompts are small. So is a ``PromptTuned`` that was passed in: start it by a call of its own.

    Encoders see each batch once, without prompts, in eval mode and without gradient; some hundred samples are enough.

    Args:
        model: a new one, neither compiled nor in DDP or FSDP; with several processes every one calls this with the same batches and
            the same state of torch's generator.
        batches: keyword arguments of the model; ``labels`` may be among them.
        progress: show a bar.

    Raises:
        TypeError: it is another model, ``batches`` gives no dicts, or one lacks the main encoder's inputs.
        ValueError: there are no batches, one lacks the other encoder's inputs, or weights are sharded.
        FloatingPointError: a mean was NaN or infinite.

    Example:
        >>> start_prompts(model, itertools.islice(loader, 10))
        >>> fit_head(model, loader)
        >>> for batch in loader: ...                            # as ever
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
                raise TypeError(f"batches must give dicts of the model's keyword arguments, got {type(batch).__name__}")
            given = _inputs(model, batch)
            for side in sides:
                if given.get(side.name) is not None:
                    side.see(given[side.name])
                elif not side.name.startswith(_SEVERAL):  # of several, who may be missing has been checked
                    raise ValueError(f"a batch has no {side.name}, only {list(batch)}: prompts start at the mean token of these")
    if not any(side.samples for side in sides):
        raise ValueError("batches gave none: it needs at least one (an iterator can be used only once)")
    sides = [side for side in sides if side.samples]
    found = [side.mean_and_std() for side in sides]  # all of them, before any is changed
    for side, (means, stds) in zip(sides, found, strict=True):
        side.bank.start_at(means, [SPREAD * std for std in stds])


def _inputs(model: MoPEFusion | PromptTuned, batch: Mapping[str, Any]) -> dict[str, Inputs | None]:
    """Of each side, whichever way the batch names them."""
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
    """What holds prompts of this model's own, by the name of its inputs."""
    if isinstance(model, PromptTuned):
        parts = {"inputs": model}
    else:
        several, sources = isinstance(model.complementary, Sides), sources_of(model.complementary)
        made = {name: source.value for name, source in sources.items() if name in model.made_sides}
        parts = {"main_inputs": model, **{_of(name) if several else "complementary_inputs": part for name, part in made.items()}}
    return {name: part for name, part in parts.items() if part.bank is not None}


class _Side:
    """One prompted encoder, and sums over samples of its layers' mean tokens and of their squares'."""

    def __init__(self, name: str, part: MoPEFusion | PromptTuned):
        self.name, self.encoder, self.bank = name, part.main, part.bank
        self.sums = [torch.zeros(2, width, dtype=torch.float64) for width in self.encoder.widths]
        self.samples = 0

    def see(self, inputs: Inputs) -> None:
        family = self.encoder.family
        arguments = family.keyword_arguments(inputs)
        # without a mean to ask for (wav2vec2) it is the family's own way
        mean = family.router_pool(self.encoder.encoder, arguments, "mean" if "mean" in family.pools else None)

        def record(index: int, hidden_states: Tensor, pool: Pool) -> tuple[tuple[()], None]:
            states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
            moments = torch.stack([mean(states), mean(states.square())])
            self.sums[index] += moments.sum(1, dtype=torch.float64).cpu()
            self.samples += moments.shape[1] if index == 0 else 0
            return (), None

        self.encoder(arguments, record)

    def mean_and_std(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of the tokens, (D,) of each layer."""
        means, squares = zip(*(total / self.samples for total in self.sums), strict=True)
        if not all(square.isfinite().all() for square in squares):
            raise FloatingPointError(f"the mean token of a layer isn't finite: look for {self.name} that aren't")
        return means, [(square - mean.square()).clamp(min=0).sqrt() for mean, square in zip(means, squares, strict=True)]

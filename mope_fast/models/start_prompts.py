"""Where prompts start, by data: at the mean token of their layer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._distributed import is_sharded
from .._progress import tracked
from ..encoders import Pool
from .fusion import MoPEFusion
from .prompt_tuned import PromptTuned
from .prompting import Inputs


def start_prompts(model: MoPEFusion | PromptTuned, batches: Iterable[Mapping[str, Any]], *, progress: bool = True) -> None:
    """Put a model's prompts where the tokens of their layers are, before it is trained.

    A pre-norm encoder norms prompts as it norms tokens: however small they are drawn, untrained ones weigh as much as tokens and
    move its feature, the more the fewer tokens there are. A prompt at the mean token hardly does. Static prompts and experts keep
    what they were drawn as, around that mean; the mapped prompt starts there for every sample. After SPT (arXiv 2402.02382), whose
    prompts start as prototypes of tokens. Layers whose norm is behind them (BERT's) are left as they are: there small prompts are
    small.

    Encoders see each batch once, without prompts, in eval mode and without gradient; some hundred samples tell the mean.

    Args:
        model: a new one, neither compiled nor in DDP or FSDP; with several processes every one calls this with the same batches.
        batches: keyword arguments of the model; ``labels`` may be among them.
        progress: show a bar.

    Raises:
        TypeError: it is another model, or ``batches`` gives no dicts.
        ValueError: there are no batches, one lacks an encoder's inputs, or weights are sharded.
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
    sides = [_Side(name, part) for name, part in _prompted_parts(model) if part.bank is not None]
    count = 0
    with torch.no_grad():
        for batch in tracked(batches, "mean tokens for the prompts", "batch", shown=progress):
            if not isinstance(batch, Mapping):
                raise TypeError(f"batches must give dicts of the model's keyword arguments, got {type(batch).__name__}")
            for side in sides:
                if batch.get(side.name) is None:
                    raise ValueError(f"a batch has no {side.name}, only {list(batch)}: prompts start at the mean token of these")
                side.see(batch[side.name])
            count += 1
    if not count:
        raise ValueError("batches gave none: it needs at least one (an iterator can be used only once)")
    for side in sides:
        side.start()


def _prompted_parts(model: MoPEFusion | PromptTuned) -> list[tuple[str, MoPEFusion | PromptTuned]]:
    """What holds prompts, by the name of its inputs."""
    if isinstance(model, PromptTuned):
        return [("inputs", model)]
    side = model.complementary
    return [("main_inputs", model), *([("complementary_inputs", side)] if isinstance(side, PromptTuned) else [])]


class _Side:
    """One prompted encoder, and the sums over samples of its layers' mean tokens."""

    def __init__(self, name: str, part: MoPEFusion | PromptTuned):
        self.name, self.encoder, self.bank = name, part.main, part.bank
        self.sums: list[Tensor] = [torch.zeros(width, dtype=torch.float64) for width in self.encoder.widths]
        self.samples = 0

    def see(self, inputs: Inputs) -> None:
        family = self.encoder.family
        arguments = family.keyword_arguments(inputs)
        # without a mean to ask for (wav2vec2) it is the family's own way
        mean = family.router_pool(self.encoder.encoder, arguments, "mean" if "mean" in family.pools else None)

        def record(index: int, hidden_states: Tensor, pool: Pool) -> tuple[tuple[()], None]:
            means = mean(hidden_states)
            self.sums[index] += means.sum(0, dtype=torch.float64).cpu()
            self.samples += len(means) if index == 0 else 0
            return (), None

        self.encoder(arguments, record)

    def start(self) -> None:
        means = [total / self.samples for total in self.sums]
        if not all(mean.isfinite().all() for mean in means):
            raise FloatingPointError("the mean token of a layer isn't finite: look for inputs that aren't")
        if self.encoder.layers[0].norm is not None:
            self.bank.start_at(means)

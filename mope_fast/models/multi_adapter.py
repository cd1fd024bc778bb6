"""Several trained models on one frozen encoder, run in one pass."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encoders import PromptedLayer
from ..modules import FoldedBank, PromptContext
from ..modules.folded import KeptTables
from ..modules.kinds import mapped_rows
from ..modules.prompts import check_input
from ..modules.router import Router
from ..modules.tables import Tables
from . import checkpoint
from .complementary import batch_of
from .folded import FoldedModel
from .fusion import MoPEFusion
from .image_config import ImageConfig
from .output import FusionOutput
from .prompt_tuned import PromptTuned
from .prompting import Inputs, stacked_scores
from .sides import complementary_feature
from .task import apply_head


class MultiAdapter(ImageConfig, nn.Module):
    """Several :class:`MoPEFusion` and :class:`PromptTuned` models on one shared frozen encoder, chosen for each sample of a batch.

    The encoder runs once for the whole batch. Each sample's result equals that of its own model alone, up to rounding. The experts
    of all adapters form one table, and a sample's routing scores for experts of other adapters are zero. This is for inference: the
    models are folded, so training them further does not affect this one.

    Args:
        adapters: name -> model, all created on one :class:`PromptedEncoder` object. Their prompt lengths may differ. Prompts are
            then padded and masked, which costs a concatenation with the tokens' keys in each layer.

    Raises:
        ValueError: the models use different encoder objects, can't be folded, gate their scores differently (``top_k``), or hold
            non-finite values.

    Examples:
        >>> shared = PromptedEncoder(bert)
        >>> topic, mood = PromptTuned.from_pretrained("topic", shared), MoPEFusion.from_pretrained("mood", shared)
        >>> both = MultiAdapter({"topic": topic, "mood": mood})
        >>> both(text, ["topic", "mood", "mood"], {"mood": images}).logits
    """

    def __init__(self, adapters: Mapping[str, MoPEFusion | PromptTuned | FoldedModel]):
        super().__init__()
        kinds = (MoPEFusion, PromptTuned, FoldedModel)
        if not isinstance(adapters, Mapping) or not all(isinstance(model, kinds) for model in adapters.values()):
            raise TypeError("adapters must be a dict of names and MoPEFusion, PromptTuned or folded models")
        if not adapters:
            raise ValueError("adapters is empty: give at least one model")
        self.names = list(adapters)
        models = {name: model if isinstance(model, FoldedModel) else model.fold() for name, model in adapters.items()}
        self.models = nn.ModuleList(models.values())
        self.main = self.models[0].main
        for name, model in models.items():
            if model.main is not self.main:
                raise ValueError(
                    f"adapter {name!r} runs another encoder object than {self.names[0]!r}: wrap the encoder once in a "
                    "PromptedEncoder and create every model on it"
                )
            if model.is_dense:
                raise ValueError(f"adapter {name!r} predicts pixels (segmentation), which MultiAdapter doesn't support yet")
            if others := sorted((set() if model.bank is None else model.bank.kind_names) - {"static", "mapped"}):
                raise ValueError(f"adapter {name!r} has {', '.join(others)} prompts, which MultiAdapter doesn't support yet")
            # a score of zero cancels finite values of other adapters, but not NaN
            if problems := checkpoint.not_finite({} if model.bank is None else dict(model.bank.named_buffers())):
                bad = ", ".join(problems)
                raise ValueError(
                    f"adapter {name!r} has numbers that are not finite, which would affect samples of other adapters: {bad}"
                )
        banks = [model.bank for model in self.models]
        self.stack = None if all(bank is None for bank in banks) else _StackedBanks(banks)
        for model, given in zip(self.models, adapters.values(), strict=True):
            if model is not given and model.bank is not None:
                # this folded copy was made only for the stack, which now has its tables
                model.bank.tables = nn.ModuleList()
        self.eval()

    def forward(
        self,
        main_inputs: Inputs,
        adapters: Sequence[str] | Tensor,
        complementary_inputs: Mapping[str, Inputs] | None = None,
    ) -> FusionOutput:
        """Run one forward pass.

        Args:
            main_inputs: the encoder's input for the whole batch.
            adapters: each sample's adapter: B names, or their indices in ``names`` (B,) int64. The values of indices are not
                checked, because that would wait for the device: an invalid one gives NaN or a device-side error, and all adapters
                count as in use. ``torch.compile`` builds one graph for all indices, but one graph for each list of names.
            complementary_inputs: name -> complementary inputs or features, for each adapter in use that needs them. Each is for
                the whole batch; values for samples of other adapters are ignored.

        Returns:
            logits (B, C), C the largest number of classes; -inf where a sample's own model has no such class, or no head.
            scores (N, B, sum of all K), nonzero for the sample's own experts; features (B, D).
        """
        ids, used = self._ids(main_inputs, adapters)
        crosses = self._crosses(main_inputs, used, complementary_inputs or {})
        prompts = None if self.stack is None else self.stack.prepare(ids, crosses, self.main.layers)
        encoded = self.main(main_inputs, prompts)
        scores = stacked_scores(encoded)
        return FusionOutput(
            logits=self._logits(encoded.feature, ids, crosses),
            scores=None if scores is None else scores[..., :-1],
            features=encoded.feature,
        )

    def _ids(self, main_inputs: Inputs, adapters: Sequence[str] | Tensor) -> tuple[Tensor, set[str]]:
        """Return indices on the device, and the names that may be in use."""
        inputs = self.main.family.keyword_arguments(main_inputs)
        device = next((x.device for x in inputs.values() if isinstance(x, Tensor)), None)
        batch = self.main.family.batch_size(inputs)
        used = set(self.names)
        if not isinstance(adapters, Tensor):
            if isinstance(adapters, str) or not all(isinstance(name, str) for name in adapters):
                raise TypeError(
                    f"adapters must be a sequence of names, one for each sample, or a tensor of indices, got {adapters!r}"
                )
            used = set(adapters)
            if unknown := sorted(used - set(self.names)):
                raise ValueError(f"unknown adapters {unknown}: expected names out of {self.names}")
            adapters = torch.tensor([self.names.index(name) for name in adapters])
        elif adapters.dtype != torch.int64:
            raise TypeError(f"adapters must be names or indices of dtype int64, got {adapters.dtype}")
        if adapters.shape != (batch,):
            raise ValueError(f"adapters must name one adapter for each of {batch} samples, got {tuple(adapters.shape)}")
        return adapters.to(device, non_blocking=True), used

    def _crosses(self, main_inputs: Inputs, used: set[str], given: Mapping[str, Inputs]) -> list[Tensor | None]:
        if unknown := sorted(set(given) - set(self.names)):
            raise ValueError(f"complementary_inputs for unknown adapters {unknown}: expected names out of {self.names}")
        crosses: list[Tensor | None] = []
        for name, model in zip(self.names, self.models, strict=True):
            needed = name in used and model.uses_cross
            if needed and name not in given:
                raise ValueError(f"adapter {name!r} depends on a complementary modality: give complementary_inputs[{name!r}]")
            cross = None
            if needed:
                cross = complementary_feature(model.complementary, given[name], batch_of(self.main, main_inputs))
                check_input("cross", cross, model.bank.cross_dim)
            crosses.append(cross)
        return crosses

    def _logits(self, features: Tensor, ids: Tensor, crosses: Sequence[Tensor | None]) -> Tensor | None:
        each = []
        for model, cross in zip(self.models, crosses, strict=True):
            if cross is None and model.uses_cross:  # this adapter is not in use
                cross = features.new_zeros(len(features), model.bank.config.cross_dim)
            each.append(apply_head(model.head, *model.head_inputs(features, cross)))
        if all(logits is None for logits in each):
            return None
        known = [logits for logits in each if logits is not None]
        classes = max(logits.shape[1] for logits in known)
        absent = known[0].new_full((len(features), classes), float("-inf"))
        padded = [
            absent if logits is None else F.pad(logits, (0, classes - logits.shape[1]), value=float("-inf")) for logits in each
        ]
        return _select(padded, ids)

    def train(self, mode: bool = True) -> "MultiAdapter":
        """Keep eval mode, whatever ``mode`` is."""
        return super().train(False)


def _select(candidates: Sequence[Tensor], ids: Tensor) -> Tensor:
    """Return row b of candidate ids[b] for each b; candidates are (B, M) each."""
    return torch.stack(list(candidates))[ids, torch.arange(len(ids), device=ids.device)]


class _StackedBanks(nn.Module):
    """All adapters' tables side by side. The last expert belongs to no adapter; samples whose adapter doesn't route get it."""

    def __init__(self, banks: Sequence[FoldedBank | None]):
        super().__init__()
        self.banks = list(banks)
        routing = [bank for bank in banks if _experts(bank)]
        gates = {(bank.config.top_k, bank.config.renormalize) for bank in routing}
        if len(gates) > 1:
            raise ValueError(f"adapters gate their scores differently, (top_k, renormalize): {sorted(gates, key=str)}")
        self.top_k, self.renormalize = gates.pop() if gates else (None, False)
        self.routes = bool(routing)
        lengths = torch.tensor([_lengths(bank) for bank in banks])  # (A, 3)
        longest = lengths.amax(0).tolist()
        self.dims = next(bank.dims for bank in banks if bank is not None)
        self.tables = nn.ModuleList(KeptTables(_shared_tables(index, banks, *longest[:2])) for index in range(len(self.dims)))
        has = torch.cat([torch.arange(most) < own[:, None] for most, own in zip(longest, lengths.T, strict=True)], dim=1)
        owners = [i for i, bank in enumerate(banks) for _ in range(_experts(bank))]
        device = next(tensor.device for bank in banks if bank is not None for tensor in (*bank.parameters(), *bank.buffers()))
        self.register_buffer("has", None if has.all() else has.to(device))  # (A, P): which rows of [static | dynamic | mapped]
        self.owner = nn.Buffer(torch.tensor(owners, dtype=torch.long, device=device))  # (all experts,)
        self.lone = nn.Buffer(torch.tensor([_experts(bank) == 0 for bank in banks], device=device))  # (A,)

    def prepare(self, ids: Tensor, crosses: Sequence[Tensor | None], layers: Sequence[PromptedLayer]) -> PromptContext:
        """Prepare a pass; ``crosses`` has each adapter's complementary feature, None if the adapter is unused or needs none."""
        routers: Sequence[Router | None] = [None] * len(self.dims)
        if self.routes:
            each = zip(self._logits(ids, crosses), self.tables, strict=True)
            routers = [Router(logits, kept.router_weight, kept.router_keys, self.top_k, self.renormalize) for logits, kept in each]
        parts = zip(self.tables, routers, self._mapped(ids, crosses), strict=True)
        stages = [
            dataclasses.replace(kept.tables(router, None, mapped), before=None if kept.before is None else kept.before[ids])
            for kept, router, mapped in parts
        ]
        return PromptContext(ids.shape[0], stages, self.routes, layers, mask=None if self.has is None else self.has[ids])

    def _logits(self, ids: Tensor, crosses: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """Return each layer's router logits (B, all experts + 1), -inf at experts of other adapters."""
        columns = []
        for bank, cross in zip(self.banks, crosses, strict=True):
            if not _experts(bank):
                continue
            if cross is None:
                columns.append(torch.zeros(len(self.dims), len(ids), _experts(bank), device=ids.device))
            else:
                columns.append(bank.cross_logits(cross))
        logits = torch.cat([*columns, torch.zeros_like(columns[0][..., :1])], dim=-1)
        own = torch.cat([self.owner == ids[:, None], self.lone[ids][:, None]], dim=1)
        return torch.where(own, logits, float("-inf")).unbind()

    def _mapped(self, ids: Tensor, crosses: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return each layer's mapped rows (B, P, 2 * H * Dh), P the most of any adapter; None if no adapter has mapped prompts."""
        maps = [bank is not None and bank.config.use_mapped for bank in self.banks]
        if not any(maps):
            return [None] * len(self.dims)
        pairs = zip(self.banks, crosses, maps, strict=True)
        rows = [mapped_rows(bank, cross) if used and cross is not None else None for bank, cross, used in pairs]
        # the projection depends only on the frozen layers, so any adapter's bank can be used
        bank = self.banks[maps.index(True)]
        most = max(_lengths(bank)[2] for bank in self.banks)
        own = {}
        for width in set(self.dims):
            none = torch.zeros(len(ids), most, width, device=ids.device)
            padded = [none if row is None else F.pad(row[width], (0, 0, 0, most - row[width].shape[1])) for row in rows]
            dtype = next((row[width].dtype for row in rows if row is not None), none.dtype)
            own[str(width)] = _select([part.to(dtype) for part in padded], ids)[None]
        return [projected["after"] for projected in bank.project({"mapped": own})]


def _shared_tables(index: int, banks: Sequence[FoldedBank | None], static_length: int, dynamic_length: int) -> Tables:
    """Build one layer's tables of all adapters, zero-padded to the longest prompt; static prompts have one entry per adapter."""
    tables = [None if bank is None else bank.tables[index] for bank in banks]
    shared = Tables()
    if static_length:
        some = next(table.before for table in tables if table is not None and table.before is not None)
        none = some.new_zeros(1, static_length, some.shape[-1])
        shared.before = torch.cat([
            none if table is None or table.before is None else _padded_rows(table.before, static_length) for table in tables
        ])  # fmt: skip
    if routing := [table for table, bank in zip(tables, banks, strict=True) if _experts(bank)]:
        experts = torch.cat([_padded_rows(table.experts, dynamic_length) for table in routing])
        shared.experts = torch.cat([experts, torch.zeros_like(experts[:1])])
        keys = torch.block_diag(*(table.router_keys for table in routing))
        shared.router = Router(None, torch.cat([table.router_weight for table in routing]), F.pad(keys, (0, 1)))
        shared.shift, shared.eps = routing[0].shift, routing[0].eps
        if routing[0].gram is not None:
            grams = [_padded_rows(table.gram, dynamic_length).unbind(1) for table in routing]
            unowned = [grams[0][0].new_zeros(1, 1)] * dynamic_length
            shared.gram = torch.stack([torch.block_diag(*rows) for rows in zip(*grams, unowned, strict=True)], dim=1)
    return shared


def _padded_rows(table: Tensor, length: int) -> Tensor:
    return F.pad(table, (0, 0, 0, length - table.shape[1]))


def _experts(bank: FoldedBank | None) -> int:
    return bank.config.num_experts if bank is not None and bank.config.use_dynamic else 0


def _lengths(bank: FoldedBank | None) -> tuple[int, int, int]:
    """Return the numbers of rows of a bank's static, dynamic and mapped prompts."""
    if bank is None:
        return 0, 0, 0
    config = bank.config
    mapped = len(config.side_dims or [1]) * config.use_mapped
    return config.prompt_length * config.use_static, config.prompt_length * config.use_dynamic, mapped

"""FeatureCache: features of a frozen encoder, computed once for each sample and kept on disk."""

import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from itertools import chain
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import encoders
from .._modes import evaluating
from .._progress import tracked
from .feature_store import FeatureStore
from .fingerprint import encoder_fingerprint, sample_keys

Inputs = Tensor | Mapping[str, Tensor]
TEXT_FAMILIES = ("bert", "roberta", "distilbert", "bart", "gpt2")
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class FeatureCache:
    """Features of a frozen encoder, looked up by the content of each sample and computed once for all runs and processes.

    The cache is a plain callable, not a module: a model that holds it neither saves, nor moves, nor casts its encoder. Rows are
    looked up by a hash of every byte that the encoder would get. So the order and batching of samples don't matter, nor does text
    padding after the last real token (see ``padded_inputs``). A row is the encoder's output in the batch in which the sample first
    occurred. To be hashed, inputs on a GPU are copied to the host, which waits for the device: for training steps that never wait,
    use the tensor that :meth:`precompute` returns. ``torch.compile`` leaves a call out of the graph.

    Processes may share a folder without any coordination. A kill loses at most the rows not flushed yet. Copies and pickles share
    the folder too. Threads of a process may call it concurrently: a lock serializes them. Rows that another version of the library
    stored with another key format are computed again; their files are left alone, and a warning names them.

    Args:
        folder: created if it doesn't exist; for one encoder only.
        encoder: a supported encoder (its plain global feature), or any callable or module that returns (B, D) floating-point
            features, called as ``encoder(tensor)`` or ``encoder(**dict)``. A module runs on its own device, in eval mode, without
            gradient and without autocast; its training flags are restored afterwards.
        fingerprint: identifies the encoder; required for a callable without parameters and buffers. Default: a hash of class,
            structure, config, parameters and buffers. Change it whenever anything else that the features depend on changes.
        pooling: how a supported encoder's tokens are pooled into its feature, as for :class:`PromptedEncoder`; None for the
            family's default.
        flush_every: maximum number of rows kept in memory before they are written. Rows are also written by :meth:`flush`, at the
            end of a ``with`` block and at interpreter exit.
        padded_inputs: names of inputs (B, S, ...) with padding that the encoder ignores: the positions after a sample's last real
            token by ``attention_mask`` (B, S), which is one of these inputs itself. Such padding is left out of the key. Default:
            input_ids, attention_mask, token_type_ids and position_ids for transformers' BERT, RoBERTa, DistilBERT, BART and GPT-2;
            nothing for any other encoder. CLIP may find its end of text after the last real token.

    Raises:
        TypeError: the encoder can't be called, or ``padded_inputs`` are not names.
        ValueError: a fingerprint is missing, the folder belongs to another encoder, or a file in it is damaged. The message says
            which, and what to do. Stored rows are not lost.
        NotADirectoryError: ``folder`` is a file.

    Examples:
        >>> cache = FeatureCache("features/", dinov2)
        >>> model = MoPEFusion(bert, cache, num_classes=13)
        >>> output = model(text, images, labels)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        encoder: nn.Module | Callable[..., Tensor],
        *,
        fingerprint: str | None = None,
        pooling: str | None = None,
        flush_every: int = 1024,
        padded_inputs: Collection[str] | None = None,
    ):
        if not callable(encoder):
            raise TypeError(f"encoder must be a module or a callable that returns (B, D) features, got {type(encoder).__name__}")
        if fingerprint is not None and (not isinstance(fingerprint, str) or not fingerprint):
            raise ValueError(f"fingerprint must be a non-empty string that names the encoder, or None, got {fingerprint!r}")
        if fingerprint is None and not _tensors(encoder):
            raise ValueError(
                f"{_name(encoder)} has no parameters or buffers to identify it by: pass fingerprint='...', a name of your choice "
                "that you change whenever its features change"
            )
        if not isinstance(flush_every, int) or isinstance(flush_every, bool) or flush_every < 1:
            raise ValueError(f"flush_every must be an integer >= 1, got {flush_every!r}")
        if pooling is not None:
            if (family := encoders.find_family(encoder)) is None:
                raise ValueError(f"pooling={pooling!r} needs a supported encoder, which {_name(encoder)} isn't: use None")
            family.check_pooling(pooling)
        if padded_inputs is None:
            padded_inputs = _padded_inputs(encoder)
        elif isinstance(padded_inputs, str) or not all(isinstance(name, str) for name in padded_inputs):
            raise TypeError(
                f"padded_inputs must be names of inputs, such as ('input_ids', 'attention_mask'), got {padded_inputs!r}"
            )
        self._padded = frozenset(padded_inputs)
        self.encoder, self.pooling = encoder, pooling
        self._named = fingerprint is not None
        self._open(Path(folder).absolute(), self._fingerprint(fingerprint), flush_every)

    def _open(self, folder: Path, fingerprint: str, flush_every: int) -> None:
        self._store = FeatureStore(folder, fingerprint, _name(self.encoder), flush_every)
        self._versions = _versions(self.encoder)
        self._flushed_at_exit_of: int | None = None
        # done here because torch.compiler.disable imports all of Dynamo; a bound method would keep a reference to the cache
        self._uncompiled = torch.compiler.disable(FeatureCache._look_up)

    def __call__(self, inputs: Inputs | None = None, /, **keywords: Tensor) -> Tensor:
        """Return the features of a batch, (B, D) on the inputs' device, without gradient.

        Samples that are not stored yet are encoded in one batch, in order, each distinct one once. A sample's row is bitwise the
        same in every call, this one included.

        Args:
            inputs: a tensor (B, ...), or a dict of them; or the dict's entries as keywords.

        Raises:
            TypeError: ``inputs`` is neither, or the encoder doesn't return a floating-point tensor.
            ValueError: the batch is empty; tensors differ in batch size; features have a wrong shape, another width or dtype than
                the stored ones, or are not finite; the encoder was changed; a file is damaged.
        """
        return self._uncompiled(self, keywords if inputs is None else inputs)

    def _look_up(self, inputs: Inputs) -> Tensor:
        named = _check_inputs(inputs)
        keys = sample_keys(named, self._padded)
        with self._store.lock:
            self._check_unchanged()
            missing = self._missing(keys)
            if missing:
                self._store.refresh()
                missing = self._missing(keys)
            if missing:
                index = torch.tensor(list(missing.values()))
                batch = {name: tensor.detach()[index.to(tensor.device)] for name, tensor in named.items()}
                features = self._encode(batch, len(missing))
                self._flush_at_exit()
                self._store.add(list(missing), features)
            rows = torch.stack([self._store.get(key) for key in keys])
        return rows.to(next(iter(named.values())).device)

    def precompute(self, loader: Iterable[Inputs], *, progress: bool = True) -> Tensor:
        """Return the features of all batches of ``loader``, (N, D) in its order, on the device of its inputs.

        If it is interrupted at any moment, the next run computes only the rows that were not stored yet.

        Args:
            loader: yields inputs, as for a call. For rows in the order of a dataset it must not shuffle.
            progress: show a progress bar.

        Raises:
            ValueError: there is no batch; or as for a call.
        """
        rows = []
        try:
            for inputs in tracked(loader, f"features of {_name(self.encoder)}", "batch", shown=progress):
                rows.append(self(inputs))
        finally:
            self.flush()
        if not rows:
            raise ValueError("the loader yielded no batch: it needs at least one (an iterator can be used only once)")
        return torch.cat(rows)

    @property
    def folder(self) -> Path:
        return self._store.folder

    @property
    def fingerprint(self) -> str:
        """The encoder's fingerprint, as given or computed."""
        return self._store.fingerprint

    @property
    def encodes(self) -> functools.partial[Tensor] | None:
        """The function that returns the same features without a folder; None if the encoder isn't a supported one."""
        if encoders.find_family(self.encoder) is None:
            return None
        return functools.partial(encoders.encode, self.encoder, pooling=self.pooling)

    @property
    def width(self) -> int:
        """The feature width D.

        Raises:
            ValueError: it is not known yet: the encoder isn't a supported one and no feature is stored.
        """
        if (width := self.feature_width) is None:
            raise ValueError(f"the width of {_name(self.encoder)} isn't known before its first feature: call the cache on a sample")
        return width

    @property
    def feature_width(self) -> int | None:
        """The feature width D, or None while it isn't known; once it is known, a fusion needs no ``cross_dim``."""
        if self._store.width is not None:
            return self._store.width
        family = encoders.find_family(self.encoder)
        return None if family is None else family.pooled_width(self.encoder, self.pooling)

    def __len__(self) -> int:
        """Return the number of distinct samples whose features this process knows."""
        with self._store.lock:
            return len(self._store)

    def flush(self) -> None:
        """Write the rows that are only in memory; once this returns, no kill or power cut loses them."""
        self._store.flush()

    def __enter__(self) -> "FeatureCache":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def __repr__(self) -> str:
        width = "" if self._store.width is None else f" of width {self._store.width}"
        return f"FeatureCache({str(self.folder)!r}, {_name(self.encoder)}, {len(self)} features{width})"

    def __getstate__(self) -> dict[str, Any]:
        with self._store.lock:
            self._check_unchanged()
            self.flush()
        arguments = (self.folder, self.fingerprint, self._store.flush_every)
        kept = {"encoder": self.encoder, "pooling": self.pooling, "named": self._named, "padded": self._padded}
        return {**kept, "arguments": arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.encoder, self.pooling, self._named, self._padded = (state[name] for name in ("encoder", "pooling", "named", "padded"))
        self._open(*state["arguments"])

    def _missing(self, keys: list[bytes]) -> dict[bytes, int]:
        """Map each unknown key to the index of its first occurrence."""
        missing: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if key not in self._store:
                missing.setdefault(key, i)
        return missing

    def _flush_at_exit(self) -> None:
        # once per process: a forked one, such as a DataLoader's worker, inherits no finalizers and runs no atexit handlers
        if self._flushed_at_exit_of != os.getpid():
            self._flushed_at_exit_of = os.getpid()
            Finalize(self, self._store.flush, exitpriority=0)

    def _fingerprint(self, name: str | None = None) -> str:
        """Return the fingerprint of encoder and pooling; ``name`` replaces the encoder's own fingerprint."""
        whole = encoder_fingerprint(self.encoder) if name is None else name
        return whole if self.pooling is None else f"{whole}, {self.pooling} of tokens"

    def _check_unchanged(self) -> None:
        if self._named or (versions := _versions(self.encoder)) == self._versions:
            return
        # moving to another device makes new tensors with the same content
        if (got := self._fingerprint()) != self.fingerprint:
            raise ValueError(
                f"{_name(self.encoder)} was changed (trained, loaded or cast?) after this cache was made: its fingerprint is "
                f"{got}, expected {self.fingerprint}; make a new cache in another folder"
            )
        self._versions = versions

    def _encode(self, batch: dict[str, Tensor], count: int) -> Tensor:
        """Return checked features (count, D) on the CPU."""
        home = next((tensor.device for tensor in _tensors(self.encoder)), None)
        batch = {name: tensor.to(home) for name, tensor in batch.items()}
        inputs = batch.get("", batch)
        supported = encoders.find_family(self.encoder) is not None
        frozen = evaluating(self.encoder) if isinstance(self.encoder, nn.Module) else nullcontext()
        with torch.no_grad(), torch.autocast(next(iter(batch.values())).device.type, enabled=False), frozen:
            if supported:
                features = encoders.encode(self.encoder, inputs, self.pooling)
            else:
                features = self.encoder(**inputs) if isinstance(inputs, dict) else self.encoder(inputs)
        name = _name(self.encoder)
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(
                f"{name} gave {got}, expected a floating-point tensor (B, D): wrap it in a function that returns one row per sample"
            )
        if features.dim() != 2 or len(features) != count or not features.shape[1]:
            raise ValueError(f"{name} gave features {tuple(features.shape)} for {count} samples, expected ({count}, D)")
        # a copy: the encoder may reuse the memory of what it returned
        features = features.detach().to("cpu", copy=True).contiguous()
        if not (finite := features.isfinite().all(1)).all():
            raise ValueError(
                f"{name} gave NaN or infinite features for {(~finite).sum()} of {count} samples; none of the {count} is stored: "
                "check the inputs, or the encoder's dtype"
            )
        return features


def _name(encoder: object) -> str:
    return type(encoder).__name__ if isinstance(encoder, nn.Module) else getattr(encoder, "__name__", type(encoder).__name__)


def _tensors(encoder: object) -> list[Tensor]:
    return list(chain(encoder.parameters(), encoder.buffers())) if isinstance(encoder, nn.Module) else []


def _versions(encoder: object) -> list[tuple[Any, ...]]:
    """Return a value that changes with every training step, load and cast, and is cheap to compare."""
    return [(id(t), t.dtype, 0 if t.is_inference() else t._version) for t in _tensors(encoder)]


def _padded_inputs(encoder: object) -> tuple[str, ...]:
    """Return TOKEN_INPUTS if the feature depends on real tokens only, as in these families; subclasses and pooling may differ."""
    family, kind = encoders.find_family(encoder), type(encoder)
    if family is None or family.name not in TEXT_FAMILIES or f"{kind.__module__}.{kind.__qualname__}" not in family.models:
        return ()
    functions = [getattr(function, "func", function) for function in (family.run, family.feature)]  # some are functools.partial
    ours = all(function.__module__.startswith(encoders.__name__) for function in functions)
    return TOKEN_INPUTS if ours else ()


def _check_inputs(inputs: object) -> dict[str, Tensor]:
    """Return the batch's tensors by name; a bare tensor is named ''."""
    named = {"": inputs} if isinstance(inputs, Tensor) else inputs
    if not isinstance(named, Mapping):
        raise TypeError(f"inputs must be a tensor or a dict of tensors, got {type(inputs).__name__}: select them from each batch")
    for name, tensor in named.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"inputs must be a tensor or a dict of tensors, but {name!r} is {type(tensor).__name__}: leave it out")
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    if not shapes or any(not shape or shape[0] == 0 for shape in shapes.values()):
        raise ValueError(f"inputs must be (B, ...) with at least one sample, got {shapes.get('', shapes)}")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"all inputs must have the same batch size B, got {shapes}")
    return dict(named)

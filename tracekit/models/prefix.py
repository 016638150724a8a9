"""A Prefix is a prompt that a model has read once: its keys and values, for any number of runs."""

# Guarantees:
#   - no run changes it, whatever the run does, and it says so if somebody did;
#   - it is never used where it does not belong: by another model, or by the same one with other
#     weights, other lasting edits or hooks.

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tracekit.capture import showing_own_lines
from tracekit.core.offload import identity_of, version_of
from tracekit.errors import InputError, OverwrittenError, UnsupportedError
from tracekit.models.kv_cache import KeyValueCache, KeyValueEntry
from tracekit.models.kv_layers import (
    APPENDING,
    WITH_STATES,
    KvCache,
    check_shareable,
    ending,
    fork,
    kind_of,
    layers_of,
    mapped,
    parts_of,
    tensors_of,
)
from tracekit.models.kv_work import Pool, Work


@final
@dataclass(frozen=True, eq=False)
class Source:
    """What an encoder made of its input, which a decoder reads at every step."""

    hidden: Tensor  # (rows, positions, width)
    attention_mask: Tensor | None


@final
class _Held:
    """The tensors of a prefix, and the versions that they had when it was made."""

    def __init__(self, kv_cache: KvCache, source: Source | None) -> None:
        self.kv_cache = kv_cache
        self._source = source
        self.versions = self.current_versions()

    def current_versions(self) -> list[int]:
        """Which change when a tensor is changed in place."""
        held = [tensor for layer in layers_of(self.kv_cache) for tensor in tensors_of(layer)]
        held += [] if self._source is None else [self._source.hidden]
        return [version_of(tensor) for tensor in held]


@final
class Prefix:
    """The keys and values of a prompt, `model.prefill(prompt)`, that runs of the model begin with.

    `model.trace(rest, prefix=prefix)`, `model.generate(rest, prefix=prefix)`: in any order, at the
    same time, from several threads. It is never changed. A prefix of one row serves a rest of any
    number of rows; one of several rows, a rest of as many.
    """

    def __init__(
        self,
        model: Any,
        kv_cache: KvCache,
        tokens: Tensor,
        attention_mask: Tensor,
        *,
        positions: Tensor | None = None,
        source: Source | None = None,
        has_media: bool = False,
        weights: tuple[object, ...] | None = None,
    ) -> None:
        check_shareable(kv_cache)
        self.model = model
        self.positions = positions  # (axes, rows, positions), where a model has several axes
        self.source = source
        self.has_media = has_media  # images or sounds among its tokens
        self.pool = Pool()
        self._held = _Held(kv_cache, source)
        self._tokens = tokens
        self._attention_mask = attention_mask
        self._edits = _lasting(model)
        self._weights = identity_of(model.module) if weights is None else weights

    # -- what it is -----------------------------------------------------------------------------

    @property
    def tokens(self) -> Tensor:
        """The token ids, `(rows, positions)`; of an encoder-decoder, those of the decoder."""
        return self._tokens.clone()

    @property
    def attention_mask(self) -> Tensor:
        """1 for each token, 0 for padding, `(rows, positions)`."""
        return self._attention_mask.clone()

    @property
    def rows(self) -> int:
        """How many prompts there are."""
        return int(self._tokens.shape[0])

    def __len__(self) -> int:
        return int(self._tokens.shape[1])

    @property
    def nbytes(self) -> int:
        """The size of its tensors, in bytes, of which longer and shorter ones may have a part."""
        held = [tensor for layer in layers_of(self._kv_cache) for tensor in tensors_of(layer)]
        held += [self._tokens, self._attention_mask]
        held += [] if self.source is None else [self.source.hidden]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def kinds(self) -> tuple[str, ...]:
        """For each layer, of which class of transformers it is."""
        return tuple(kind_of(layer) for layer in layers_of(self._kv_cache))

    @property
    def entries(self) -> Sequence[KeyValueEntry]:
        """The keys and values of each layer, `(rows, positions, heads, width)`, frozen."""
        return self.kv_cache.entries

    @property
    def kv_cache(self) -> KeyValueCache:
        """The same keys and values as a frozen KeyValueCache; only for plain attention layers."""
        layers = self._plain_layers("has no entries of keys and values")
        entries = [KeyValueEntry.of_layer(layer.keys, layer.values) for layer in layers]
        found = KeyValueCache(entries, self.attention_mask, tokens=self.tokens, model=self.model)
        found.freeze()
        return found

    def __repr__(self) -> str:
        rows = f" in {self.rows} rows" if self.rows > 1 else ""
        first = next(iter(tensors_of(next(layers_of(self._kv_cache)))), self._tokens)
        kind = str(first.dtype).removeprefix("torch.")
        return (
            f"<Prefix of {len(self)} tokens{rows}: {type(self.model.module).__name__}, "
            f"{len(parts_of(self._kv_cache)['self'].layers)} layers, {kind} on {first.device}, "
            f"{_size(self.nbytes)}>"
        )

    # -- others made of it ----------------------------------------------------------------------

    @showing_own_lines
    def extend(self, more: Any, **kwargs: Any) -> Prefix:
        """A longer prefix: this one with `more` behind it, which alone is run. This one stays.

        `more` is what a trace takes as a rest. Its rows may be several where this has one. Where
        all layers are plain attention, and the rows as many, the two then share their memory.
        """
        return self.model._extended(self, (more,), kwargs)

    @showing_own_lines
    def crop(self, positions: int) -> Prefix:
        """The first `positions` positions, which share the memory of these."""
        if not 0 < positions <= len(self):
            raise InputError(
                f"crop({positions}): a prefix of {len(self)} positions can be cropped to 1 up to "
                f"{len(self)}."
            )
        if self.has_media and positions < len(self):
            raise UnsupportedError(
                "a prefix with images or sounds can't be cropped, as the tokens of one read each "
                "other. Prefill the shorter prompt."
            )
        return self.cut(positions)

    @showing_own_lines
    def save(self, path: str | Path) -> None:
        """Write it to a file of safetensors, for `model.load_prefix(path)`."""
        from tracekit.models.prefix_files import save_prefix

        save_prefix(self, path)

    # -- for runs -------------------------------------------------------------------------------

    def cut(self, positions: int) -> Prefix:
        """The first `positions`, which may be none: a run behind nothing, that keeps its own."""
        if positions == len(self):
            return self
        return self._with(_cropped(self._kv_cache, positions), positions)

    def ending(self, index: int) -> tuple[Prefix, list[tuple[Tensor, Tensor]]]:
        """The same, whose runs end when a plain layer has appended: Filled is raised there.

        And the list of what the layer held then, keys and values, in each run.
        """
        kv_cache, filled = ending(self._kv_cache, index)
        return self._with(kv_cache, len(self)), filled

    def replaced(self, index: int, keys: Tensor, values: Tensor) -> Prefix:
        """The same with other keys and values in one layer, of any number of rows."""
        kv_cache = copy.copy(self._kv_cache)
        kv_cache.layers = list(kv_cache.layers)
        new = {"keys": keys, "values": values}
        layer = mapped(kv_cache.layers[index], new.get)
        kv_cache.layers[index] = layer
        return self._with(kv_cache, len(self))

    def check_belongs(self, model: Any) -> None:
        """InputError if runs of `model` would not have these keys and values themselves."""
        own, other = self.model.module, model.module
        if own is not other:
            raise InputError(
                f"this prefix was made by another model ({type(own).__name__}, not this "
                f"{type(other).__name__}): keys and values are of the weights that made them. "
                f"Write `prefix = model.prefill(prompt)` with this model."
            )
        if identity_of(other) != self._weights:
            raise InputError(
                "the weights of this model have changed since it made this prefix (their values, "
                "dtype or device): its keys and values are of the earlier ones. Prefill again."
            )
        if _lasting(model) != self._edits:
            raise InputError(
                "this prefix was made under other lasting edits or hooks than this model has, so "
                "its keys and values are not those that it computes. Prefill with this model."
            )

    def check_unchanged(self) -> None:
        """OverwrittenError if somebody has changed its tensors in place."""
        self._check(self._held)

    def fork(self, rows: int, work: Work | None = None) -> KvCache:
        """A kv_cache for one run, which begins as this prefix and shares its memory."""
        held = self._held  # which another thread may exchange
        self._check(held)
        return fork(held.kv_cache, rows, work)

    def share(self, longer: Prefix) -> None:
        """Hold the memory of `longer`, which begins with the same keys and values."""
        self._held = _Held(_cropped(longer._kv_cache, len(self)), self.source)

    @property
    def _kv_cache(self) -> KvCache:
        return self._held.kv_cache

    def _check(self, held: _Held) -> None:
        if held.current_versions() != held.versions:
            raise OverwrittenError(
                "the keys or values of this prefix were changed in place, and runs behind it "
                "would read them so. Prefill again, and edit a clone."
            )

    def row(self, rows: int) -> KvCache:
        """The same of the first row alone, repeated."""
        first = _changed(self._kv_cache, lambda _, tensor: tensor[:1] if tensor.dim() else tensor)
        return fork(first, rows)

    @property
    def layers(self) -> dict[str, list[Any]]:
        """Its layers: of self-attention, and of cross-attention where there is an encoder."""
        return {name: part.layers for name, part in parts_of(self._kv_cache).items()}

    @property
    def has_edits(self) -> bool:
        """Whether lasting edits had a part in it."""
        return bool(self._edits)

    @property
    def is_plain(self) -> bool:
        """Whether its layers hold all keys and values, and nothing else."""
        return all(kind == "DynamicLayer" for kind in self.kinds)

    @property
    def is_stateful(self) -> bool:
        """Whether some layer keeps states, which run through all that it reads."""
        return not WITH_STATES.isdisjoint(self.kinds)

    def positions_with(self, attention_mask: Tensor) -> Tensor | None:
        """The positions of all tokens of a longer mask, on every axis, if there are several.

        Behind an image, text goes on from the largest position that the image has on any axis.
        """
        if self.positions is None:
            return None
        mask = attention_mask.long()
        before = self.positions.to(mask.device)
        seen = self._attention_mask.to(mask.device).bool()
        ahead = before.masked_fill(~seen, -1).amax((0, 2)) + 1 - seen.sum(-1)  # for each row
        columns = (mask.cumsum(-1) - 1).clamp(min=0) + ahead.expand(mask.shape[0])[:, None]
        after = columns[:, len(self) :].expand(before.shape[0], -1, -1)
        return torch.cat([before.expand(-1, mask.shape[0], -1), after], -1)

    def _plain_layers(self, what: str) -> list[Any]:
        if not self.is_plain or self.source is not None:
            kinds = ", ".join(sorted({*self.kinds} - {"DynamicLayer"})) or "cross-attention"
            raise UnsupportedError(
                f"this prefix {what}, as not all of its layers are plain attention ({kinds})."
            )
        return list(layers_of(self._kv_cache))

    def _with(self, kv_cache: KvCache, positions: int) -> Prefix:
        axes = None if self.positions is None else self.positions[..., :positions]
        found = Prefix(
            self.model,
            kv_cache,
            self._tokens[:, :positions],
            self._attention_mask[:, :positions],
            positions=axes,
            source=self.source,
            weights=self._weights,
        )
        found._edits = self._edits
        return found


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def _changed(kv_cache: KvCache, change: Any) -> KvCache:
    """A cache of the same kind with every tensor of its layers changed."""
    if len(parts := parts_of(kv_cache)) > 1:
        return type(kv_cache)(*(_changed(part, change) for part in parts.values()))
    found = object.__new__(type(kv_cache))
    vars(found).update(vars(kv_cache))
    found.layers = [mapped(layer, change) for layer in kv_cache.layers]
    return found


def _cropped(kv_cache: KvCache, positions: int) -> KvCache:
    """The first positions, as views; what an encoder gave is kept whole."""
    if len(parts := parts_of(kv_cache)) > 1:
        return type(kv_cache)(_cropped(parts["self"], positions), parts["cross"])
    for layer in kv_cache.layers:
        _check_croppable(layer)

    def cropped(name: str, tensor: Tensor) -> Tensor:
        return tensor[:, :, :positions] if name in {"keys", "values"} else tensor

    found = _changed(kv_cache, cropped)
    for layer in found.layers:
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = positions
    return found


def _check_croppable(layer: Any) -> None:
    kind = kind_of(layer)
    if kind == "DynamicSlidingWindowLayer" and layer.cumulative_length >= layer.sliding_window:
        why = f"has forgotten what lies further back than its window ({layer.sliding_window})"
    elif kind not in APPENDING | {"DummyLayer"}:
        why = "keeps states of the whole text, or memory of a fixed size"
    else:
        return
    raise UnsupportedError(
        f"this prefix can't be cropped: a layer ({kind}) {why}. Prefill the shorter prompt."
    )


def empty_mask(tokens: Tensor) -> Tensor:
    """The attention mask of tokens without padding."""
    return torch.ones_like(tokens, dtype=torch.long)


def _lasting(model: Any) -> tuple[Any, ...]:
    """What is made in every run of a model: its edits, and the functions at its activations."""
    return (*model._edits, *(each for each in model._functions if each.is_on))

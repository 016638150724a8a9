"""Fork a kv_cache of transformers: the fork shares its tensors until a layer first appends."""

# Guarantees:
#   - nothing that happens to a fork happens to what it was forked from: whoever reads the tensors
#     of a layer before it has appended gets, and from then on the fork has, a copy;
#   - the model itself appends without that copy.

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from tracekit.errors import UnsupportedError
from tracekit.interleave.protocol import Unwind
from tracekit.models.kv_work import Work

KvCache = Any  # transformers.Cache; transformers is imported where it is needed
KvLayer = Any

# Layers that append by joining, into new tensors (transformers 4.57 to 5.23).
APPENDING = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})
# Layers whose states are written in place (transformers 5): a fork has copies of the states.
WITH_STATES = frozenset(
    {
        "LinearAttentionLayer",
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    }
)
# Layers of a size that is fixed, written in place: a fork has a copy of all.
FIXED = frozenset({"StaticLayer", "StaticSlidingWindowLayer"})
EMPTY = frozenset({"DummyLayer"})
SHAREABLE = APPENDING | WITH_STATES | FIXED | EMPTY
CACHES = frozenset({"Cache", "DynamicCache", "StaticCache", "EncoderDecoderCache"})


def parts_of(kv_cache: KvCache) -> dict[str, KvCache]:
    """The caches with layers that it consists of: its own, and one of cross-attention."""
    if type(kv_cache).__name__ == "EncoderDecoderCache":
        own, cross = kv_cache.self_attention_cache, kv_cache.cross_attention_cache
        return {"self": own, "cross": cross}
    return {"self": kv_cache}


def layers_of(kv_cache: KvCache) -> Iterator[KvLayer]:
    """Every layer, those of cross-attention last."""
    for part in parts_of(kv_cache).values():
        yield from part.layers


def kind_of(layer: KvLayer) -> str:
    """The name of the class of transformers that a layer is of."""
    return next(kind.__name__ for kind in type(layer).__mro__ if kind.__module__ != __name__)


def tensors_of(layer: KvLayer) -> Iterator[Tensor]:
    """The tensors that a layer holds."""
    for value in vars(layer).values():
        held = cast("dict[Any, Any]", value).values() if isinstance(value, dict) else (value,)
        yield from (each for each in held if isinstance(each, Tensor))


def check_shareable(kv_cache: KvCache) -> None:
    """UnsupportedError if runs could not share it, with the reason."""
    name = type(kv_cache).__name__
    if name not in CACHES or not type(kv_cache).__module__.startswith("transformers.cache_utils"):
        raise UnsupportedError(
            f"a prefix can't be kept in a {name}: tracekit knows how to share the caches of "
            f"transformers ({', '.join(sorted(CACHES))}). Trace the whole text instead."
        )
    if getattr(kv_cache, "offloading", False):
        raise UnsupportedError(
            "a prefix can't be kept in a cache that is offloaded layer by layer, as a run moves "
            "its layers. Prefill without cache_implementation='offloaded'."
        )
    for layer in layers_of(kv_cache):
        if kind_of(layer) not in SHAREABLE:
            raise UnsupportedError(
                f"a prefix can't be kept in layers of {kind_of(layer)}: how they change their "
                f"tensors is not known to tracekit. Trace the whole text instead."
            )


def fork(kv_cache: KvCache, rows: int, work: Work | None = None) -> KvCache:
    """A kv_cache that begins as `kv_cache` and can grow, for `rows` rows.

    A row is repeated where there are more rows, each beside itself. What is appended goes into
    the buffers of `work`, where there is one.
    """
    if type(kv_cache).__name__ == "EncoderDecoderCache":
        own = fork(kv_cache.self_attention_cache, rows, work)
        return type(kv_cache)(own, fork(kv_cache.cross_attention_cache, rows))
    found = copy.copy(kv_cache)
    found.layers = [
        _forked(layer, rows, None if work is None else (work, index))
        for index, layer in enumerate(kv_cache.layers)
    ]
    return found


def mapped(
    layer: KvLayer, change: Callable[[str, Tensor], Tensor], kind: type | None = None
) -> KvLayer:
    """A layer of the same kind with `change(name, tensor)` for each of its tensors."""
    found = object.__new__(kind or type(layer))

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            states = cast("dict[Any, Any]", value)
            return {index: changed(name, each) for index, each in states.items()}
        return change(name, value) if isinstance(value, Tensor) else value

    vars(found).update({name: changed(name, value) for name, value in vars(layer).items()})
    return found


class Filled(Unwind):
    """The layer that a run was to come to has appended; what is behind it is not to be computed."""


def ending(kv_cache: KvCache, index: int) -> tuple[KvCache, list[tuple[Tensor, Tensor]]]:
    """The same with a layer that ends the run of a fork, with Filled, when it has appended.

    What the layer then holds, keys and values, is added to the list. Of plain layers.
    """
    filled: list[tuple[Tensor, Tensor]] = []
    found = copy.copy(kv_cache)
    found.layers = list(kv_cache.layers)
    last = mapped(found.layers[index], lambda _, tensor: tensor, _ending_class())
    last.filled = filled
    found.layers[index] = last
    return found, filled


@lru_cache(maxsize=1)
def _ending_class() -> type:
    """Made once, when transformers is first needed."""
    from transformers.cache_utils import DynamicLayer

    class Ending(DynamicLayer):
        """A layer behind whose keys and values nothing is computed."""

        filled: list[tuple[Tensor, Tensor]]

        def update(self, *args: Any, **kwargs: Any) -> Any:
            parent: Any = super()
            self.filled.append(parent.update(*args, **kwargs))
            raise Filled

    return Ending


def end_run(kv_cache: KvCache) -> None:
    """The run of a fork is over: layers that have not appended will have no buffers."""
    for layer in layers_of(kv_cache):
        if isinstance(layer, _Shared):
            layer.give_up_unused()


def settle(kv_cache: KvCache) -> None:
    """A fork whose run is over becomes a kv_cache as the model itself makes one."""
    for part in parts_of(kv_cache).values():
        part.layers = [_settled(layer) for layer in part.layers]


def _forked(layer: KvLayer, rows: int, work: tuple[Work, int] | None) -> KvLayer:
    kind = kind_of(layer)
    if kind in EMPTY:
        return layer
    keeps = kind not in FIXED

    def taken(name: str, tensor: Tensor) -> Tensor:
        if name in {"keys", "values"}:
            return _for_rows(tensor, rows) if keeps else _for_rows(tensor, rows).clone()
        if name in {"conv_states", "recurrent_states"}:
            return _for_rows(tensor, rows).clone()
        return tensor.clone()

    is_shared = keeps and vars(layer).get("keys") is not None
    found = mapped(layer, taken, _shared_class(type(layer)) if is_shared else None)
    for name in ("batch_size", "max_batch_size"):  # of a layer of fixed size
        if isinstance(vars(found).get(name), int):
            vars(found)[name] = rows
    if is_shared:
        own = work if kind == "DynamicLayer" else None
        vars(found).update(_is_shared=True, _work=own, _view=None)
    return found


def _settled(layer: KvLayer) -> KvLayer:
    if not isinstance(layer, _Shared):
        return layer
    kind = next(kind for kind in type(layer).__mro__ if kind.__module__ != __name__)
    found = object.__new__(kind)
    own = {"_is_shared", "_work", "_view"}
    vars(found).update({name: value for name, value in vars(layer).items() if name not in own})
    return found


def _for_rows(tensor: Tensor, rows: int) -> Tensor:
    own = tensor.shape[0]
    if own == rows:
        return tensor
    if own == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    return tensor.repeat_interleave(rows // own, 0)


class _Shared:
    """What a layer does that shares its tensors with others until it appends."""

    # In front of the class of the layer; `keys` and `values` themselves lie in its dictionary.
    _is_shared: bool
    _work: tuple[Work, int] | None
    _view: tuple[Tensor, Tensor] | None  # what the buffers hold, as it was handed out last

    @property
    def keys(self) -> Any:
        """The keys, as the fork's own."""
        return self._owned("keys")

    @keys.setter
    def keys(self, keys: Any) -> None:
        vars(self)["keys"] = keys

    @property
    def values(self) -> Any:
        """The values, as the fork's own."""
        return self._owned("values")

    @values.setter
    def values(self, values: Any) -> None:
        vars(self)["values"] = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append (transformers calls it)."""
        joined = self._append(key_states, value_states)
        if joined is not None:
            return joined
        self._is_shared = False  # the class itself joins them into new tensors
        parent: Any = super()
        return parent.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        """How many positions there are (transformers asks)."""
        was_shared, self._is_shared = self._is_shared, False
        try:
            parent: Any = super()
            return parent.get_seq_length()
        finally:
            self._is_shared = was_shared

    def give_up_unused(self) -> None:
        """Append to no buffers, if it has not yet: another run may have them now."""
        if self._is_shared:
            self._work = None

    def reset(self) -> None:
        """Empty it; some versions write zeros in place."""
        self._owned("keys")
        parent: Any = super()
        parent.reset()

    def __copy__(self) -> Any:
        found = object.__new__(type(self))  # two may not append to the same buffers
        vars(found).update(vars(self), _work=None, _view=None)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        found = object.__new__(type(self))
        memo[id(self)] = found
        own = {name: value for name, value in vars(self).items() if name not in {"_work", "_view"}}
        vars(found).update(copy.deepcopy(own, memo), _work=None, _view=None, _is_shared=False)
        return found

    def _owned(self, name: str) -> Any:
        state = vars(self)
        if self._is_shared:
            self._is_shared, self._work = False, None
            with torch.no_grad():
                for each in ("keys", "values"):
                    held = state[each]
                    state[each] = held.clone() if isinstance(held, Tensor) else held
        return state[name]

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """What there is with the new behind it, in the buffers; None if they are of no use."""
        if self._work is None:
            return None
        held = vars(self)["keys"], vars(self)["values"]
        is_as_left = self._is_shared or (
            self._view is not None and held[0] is self._view[0] and held[1] is self._view[1]
        )
        work, index = self._work
        joined = None
        if is_as_left and not torch.is_grad_enabled():
            joined = work.append(index, held, (keys, values), held[0].shape[-2])
        if joined is None:
            self._work = self._view = None
            return None
        vars(self).update(keys=joined[0], values=joined[1], _view=joined, _is_shared=False)
        return joined


@lru_cache(maxsize=16)
def _shared_class(kind: type) -> type:
    doc = f"A {kind.__name__} that shares its tensors until it appends."
    own = {"__module__": __name__, "__doc__": doc, "_layer_type": None}
    return type(f"Shared{kind.__name__}", (_Shared, kind), own)

"""A NamedCache holds recorded activations by standard name; no model, no hooks."""

# It rests on a Cache that has each value by itself, once, however many names it has; what a name
# means is a view of it, made when it is asked for.

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast, final

import torch
from torch import Tensor

from tracekit.architectures import Key, Sharing, Spelling
from tracekit.core.keep import Keep
from tracekit.core.nest import describe, first_tensor, on_one_device, tensors
from tracekit.core.tree import Tree
from tracekit.errors import (
    CacheError,
    GradientError,
    UnknownModuleError,
    UnknownPathError,
    did_you_mean,
)
from tracekit.tracing.arrivals import Arrival
from tracekit.tracing.cache import Cache
from tracekit.tracing.entries import Entry
from tracekit.tracing.execution import Execution
from tracekit.tracing.plans import plan_of
from tracekit.tracing.sequence import TokenSequence, stitch
from tracekit.tracing.sites import PosSlice
from tracekit.tracing.wanted import Spot, keys_of


@final
class NamedCache(Mapping[str, Tensor]):
    """Recorded activations: `cache["resid_post", 3]`, or `cache["layers.3.resid_post"]`.

    TransformerLens' names mean the same: `cache["blocks.3.hook_resid_post"]`. Layers count from the
    end, too. Without a layer, `cache["resid_post"]` is the stack of all that have it. Keys are in
    the order in which the model came to them.
    """

    def __init__(
        self,
        store: Cache,
        spots: Mapping[str, Spot],
        spelling: Spelling,
        *,
        has_batch: bool = True,
        is_of_gradients: bool = False,
    ) -> None:
        self._store = store
        self._every = spots
        shared = {key for key, spot in spots.items() if is_of_gradients and _is_apart(spot)}
        self._shared = shared  # without gradients of their own
        self._spots = {key: spot for key, spot in spots.items() if key not in shared}
        self._spelling = spelling
        self._has_batch = has_batch
        self._is_of_gradients = is_of_gradients

    # -- by key ---------------------------------------------------------------------------------

    def __getitem__(self, key: str | tuple[Any, ...]) -> Tensor:
        """The activation, of the shape that its name says; of several steps, CacheError.

        UnknownPathError, with near names, for what is not in it.
        """
        found = self._read(key)
        if found is not None and found.layer is None and not found.is_of_root:
            return self.stack(found.name, found.stack)
        spot = self._spot(key, found)
        entries = self._entries(spot)
        if len(entries) != 1:
            raise CacheError(
                f"{spot.key} was recorded {len(entries)} times, so it is not one value: take "
                f"cache.sequence({key!r}), the steps put together, cache.at(step)[{key!r}], or "
                f"cache.values_of({key!r}), a list."
            )
        return self._value(spot, entries[0])

    def values_of(self, key: str | tuple[Any, ...]) -> list[Tensor]:
        """The activation at every step (and call) that there was, in order."""
        spot = self._spot(key, self._read(key))
        return [self._value(spot, entry) for entry in self._entries(spot)]

    def at(self, step: int) -> NamedCache:
        """What was recorded in one step of a generation."""
        kept = self._store._mapped(lambda entry: entry if entry.step == step else None)
        if not len(kept):
            raise CacheError(f"nothing was recorded in step {step}.")
        return self._with(kept)

    def sequence(self, key: str | tuple[Any, ...], *, partial: bool = False) -> TokenSequence:
        """The steps of a generation put together: `[batch, positions, ...]`, one for each token.

        As `tracer.cache().sequence(path)`, which says more.
        """
        spot = self._spot(key, self._read(key))
        entries = self._entries(spot)
        values = [self._value(spot, entry, has_batch=True) for entry in entries]
        timeline = self._store._changes.timeline
        return stitch(entries, values, timeline, is_partial=partial)

    def stack(self, name: str, stack: str | None = None) -> Tensor:
        """The activation of all layers that have it: `[layers, ...]`; `layers_of` says which.

        `stack` says of which list of layers, where there are several: "encoder_layers".
        """
        spots = self._of_layers(name, stack)
        values = [self[spot.key] for spot in spots]
        if len({value.shape for value in values}) > 1:
            shapes = ", ".join(str(list(value.shape)) for value in values)
            raise CacheError(f"{name} can't be stacked, its shapes differ: {shapes}.")
        return torch.stack(on_one_device(values))

    def layers_of(self, name: str, stack: str | None = None) -> list[int]:
        """Which layers have the activation: those of `stack(name)`, in order."""
        return [spot.named.key.layer or 0 for spot in self._of_layers(name, stack)]

    def _of_layers(self, name: str, stack: str | None) -> list[Spot]:
        key = self._read(name)
        if key is None or key.is_of_root or key.layer is not None:
            raise UnknownPathError(f"{name!r} is no activation of layers{self._near(name)}")
        every = [spot for spot in self._spots.values() if spot.named.key.name == key.name]
        found = [spot for spot in every if str(spot.site) in self._store]
        stacks = list(dict.fromkeys(spot.named.key.stack for spot in found))
        chosen = stack or (self._spelling.main if len(stacks) > 1 else None)
        if len(stacks) > 1 and chosen is None:
            raise CacheError(f"{name} is of {' and '.join(map(str, stacks))}: name one.")
        found = [spot for spot in found if chosen in (None, spot.named.key.stack)]
        if not found and any(each.endswith(f".{key.name}") for each in self._shared):
            raise _no_gradient(name)
        if not found:
            raise UnknownPathError(f"{name!r} is not in this cache{self._near(name)}")
        return sorted(found, key=lambda spot: spot.named.key.layer or 0)

    def _read(self, key: object) -> Key | None:
        try:
            return self._spelling.read(key)
        except IndexError as error:
            raise UnknownPathError(f"{key!r} is not in this cache: {error.args[0]}") from None

    def _spot(self, asked: object, key: Key | None) -> Spot:
        text = str(key) if key is not None else str(asked)
        spot = self._spots.get(text)
        if spot is None and text in self._shared:
            raise _no_gradient(text)
        if spot is None:
            raise UnknownPathError(f"{asked!r} is not in this cache{self._near(text)}")
        if str(spot.site) not in self._store:
            raise UnknownPathError(
                f"{asked!r} was to be recorded, but the run ended before {spot.site} came"
            )
        return spot

    def _near(self, text: str) -> str:
        hooks = [spot.named.key.hook for spot in self._spots.values()]
        bare = dict.fromkeys(spot.named.key.name for spot in self._spots.values())
        return did_you_mean(text, dict.fromkeys([*self._spots, *filter(None, hooks), *bare]))

    def _entries(self, spot: Spot) -> list[Entry]:
        entries = self._store[str(spot.site)]
        call = spot.named.call
        return [entry for entry in entries if call is None or entry.call == call]

    def _value(self, spot: Spot, entry: Entry, *, has_batch: bool | None = None) -> Tensor:
        bound = spot.named.bound
        value = entry.grad if self._is_of_gradients else entry.output
        whole = first_tensor(value) if bound.key is None else list(tensors(value))[bound.key]
        if whole is None:
            raise CacheError(f"{spot.key} is no tensor, but {describe(value)}.")
        found = bound.view(whole)
        has_batch = self._has_batch if has_batch is None else has_batch
        if has_batch or not bound.shape.startswith(("batch ", "1|batch ")):
            return found
        return found[0]

    # -- as a mapping ---------------------------------------------------------------------------

    def __iter__(self) -> Iterator[str]:
        order = {site: place for place, site in enumerate(self._store)}
        found = [spot for spot in self._spots.values() if str(spot.site) in order]
        places = sorted(found, key=lambda spot: order[str(spot.site)])
        return iter([spot.key for spot in places])

    def __len__(self) -> int:
        return sum(str(spot.site) in self._store for spot in self._spots.values())

    def __contains__(self, key: object) -> bool:
        try:
            found = self._read(key)
        except UnknownPathError:
            return False
        if found is not None and found.layer is None and not found.is_of_root:
            return any(spot.named.key.name == found.name for spot in self._spots.values())
        spot = self._spots.get(str(found) if found is not None else str(key))
        return spot is not None and str(spot.site) in self._store

    # -- by attribute ---------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while it is being unpickled
            raise AttributeError(name)
        if name in self._spelling.lengths:
            return Layers(self, name, self._spelling.lengths[name])
        if name in self:
            return self[name]
        raise UnknownModuleError(f"{name!r} is not in this cache{self._near(name)}")

    # -- others like it -------------------------------------------------------------------------

    @property
    def grad(self) -> NamedCache:
        """The gradients, by the same keys; of a cache that was made with incl_bwd.

        Of what is a tensor that the model uses elsewhere too (mlp_in) there is none of its own.
        """
        return self._with(self._store, is_of_gradients=True)

    def to(self, device: torch.device | str) -> NamedCache:
        """The same activations on another device."""

        def moved(leaf: Any) -> Any:
            if isinstance(leaf, Arrival) and leaf.gradient is not None:
                other = Arrival()
                other.gradient = leaf.gradient.to(device)
                return other
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        return self._with(self._store._mapped(lambda entry: entry.mapped(moved)))

    def remove_batch_dim(self) -> NamedCache:
        """The same activations of a batch of one, without that axis; CacheError of a larger one."""
        self.check_is_one_row()
        return self._with(self._store, has_batch=False)

    def check_is_one_row(self) -> None:
        """CacheError if the batch is not one row."""
        for spot in self._spots.values():
            if not spot.named.bound.shape.startswith("batch ") or str(spot.site) not in self._store:
                continue
            for entry in self._entries(spot):
                rows = self._value(spot, entry, has_batch=True).shape[0]
                if rows != 1:
                    raise CacheError(
                        f"the batch axis goes away only of a batch of one; {spot.key} has {rows} "
                        f"rows. Index them, as in cache[{spot.key!r}][0]."
                    )
                return

    def _with(
        self, store: Cache, has_batch: bool | None = None, is_of_gradients: bool | None = None
    ) -> NamedCache:
        return NamedCache(
            store,
            self._every,
            self._spelling,
            has_batch=self._has_batch if has_batch is None else has_batch,
            is_of_gradients=self._is_of_gradients if is_of_gradients is None else is_of_gradients,
        )

    def __repr__(self) -> str:
        if self._store._is_hidden:
            return "NamedCache(recording until the trace ends)"
        keys = list(self)
        shown = [f"\n  {key}: {describe(self.values_of(key)[0])}" for key in keys[:12]]
        more = f"\n  … {len(keys) - 12} more" if len(keys) > 12 else ""
        return f"NamedCache({len(keys)} activations){''.join(shown)}{more}"


def _is_apart(spot: Spot) -> bool:
    return spot.named.bound.sharing is Sharing.APART


def _no_gradient(key: str) -> GradientError:
    return GradientError(
        f"{key} has no gradient in this cache: its tensor is the residual stream, and what is "
        f"recorded there is the gradient of all that reads it. run_with_hooks(bwd_hooks=[({key!r}, "
        f"function)]) gives {key} a copy, and calls the function with the gradient of that alone."
    )


@final
class Layers:
    """The layers of one stack in a cache: `cache.layers[3].resid_post`."""

    def __init__(self, cache: NamedCache, stack: str, count: int) -> None:
        self._cache = cache
        self._stack = stack
        self._count = count

    def __getitem__(self, layer: int) -> Layer:
        if not -self._count <= layer < self._count:
            raise IndexError(f"there are {self._count} {self._stack}, from 0; there is no {layer}.")
        return Layer(self._cache, self._stack, layer % self._count)

    def __len__(self) -> int:
        return self._count


@final
class Layer:
    """One layer in a cache; its activations are attributes."""

    def __init__(self, cache: NamedCache, stack: str, layer: int) -> None:
        self._cache = cache
        self._prefix = f"{stack}.{layer}."

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        if f"{self._prefix}{name}" not in self._cache:
            known = [each.removeprefix(self._prefix) for each in dir(self)]
            raise UnknownModuleError(
                f"{self._prefix}{name} is not in this cache{did_you_mean(name, known)}"
            )
        return self._cache[f"{self._prefix}{name}"]

    def __dir__(self) -> list[str]:
        there = [key for key in self._cache if key.startswith(self._prefix)]
        return [key.removeprefix(self._prefix) for key in there]


def record_named(
    execution: Execution,
    tree: Tree,
    spots: Iterable[Spot] | None,
    keep: Keep,
    pos_slice: PosSlice = None,
    *,
    has_grads: bool = False,
    is_plain: bool = False,
    invoke: int | None = 0,
) -> NamedCache:
    """Begin to record activations (None: all); the cache is complete when the run has ended.

    Of a run that `is_plain`, which nothing edits, what is inside a norm is told by its input.
    """
    derives = is_plain and not has_grads and keep.dtype is None
    plan = plan_of(tree, spots, pos_slice, derives)
    store = execution.record_sites(plan.sites, plan.named, keep, has_grads, invoke)
    keys = keys_of(tree)
    return NamedCache(store, plan.spots, Spelling({}) if keys is None else keys.spelling)


def keep_of(
    device: torch.device | str | None, dtype: torch.dtype | None, *, detach: bool, clone: bool
) -> Keep:
    """How a cache keeps tensors; CacheError for what is no dtype."""
    if dtype is not None and not isinstance(cast("object", dtype), torch.dtype):
        raise CacheError(f"dtype= takes a torch.dtype, as in torch.float16, not {dtype!r}.")
    return Keep(torch.device(device) if device is not None else None, dtype, detach, clone)

"""What a sweep patches: activations at layers, positions and heads, alone or several at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias, final

from torch import Tensor

from tracekit.analysis.labelled import Axis
from tracekit.architectures import Bound
from tracekit.errors import InputError, did_you_mean
from tracekit.models.language import LanguageModel
from tracekit.models.resuming import number_of_layer, spots_of
from tracekit.tracing.wanted import Spot

# One place, several that are patched together, or all.
Several: TypeAlias = "int | Sequence[int] | None"
# The places of an axis; each may be several, which are patched together.
Places: TypeAlias = "Iterable[int | Sequence[int]] | None"

AXES = ("layer", "position", "head")
_POSITIONS = ("pos", "key")
_HEADS = ("heads", "kv_heads")


@final
@dataclass(frozen=True)
class Patch:
    """What is written at once: an activation, or what a module at a path returns.

    At a layer, a position, a head, or several of each; None is all that there are.
    """

    activation: str = "resid_pre"
    layer: Several = None
    position: Several = None
    head: Several = None

    def __str__(self) -> str:
        parts = [self.activation]
        for name, places in (("L", self.layer), ("P", self.position), ("H", self.head)):
            if places is not None:
                parts.append(f"{name}{_label(places)}")
        return " ".join(parts)


@final
@dataclass(frozen=True)
class Target:
    """One activation of a patch, at positions and heads (None: all)."""

    key: str
    positions: tuple[int, ...] | None
    heads: tuple[int, ...] | None


@final
@dataclass(frozen=True)
class Where:
    """An activation of a model: in which layer it is, and how its axes lie."""

    spot: Spot
    layer: int | None

    @property
    def bound(self) -> Bound:
        """Whose value it is."""
        return self.spot.named.bound

    @property
    def name(self) -> str:
        """The standard name; of a module, its path."""
        return self.spot.named.key.name

    @property
    def boundary(self) -> int | None:
        """The number of the layer that it is the residual stream in front of, if it is that."""
        if self.layer is None or self.name not in ("resid_pre", "resid_post"):
            return None
        return self.layer + (self.name == "resid_post")

    @property
    def has_heads(self) -> bool:
        """Whether it has an axis of heads."""
        return any(each in self.bound.shape.split() for each in _HEADS)

    @property
    def has_every_key(self) -> bool:
        """Whether its positions are all that are attended to, also those before the run."""
        return "pos" not in self._axes and "key" in self._axes

    @property
    def _axes(self) -> list[str]:
        return self.bound.shape.replace("batch*pos", "batch pos").split() or ["batch", "pos"]

    def laid_out(self, value: Tensor, rows: int) -> Tensor:
        """A view of it as `[rows, positions, heads, …]`, or without heads."""
        if self.bound.shape.startswith("batch*pos"):
            value = value.unflatten(0, (rows, -1))
        axes = self._axes
        order = [axes.index(each) for each in (*_POSITIONS, *_HEADS) if each in axes]
        if not order or value.dim() < 2 or axes[order[0]] not in _POSITIONS:
            raise InputError(f"{self.spot.spelled} has no axis of positions to patch.")
        if "pos" in axes and "key" in axes:  # scores: by the position that reads
            order.remove(axes.index("key"))
        return value.movedim(order, list(range(1, len(order) + 1)))


@final
@dataclass(frozen=True)
class Cells:
    """The patches of a sweep, one for each place of the axes, the last axis fastest."""

    axes: tuple[Axis, ...]
    patches: tuple[tuple[Target, ...], ...]
    names: tuple[str, ...]


@final
class Asked:
    """What a sweep was asked for, read for a model."""

    def __init__(
        self,
        model: LanguageModel,
        over: Sequence[str],
        activation: str,
        layers: Places,
        positions: Places | str,
        heads: Places,
        patches: Iterable[Patch] | None,
    ) -> None:
        self._is_of_modules = patches is None and not set(over) <= {*AXES}
        self._patches = None if patches is None else list(patches)
        self._positions, self._heads = positions, heads
        axes = ("module",) if positions == "all" else ("module", "position")
        self._over = axes if self._is_of_modules else tuple(over)
        self._check(over)
        names = list(over) if self._is_of_modules else [activation]
        if self._patches is not None:
            names = list(dict.fromkeys(patch.activation for patch in self._patches))
            self._over = ("patch",)
        self.name = names[0] if len(names) == 1 else f"{len(names)} activations"
        self._by_name = {name: _wheres(model, name) for name in names}
        self._layers = layers

    @property
    def wheres(self) -> dict[str, Where]:
        """Every activation that may be patched, by its key."""
        return {
            where.spot.key: where for found in self._by_name.values() for where in found.values()
        }

    def cells(self, sizes: dict[str, tuple[int, int]], tokens: Sequence[str]) -> Cells:
        """The patches, where each activation (by key) has so many positions and heads."""
        if self._patches is not None:
            found = [self._targets(patch, sizes) for patch in self._patches]
            labels = tuple(map(str, self._patches))
            return Cells((Axis("patch", labels),), tuple(found), labels)
        axes: list[tuple[Axis, list[Any]]] = []
        for axis in self._over:
            axes.append(self._axis(axis, sizes, tokens))
        patches: list[tuple[Target, ...]] = []
        names: list[str] = []
        for place in product(*(range(len(places)) for _, places in axes)):
            chosen = {axis.name: places[at] for (axis, places), at in zip(axes, place, strict=True)}
            patches.append(self._targets(self._patch(chosen), sizes))
            named = [
                f"{axis.name} {axis.labels[at]}" for (axis, _), at in zip(axes, place, strict=True)
            ]
            names.append(", ".join(named))
        return Cells(tuple(axis for axis, _ in axes), tuple(patches), tuple(names))

    def _check(self, over: Sequence[str]) -> None:
        if isinstance(over, str) or not over:  # pyright: ignore[reportUnnecessaryIsInstance] - what a user gives
            raise InputError(
                f"over= is a tuple of axes, as ('layer', 'position'), or a list of paths of "
                f"modules; not {over!r}."
            )
        if len(set(over)) < len(over):
            raise InputError(f"over={tuple(over)} names one twice.")
        if self._is_of_modules:
            self._check_modules(over)

    def _check_modules(self, over: Sequence[str]) -> None:
        """InputError if what is no axis was meant as one."""
        for each in over:
            cure = did_you_mean(each, AXES) if "." not in each else ""
            if each not in AXES and (cure or {*over} & {*AXES}):
                raise InputError(
                    f"over={tuple(over)}: {each!r} is no axis; there are {', '.join(AXES)}"
                    f"{cure or '.'}"
                )

    def _axis(
        self, name: str, sizes: dict[str, tuple[int, int]], tokens: Sequence[str]
    ) -> tuple[Axis, list[Any]]:
        if name == "module":
            return Axis(name, tuple(self._by_name)), list(self._by_name)
        if name == "layer":
            there = self._there
            if not there:
                raise InputError(f"{self.name} is of no layer: leave 'layer' out of over=.")
            places = _places(self._layers, there, "layers=")
            return Axis(name, tuple(map(_label, places))), places
        if name == "head":
            count = max(heads for _, heads in sizes.values())
            if not count:
                raise InputError(_no_heads(self.name))
            places = _places(self._heads, range(count), "heads=")
            return Axis(name, tuple(map(_label, places))), places
        count = max(positions for positions, _ in sizes.values())
        given = None if isinstance(self._positions, str) else self._positions
        places = _places(given, range(count), "positions=")
        return Axis(name, tuple(_token(place, tokens) for place in places)), places

    @property
    def _there(self) -> list[int]:
        """The layers that have the activation."""
        (found,) = self._by_name.values()
        return [layer for layer in found if layer is not None]

    def _patch(self, chosen: dict[str, Any]) -> Patch:
        """One cell: what is no axis is patched together."""
        name = chosen.get("module", next(iter(self._by_name)))

        def part(axis: str, given: Places | str) -> Several:
            if axis in chosen:
                return chosen[axis]
            if given is None or isinstance(given, str):
                return None
            return [one for each in given for one in ([each] if isinstance(each, int) else each)]

        return Patch(
            name,
            None if self._is_of_modules else part("layer", self._layers),
            part("position", self._positions),
            part("head", self._heads),
        )

    def _targets(self, patch: Patch, sizes: dict[str, tuple[int, int]]) -> tuple[Target, ...]:
        found = self._by_name[patch.activation]
        if list(found) == [None]:
            if patch.layer is not None:
                raise InputError(f"{patch.activation} is of no layer: leave layer= out.")
            chosen = list(found.values())
        else:
            there = [layer for layer in found if layer is not None]
            numbers = there if patch.layer is None else _numbers(patch.layer, there, "layer")
            chosen = [found[number] for number in numbers]
        return tuple(self._target(where, patch, *sizes[where.spot.key]) for where in chosen)

    def _target(self, where: Where, patch: Patch, positions: int, heads: int) -> Target:
        chosen = patch.position
        at = None if chosen is None else _numbers(chosen, range(positions), "position")
        if patch.head is not None and not heads:
            raise InputError(_no_heads(patch.activation))
        of = None if patch.head is None else _numbers(patch.head, range(heads), "head")
        return Target(where.spot.key, at, of)


def _wheres(model: LanguageModel, name: str) -> dict[int | None, Where]:
    """The activation of that name in every layer that has it, by number; None if it is of none."""
    spots = spots_of(model, name, "activation=")
    main = [spot for spot in spots if spot.named.key.stack in (None, "layers")] or spots
    found = {spot.named.key.layer: Where(spot, number_of_layer(model, spot)) for spot in main}
    if len(found) < len(main):
        raise InputError(f"{name!r} is of several stacks of layers: give the paths of modules.")
    return found


def _places(given: Places, there: Sequence[int], what: str) -> list[Any]:
    """The places of an axis, each a number or a tuple of them."""
    if given is None:
        return list(there)
    found: list[Any] = []
    for each in given:
        numbers = _numbers(each, there, what.rstrip("s="))
        found.append(numbers[0] if isinstance(each, int) else numbers)
    if not found:
        raise InputError(f"{what} names nothing.")
    return found


def _numbers(given: int | Sequence[int], there: Sequence[int], what: str) -> tuple[int, ...]:
    """Numbers counted from 0; InputError for one that is not there."""
    each = [given] if isinstance(given, int) else list(given)
    count = max(there) + 1
    found = tuple(number + count if number < 0 else number for number in each)
    for number, told in zip(found, each, strict=True):
        if number not in there:
            some = f"0 to {count - 1}" if len(there) == count else ", ".join(map(str, there))
            raise InputError(f"{what}={told}: there are {some}.")
    if not found:
        raise InputError(f"a group of {what}s is empty.")
    return found


def _label(place: int | Sequence[int]) -> str:
    if isinstance(place, int):
        return str(place)
    numbers = list(place)
    is_run = len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if is_run else "+".join(map(str, numbers))


def _token(place: int | Sequence[int], tokens: Sequence[str]) -> str:
    if isinstance(place, int):
        return tokens[place] if tokens else str(place)
    if not tokens:
        return _label(place)
    return "".join(tokens[each] for each in place)


def _no_heads(name: str) -> str:
    return f"{name} has no heads; patch 'z', 'q', 'k', 'v' or 'pattern'."

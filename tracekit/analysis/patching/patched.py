"""What a sweep found: a number for each patch, what it was held against, and what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from tracekit.analysis.labelled import Axis, Cell, Labelled, Where

SHOWN = 5  # patches in its text


@final
@dataclass(frozen=True)
class Request:
    """What makes two sweeps the same; the tokens of all prompts, the patches, the metric."""

    tokens: tuple[tuple[int, ...], ...]
    patches: tuple[Any, ...]
    metric: str
    direction: str


@final
@dataclass(frozen=True, eq=False)
class PatchSweep:
    """What each patch makes of a metric; `.values` is labelled by layer, position, head.

    Units are those of the metric; several pairs of prompts are averaged, and `.per_pair` has each
    by itself. `clean` and `corrupted` are the metric of the two unpatched runs. What was not
    computed is NaN, and then `.is_complete` is False: `patch_sweep(..., resume=this)` goes on.

    `deviation` is the largest difference in any logit between `checked` patches, drawn at random,
    and whole forwards with plain PyTorch hooks. `layer_tokens` counts the tokens gone through by a
    layer, and `naive_layer_tokens` what one whole forward for each patch would have taken.
    """

    per_pair: Labelled
    clean_per_pair: Tensor
    corrupted_per_pair: Tensor
    direction: str
    what: str
    how: str
    deviation: float
    checked: int
    layer_tokens: int
    naive_layer_tokens: int
    unchanged: int
    done: Tensor = field(repr=False)
    request: Request = field(repr=False)

    @property
    def values(self) -> Labelled:
        """The metric with each patch, averaged over the pairs."""
        return self.per_pair.mean("pair")

    @property
    def clean(self) -> float:
        """The metric of the clean prompt."""
        return float(self.clean_per_pair.nanmean())

    @property
    def corrupted(self) -> float:
        """The metric of the corrupted prompt."""
        return float(self.corrupted_per_pair.nanmean())

    @property
    def base(self) -> float:
        """The metric of the run that is patched."""
        return self.corrupted if self.direction == "denoise" else self.clean

    @property
    def other(self) -> float:
        """The metric of the run that the values are of."""
        return self.clean if self.direction == "denoise" else self.corrupted

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the values."""
        return self.per_pair.axes[1:]

    @property
    def is_complete(self) -> bool:
        """Whether every patch was computed."""
        return bool(self.done.all())

    @property
    def saved(self) -> float:
        """The part of the layer-tokens of whole forwards that was not computed, from 0 to 1."""
        return 1 - self.layer_tokens / self.naive_layer_tokens if self.naive_layer_tokens else 0.0

    def normalised(self) -> Labelled:
        """From 0, where a patch changes nothing, to 1, where it makes the metric the other run's.

        Of the averages over the pairs, as in Wang et al. 2022.
        """
        values = (self.values.values - self.base) / (self.other - self.base)
        return Labelled(values, self.axes, f"{self.per_pair.what}, 0 as patched, 1 as the other")

    def at(self, **places: Where) -> Labelled:
        """The values at some places: `sweep.at(layer=3)`; as Labelled.at."""
        return self.values.at(**places)

    def top(self, count: int = SHOWN) -> list[Cell]:
        """The patches that change the metric most, with its value; largest change first."""
        values = self.values
        moved = Labelled(values.values - self.base, values.axes).top(count)
        return [cell._replace(value=cell.value + self.base) for cell in moved]

    def to_json(self) -> dict[str, Any]:
        """All of it in numbers, lists and strings."""
        return {
            "patched": self.what,
            "direction": self.direction,
            "values": self.values.to_json(),
            "per_pair": self.per_pair.to_json()["values"],
            "clean": _plain(self.clean_per_pair),
            "corrupted": _plain(self.corrupted_per_pair),
            "is_complete": self.is_complete,
            "how": self.how,
            "deviation": self.deviation,
            "checked": self.checked,
            "layer_tokens": self.layer_tokens,
            "naive_layer_tokens": self.naive_layer_tokens,
            "unchanged": self.unchanged,
        }

    def __repr__(self) -> str:
        sizes = " x ".join(f"{len(axis.labels)} {axis.name}s" for axis in self.axes)
        run = "corrupted" if self.direction == "denoise" else "clean"
        lines = [
            f"PatchSweep({self.what}, {sizes}, into the {run} run: {self.per_pair.what})",
            f"  clean {self.clean:.4g}, corrupted {self.corrupted:.4g}",
        ]
        for cell in self.top():
            places = zip(self.axes, cell.place, cell.labels, strict=True)
            where = ", ".join(_place(axis, number, label) for axis, number, label in places)
            share = (cell.value - self.base) / (self.other - self.base) if self._has_scale else 0.0
            part = f" ({share:.0%} of the way)" if self._has_scale else ""
            lines.append(f"  {where}: {cell.value:.4g}{part}")
        lines += [f"  {self._cost}", f"  how: {self.how}"]
        if not self.is_complete:
            left = int((~self.done).any(0).sum())
            lines.append(f"  not complete: {left} patches are left; resume= goes on")
        return "\n".join(lines)

    @property
    def _has_scale(self) -> bool:
        return self.other != self.base

    @property
    def _cost(self) -> str:
        part = self.layer_tokens / max(self.naive_layer_tokens, 1)
        checks = f"off by {self.deviation:.1e} in {self.checked} recomputed whole"
        checks = checks if self.checked else "none recomputed whole"
        return f"{part:.0%} of the layer-tokens of whole forwards; {checks}"


def _place(axis: Axis, number: int, label: str) -> str:
    is_number = label.lstrip("-").isdigit()
    if axis.name in ("module", "patch"):
        return label
    return f"{axis.name} {label}" if is_number else f"{axis.name} {number} {label!r}"


def _plain(values: Tensor) -> list[float | None]:
    return [None if math.isnan(each) else each for each in values.tolist()]


def empty(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Values that are no numbers yet, and that none was computed."""
    return torch.full(shape, float("nan")), torch.zeros(shape, dtype=torch.bool)

"""What a test module of a user may have: functions that a host imports by name."""

from __future__ import annotations

import torch

from tracekit import Model


def doubled(value: torch.Tensor) -> torch.Tensor:
    return value * 2


def small() -> Model:
    """A model whose worker is there quickly."""
    torch.manual_seed(0)
    return Model(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()))


class OddError(Exception):
    """An error whose arguments are not what its maker takes."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
        self.two = two


class Meter:
    """An object that has slots, and so no `__dict__` to compare."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen = 0

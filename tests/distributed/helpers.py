"""What a test module of a user may have: functions that a host imports by name."""

from __future__ import annotations

import torch


def doubled(value: torch.Tensor) -> torch.Tensor:
    return value * 2


class OddError(Exception):
    """An error whose arguments are not what its maker takes."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
        self.two = two

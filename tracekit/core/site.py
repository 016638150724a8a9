"""Where a value appears in a model, and when: a Visit is a Site at a step and a call."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Slot(Enum):
    """Which value of a module is meant."""

    INPUT = "input"
    OUTPUT = "output"
    RESULT = "result"  # what the traced call returned; the root's alone

    __hash__ = object.__hash__  # Enum hashes the name, in Python; sites are hashed in every hook


class Site(NamedTuple):
    """One value of one module: `Site("model.layers.3", Slot.OUTPUT)`."""

    path: str
    slot: Slot

    def __str__(self) -> str:
        return f"{self.path}.{self.slot.value}"


class Visit(NamedTuple):
    """A Site at one step of the run, and the how-manieth call of the module within that step."""

    site: Site
    step: int = 0
    call: int = 0

    def __str__(self) -> str:
        when = f"step {self.step}" if self.call == 0 else f"step {self.step}, call {self.call}"
        return f"{self.site} ({when})"


class Line(str):
    """A line of the user's code; for people, it is "line 12"."""

    __slots__ = ("file", "number")

    file: str
    number: int

    def __new__(cls, file: str, number: int) -> Line:
        made = super().__new__(cls, f"line {number}")
        made.file, made.number = file, number
        return made

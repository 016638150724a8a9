"""What has a part in a run: a block, with its rows and names, or functions at activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from tracekit.interleave.ahead import Foretold
from tracekit.interleave.duties import Rows, Scope
from tracekit.tracing.cut import StopAt
from tracekit.tracing.glance import Asked
from tracekit.tracing.hooked import Hooked
from tracekit.tracing.touches import Author


@final
@dataclass(frozen=True)
class Intervention:
    """A block, to be run once beside the model."""

    body: Callable[[], None]
    rows: Rows | None = None  # None: the whole batch
    scope: Scope | None = None  # of its names, if it shares them with other blocks
    has_rounds: bool = False  # it runs its block anew in each step (rounds.py)
    forecast: Callable[[], Foretold | None] | None = None  # of what it will ask, if that is known
    asked: Asked | None = None  # all of it, if no value decides
    file: str = ""  # where the block stands, for a forecast
    functions: Sequence[Hooked | StopAt] = ()  # in the place of a block: what stands at activations
    author: Author | None = None  # what it is, where that is no block

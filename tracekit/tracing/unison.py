"""Which blocks of several invokes may run behind the model, with answers that were asked ahead."""

# A block that only stores what it reads needs no worker: its requests are asked ahead of it, and it
# runs when the model has ended (foresight.py). Among siblings that must make no difference to the
# others: so it is all of them or none, no block may read a name that another binds, and what they
# store into one container must come in the order in which the model gets there.

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence

from tracekit.capture import Block, Member
from tracekit.core.settings import settings
from tracekit.core.tree import Tree
from tracekit.interleave.ahead import Forecast
from tracekit.tracing.envoy import Envoy
from tracekit.tracing.foresight import forecast


def forecasts(
    blocks: Sequence[Block], members: Sequence[Member], tracer: object, tree: Tree
) -> Sequence[Forecast | None]:
    """What each of the blocks will ask; None for each if they have to run beside the model."""
    if not settings.defer_reads or not _are_apart(blocks, members, tracer):
        return [None] * len(blocks)
    return [
        forecast(block, member.frame, tracer, tree, member.names_taken)
        for block, member in zip(blocks, members, strict=True)
    ]


def _are_apart(blocks: Sequence[Block], members: Sequence[Member], tracer: object) -> bool:
    places = Counter(blocks)
    if not all(block.plan().is_complete for block in places):
        return False
    writes = {
        block: {name for _, name in member.writes}
        for block, member in zip(blocks, members, strict=True)
    }
    for block, count in places.items():
        others = [other for other in places if other is not block or count > 1]
        if any(name in other.reads for other in others for name in writes[block]):
            return False
    is_one_place = len(places) == 1 and _is_one_statement(blocks[0])
    return is_one_place or not _share_a_container(members, tracer)


def _is_one_statement(block: Block) -> bool:
    return len(block.tree.body) == 1 and isinstance(block.tree.body[0], (ast.Assign, ast.Expr))


def _share_a_container(members: Sequence[Member], tracer: object) -> bool:
    seen: set[int] = set()
    for member in members:
        own = {id(value) for value in member.names_taken.values() if _may_be_changed(value, tracer)}
        if own & seen:
            return True
        seen |= own
    return False


def _may_be_changed(value: object, tracer: object) -> bool:
    return value is not tracer and not isinstance(value, (Envoy, int, float, str, type(None)))

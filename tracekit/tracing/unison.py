"""Which blocks of several invokes may run behind the model, with answers that were asked ahead."""

# A block that only stores what it reads needs no worker: its requests are asked ahead of it, and it
# runs when the model has ended (foresight.py). Among siblings that must make no difference to the
# others: so it is all of them or none, no block may read a name that another binds, and what they
# store into one container must come in the order in which the model gets there.

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from tracekit.capture import Block, Member, Scope
from tracekit.core.settings import settings
from tracekit.core.tree import Tree
from tracekit.interleave.ahead import Foretold
from tracekit.tracing.foresight import forecast, foreseen
from tracekit.tracing.glance import Asked


class Outlook(NamedTuple):
    """What is known of a block ahead of it."""

    forecast: Callable[[], Foretold | None] | None = None
    asked: Asked | None = None  # all of it, if no value decides


def outlooks(
    blocks: Sequence[Block], members: Sequence[Member], tracer: object, tree: Tree
) -> Sequence[Outlook]:
    """Of each block; nothing is known of any if they must run beside the model."""
    nothing = [Outlook()] * len(blocks)
    if not settings.defer_reads or not all(block.plan().is_complete for block in set(blocks)):
        return nothing
    if _share_names(blocks, members):
        return nothing
    ahead = [
        (block, member.frame, tracer, tree, member.names_taken)
        for block, member in zip(blocks, members, strict=True)
    ]
    known = [found for each in ahead if (found := foreseen(*each)) is not None]
    if not _fill_in_order(blocks, known):
        return nothing
    asked = [each for each, _ in known] if len(known) == len(blocks) else [None] * len(blocks)
    return [Outlook(partial(forecast, *each), own) for each, own in zip(ahead, asked, strict=True)]


def _share_names(blocks: Sequence[Block], members: Sequence[Member]) -> bool:
    """Whether one of them may read a name that another binds."""
    places = Counter(blocks)
    writes = {
        block: {name for _, name in member.writes}
        for block, member in zip(blocks, members, strict=True)
    }
    for block, count in places.items():
        others = [other for other in places if other is not block or count > 1]
        if any(name in other.reads for other in others for name in writes[block]):
            return True
    return False


def _fill_in_order(blocks: Sequence[Block], known: list[tuple[Asked, Scope]]) -> bool:
    """Whether containers are filled as the model gets there, if each block fills them behind it."""
    places = set(blocks)
    if len(blocks) == 1 or not any(block.fills_containers for block in places):
        return True
    if len(known) < len(blocks):
        return False
    is_one_statement = len(places) == 1 and len(blocks[0].tree.body) == 1
    return (is_one_statement and _fill_in_turn(known)) or _fill_apart([each[1] for each in known])


def _fill_in_turn(known: list[tuple[Asked, Scope]]) -> bool:
    """Whether one statement, at the same values for all, stores without looking what is there."""
    visits = [[look.visit for look in asked.looks] for asked, _ in known]
    looks = any(scope.changed & scope.looked_into for _, scope in known)
    return not looks and all(each == visits[0] for each in visits)


def _fill_apart(scopes: list[Scope]) -> bool:
    """Whether none of them stores into what another stores into, or looks into."""
    filled: set[int] = set()
    looked: set[int] = set()
    for scope in scopes:
        changed, own = scope.changed, scope.looked_into
        if changed & (filled | looked) or own & filled:
            return False
        filled |= changed
        looked |= own
    return True

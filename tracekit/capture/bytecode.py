"""Read from bytecode where a `with` is entered and where its body begins."""

from __future__ import annotations

import dis
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, final

from tracekit.capture.percode import PerCode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

_ENTERING: Final = frozenset({"BEFORE_WITH", "SETUP_WITH", "BEFORE_ASYNC_WITH", "SETUP_ASYNC_WITH"})
_SILENT: Final = frozenset({"NOP", "CACHE"})


@final
@dataclass(frozen=True)
class WithSites:
    """Where a code object enters context managers, as byte offsets in the order of the code."""

    calls: frozenset[int]  # instructions whose result is entered at once, with their caches
    entries: tuple[int, ...]  # instructions that run `__enter__`


@final
@dataclass(frozen=True)
class BodyStart:
    """Where to raise so that exactly our `with` sees it: at the first event from `first` to `last`.

    One instruction would do, but CPython 3.12 and 3.13 lose the event of an instruction whose line
    event was just switched off (coverage does that): so the one after it counts too.
    """

    first: int
    last: int
    is_before_target: bool  # then the name after `as` is not bound by Python


_sites: PerCode[WithSites] = PerCode()


def with_sites(code: CodeType) -> WithSites:
    sites = _sites.get(code)
    if sites is None:
        sites = _find_sites(code)
        _sites.put(code, sites)
    return sites


class _Step(NamedTuple):
    """An instruction that does something."""

    name: str
    detail: str
    effect: int  # on the depth of the stack
    first: int  # offset of its first EXTENDED_ARG
    last: int  # its own offset

    @property
    def reported(self) -> int:
        """What `f_lasti` is while it runs."""
        return self.last if sys.version_info >= (3, 11) else self.first


def steps_of(code: CodeType) -> list[_Step]:
    """The instructions of `code` that do something, in order."""
    steps: list[_Step] = []
    first: int | None = None
    for item in dis.get_instructions(code):
        if item.opname == "EXTENDED_ARG":
            first = item.offset if first is None else first
        elif item.opname not in _SILENT:
            argument = item.arg if item.opcode >= dis.HAVE_ARGUMENT else None
            effect = dis.stack_effect(item.opcode, argument)
            start = item.offset if first is None else first
            steps.append(_Step(item.opname, item.argrepr, effect, start, item.offset))
            first = None
    return steps


def _find_sites(code: CodeType) -> WithSites:
    steps = steps_of(code)
    calls: set[int] = set()
    entries: list[int] = []
    for index, step in enumerate(steps):
        if step.name in _ENTERING:
            calls.update(range(steps[index - 1].reported, step.first, 2))
            entries.append(step.reported)
        elif step.name == "LOAD_SPECIAL" and "enter" in step.detail:
            # 3.14: the call, COPY, LOAD_SPECIAL __exit__, SWAP, SWAP, LOAD_SPECIAL __enter__, CALL
            calls.update(range(steps[index - 5].reported, steps[index - 4].first, 2))
            entries.append(steps[index + 1].reported)
    return WithSites(frozenset(calls), tuple(entries))


def body_start(code: CodeType, entry: int) -> BodyStart:
    """Where the body begins of the `with` that is entered at `entry`.

    Without `as`, it is where the value of `__enter__` is dropped. Else the instruction after the
    target is bound will do, unless it lies in a `try` that opens the body (whose handlers and
    `finally` would see the exception) or behind a body that has no code.
    """
    steps = steps_of(code)
    index = next(index for index, step in enumerate(steps) if step.reported == entry) + 1
    target, body = index, _after_target(steps, index)
    handlers = _Handlers(code)
    is_dropped = steps[target].name == "POP_TOP"
    is_ours = body is not None and handlers.at(steps[body].last) == handlers.at(steps[target].last)
    start = body if body is not None and is_ours and not is_dropped else target
    following = steps[start + 1] if start + 1 < len(steps) else steps[start]
    is_same = handlers.at(following.last) == handlers.at(steps[start].last)
    last = following if is_same and start != target else steps[start]
    return BodyStart(steps[start].first, last.last, start == target and not is_dropped)


def _after_target(steps: list[_Step], index: int) -> int | None:
    """The index of the first step after what `__enter__` returned has left the stack."""
    depth = 1
    for position in range(index, len(steps) - 1):
        step = steps[position]
        if "JUMP" in step.name:
            return None
        if depth == 1 and step.name == "STORE_FAST_LOAD_FAST":
            depth = 0  # 3.13 joins the target with the first read of a body on the same line
        else:
            depth += step.effect
        if depth == 0:
            return position + 1
    return None


@final
class _Handlers:
    """Which exception handler covers which instruction.

    Up to 3.10 there is no table: a `try` is entered by an instruction, where the skip can fire.
    """

    def __init__(self, code: CodeType) -> None:
        self._ranges = list(_exception_table(getattr(code, "co_exceptiontable", b"")))

    def at(self, offset: int) -> int | None:
        return next(
            (handler for start, end, handler in self._ranges if start <= offset < end), None
        )


def _exception_table(table: bytes) -> Iterator[tuple[int, int, int]]:
    """Start, end and handler of each range in bytes (CPython: exception_handling_notes.txt)."""
    numbers = _varints(table)
    for start in numbers:
        length, handler, _ = next(numbers), next(numbers), next(numbers)
        yield start * 2, (start + length) * 2, handler * 2


def _varints(table: bytes) -> Iterator[int]:
    value = 0
    for byte in table:
        value = (value << 6) | (byte & 63)
        if not byte & 64:
            yield value
            value = 0

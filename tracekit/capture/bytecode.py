"""Read from bytecode where a `with` is entered and where its body begins."""

from __future__ import annotations

import dis
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from tracekit.capture.percode import PerCode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType

_ENTERING: Final = frozenset({"BEFORE_WITH", "SETUP_WITH", "BEFORE_ASYNC_WITH", "SETUP_ASYNC_WITH"})
_SILENT: Final = frozenset({"NOP", "EXTENDED_ARG", "CACHE"})


@final
@dataclass(frozen=True)
class WithSites:
    """Where a code object enters context managers, as byte offsets in the order of the code."""

    calls: frozenset[int]  # instructions whose result is entered at once, with their caches
    entries: tuple[int, ...]  # instructions that run `__enter__`


@final
@dataclass(frozen=True)
class BodyStart:
    """Where to raise so that exactly our `with` sees it."""

    offset: int
    is_before_target: bool  # then the name after `as` is not bound by Python


_sites: PerCode[WithSites] = PerCode()


def with_sites(code: CodeType) -> WithSites:
    sites = _sites.get(code)
    if sites is None:
        sites = _find_sites(code)
        _sites.put(code, sites)
    return sites


def _steps(code: CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in _SILENT]


def _find_sites(code: CodeType) -> WithSites:
    steps = _steps(code)
    calls: set[int] = set()
    entries: list[int] = []
    for index, step in enumerate(steps):
        if step.opname in _ENTERING:
            calls.update(range(steps[index - 1].offset, step.offset, 2))
            entries.append(step.offset)
        elif step.opname == "LOAD_SPECIAL" and "enter" in step.argrepr:
            # 3.14: the call, COPY, LOAD_SPECIAL __exit__, SWAP, SWAP, LOAD_SPECIAL __enter__, CALL
            calls.update(range(steps[index - 5].offset, steps[index - 4].offset, 2))
            entries.append(steps[index + 1].offset)
    return WithSites(frozenset(calls), tuple(entries))


def body_start(code: CodeType, entry: int) -> BodyStart:
    """Where the body begins of the `with` that is entered at `entry`.

    The instruction after the target is bound will do, unless it lies in a `try` that opens the body
    (whose handlers and `finally` would see the exception) or behind a body that has no code.
    """
    steps = _steps(code)
    index = next(index for index, step in enumerate(steps) if step.offset == entry) + 1
    bound = _after_target(steps, index)
    handlers = _Handlers(code)
    first = steps[index].offset
    if bound is not None and handlers.at(bound) == handlers.at(first):
        return BodyStart(bound, is_before_target=False)
    return BodyStart(first, is_before_target=steps[index].opname != "POP_TOP")


def _after_target(steps: list[dis.Instruction], index: int) -> int | None:
    """The offset where what `__enter__` returned has left the stack: the target is bound."""
    depth = 1
    for position in range(index, len(steps) - 1):
        step = steps[position]
        if "JUMP" in step.opname:
            return None
        if depth == 1 and step.opname == "STORE_FAST_LOAD_FAST":
            depth = 0  # 3.13 joins the target with the first read of a body on the same line
        else:
            argument = step.arg if step.opcode >= dis.HAVE_ARGUMENT else None
            depth += dis.stack_effect(step.opcode, argument)
        if depth == 0:
            return steps[position + 1].offset
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

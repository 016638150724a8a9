"""What a user meant an edit to touch, held against what it touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

from tracekit.errors import InputError
from tracekit.tracing.verified.report import EditCheck, EditReport, Landing, Problem


@final
@dataclass(frozen=True)
class Meant:
    """Which rows, positions and modules an edit is to touch; None: nothing is said."""

    rows: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    modules: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        rows: Sequence[int] | int | None,
        positions: Sequence[int] | int | None,
        modules: Sequence[str] | str | None,
    ) -> Meant:
        """As a user says it; InputError for what is no list of numbers, or of paths."""
        paths = (modules,) if isinstance(modules, str) else modules
        return cls(
            _numbers(rows, "rows"),
            _numbers(positions, "positions"),
            None if paths is None else tuple(getattr(each, "path", each) for each in paths),
        )

    def __bool__(self) -> bool:
        return any(each is not None for each in (self.rows, self.positions, self.modules))


def _numbers(given: Sequence[int] | int | None, what: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    each = [given] if isinstance(given, int) else list(given)
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in each):  # pyright: ignore[reportUnnecessaryIsInstance] - what a user gives
        raise InputError(
            f"{what}= of a verified edit is a number or a list of them, not {given!r}."
        )
    return tuple(each)


def with_expectation(report: EditReport, meant: Meant) -> EditReport:
    """The report, with a problem for whatever was touched and not meant, or meant and not touched.

    What is missed is judged of all edits together: each may have its own part of what is meant.
    """
    found: list[Problem] = []
    for edit in report.edits:
        found += _strayed(report, edit, meant)
    return report.with_problems([*found, *_missed(report, meant)])


def _strayed(report: EditReport, edit: EditCheck, meant: Meant) -> Iterator[Problem]:
    for landing in edit.landings:
        if not landing.elements[0]:
            continue
        if meant.modules is not None and not _is_meant(landing, meant.modules):
            yield Problem(
                "wrong-module",
                f"{landing.site} was edited, and {', '.join(meant.modules)} was meant.",
                edit.index,
            )
        rows = [touched.row for touched in landing.rows]
        wrong = [row for row in rows if meant.rows is not None and row not in meant.rows]
        if wrong:
            assert meant.rows is not None
            yield Problem(
                "wrong-row",
                f"{landing.site} was edited in {_listed('row', wrong)}, and "
                f"{_listed('row', meant.rows)} was meant.",
                edit.index,
            )
        if meant.positions is not None:
            yield from _strayed_positions(report, edit, landing, meant.positions)


def _strayed_positions(
    report: EditReport, edit: EditCheck, landing: Landing, positions: tuple[int, ...]
) -> Iterator[Problem]:
    for touched in landing.rows:
        if touched.positions is None:
            yield Problem(
                "wrong-position",
                f"{landing.site} was edited, whose axis of positions could not be told, and "
                f"{_listed('position', positions)} was meant.",
                edit.index,
            )
            return
        own = _own(report, touched.row, positions)
        wrong = [each for each in touched.positions if each not in own]
        if wrong:
            yield Problem(
                "wrong-position",
                f"{landing.site} was edited at {_shown(report, touched.row, wrong)} of row "
                f"{touched.row}, and {_shown(report, touched.row, own)} was meant.",
                edit.index,
            )


def _missed(report: EditReport, meant: Meant) -> Iterator[Problem]:
    landings = [each for edit in report.edits for each in edit.landings if each.elements[0]]
    touched = {one.row for each in landings for one in each.rows}
    missed = [row for row in meant.rows or () if row not in touched]
    if missed:
        yield Problem("missed-row", f"{_listed('row', missed)} was meant, and no edit touched it.")
    for row in sorted(touched if meant.rows is None else touched & {*meant.rows}):
        of_row = [one for each in landings for one in each.rows if one.row == row]
        if any(one.positions is None for one in of_row):
            continue
        there = {place for one in of_row for place in one.positions or ()}
        left = [each for each in _own(report, row, meant.positions or ()) if each not in there]
        if left:
            yield Problem(
                "missed-position",
                f"{_shown(report, row, left)} of row {row} was meant, and no edit touched it.",
            )
    for module in meant.modules or ():
        if not any(_is_meant(each, (module,)) for each in landings):
            yield Problem("missed-module", f"{module} was meant, and no edit touched it.")


def _is_meant(landing: Landing, modules: Sequence[str]) -> bool:
    whole = (landing.site, landing.path)
    names = {name for each in whole for name in (each, each.partition(".")[2])}
    return any(fnmatchcase(name, module) for name in names for module in modules)


def _own(report: EditReport, row: int, positions: Sequence[int]) -> list[int]:
    """The positions as numbers from 0, in one row."""
    length = len(report.tokens[row]) if row < len(report.tokens) else 0
    return [each if each >= 0 else length + each for each in positions]


def _shown(report: EditReport, row: int, positions: Sequence[int]) -> str:
    tokens = report.tokens[row] if row < len(report.tokens) else ()
    shown = [
        "padding" if each < 0 else f"{each} {tokens[each]!r}" if each < len(tokens) else str(each)
        for each in positions[:8]
    ]
    more = f" and {len(positions) - 8} more" if len(positions) > 8 else ""
    return f"position{'s' if len(positions) > 1 else ''} {', '.join(shown)}{more}"


def _listed(what: str, numbers: Sequence[int]) -> str:
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"

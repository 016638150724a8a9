"""`tracekit tree`: the modules of a model, what they weigh and gave, and their standard names."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

from tracekit.cli.naming import Naming, namings
from tracekit.cli.opening import open_model, open_outside, quiet_transformers
from tracekit.cli.output import clipped, say, say_json, styled, table, width
from tracekit.cli.status import FINE
from tracekit.errors import InputError
from tracekit.models.activity import Activity, activity
from tracekit.models.language import LanguageModel
from tracekit.models.outline import Branch, outline

_HEAD = ["module", "kind", "parameters", "weights", "standard names"]
_HEAD_OF_RUN = ["gives", "rms", "largest"]
_UNDECLARED = (
    "no standard names: its architecture is not declared; with --input TEXT they are looked for\n"
    "by its structure, and proved with a run"
)


def run(options: Namespace) -> int:
    """Print the tree, or the list of names."""
    if options.input == "":
        raise InputError('--input "": there is nothing to run; give a text.')
    with quiet_transformers():
        model = open_model(options) if options.input else open_outside(options)
        if options.names:
            _tell_names(options, _learned(model, options.input))
        else:
            ran = activity(model, options.input) if options.input else {}
            _tell_tree(options, outline(model, fold=not options.full), ran)
    return FINE


def _tell_tree(options: Namespace, whole: Branch, ran: dict[str, Activity]) -> None:
    if options.json:
        say_json({"model": str(options.model), **_json(whole, options.depth, ran)})
        return
    rows = [[*_HEAD, *(_HEAD_OF_RUN if ran else ())], *_rows(whole, options.depth, ran)]
    if ran:  # what it gave is what was asked for; the weights are in the tree without a run
        rows = [row[:3] + row[5:] + row[4:5] for row in rows]
    head, *lines = (clipped(line, width()) for line in table(rows, right=[2]))
    say(styled(head, "bold"))
    say("\n".join(lines))


def _rows(
    branch: Branch,
    depth: int | None,
    ran: dict[str, Activity],
    front: str = "",
    below: str = "",
) -> Iterator[list[str]]:
    """A row for a branch and for each in it; `front` and `below` are the lines of the tree."""
    hidden = sum(len(each.paths) for each in branch) - len(branch.paths) if depth == 0 else 0
    name = branch.name + (f" (x{len(branch.paths)})" if _is_folded(branch) else "")
    yield [
        f"{front}{name}",
        branch.kind + (f" + {hidden} inside" if hidden else ""),
        f"{branch.parameters:,}" if branch.parameters else "",
        _weights(branch),
        " ".join(branch.names),
        *_gave(branch, ran),
    ]
    if depth == 0:
        return
    for each in branch.branches:
        is_last = each is branch.branches[-1]
        lines = ("└── ", "    ") if is_last else ("├── ", "│   ")
        left = None if depth is None else depth - 1
        yield from _rows(each, left, ran, below + lines[0], below + lines[1])


def _is_folded(branch: Branch) -> bool:
    return len(branch.paths) > 1 and "-" in branch.name


def _weights(branch: Branch) -> str:
    if branch.same_as:
        return f"= {branch.same_as}"
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in branch.weights)


def _gave(branch: Branch, ran: dict[str, Activity]) -> list[str]:
    """The shape that a module gave and its size; of several, of the first and of the last."""
    found = [ran[path] for path in branch.paths if path in ran]
    if not found:
        return ["", "", ""] if ran else []
    told = "x".join(map(str, found[0].shape))
    told += f" {found[0].dtype}" if found[0].rms is None else ""
    told += f" in {found[0].calls} calls" if found[0].calls > 1 else ""
    nans = sum(each.nans for each in found)
    told += f", {nans} nan" if nans else ""
    return [told, _span([each.rms for each in found]), _span([e.largest for e in found])]


def _span(sizes: Sequence[float | None]) -> str:
    first, last = sizes[0], sizes[-1]
    if first is None or last is None:
        return ""
    return f"{first:.3g}" if len(sizes) == 1 else f"{first:.3g} .. {last:.3g}"


def _json(branch: Branch, depth: int | None, ran: dict[str, Activity]) -> dict[str, Any]:
    left = None if depth is None else depth - 1
    inside = [] if depth == 0 else [_json(each, left, ran) for each in branch.branches]
    gave = {path: ran[path].to_json() for path in branch.paths if path in ran}
    return {**branch.to_json(), "branches": inside, **({"gave": gave} if ran else {})}


def _learned(model: LanguageModel, text: str | None) -> list[Naming]:
    """The standard names; of an architecture that is not declared, those that a run proves."""
    found = namings(model)
    if not found and text:
        model.check_names(text)
        found = namings(model)
    return found


def _tell_names(options: Namespace, found: list[Naming]) -> None:
    if options.json:
        say_json({"model": str(options.model), "names": [each.to_json() for each in found]})
        return
    if not found:
        say(_UNDECLARED)
    heads: list[str] = []
    for each in found:
        if each.owner not in heads:
            heads.append(each.owner)
    for head in heads:
        rows = [each.row() for each in found if each.owner == head]
        say(styled(f"{head}.", "bold"))
        say("\n".join(clipped(f"  {line}", width()) for line in table(rows)))

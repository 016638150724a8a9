"""The intervention graph: what the lines of a block asked for, in the order of the model."""

from __future__ import annotations

from collections import Counter

from tracekit.tracing.graph import Graph, Node
from tracekit.viz.parts import Item, Part, Table

_EDITS = ("write", "edit", "skip")


def graph_of(graph: Graph) -> list[Part]:
    """The parts of the picture: a table with a row for each request."""
    has_steps = any(node.step for node in graph)
    has_calls = any(node.call for node in graph)
    has_invokes = len({node.invoke for node in graph}) > 1
    columns = ["line", "code", "asks for", "of", "value"]
    columns += ["step"] * has_steps + ["call"] * has_calls + ["invoke"] * has_invokes
    rows: list[tuple[Item, ...]] = []
    last = None
    for node in graph:
        items = [*_code(node, last), *_request(node)]
        items += [Item(str(node.step), "number")] * has_steps
        items += [Item(str(node.call), "number")] * has_calls
        items += [Item("all" if node.invoke is None else str(node.invoke), "number")] * has_invokes
        rows.append(tuple(items))
        last = node
    return [Table(tuple(columns), tuple(rows))]


def told(graph: Graph) -> str:
    """How many requests of which kind, in words."""
    counts = Counter(node.kind for node in graph)
    kinds = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items())
    return (
        f"What the block asked for, in order: {kinds}" if kinds else "The block asked for nothing"
    )


def _code(node: Node, last: Node | None) -> tuple[Item, Item]:
    """The line and its source, once for all that one line asks for in a row."""
    if last is not None and (last.file, last.line, last.step) == (node.file, node.line, node.step):
        return Item("", "number"), Item("")
    return Item(str(node.line) if node.line else "", "number", node.file), Item(node.source, "code")


def _request(node: Node) -> tuple[Item, ...]:
    value = node.value if node.shape is None else f"{list(node.shape)} {node.dtype}"
    kind = f"{node.kind} (deferred)" if node.is_deferred else node.kind
    return (
        Item(kind, "note" if node.kind in _EDITS else ""),
        Item(node.what, "code"),
        Item(value, "whole"),
    )

"""Attention patterns: a small picture for each head, from each token to those that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tracekit.errors import InputError
from tracekit.tracing.named_cache import NamedCache
from tracekit.viz.parts import Grid, Grids, Part, Places, Scale
from tracekit.viz.wording import as_numbers


def pattern_in(cache: NamedCache, layer: int | None) -> Tensor:
    """The pattern of a layer in a cache; InputError if it is not said which."""
    if layer is None:
        layers = ", ".join(map(str, cache.layers_of("pattern")))
        raise InputError(f"of which layer is the attention to be shown? layer= is one of {layers}.")
    return cache["pattern", layer]


def attention_of(pattern: Tensor, tokens: Sequence[str] | None) -> list[Part]:
    """The parts of a picture of `pattern`: `[heads, queries, keys]`, or of one row, or of one head.

    `tokens` are those of the keys; the queries are the last of them.
    """
    shape = list(pattern.shape)
    if pattern.dim() == 4 and len(pattern) == 1:
        pattern = pattern[0]
    is_one_head = pattern.dim() == 2  # nobody said which
    if is_one_head:
        pattern = pattern[None]
    if pattern.dim() != 3 or not pattern.numel():
        raise InputError(
            f"a pattern of attention is [heads, queries, keys], not {shape}; "
            f"take one row of a batch, as in pattern[0]."
        )
    _, queries, keys = pattern.shape
    if tokens is not None and len(tokens) != keys:
        raise InputError(f"{len(tokens)} tokens, and a pattern of {keys} keys: {shape}.")
    labels = tuple(map(str, range(keys) if tokens is None else tokens))
    behind = keys - queries
    rows = Places("from", labels[behind:], first=behind, is_named=False)
    columns = Places("to", labels, is_named=False)
    numbers: Any = as_numbers(pattern)
    grids = tuple(
        Grid(
            rows,
            columns,
            head,
            "" if is_one_head else f"head {number}",
            joint=" \N{RIGHTWARDS ARROW} ",
            told="" if is_one_head else f"head {number}",
        )
        for number, head in enumerate(numbers)
    )
    return [Grids(grids, Scale("sequential", 0.0, 1.0, "weight"), is_pattern=True)]

"""Prove the standard names of one model by its numbers, with plain hooks alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tracekit.architectures.binding import Names
from tracekit.architectures.check_attention import attention
from tracekit.architectures.check_identities import head, identities, joints
from tracekit.architectures.check_shapes import presence
from tracekit.architectures.check_weights import weights
from tracekit.architectures.check_writes import writes
from tracekit.architectures.findings import Claim, Proof
from tracekit.architectures.witness import Run, layers_of, observe


def prove(names: Names, run: Run, *, with_writes: bool = True) -> Proof:
    """Run a model and hold each of its names against the numbers; `run` is one forward pass.

    With `with_writes`, it runs once more for every name, with that value changed.
    """
    with torch.no_grad():
        return Proof(names.family.name, list(_claims(names, run, with_writes)))


def _claims(names: Names, run: Run, with_writes: bool) -> Iterator[Claim]:
    seen = observe(names, run, raw=True)
    yield from presence(names, seen)
    for where in layers_of(names):
        yield from identities(names, where, seen)
        yield from weights(names, where, seen)
    for stack in names.stacks:
        yield from joints(names, stack, seen)
    yield from head(names, seen)
    if with_writes:
        yield from attention(names, run, seen)
        yield from writes(names, run, seen)

"""Does a write to a named value change exactly what it must?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tracekit.architectures.binding import Names
from tracekit.architectures.check_identities import ADDED, identities, joints
from tracekit.architectures.findings import Claim
from tracekit.architectures.schema import Residual, Sharing
from tracekit.architectures.witness import (
    ROOT,
    Run,
    Seen,
    Testimony,
    Where,
    Write,
    layers_of,
    observe,
)
from tracekit.core.nest import tensors

# What a write leaves as it is, though it comes later: parts of one tensor, and what runs beside.
_LEAVES = {
    "q": ("k", "v"),
    "k": ("q", "v"),
    "v": ("q", "k"),
    "mlp_pre": ("mlp_pre_linear",),
    "mlp_pre_linear": ("mlp_pre",),
}

# What only the next step of a generation reads.
_FOR_LATER = ("ssm_state",)


def writes(names: Names, run: Run, seen: Testimony) -> Iterator[Claim]:
    """Add a little to every named value in turn, and look at what moves."""
    for where in [ROOT, *layers_of(names)]:
        for bound in list(names.points(where.path)):
            found = seen.named.get((where, bound.name))
            if (
                bound.sharing is not Sharing.UNUSED
                and found is not None
                and found.value.is_floating_point()
            ):
                write = Write(where, bound.name, delta_for(found.value))
                yield from _of_one(names, run, seen, found, write)


def delta_for(value: Tensor, seed: int = 0) -> Tensor:
    """A random change of about a fifth of a value's size."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(value.shape, generator=generator).to(value)
    return noise * (0.2 * value.double().std().clamp_min(1e-3)).to(value.dtype)


def _of_one(names: Names, run: Run, seen: Testimony, found: Seen, write: Write) -> Iterator[Claim]:
    where, name = write.where, write.name
    moved = observe(names, run, write, raw=True)
    yield _untouched(names, seen, found, moved, write)
    yield _arrives(seen, moved, write)
    known = {_key(claim) for claim in _after(names, seen, write) if claim.is_right is False}
    found_now = (claim for claim in _after(names, moved, write) if claim.is_right is False)
    broken = [claim for claim in found_now if _key(claim) not in known]
    for claim in broken:
        text = f"with a write to it, {claim.name} is still {claim.claim}"
        why = f"{claim.where}{': ' if claim.why else ''}{claim.why}"
        yield replace(claim, where=str(where), name=name, claim=text, why=why)
    if not broken:
        yield Claim(str(where), name, "with a write to it all identities hold", True)


def _key(claim: Claim) -> tuple[str, str, str]:
    return claim.where, claim.name, claim.claim


def _after(names: Names, moved: Testimony, write: Write) -> Iterator[Claim]:
    """The identities that must hold whatever was written, but for that of the value itself."""
    for stack in names.stacks:
        first = write.where.index if stack == write.where.stack else 0
        for claim in joints(names, stack, moved):
            if int(claim.where.rpartition(".")[2]) >= first and write.where != ROOT:
                yield claim
    for each in layers_of(names):
        for claim in identities(names, each, moved):
            if (each, claim.name) != (write.where, write.name):
                yield claim


def _beside(names: Names, write: Write) -> set[tuple[Where, str]]:
    """What a write leaves as it is, though it may come later."""
    left = _LEAVES.get(write.name, ())
    layer = names.layers[write.where.path]
    if layer.block is not None and layer.block.residual is Residual.PARALLEL:
        left = (*left, *(each for each in ADDED if write.name in ADDED and each != write.name))
    return {(write.where, each) for each in left}


def _untouched(names: Names, seen: Testimony, found: Seen, moved: Testimony, write: Write) -> Claim:
    """That nothing in front of a write, and nothing beside it, has moved."""
    where, name = write.where, write.name
    claim = "a write moves nothing in front, or beside"
    beside = _beside(names, write)
    for key, was in seen.named.items():
        is_before = was.order < found.order and was.source != found.source
        now = moved.named.get(key)
        has_moved = now is None or not _is_as_seen(was.value, now.value)
        if has_moved and (is_before or key in beside):
            what = f"{key[0]} {key[1]} has moved"
            return Claim(str(where), name, claim, False, why=what)
    return Claim(str(where), name, claim, True)


def _arrives(seen: Testimony, moved: Testimony, write: Write) -> Claim:
    """That a write is seen where it was made, and by what comes behind it."""
    where, name, delta = write.where, write.name, write.delta
    found, now = seen.named[where, name], moved.value(where, name)
    if now is None or not torch.equal(now, found.value + delta):
        return Claim(str(where), name, "a write is there", False)
    claim = "a write arrives in what the model returns"
    if name in _FOR_LATER:
        return Claim(str(where), name, claim, None, why="the next step of a generation reads it")
    pairs = zip(tensors(seen.result), tensors(moved.result), strict=False)
    if any(not torch.equal(one, other) for one, other in pairs):
        return Claim(str(where), name, claim, True)
    if any(not _is_as_seen(each, moved.raw.get(site)) for site, each in seen.raw.items()):
        why = "what comes behind it has moved, but what the model returns does not hang on that"
        return Claim(str(where), name, claim, None, why=why)
    return Claim(str(where), name, claim, False)


def _is_as_seen(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)

"""Are two caches the same, to the bit, in types, order and attributes?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracekit import Cache
from tracekit.core.nest import map_leaves
from tracekit.errors import CacheError
from tracekit.tracing.entries import Entry


def assert_same(one: Any, other: Any) -> None:
    """Equal to the bit, of the same types and in the same order; attributes as well."""
    if isinstance(one, Tensor):
        assert type(one) is type(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(bits(one), bits(other))
        return
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
    leaves: list[list[Any]] = [[], []]
    for found, nest in zip(leaves, (one, other), strict=True):
        map_leaves(found.append, nest)
    assert len(leaves[0]) == len(leaves[1])
    if len(leaves[0]) == 1 and leaves[0][0] is one:
        assert repr(one) == repr(other)
        return
    for left, right in zip(*leaves, strict=True):
        assert_same(left, right)


def bits(tensor: Tensor) -> Tensor:
    plain = tensor.detach().resolve_conj().contiguous()
    if plain.dtype.is_complex:
        plain = torch.view_as_real(plain)
    flat = plain.as_strided((plain.numel(),), (1,))  # a single number may have any stride
    return flat.view(torch.uint8)


def assert_same_cache(one: Cache, other: Cache) -> None:
    assert list(one) == list(other)
    for path in one:
        assert len(one[path]) == len(other[path])
        for left, right in zip(one[path], other[path], strict=True):
            assert_same_entry(left, right)


def assert_same_entry(left: Entry, right: Entry) -> None:
    assert (left.path, left.step, left.call, left.during) == (
        right.path,
        right.step,
        right.call,
        right.during,
    )
    assert repr(left) == repr(right)
    for name in ("output", "inputs", "grad"):
        assert_same(value_of(left, name), value_of(right, name))


def value_of(entry: Entry, name: str) -> Any:
    try:
        return getattr(entry, name)
    except CacheError as error:
        return str(error)

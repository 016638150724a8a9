"""What a recorder keeps: tensors detached, moved and cast; a note in the place of what changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.tiny_models import make
from tracekit import Note
from tracekit.core.keep import Keep, note

VALUES = torch.arange(6.0).reshape(2, 3)
CPU = torch.device("cpu")


def keep(
    device: torch.device | None = CPU,
    dtype: torch.dtype | None = None,
    detach: bool = True,
    clone: bool = False,
) -> Keep:
    return Keep(device, dtype, detach, clone)


def share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@pytest.mark.parametrize("place", [CPU, None])
def test_a_tensor_that_stays_where_it_is_is_not_copied(place: Any) -> None:
    kept = keep(place)(VALUES)
    assert share(kept, VALUES) and torch.equal(kept, VALUES)
    assert keep(place).shares(VALUES)


def test_a_clone_is_a_copy() -> None:
    kept = keep(clone=True)(VALUES)
    assert not share(kept, VALUES) and torch.equal(kept, VALUES)
    assert not keep(clone=True).shares(VALUES)


def test_detached_values_have_no_graph_and_others_keep_theirs() -> None:
    value = VALUES.clone().requires_grad_() * 2
    assert not keep()(value).requires_grad
    kept = keep(detach=False)(value)
    assert kept.requires_grad and kept.grad_fn is not None
    assert keep(detach=False, dtype=torch.float64)(value).grad_fn is not None


@pytest.mark.parametrize(
    ("dtype", "cast"),
    [
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.float16),
        (torch.int64, torch.int64),
        (torch.bool, torch.bool),
        (torch.complex64, torch.complex64),
    ],
)
def test_a_dtype_casts_floating_point_alone(dtype: torch.dtype, cast: torch.dtype) -> None:
    value = VALUES.to(dtype)
    kept = keep(dtype=torch.float16)(value)
    assert kept.dtype == cast
    assert keep(dtype=torch.float16).shares(value) == share(kept, value)


def test_a_device_moves_every_tensor_of_a_structure() -> None:
    kept = keep(torch.device("meta"))((VALUES, {"a": [VALUES]}))
    assert kept[0].is_meta and kept[1]["a"][0].is_meta
    assert not keep(torch.device("meta")).shares(VALUES)


def test_inference_tensors_are_copied() -> None:
    with torch.inference_mode():
        value = VALUES.clone()
        kept = keep()(value)
    assert not share(kept, value)
    assert not keep().shares(value)


def test_plain_values_are_kept_and_objects_noted() -> None:
    plain = (3, 2.5, True, "text", None, torch.float32, CPU, VALUES.shape, slice(1, 2), 1j, b"x")
    assert keep()(plain) == plain
    assert keep()(object()) == Note("object")
    assert keep()((VALUES, torch.nn.Linear(1, 1)))[1] == Note("Linear")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_kv_cache_is_noted_with_its_length_then(kind: str) -> None:
    model, inputs = make("llama")
    kv_cache: Any = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=16)
    )
    empty = note(kv_cache)
    with torch.no_grad():
        model(**inputs, past_key_values=kv_cache, use_cache=True)
    assert empty == Note(type(kv_cache).__name__, 0)
    assert note(kv_cache) == Note(type(kv_cache).__name__, 8)
    assert empty.length == 0


def test_a_cache_of_states_alone_is_noted_without_a_length() -> None:
    model, inputs = make("mamba")
    with torch.no_grad():
        states = model(**inputs, use_cache=True).cache_params
    assert note(states).type == type(states).__name__

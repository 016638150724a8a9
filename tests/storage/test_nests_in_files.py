"""Whatever a module may take or return comes back from a file: nests drawn at random."""

from __future__ import annotations

import collections
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from tests.storage.same import assert_same
from tracekit import Cache, Note, load_cache
from tracekit.core.site import Slot
from tracekit.errors import UnsupportedError
from tracekit.tracing.cache import Recorded
from tracekit.tracing.changes import Changes
from tracekit.tracing.classes import Unclassed
from tracekit.tracing.entries import ABSENT, Entry
from tracekit.tracing.timeline import Timeline

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e8m0fnu,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]


def through_a_file(value: Any) -> Any:
    """`value`, as the output of a module, written and read again."""
    cache = Cache()
    entry = Entry("model", 0, 0, ABSENT, value)
    cache._freeze(Recorded({"model": [entry]}, {}, ["model"], Changes(Timeline())))
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "run")
        return load_cache(Path(folder) / "run")["model"].output


@st.composite
def some_tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = torch.Size(shape).numel() * dtype.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        content = bytes(each & 1 for each in content)
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if size else torch.empty(0)
    tensor = flat.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    return draw(
        st.sampled_from(
            [
                tensor,
                tensor.mT if tensor.dim() > 1 else tensor,
                tensor.expand(2, *shape),
                tensor[..., ::2] if shape else tensor,
                tensor[1:] if shape else tensor,
            ]
        )
    )


plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | st.sampled_from(
        [
            torch.float16,
            torch.device("cpu"),
            torch.Size([1, 2]),
            slice(1, None, 2),
            Note("DynamicCache", 3),
            Note("Thing"),
            Slot.INPUT,
            np.float64(0.1),
        ]
    )
)
nests = st.recursive(
    plain | some_tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        | st.dictionaries(st.text(), inner, max_size=2).map(collections.OrderedDict)
        | st.builds(BaseModelOutput, last_hidden_state=some_tensors(), attentions=st.tuples(inner))
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(nests)
def test_any_nest_comes_back(nest: Any) -> None:
    assert_same(nest, through_a_file(nest))


class Pair(NamedTuple):
    left: Tensor
    right: int


@dataclasses.dataclass
class Mine:
    hidden: Tensor
    count: int = 0


def test_an_output_of_transformers_comes_back_with_its_class_and_attributes() -> None:
    found = through_a_file(CausalLMOutput(logits=torch.ones(2)))
    assert type(found) is CausalLMOutput
    assert found.loss is None
    assert list(found) == ["logits"]
    assert torch.equal(found[0], found.logits)


def test_what_torch_returns_comes_back() -> None:
    found = through_a_file(torch.max(torch.tensor([[1.0, 3.0]]), 1))
    assert type(found) is torch.return_types.max
    assert found.indices.item() == 1


def test_objects_of_a_users_own_class_come_back_as_a_mapping_with_attributes() -> None:
    found = through_a_file((Pair(torch.ones(1), 2), Mine(torch.zeros(1), 3)))
    pair, mine = found
    assert isinstance(pair, Unclassed)
    assert isinstance(mine, Unclassed)
    assert torch.equal(pair.left, torch.ones(1))
    assert (pair["right"], mine.count) == (2, 3)
    assert repr(mine) == "Unclassed(Mine: hidden, count)"


def test_what_is_no_value_is_refused_by_its_place() -> None:
    with pytest.raises(
        UnsupportedError, match=r"model.output.1 \(step 0\) is a object, which can't"
    ):
        through_a_file([1, object()])


def test_a_class_that_a_file_names_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("it was called")

    monkeypatch.setattr(CausalLMOutput, "__init__", refused)
    made = CausalLMOutput.__new__(CausalLMOutput)
    made["logits"] = torch.ones(1)
    assert torch.equal(through_a_file(made).logits, torch.ones(1))

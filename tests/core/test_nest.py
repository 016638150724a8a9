"""Any structure is walked, rebuilt as what it was, and compared with another in words."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding, DynamicCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from tracekit.core.nest import (
    describe,
    first_input,
    first_tensor,
    map_leaves,
    misfit,
    replace_first_tensor,
    tensors,
)

A, B, C = torch.zeros(2, 3), torch.ones(4), torch.arange(3)


class Pair(NamedTuple):
    """By name."""

    first: Any
    second: Any


@dataclass
class Box:
    """Changeable."""

    value: Any
    rest: Any = None


@dataclass(frozen=True, slots=True)
class Frozen:
    """Not changeable."""

    value: Any
    rest: Any = 7


@dataclass
class Derived:
    """With a field that its constructor does not take."""

    value: Any
    doubled: Any = field(init=False)

    def __post_init__(self) -> None:
        self.doubled = self.value * 2


class Named(list[Any]):
    """A list whose constructor takes something else."""

    def __init__(self, *, name: str) -> None:
        super().__init__()
        self.name = name


class Reading(Mapping[str, Any]):
    """A mapping of the user's that cannot be changed."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


STRUCTURES: dict[str, Any] = {
    "tensor": A,
    "tuple": (A, B),
    "empty tuple": (),
    "list": [A, 3, None],
    "nested": ((A, [B, {"c": C}]), "text", None, 2.5),
    "named tuple": Pair(A, (B, C)),
    "dict": {"a": A, "b": {"c": B}},
    "ordered dict": OrderedDict(z=A, a=B),
    "defaultdict": defaultdict(list, a=A),
    "user dict": UserDict(a=A, b=3),
    "encoding": BatchEncoding({"input_ids": C, "attention_mask": B}),
    "dataclass": Box(A, [B]),
    "frozen dataclass": Frozen(A, (B,)),
    "derived dataclass": Derived(A),
    "model output": CausalLMOutput(logits=A, hidden_states=(B, C)),
    "return type": torch.max(A, 1),
    "size": A.shape,
    "parameter": torch.nn.Parameter(A.clone()),
}
BY_NAME = pytest.mark.parametrize("name", STRUCTURES)


def plain(nest: Any) -> Any:
    """The structure without its kinds, and tensors by identity."""
    if isinstance(nest, Tensor):
        return id(nest)
    if isinstance(nest, Mapping):
        return {key: plain(nest[key]) for key in nest}
    if isinstance(nest, (list, tuple)):
        return [plain(item) for item in nest]
    if hasattr(nest, "__dataclass_fields__"):
        return {name: plain(getattr(nest, name)) for name in nest.__dataclass_fields__}
    return nest


@BY_NAME
def test_a_structure_mapped_to_itself_is_the_same_in_kind_and_content(name: str) -> None:
    nest = STRUCTURES[name]
    new = map_leaves(lambda leaf: leaf, nest)
    assert type(new) is type(nest)
    assert plain(new) == plain(nest)


@BY_NAME
def test_mapping_changes_every_tensor_of_the_copy_and_none_of_the_original(name: str) -> None:
    nest = STRUCTURES[name]
    before = plain(nest)
    new = map_leaves(lambda leaf: leaf + 1 if isinstance(leaf, Tensor) else leaf, nest)
    assert plain(nest) == before
    pairs = list(zip(tensors(new), tensors(nest), strict=True))
    assert all(torch.equal(one, other + 1) for one, other in pairs)


@BY_NAME
def test_a_structure_fits_in_its_own_place_also_with_its_first_tensor_replaced(name: str) -> None:
    nest = STRUCTURES[name]
    assert misfit(nest, nest) is None
    found = first_tensor(nest)
    if found is None:
        return
    new = replace_first_tensor(nest, found + 1)
    assert misfit(new, nest) is None
    assert isinstance(nest, Tensor) or type(new) is type(nest)
    assert torch.equal(next(tensors(new)), found + 1)
    assert [id(t) for t in tensors(new)][1:] == [id(t) for t in tensors(nest)][1:]


def test_tensors_come_in_the_order_of_the_structure() -> None:
    assert [id(t) for t in tensors(STRUCTURES["nested"])] == [id(A), id(B), id(C)]
    assert list(tensors(("text", None, 3, DynamicCache()))) == []
    assert list(tensors(None)) == []


def test_the_attributes_of_a_model_output_follow_its_items() -> None:
    new = replace_first_tensor(STRUCTURES["model output"], A + 5)
    assert torch.equal(new.logits, A + 5)
    assert new["logits"] is new.logits and new[0] is new.logits
    assert list(new) == ["logits", "hidden_states"]
    assert STRUCTURES["model output"].logits is A


def test_a_model_output_without_its_first_field_has_the_next() -> None:
    output = CausalLMOutput(loss=None, logits=A)
    assert first_tensor(output) is A
    assert torch.equal(replace_first_tensor(output, A + 1).logits, A + 1)


def test_a_list_with_a_constructor_of_its_own_is_mapped_to_a_list() -> None:
    named = Named(name="x")
    named += [A, 3]
    assert plain(map_leaves(lambda leaf: leaf, named)) == [id(A), 3]


@pytest.mark.parametrize("kind", [Reading, MappingProxyType])
def test_a_mapping_that_cannot_be_changed_is_mapped_to_a_dictionary(kind: Any) -> None:
    mapped = map_leaves(lambda leaf: leaf, kind({"a": A, "b": 2}))
    assert type(mapped) is dict
    assert plain(mapped) == {"a": id(A), "b": 2}


def test_objects_that_are_no_containers_are_leaves() -> None:
    kv_cache = DynamicCache()
    seen: list[Any] = []
    map_leaves(seen.append, (kv_cache, "text", A, Box))
    assert seen[0] is kv_cache and seen[1] == "text" and seen[2] is A and seen[3] is Box


def test_the_first_input_is_the_first_argument_or_else_the_first_keyword() -> None:
    assert first_input(((1, 2), {"a": 3})) == 1
    assert first_input(((), {"a": 3, "b": 4})) == 3
    assert first_input(((), {})) is None


# -- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old", "says"),
    [
        (B, A, "x was Tensor[2, 3] float32 cpu, and Tensor[4] float32 cpu was written"),
        (A.double(), A, "x was Tensor[2, 3] float32 cpu, and Tensor[2, 3] float64 cpu was written"),
        (A.to("meta"), A, "x was Tensor[2, 3] float32 cpu, and Tensor[2, 3] float32 meta was "),
        (3, A, "x was Tensor[2, 3] float32 cpu, and int was written"),
        (None, A, "x was Tensor[2, 3] float32 cpu, and None was written"),
        ((A,), A, "x was Tensor[2, 3] float32 cpu, and tuple of 1 was written"),
        (A, (A, B), "x was tuple of 2, not a tensor"),
        ([A, B], (A, B), "x was tuple of 2, and list of 2 was written"),
        ((A,), (A, B), "x was tuple of 2, and tuple of 1 was written"),
        ((A, B), Pair(A, B), "x was Pair of 2, and tuple of 2 was written"),
        ((A, A), (A, B), "1 of x was Tensor[4]"),
        (((A,), (A,)), ((A,), (B,)), "of x was Tensor[4] float32 cpu"),
        ({"a": A}, {"b": A}, "had 'b'"),
        ({"a": B}, {"a": A}, "'a' of x was Tensor[2, 3]"),
        (Box(B), Box(A), "'value' of x was Tensor[2, 3]"),
        (Frozen(A), Box(A), "x was Box, and Frozen was written"),
        ({"logits": A}, CausalLMOutput(logits=A), "x was CausalLMOutput(logits), and dict(logits)"),
        (BaseModelOutput(A), CausalLMOutput(logits=A), "CausalLMOutput(logits), and BaseModelOutp"),
        (5, (A,), "x was tuple of 1, and int was written"),
        (A, 5, "x was int, not a tensor"),
    ],
    ids=str,
)
def test_a_misfit_is_told_in_words(new: Any, old: Any, says: str) -> None:
    found = misfit(new, old, "x")
    assert found is not None
    assert says in found


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (A + 1, A),
        (A, torch.nn.Parameter(A.clone())),
        (torch.zeros(3, 2).T, A),
        ((A, 5), (A, 3)),
        ((A, "other"), (A, None)),
        ({"b": B, "a": A}, {"a": A, "b": B}),
        (None, None),
    ],
    ids=str,
)
def test_what_differs_in_values_alone_fits(new: Any, old: Any) -> None:
    assert misfit(new, old) is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (A, "Tensor[2, 3] float32 cpu"),
        (C, "Tensor[3] int64 cpu"),
        ((A, B), "tuple of 2"),
        ({"a": A, 3: B}, "dict(a, 3)"),
        (DynamicCache(), "DynamicCache"),
        (None, "None"),
        (4, "int"),
    ],
    ids=str,
)
def test_a_value_is_described_in_one_line(value: Any, says: str) -> None:
    assert describe(value) == says

"""Read, replace and edit values, and skip modules, as plain hooks would."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from tests.tiny_models import make
from tests.tracing.plain import X, changing, plain_hooks, small
from tracekit import Envoy, Model
from tracekit.errors import MisfitError

pytestmark = pytest.mark.usefixtures("each_way")


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


class Pair(NamedTuple):
    """Two tensors by name."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Box:
    """A tensor and a number."""

    value: Tensor
    scale: float = 2.0


class Wrapping(nn.Module):
    """Returns its input in a structure, whose tensors `Summing` adds up."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, value: Tensor) -> Any:
        return self.wrap(value + 1)


class Summing(nn.Module):
    """Takes the structure apart."""

    def __init__(self, unwrap: Any) -> None:
        super().__init__()
        self.unwrap = unwrap

    def forward(self, structure: Any) -> Tensor:
        return self.unwrap(structure) * 10


STRUCTURES = {
    "tuple": (lambda v: (v, v * 2), lambda s: s[0] + s[1]),
    "list": (lambda v: [v, v * 2], lambda s: s[0] + s[1]),
    "dict": (lambda v: {"a": v, "b": None}, lambda s: s["a"]),
    "ordered dict": (lambda v: OrderedDict(a=v), lambda s: s["a"]),
    "named tuple": (lambda v: Pair(v, v * 2), lambda s: s.first + s.second),
    "frozen dataclass": (lambda v: Box(v), lambda s: s.value * s.scale),
    "model output": (lambda v: BaseModelOutput(last_hidden_state=v), lambda s: s[0]),
    "nested": (lambda v: (({"a": [v]}, 3), None), lambda s: s[0][0]["a"][0]),
    "tensor": (lambda v: v, lambda s: s),
}


@pytest.fixture(params=STRUCTURES)
def structured(request: pytest.FixtureRequest) -> nn.Sequential:
    wrap, unwrap = STRUCTURES[request.param]
    return nn.Sequential(Wrapping(wrap), Summing(unwrap))


def test_an_output_is_read_in_the_type_that_the_module_returned(structured: nn.Sequential) -> None:
    model = Model(structured)
    with model.trace(X):
        output = model[0].output
    assert type(output) is type(structured[0](X))


def test_hidden_is_the_first_tensor_of_any_structure(structured: nn.Sequential) -> None:
    model = Model(structured)
    with model.trace(X):
        hidden = model[0].hidden
    assert torch.equal(hidden, X + 1)


def test_assigning_hidden_puts_it_back_into_the_structure(structured: nn.Sequential) -> None:
    model = Model(structured)
    with model.trace(X) as tracer:
        structure = type(model[0].output)
        model[0].hidden = torch.zeros_like(X)
        after = model[0].output
        got = tracer.result
    assert type(after) is structure
    with plain_hooks(structured[0]) as _:
        wrap = structured[0].wrap
    first_is_zero = wrap(X + 1)
    expected = structured[1](_with_zero_first(first_is_zero))
    assert torch.equal(got, expected)


def _with_zero_first(structure: Any) -> Any:
    """The same structure, its first tensor zeroed in place: a way that needs no rebuilding."""
    queue = [structure]
    while queue:
        value = queue.pop(0)
        if isinstance(value, Tensor):
            value.zero_()
            return structure
        if isinstance(value, dict):
            queue = [*value.values(), *queue]
        elif isinstance(value, (tuple, list)):
            queue = [*value, *queue]
        elif isinstance(value, Box):
            queue = [value.value, *queue]
    raise AssertionError("no tensor")


def test_editing_hidden_in_place_is_what_the_model_goes_on_with(structured: nn.Sequential) -> None:
    model = Model(structured)
    with changing(structured[0], _with_zero_first):
        expected = structured(X)
    with model.trace(X) as tracer:
        model[0].hidden[:] = 0
        got = tracer.result
    assert torch.equal(got, expected)


def test_a_whole_structure_can_be_replaced(structured: nn.Sequential) -> None:
    model = Model(structured)
    other = structured[0](X * 3)
    expected = structured[1](structured[0](X * 3))
    with model.trace(X) as tracer:
        model[0].output = other
        got = tracer.result
    assert torch.equal(got, expected)


# -- a real model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_edit_of_a_part_in_place_equals_a_hook_that_makes_it(name: str) -> None:
    model, inputs = make(name)
    traced = Model(model)
    blocks = traced.transformer.h if name == "gpt2" else traced.model.layers

    def edit(output: Tensor) -> Tensor:
        output[:, -1] += 1
        return output

    with changing(blocks[0].module, edit):
        expected = model(**inputs).logits
    with traced.trace(**inputs) as tracer:
        blocks[0].output[:, -1] += 1
        got = tracer.result.logits
    assert torch.equal(got, expected)
    assert not torch.equal(got, model(**inputs).logits)


def test_one_row_of_a_batch_is_edited_alone() -> None:
    model, inputs = make("llama")
    traced = Model(model)
    clean = model(**inputs).logits
    with traced.trace(**inputs) as tracer:
        traced.model.layers[0].output[1] = 0
        got = tracer.result.logits
    assert torch.equal(got[0], clean[0])
    assert not torch.equal(got[1], clean[1])


def test_the_input_of_a_call_by_keyword_alone_is_its_first_keyword() -> None:
    model, inputs = make("llama")
    traced = Model(model)
    with plain_hooks(model, inputs=True) as seen:
        model(**inputs)
    args, kwargs = seen["model.model.layers.0.self_attn"][0]
    assert args == []
    with traced.trace(**inputs):
        attention = traced.model.layers[0].self_attn
        got_args, got_kwargs = attention.inputs
        got = attention.input
    assert got_args == ()
    assert list(got_kwargs) == list(kwargs)
    assert torch.equal(got, kwargs[next(iter(kwargs))])


def test_a_written_input_of_a_call_by_keyword_stays_a_keyword() -> None:
    model, inputs = make("llama")
    traced = Model(model)
    attention = model.model.layers[0].self_attn
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 2}),
        with_kwargs=True,
    )
    expected = model(**inputs).logits
    hook.remove()
    with traced.trace(**inputs) as tracer:
        envoy = traced.model.layers[0].self_attn
        envoy.input = envoy.input * 2
        got = tracer.result.logits
    assert torch.equal(got, expected)


def test_an_input_edited_in_place_is_what_the_module_runs_with() -> None:
    net = small()
    model = Model(net)
    expected = net[2](torch.zeros(3, 4))
    with model.trace(X) as tracer:
        model[2].input[:] = 0
        got = tracer.result
    assert torch.equal(got, expected)


def test_inputs_may_be_written_with_their_keywords_in_another_order() -> None:
    class Scaled(nn.Module):
        def forward(self, value: Tensor, row: Tensor) -> Tensor:
            return value * row

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled = Scaled()

        def forward(self, value: Tensor) -> Tensor:
            return self.scaled(value=value, row=value[0])

    model = Model(Calling())
    with model.trace(X) as tracer:
        args, kwargs = model.scaled.inputs
        model.scaled.inputs = (args, {"row": kwargs["row"] * 2, "value": kwargs["value"]})
        got = tracer.result
    assert torch.equal(got, X * (X[0] * 2))


def test_two_edits_at_one_place_are_made_in_their_order() -> None:
    net = small()
    model = Model(net)
    with model.trace(X) as tracer:
        model[0].output += 1
        model[0].output = model[0].output * 2
        model[0].output[:, 0] = 5
        got = tracer.result
    expected = (net[0](X) + 1) * 2
    expected[:, 0] = 5
    assert torch.equal(got, net[2](net[1](expected)))


def test_rebinding_the_name_of_a_read_value_edits_nothing() -> None:
    net = small()
    model = Model(net)
    with model.trace(X) as tracer:
        value = model[0].output
        value = value * 0
        got = tracer.result
    assert torch.equal(got, net(X))
    assert not value.any()


# -- skip, stop, result ------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        return value * 3


def test_a_skipped_module_does_not_run_and_its_output_is_the_value_given() -> None:
    counting = Counting()
    net = nn.Sequential(nn.Linear(4, 4), counting, nn.Linear(4, 4))
    model = Model(net)
    with model.trace(X) as tracer:
        model[1].skip(model[0].output)
        got = tracer.result
    assert counting.calls == 0
    assert torch.equal(got, net[2](net[0](X)))


def test_a_module_is_skipped_with_its_own_input() -> None:
    counting = Counting()
    net = nn.Sequential(nn.Linear(4, 4), counting, nn.Linear(4, 4))
    model = Model(net)
    with model.trace(X) as tracer:
        model[1].skip(model[1].input)
        got = tracer.result
    assert counting.calls == 0
    assert torch.equal(got, net[2](net[0](X)))


def test_a_cache_records_the_value_that_stands_for_a_skipped_module() -> None:
    net = small()
    model = Model(net)
    with model.trace(X) as tracer:
        cache = tracer.cache()
        model[1].skip(torch.zeros(3, 4))
    assert torch.equal(cache["model.1"].output, torch.zeros(3, 4))


def test_a_skipped_block_of_a_real_model_is_the_identity() -> None:
    model, inputs = make("llama")
    traced = Model(model)
    with traced.trace(**inputs) as tracer:
        before = traced.model.layers[0].output
        traced.model.layers[1].skip(before)
        got = tracer.result.logits
    handle = model.model.layers[1].register_forward_hook(lambda _, args, __: args[0])
    expected = model(**inputs).logits
    handle.remove()
    assert torch.equal(got, expected)


def test_nothing_is_computed_after_a_stop() -> None:
    counting = Counting()
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), counting))
    with model.trace(X) as tracer:
        value = model[0].output
        tracer.stop()
    assert counting.calls == 0
    assert torch.equal(value, model.module[0](X))


def test_a_line_after_a_stop_is_not_run() -> None:
    model = Model(small())
    ran = []
    with model.trace(X) as tracer:
        ran.append(1)
        tracer.stop()
        ran.append(2)
    assert ran == [1]


def test_the_result_is_what_the_call_returned() -> None:
    model, inputs = make("gpt2")
    with Model(model).trace(**inputs) as tracer:
        result = tracer.result
    expected = model(**inputs)
    assert type(result) is type(expected)
    assert torch.equal(result.logits, expected.logits)


# -- modules in the block ----------------------------------------------------------------------


def test_a_module_called_in_the_block_runs_on_the_value_and_is_seen_by_nobody() -> None:
    net = small()
    model = Model(net)
    with model.trace(X) as tracer:
        cache = tracer.cache()
        lens = model[2](model[0].output)
        own = model[2].output
    assert torch.equal(lens, net[2](net[0](X)))
    assert torch.equal(own, net(X))
    assert len(cache["model.2"]) == 1
    assert torch.equal(cache["model.2"].output, net(X))


def test_a_module_that_is_waited_for_can_be_called_in_the_block() -> None:
    net = small()
    model = Model(net)
    with model.trace(X) as tracer:
        model[2].output
        again = model[2](torch.zeros(3, 4))
        got = tracer.result
    assert torch.equal(again, net[2](torch.zeros(3, 4)))
    assert torch.equal(got, net(X))


def test_the_whole_model_can_be_called_in_its_own_block() -> None:
    net = small()
    model = Model(net)
    with model.trace(X) as tracer:
        first = model[0].output
        other = model(X * 2)
        got = tracer.result
    assert torch.equal(other, net(X * 2))
    assert torch.equal(got, net(X))
    assert torch.equal(first, net[0](X))


def test_a_module_that_is_no_part_of_the_model_edits_it() -> None:
    net, coder = small(), nn.Linear(4, 4)
    model = Model(net)
    with model.trace(X) as tracer:
        model[0].output = coder(model[0].output)
        got = tracer.result
    assert torch.equal(got, net[2](net[1](coder(net[0](X)))))


# -- the tree ----------------------------------------------------------------------------------


def test_lists_of_modules_have_a_length_indices_slices_and_an_order() -> None:
    model = Model(make("gpt2", n_layer=4)[0])
    blocks = model.transformer.h
    assert len(blocks) == 4
    assert [block.path for block in blocks] == [f"model.transformer.h.{i}" for i in range(4)]
    assert blocks[-1] == blocks[3]
    assert blocks[1:3] == [blocks[1], blocks[2]]
    assert blocks[::-1] == list(blocks)[::-1]
    with pytest.raises(IndexError, match="4 modules"):
        blocks[4]


def test_a_child_named_output_is_reached_by_its_name_in_brackets() -> None:
    model, inputs = make("bert")
    traced = Model(model)
    with plain_hooks(model) as seen:
        model(**inputs)
    layer = next(path for path in seen if path.endswith("layer.0"))
    relative = layer.removeprefix("model.").split(".")
    envoy: Envoy = traced
    for name in relative:
        envoy = envoy[name]
    with traced.trace(**inputs):
        inner = envoy["output"].output
        outer = envoy.output
    assert torch.equal(inner, seen[f"{layer}.output"][0])
    assert torch.equal(outer, seen[layer][0])


def test_a_module_replaced_outside_a_trace_is_the_one_that_is_called() -> None:
    net = small()
    model = Model(net)
    net[0] = nn.Linear(4, 4)
    assert torch.equal(model[0](X), net[0](X))


def test_a_module_added_after_wrapping_can_be_called_at_once() -> None:
    net = small()
    model = Model(net)
    net.extra = nn.Linear(4, 4)
    assert torch.equal(model.extra(X), net.extra(X))


def test_a_module_replaced_between_traces_is_the_one_that_is_read() -> None:
    net = small()
    model = Model(net)
    with model.trace(X):
        model[0].output
    net[0] = nn.Linear(4, 4)
    with model.trace(X) as tracer:
        cache = tracer.cache()
        value = model[0].output
    assert torch.equal(value, net[0](X))
    assert torch.equal(cache["model.0"].output, net[0](X))


def test_a_second_wrapper_of_the_same_module_reads_the_same_values() -> None:
    net = small()
    model, other = Model(net), Model(net, name="other")
    with model.trace(X):
        value = other[0].output
    assert torch.equal(value, net[0](X))


def test_an_empty_place_for_a_module_is_no_module() -> None:
    net = small()
    net.register_module("extra", None)
    model = Model(net)
    assert model.extra is None
    assert [child.path for child in model] == ["model.0", "model.1", "model.2"]


def test_a_shared_module_has_one_value_for_each_call() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    model = Model(net)
    with model.trace(X):
        first = model[0].output
        second = model[0].calls[1].output
    assert torch.equal(first, shared(X))
    assert torch.equal(second, net(X))


def test_a_value_in_a_module_that_returns_no_tensor_has_no_hidden() -> None:
    class Nothing(nn.Module):
        def forward(self, value: Tensor) -> int:
            return 3

    model = Model(nn.Sequential(Nothing()))
    with pytest.raises(MisfitError, match="no tensor"):
        with model.trace(X):
            model[0].hidden

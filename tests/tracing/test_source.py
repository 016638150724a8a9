"""Operations inside a forward: compared with functions that were replaced by hand."""

from __future__ import annotations

import functools
import gc
import random
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import generate, make
from tests.tracing import source_models
from tests.tracing.plain import X, changing, copied, is_same, plain_hooks, state_of
from tests.tracing.source_models import (
    Catching,
    Decorated,
    Derived,
    Hidden,
    Loop,
    Passing,
    closing_over,
    in_order,
)
from tracekit import Envoy, Model
from tracekit.errors import (
    MisfitError,
    NeverRanError,
    OutsideTraceError,
    OverwrittenError,
    RowsError,
    SiteOrderError,
    SourceError,
    UnknownOperationError,
)


def at(model: Model, path: str) -> Envoy:
    """The Envoy of a module, by its path below the root."""
    envoy: Envoy = model
    for name in path.split(".") if path else ():
        envoy = envoy[name]
    return envoy


@contextmanager
def replaced(owner: Any, name: str, by: Callable[[Any], Any]) -> Generator[None]:
    """A function of a module of Python, replaced by hand."""
    function = getattr(owner, name)
    setattr(owner, name, functools.wraps(function)(by(function)))
    try:
        yield
    finally:
        setattr(owner, name, function)


@contextmanager
def recorded(owner: Any, name: str) -> Generator[list[tuple[Any, Any]]]:
    """What a function is given and returns, call by call."""
    seen: list[tuple[Any, Any]] = []

    def recording(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = copied([*args, *kwargs.values()])
            output = function(*args, **kwargs)
            seen.append((given, copied(output)))
            return output

        return call

    with replaced(owner, name, recording):
        yield seen


def attention_of(model: nn.Module) -> Any:
    """The module of Python that a model's family is written in."""
    return sys.modules[type(model).__module__]


def attentions(model: Model) -> list[Envoy]:
    """The modules that call an attention function, in the model's order."""
    paths = [path for path, _ in model.module.named_modules()]
    called = [at(model, path) for path in paths if path]
    found = [each for each in called if hasattr(type(each.module), "forward")]
    return [each for each in found if "Attention" in type(each.module).__name__ and _calls_it(each)]


def _calls_it(envoy: Envoy) -> bool:
    return any(operation.name == "attention_interface_0" for operation in envoy.source)


# --- what is listed ------------------------------------------------------------------------------


def test_the_source_is_printed_with_each_name_beside_its_line() -> None:
    source = Model(in_order())[1].source
    text = repr(source).splitlines()
    lines = Path(source_models.__file__).read_text("utf-8").splitlines()
    number = lines.index("        value = self.first(double(value))") + 1
    rows = [row.split(maxsplit=2) for row in text if row.startswith(("double_0", "self_first_0"))]
    assert rows[0] == ["double_0", str(number), "value = self.first(double(value))"]
    assert rows[1] == ["self_first_0", str(number)]
    assert text[0] == f"model.1.source: Order.forward, {source_models.__file__}"
    for operation in source:
        assert operation.name.split("_")[-2] in lines[operation.line - 1]


def test_names_are_numbered_in_the_order_in_which_python_makes_the_calls() -> None:
    names = [operation.name for operation in Model(in_order())[1].source]
    assert names == ["double_0", "self_first_0", "self_inner_0", "negate_0", "local_0", "halve_0"]
    assert len(Model(in_order())[1].source) == 6
    assert set(names) <= set(dir(Model(in_order())[1].source))


def test_the_operations_of_a_line_are_found_by_its_number() -> None:
    source = Model(in_order())[1].source
    line = source.halve_0.line
    assert [operation.name for operation in source.line(line)] == ["local_0", "halve_0"]
    assert source.line(1) == []


def test_an_operation_is_found_by_the_last_part_of_its_name_where_only_one_kind_has_it() -> None:
    source = Model(in_order())[1].source
    assert source.first_0.name == source["first_0"].name == "self_first_0"
    attn = Model(make("gpt2")[0]).transformer.h[0].attn.source
    assert attn.split_0.name == "split_0"
    assert attn.c_proj_0.path == "model.transformer.h.0.attn.source.self_c_proj_0"


def test_what_looks_at_its_callers_frame_is_no_operation() -> None:
    names = [operation.name for operation in Model(nn.Sequential(Derived()))[0].source]
    assert names == ["sorted_0", "forward_0", "self___secret_0", "len_0"]


def test_a_misspelled_operation_is_an_error_with_near_matches() -> None:
    source = Model(in_order())[1].source
    with pytest.raises(UnknownOperationError, match="did you mean 'self_first_0'"):
        source.self_frst_0
    with pytest.raises(UnknownOperationError, match=r"assign to its \.output"):
        source.self_first_0 = X
    assert not hasattr(source, "nothing_0")


def test_operations_have_values_in_a_trace_alone() -> None:
    model = Model(in_order())
    with pytest.raises(OutsideTraceError, match="only while the model runs"):
        model[1].source.double_0.output
    with pytest.raises(OutsideTraceError, match="which function"):
        model[1].source.self_inner_0.source
    with pytest.raises(OutsideTraceError, match="not tracing"), Model(in_order()).trace(X):
        model[1].source.double_0.output


# --- what is read and edited ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5", "bert"])
def test_attention_functions_are_read_as_a_function_in_their_place_sees_them(name: str) -> None:
    module, inputs = make(name, attn="eager")
    model = Model(module)
    with torch.no_grad():
        with recorded(attention_of(module), "eager_attention_forward") as seen:
            expected = module(**inputs)
        places = attentions(model)
        got: list[tuple[Any, Any]] = []
        with model.trace(**inputs) as tracer:
            for place in places:
                operation = place.source.attention_interface_0
                args, kwargs = operation.inputs
                got.append((copied([*args, *kwargs.values()]), copied(operation.output)))
            result = tracer.result
    assert len(got) == len(seen) > 1
    assert all(is_same(one, plain) for one, plain in zip(got, seen, strict=True))
    assert torch.equal(result[0], expected[0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5", "bert"])
def test_edits_inside_attention_functions_change_what_the_model_goes_on_with(name: str) -> None:
    module, inputs = make(name, attn="eager")
    model = Model(module)

    def with_half(function: Any) -> Any:
        return lambda *args, **kwargs: function(*args, **kwargs) / 2

    with torch.no_grad():
        # The eager functions take `nn` from their own module; the router of Mixtral takes `torch`.
        halved = {**vars(nn.functional), "softmax": with_half(nn.functional.softmax)}
        functional = SimpleNamespace(**halved)
        own = SimpleNamespace(**{**vars(nn), "functional": functional})
        written = attention_of(module)
        written.nn, plain_nn = own, written.nn
        try:
            expected = module(**inputs)
        finally:
            written.nn = plain_nn
        places = attentions(model)
        with model.trace(**inputs) as tracer:
            for place in places:
                inner = place.source.attention_interface_0.source
                inner.softmax_0.output[:] /= 2
            result = tracer.result
    assert torch.equal(result[0], expected[0])
    assert not torch.equal(result[0], module(**inputs)[0])


def test_a_router_is_edited_behind_its_softmax() -> None:
    module, inputs = make("mixtral")
    model = Model(module)
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        with model.trace(**inputs):
            probabilities = gate.source.softmax_0.output
            gate.source.softmax_0.output = probabilities.flip(-1)
            value, indices = gate.source.topk_0.output
            chosen, value = indices.clone(), value.clone()
        plain = probabilities.flip(-1).topk(indices.shape[-1])
    assert torch.equal(chosen, plain.indices) and torch.equal(value, plain.values)


def test_a_value_that_the_forward_overwrites_later_is_refused() -> None:
    model = Model(make("mixtral")[0])
    held: list[Any] = []
    with pytest.raises(OverwrittenError, match=r"topk_0\.output\.clone"):
        with torch.no_grad(), model.trace(torch.tensor([[11, 12]])):
            held.append(model.model.layers[0].mlp.gate.source.topk_0.output)


def test_the_scan_of_a_state_space_model_is_read_and_skipped() -> None:
    module, inputs = make("mamba")
    model = Model(module)
    mixer = model.backbone.layers[0].mixer
    written = attention_of(module)
    with torch.no_grad():
        with recorded(written, "mamba_selective_scan") as seen:
            module(**inputs, use_cache=False)
        with model.trace(**inputs, use_cache=False):
            scan = mixer.source.mamba_selective_scan_0.output
        assert is_same(scan, seen[0][1])
        zeros = torch.zeros_like(scan)
        with model.trace(**inputs, use_cache=False) as tracer:
            mixer.source.mamba_selective_scan_0.skip(zeros)
            skipped = tracer.result.logits
        rest = [seen[1][1]]

        def first_zero(function: Any) -> Any:
            queue = [lambda *_, **__: zeros, *[function] * len(rest)]
            return lambda *args, **kwargs: queue.pop(0)(*args, **kwargs)

        with replaced(written, "mamba_selective_scan", first_zero):
            expected = module(**inputs, use_cache=False).logits
    assert torch.equal(skipped, expected)


def test_inputs_are_replaced_before_the_call() -> None:
    model = Model(in_order())
    with model.trace(X) as tracer:
        model[1].source.double_0.input = X
        (value,), keywords = model[1].source.halve_0.inputs
        model[1].source.halve_0.inputs = ((value * 3,), keywords)
        result = tracer.result
    with replaced(source_models, "double", lambda _: lambda _: X * 2):
        with replaced(source_models, "halve", lambda _: lambda value: value * 3 / 2):
            expected = model.module(X)
    assert torch.equal(result, expected)


def test_the_operation_gives_the_very_object_that_the_forward_goes_on_with() -> None:
    model = Model(in_order())
    with model.trace(X):
        output = model[1].source.double_0.output
        value = model[1].source.self_first_0.input
        same = model[1].first.input
        returned = model[1].source.halve_0.output
        outside = model[1].output
    assert value is output is same and returned is outside


def test_a_call_in_a_loop_has_calls() -> None:
    model = Model(nn.Sequential(Loop()))
    source = model[0].source
    with model.trace(X):
        first = source.double_0.output
        third = source.double_0.calls[2].output
        shifted = [source.shift_0.calls[index].output for index in range(3)]
    assert torch.equal(first, X * 2) and torch.equal(third, X * 8)
    assert torch.equal(torch.stack(shifted), X * 8 + 1)
    with pytest.raises(NeverRanError, match="at most 3 times"), model.trace(X):
        source.double_0.calls[3].output


@pytest.mark.parametrize("step_of_edit", [None, 0, 2])
def test_operations_are_read_and_edited_in_each_step_of_a_generation(
    step_of_edit: int | None,
) -> None:
    module, inputs = make("llama", attn="eager")
    model = Model(module)
    attn = model.model.layers[1].self_attn
    layers = len(model.model.layers)
    calls = 0

    def edited(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            output, weights = function(*args, **kwargs)
            step, layer = divmod(calls, layers)
            calls += 1
            if layer == 1 and step == step_of_edit:
                output = output * -50
            seen.append((layer, copied(output)))
            return output, weights

        return call

    seen: list[tuple[int, Any]] = []
    with replaced(attention_of(module), "eager_attention_forward", edited):
        expected = generate("llama", module, inputs)
    got: list[Any] = []
    options = {"max_new_tokens": 3, "do_sample": False, **inputs}
    with model.generate(**options) as tracer:
        for step in tracer.iter[:]:
            interface = attn.source.attention_interface_0
            if step == step_of_edit:
                output, weights = interface.output
                interface.output = (output * -50, weights)
            inner = interface.output
            got.append(copied(inner[0]))
        tokens = tracer.result
    plain = [value for layer, value in seen if layer == 1]
    assert torch.equal(tokens, expected)
    assert len(got) == len(plain) == 3
    assert all(is_same(one, other) for one, other in zip(got, plain, strict=True))


def test_functions_are_drilled_into_in_each_step() -> None:
    module, inputs = make("llama", attn="eager")
    model = Model(module)
    attn = model.model.layers[0].self_attn
    shapes: list[tuple[int, ...]] = []
    with model.generate(**inputs, max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            inner = attn.source.attention_interface_0.source
            softmax = inner.softmax_0.output
            assert torch.equal(softmax, inner.to_0.output)
            shapes.append(tuple(softmax.shape[-2:]))
    length = inputs["input_ids"].shape[1]
    assert shapes == [(length, length), (1, length + 1), (1, length + 2)]


# --- in the model's order ------------------------------------------------------------------------

INSIDE = "self_inner_0"


def sites() -> list[tuple[str, Callable[[Model], Any]]]:
    """Every site of the Order in the middle of a model, in the order of the run."""

    def source(model: Model) -> Any:
        return model[1].source

    def inner(model: Model) -> Any:
        return model[1].source.self_inner_0.source

    def slots(name: str, of: Callable[[Model], Any]) -> Any:
        return (
            (f"{name}.input", lambda model: of(model).input),
            (f"{name}.output", lambda model: of(model).output),
        )

    def around(name: str, of: Callable[[Model], Any], *inside: Any) -> Any:
        begin, end = slots(name, of)
        return [begin, *inside, end]

    def operation(name: str, of: Callable[[Model], Any] = source) -> Callable[[Model], Any]:
        return lambda model: of(model)[name]

    return around(
        "order",
        lambda model: model[1],
        *slots("double", operation("double_0")),
        *around(
            "self_first", operation("self_first_0"), *slots("first", lambda model: model[1].first)
        ),
        *around(
            INSIDE,
            operation(INSIDE),
            *slots("inner shift", operation("shift_0", inner)),
            *around(
                "inner self_second",
                operation("self_second_0", inner),
                *slots("inner second", lambda model: model[1].second),
            ),
            *slots("inner tanh", operation("torch_tanh_0", inner)),
        ),
        *around("local", operation("local_0"), *slots("negate", operation("negate_0"))),
        *slots("halve", operation("halve_0")),
    )


def values_of_order(module: Any) -> dict[str, Tensor]:
    """What is at those sites, computed by hand."""
    with torch.no_grad():
        value = module[0](X)
        found = {"order.input": value, "double.input": value, "double.output": value * 2}
        first = module[1].first(value * 2)
        found |= {"self_first.input": value * 2, "first.input": value * 2}
        found |= {"first.output": first, "self_first.output": first, f"{INSIDE}.input": first}
        found |= {"inner shift.input": first, "inner shift.output": first + 1}
        second = module[1].second(first + 1)
        found |= {"inner self_second.input": first + 1, "inner second.input": first + 1}
        found |= {"inner second.output": second, "inner self_second.output": second}
        tanh = second.tanh()
        found |= {"inner tanh.input": second, "inner tanh.output": tanh, f"{INSIDE}.output": tanh}
        found |= {"local.input": tanh, "negate.input": tanh, "negate.output": -tanh}
        found |= {"local.output": -tanh, "halve.input": -tanh, "halve.output": -tanh / 2}
        return {**found, "order.output": -tanh / 2}


def test_two_values_are_right_in_the_models_order_and_refused_in_the_other() -> None:
    module = in_order()
    model = Model(module)
    values = values_of_order(module)
    names = [name for name, _ in sites()]
    assert set(names) == set(values)
    pairs = [(one, other) for one in sites() for other in sites() if one is not other]
    for (one, get_one), (other, get_other) in random.Random(0).sample(pairs, 300):
        if one == other:
            continue
        got: list[Tensor] = []
        try:
            with torch.no_grad(), model.trace(X):
                if one.startswith("inner") and other.startswith("inner"):
                    model[1].source.self_inner_0.source
                else:
                    model[1].source
                got.append(get_one(model))
                got.append(get_other(model))
        except SiteOrderError:
            assert names.index(one) > names.index(other), f"{one} before {other}"
            continue
        assert names.index(one) < names.index(other), f"{one} after {other}"
        assert torch.equal(got[0], values[one]) and torch.equal(got[1], values[other])


def test_a_source_that_is_first_asked_for_inside_its_forward_is_refused() -> None:
    model = Model(in_order())
    with pytest.raises(SiteOrderError, match="running already") as caught, model.trace(X):
        model[1].first.output
        model[1].source
    assert "model.1.source" in str(caught.value)
    with pytest.raises(SiteOrderError, match="running already"), model.trace(X):
        model[1].source.double_0.output
        model[1].second.output
        model[1].source.self_inner_0.source.shift_0.output


def test_a_source_that_is_first_asked_for_at_the_input_of_its_module_is_in_time() -> None:
    model = Model(in_order())
    with model.trace(X):
        value = model[1].input
        double = model[1].source.double_0.output
    assert torch.equal(double, value * 2)


def test_a_first_touch_within_a_step_is_never_the_value_of_the_next() -> None:
    module, inputs = make("llama", attn="eager")
    model = Model(module)
    attn = model.model.layers[0].self_attn
    options = {**inputs, "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(SiteOrderError, match="step 1"), model.generate(**options) as tracer:
        for _ in tracer.iter[1:]:
            attn.output
            attn.source.attention_interface_0.output
    with pytest.raises(SiteOrderError, match="running already"):
        with model.generate(**options) as tracer:
            for _ in tracer.iter[1:]:
                attn.q_proj.output
                attn.source.attention_interface_0.output
    with pytest.raises(SiteOrderError, match="running already"):
        with model.generate(**options) as tracer:
            for _ in tracer.iter[1:]:
                model.source


def test_a_call_that_the_forward_does_not_come_to_is_an_error() -> None:
    model = Model(make("gpt2")[0])
    attn = model.transformer.h[0].attn
    with pytest.raises(NeverRanError, match="a line that this run did not come to"):
        with model.trace(torch.tensor([[11]])):
            attn.source.self_q_attn_0.output


def test_an_operation_inside_what_was_skipped_is_an_error() -> None:
    model = Model(in_order())
    with pytest.raises(NeverRanError, match="was skipped"), model.trace(X):
        model[1].source
        model[1].skip(X)
        model[1].source.double_0.output


def test_errors_are_at_the_users_own_line() -> None:
    model = Model(in_order())
    with pytest.raises(MisfitError) as caught, model.trace(X):
        model[1].source.double_0.output = torch.zeros(2)
    entries = traceback.extract_tb(caught.value.__traceback__)
    assert {entry.filename for entry in entries} == {__file__}
    assert entries[-1].line == "model[1].source.double_0.output = torch.zeros(2)"
    with pytest.raises(RuntimeError) as failed, model.trace(X):
        model[1].source.double_0.skip(torch.zeros(3, 5))
    lines = [entry.line for entry in traceback.extract_tb(failed.value.__traceback__)]
    assert "value = self.first(double(value))" in lines


# --- the ways in which forwards are written ------------------------------------------------------


def test_decorators_stay_around_the_function() -> None:
    model = Model(nn.Sequential(Decorated()))
    value = X.clone().requires_grad_()
    with model.trace(value) as tracer:
        inner = model[0].source.halve_0.output
        result = tracer.result
    assert torch.equal(inner, X / 3) and torch.equal(result, X / 3 * 2)
    assert not inner.requires_grad
    with replaced(source_models, "halve", lambda function: lambda *_: X):
        with model.trace(X) as tracer:  # the globals are those of the file, as they are now
            seen = tracer.result
            del seen
        assert torch.equal(model.module(X), X * 2)


def test_a_decorator_that_hides_its_function_is_shown_and_drilled_through() -> None:
    model = Model(nn.Sequential(Hidden()))
    with model.trace(X):
        inner = model[0].source.forward_0.source.halve_0.output
    assert torch.equal(inner, X / 2)


def test_inherited_forwards_and_private_names_work() -> None:
    model = Model(nn.Sequential(Derived()))
    expected = model.module(X)
    with model.trace(X) as tracer:
        own = model[0].source.forward_0.source.double_0.output
        shifted = model[0].source.self___secret_0.source.shift_0.output
        result = tracer.result
    assert torch.equal(own, X * 2) and torch.equal(shifted, X * 2 + 1)
    assert torch.equal(result, expected)


def test_a_forward_on_the_instance_keeps_its_own_cells() -> None:
    module, change = closing_over(2.0)
    model = Model(nn.Sequential(module))
    with model.trace(X):
        before = model[0].source.torch_mul_0.output
    change(5.0)
    with model.trace(X):
        after = model[0].source.torch_mul_0.output
    assert torch.equal(before, X * 2) and torch.equal(after, X * 5)


def test_a_lambda_is_a_forward_too() -> None:
    linear = nn.Linear(4, 4)
    linear.forward = lambda input: torch.relu(torch.neg(input))
    model = Model(nn.Sequential(linear))
    with model.trace(X):
        negated = model[0].source.torch_neg_0.output
    assert torch.equal(negated, -X)


def test_a_call_that_fails_and_is_caught_counts() -> None:
    model = Model(nn.Sequential(Catching()))
    value = torch.randn(16)
    with model.trace(value):
        doubled = model[0].source.double_0.output
        reshaped = model[0].source.torch_reshape_0.calls[1].output
    assert torch.equal(doubled, value * 2) and reshaped.shape == (4, 4)


def test_another_function_in_each_call_has_operations_of_its_own() -> None:
    model = Model(nn.Sequential(Passing()))
    function = model[0].source.function_0
    with model.trace(X):
        halved = function.source.torch_div_0.output
        deeper = function.calls[2].source.forward_0.source.double_0.output
    assert torch.equal(halved, X / 2) and torch.equal(deeper, (X / 2).tanh() * 2)
    with pytest.raises(SourceError, match="not written in Python"), model.trace(X):
        function.source
        function.calls[1].source


def test_modules_with_hooks_of_accelerate_run_their_own_forward() -> None:
    accelerate = pytest.importorskip("accelerate.hooks")
    module: Any = in_order()
    expected = module(X)
    accelerate.add_hook_to_module(module[1], accelerate.ModelHook())
    before = state_of(module)
    model = Model(module)
    with model.trace(X) as tracer:
        double = model[1].source.double_0.output
        result = tracer.result
    assert torch.equal(double, module[0](X) * 2) and torch.equal(result, expected)
    assert state_of(module) == before


def test_a_model_with_hooks_of_its_own_keeps_them() -> None:
    module: Any = in_order()
    with changing(module[1].first, lambda output: output * 3):
        expected = module(X)
        model = Model(module)
        with model.trace(X) as tracer:
            first = model[1].source.self_first_0.output
            result = tracer.result
    assert torch.equal(first, module[1].first(module[0](X) * 2) * 3)
    assert torch.equal(result, expected)


# --- what has no operations ----------------------------------------------------------------------


def test_what_has_no_operations_says_why() -> None:
    module, inputs = make("gpt2")
    model = Model(module)
    source = model.transformer.h[0].attn.source
    with pytest.raises(SourceError, match=r"model\.transformer\.h\.0\.attn\.c_attn\.source"):
        with model.trace(**inputs):
            source.self_c_attn_1.source
    with pytest.raises(SourceError, match="not written in Python"), model.trace(**inputs):
        source.key_states_view_1.source
    with pytest.raises(SourceError, match="is a class"), model.trace(**inputs):
        model.source.CausalLMOutputWithCrossAttentions_0.source
    with pytest.raises(SourceError, match=r"h\[0\].source"):
        model.transformer.h.source
    with pytest.raises(SourceError, match=r"source.NAME.calls\[1\]"):
        model.transformer.h[0].calls[1].source


def test_scripted_and_compiled_modules_have_no_operations() -> None:
    scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(SourceError, match="not written in Python"):
        Model(nn.Sequential(scripted))[0].source
    compiled: Any = torch.compile(nn.Linear(4, 4))
    with pytest.raises(SourceError, match=r"torch\.compile"):
        Model(nn.Sequential(compiled))[0].source


def test_a_function_whose_source_is_not_there_is_refused() -> None:
    namespace: dict[str, Any] = {"torch": torch}
    source = "def forward(value):\n    return torch.relu(value)"
    exec(compile(source, "<made here>", "exec"), namespace)  # "<string>" is also xdist's own
    linear = nn.Linear(4, 4)
    linear.forward = namespace["forward"]
    with pytest.raises(SourceError, match="not available"):
        Model(nn.Sequential(linear))[0].source


def test_a_file_that_changed_since_it_was_imported_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "changing_source.py"
    text = "import torch\n\ndef forward(value):\n    return torch.relu(value)\n"
    path.write_text(text, "utf-8")
    linear = nn.Linear(4, 4)
    linear.forward = __import__("changing_source").forward
    path.write_text(text.replace("relu", "tanh  # longer"), "utf-8")
    with pytest.raises(SourceError, match="changed since"):
        Model(nn.Sequential(linear))[0].source


# --- what is left behind -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "mixtral", "gpt_oss", "deepseek_v3", "t5", "bert", "mamba", "rwkv"]
)
def test_with_every_forward_opened_a_model_computes_the_same_and_is_left_as_it_was(
    name: str,
) -> None:
    module, inputs = make(name)
    model = Model(module)
    with torch.no_grad():
        with plain_hooks(module) as ran:
            expected = copied(module(**inputs))
        before = state_of(module)
        places = [at(model, path.partition(".")[2]) for path in ran]
        operations = 0
        with model.trace(**inputs) as tracer:
            for place in places:
                operations += len(place.source)
            result = tracer.result
        assert is_same(copied(result), expected)
    assert operations > len(places)
    assert state_of(module) == before


def test_after_errors_and_stops_the_model_is_as_it_was() -> None:
    module = in_order()
    model = Model(module)
    before = state_of(module)
    with model.trace(X) as tracer:
        model[1].source.double_0.output
        tracer.stop()
    with pytest.raises(ZeroDivisionError), model.trace(X):
        model[1].skip(model[1].source.double_0.input / 0 if 0 else 1 / 0)
    with pytest.raises(NeverRanError), model.trace(X):
        model[1].input
        model[1].source.double_0.calls[1].output
    assert state_of(module) == before


def test_threads_that_open_the_same_module_each_see_their_own_values() -> None:
    module = in_order()
    model = Model(module)
    before = state_of(module)
    barrier = threading.Barrier(2)
    failures: list[BaseException] = []

    def opened(value: Tensor) -> None:
        try:
            with model.trace(value):
                model[1].input
                barrier.wait(20)
                double = model[1].source.double_0.output
                barrier.wait(20)
            assert torch.equal(double, module[0](value) * 2)
        except BaseException as error:
            failures.append(error)

    def plain(value: Tensor) -> None:
        try:
            barrier.wait(20)
            expected = values_of_order(module)["order.output"]
            assert torch.equal(module[1](module[0](value)), expected)
            barrier.wait(20)
        except BaseException as error:
            failures.append(error)

    for pair in ((opened, X), (opened, X * 3)), ((opened, X * 5), (plain, X)):
        threads = [threading.Thread(target=work, args=(value,)) for work, value in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not failures
    assert state_of(module) == before


def test_nothing_of_a_run_stays_alive() -> None:
    model = Model(in_order())

    def run() -> list[Any]:
        with torch.no_grad(), model.trace(X):
            outer = model[1].source.double_0.output
            inner = model[1].source.self_inner_0.source.shift_0.output
        return [weakref.ref(outer), weakref.ref(inner)]

    run()
    gc.collect()
    gc.disable()
    try:
        assert [alive() for alive in run()] == [None, None]
    finally:
        gc.enable()


class Centred(nn.Module):
    """Takes the mean of the batch away from its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.linear(x, self.weight)
        mean = torch.mean(wide, 0)
        return wide - mean - torch.sum(mean)


@pytest.mark.parametrize("name", ["torch_mean_0", "torch_sum_0"])
def test_what_an_operation_gives_for_the_whole_batch_is_not_taken_for_a_blocks_own(
    name: str,
) -> None:
    net = nn.Sequential(Centred())
    model, values = Model(net), torch.linspace(0, 1, 10).reshape(2, 5)
    with pytest.raises(RowsError, match=rf"model\.0\.source\.{name}\.output"):
        with model.trace() as tracer:
            with tracer.invoke(values[:1]):
                model[0].source[name].output
            with tracer.invoke(values[1:]):
                model[0].output
    with model.trace() as tracer:
        with tracer.invoke(values[:1]):
            (given, weight), _ = model[0].source.linear_0.inputs
        with tracer.invoke(values[1:]):
            wide = model[0].source.linear_0.output
        with tracer.invoke():
            mean = model[0].source.torch_mean_0.output
    assert torch.equal(given, values[:1]) and weight is net[0].weight
    torch.testing.assert_close(wide, values[1:] @ net[0].weight.T)
    torch.testing.assert_close(mean, (values @ net[0].weight.T).mean(0))


class Heads(nn.Module):
    """Attention in the manner of Bloom: the heads of each row lie behind one another."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        heads = self.project(x).view(rows, length, 2, 3).transpose(1, 2)
        flat = torch.reshape(heads, (rows * 2, length, 3))
        scores = torch.bmm(flat, flat.transpose(1, 2))
        turned = torch.transpose(heads, 0, 1)
        pattern = scored(scores)
        mixed = torch.bmm(pattern, flat).view(rows, 2, length, 3) + turned.transpose(0, 1)
        return torch.reshape(mixed.transpose(1, 2), x.shape)


def scored(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


@pytest.mark.parametrize("rows", [1, 2])
def test_operations_are_divided_into_rows_as_modules_are(rows: int) -> None:
    net = nn.Sequential(Heads()).requires_grad_(False)
    model = Model(net)
    inputs = [torch.randn(rows, 4, 6) for _ in range(2)]  # 4 heads or rows or positions
    found: list[list[Any]] = []
    with model.trace() as tracer:
        for x in inputs:
            with tracer.invoke(x):
                values = [model[0].source.torch_bmm_0.inputs[0][0]]
                values.append(model[0].source.torch_transpose_0.output)
                values.append(model[0].source.scored_0.source.torch_softmax_0.output)
                found.append(values)
    for x, values in zip(inputs, found, strict=True):
        with model.trace(x):
            alone = [model[0].source.torch_bmm_0.inputs[0][0]]
            alone.append(model[0].source.torch_transpose_0.output)
            alone.append(model[0].source.scored_0.source.torch_softmax_0.output)
        for value, plain in zip(values, alone, strict=True):
            torch.testing.assert_close(value, plain)
    with model.trace() as tracer:
        with tracer.invoke(inputs[0]):
            first = model.output
        with tracer.invoke(inputs[1]):
            model[0].source.scored_0.source.torch_softmax_0.output[:] = 0
            second = model.output
    torch.testing.assert_close(first, net(inputs[0]))
    torch.testing.assert_close(second, net[0].project(inputs[1]))

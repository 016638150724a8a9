"""A value that something overwrites in place later is never handed back as if it were the value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_models import make
from tests.tracing.plain import X, changing, is_same, plain_hooks, small
from tracekit import Model
from tracekit.core.versions import is_a_graph_counted
from tracekit.errors import OverwrittenError

pytestmark = pytest.mark.usefixtures("each_way")


@pytest.fixture
def net() -> nn.Sequential:
    return small(nn.ReLU(inplace=True))


def test_a_value_that_the_model_overwrites_is_refused(net: nn.Sequential) -> None:
    model = Model(net)
    with pytest.raises(OverwrittenError, match=r"model\.0\.output .*clone\(\)"):
        with model.trace(X):
            value = model[0].output
    assert value is not None  # bound all the same


def test_where_a_later_value_keeps_the_memory_the_error_says_what_to_clone(
    net: nn.Sequential,
) -> None:
    model = Model(net)
    cure = r"model\.0\.output\.clone\(\).* as model\.1\.output .*take \.clone\(\) of that, too\. \["
    with torch.no_grad(), pytest.raises(OverwrittenError, match=cure):
        with model.trace(X):
            before = model[0].output.clone()
            after = model[1].output  # the very tensor that model[0] returned
    with torch.no_grad(), model.trace(X):
        before = model[0].output.clone()
        after = model[1].output.clone()
    assert torch.equal(before, net[0](X))
    assert torch.equal(after, net[0](X).relu())


@pytest.mark.skipif(is_a_graph_counted(), reason="this torch tells who holds a tensor")
def test_where_the_backward_pass_keeps_the_memory_the_error_says_so(net: nn.Sequential) -> None:
    model = Model(net)
    with pytest.raises(OverwrittenError, match=r"in use for a backward pass; .*torch\.no_grad\(\)"):
        with model.trace(X) as tracer:
            before = model[0].output.clone()
            result = tracer.result
    with torch.no_grad(), model.trace(X) as tracer:
        before = model[0].output.clone()
        result = tracer.result
    assert torch.equal(before, net[0](X))
    assert torch.equal(result, net(X))


def test_a_clone_of_a_value_that_the_model_overwrites_is_right(net: nn.Sequential) -> None:
    model = Model(net)
    with model.trace(X):
        value = model[0].output.clone()
    assert torch.equal(value, net[0](X))


@pytest.mark.skipif(not is_a_graph_counted(), reason="torch tells who holds a tensor since 2.10")
def test_a_clone_is_right_though_a_graph_keeps_the_memory_of_what_was_overwritten() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    model = Model(net)
    with model.trace(X):
        value = model[0].output.clone()
        out = model[2].output
    assert torch.equal(value, net[0](X))
    out.sum().backward()
    held: list[Any] = []
    with pytest.raises(OverwrittenError):
        with model.trace(X):
            held.append({"deep": (model[0].output[:, -1],)})
            out = model[2].output


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 0],
        lambda t: t.detach(),
        lambda t: t.data,
        lambda t: t.detach()[:, 0],
        lambda t: t.detach().numpy(),
        lambda t: t.detach().cpu().float().view(-1),
    ],
    ids=["slice", "detach", "data", "slice of detached", "numpy", "moves that copy nothing"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_a_view_of_a_value_that_the_model_overwrites_is_refused(
    view: Any, grad: bool, net: nn.Sequential
) -> None:
    model = Model(net)
    with pytest.raises(OverwrittenError):
        with torch.set_grad_enabled(grad):
            with model.trace(X):
                value = view(model[0].output)
    assert value is not None  # bound all the same


def test_a_value_overwritten_under_inference_mode_is_refused_or_right(net: nn.Sequential) -> None:
    model = Model(net)
    value = None
    try:
        with torch.inference_mode():
            with model.trace(X):
                value = model[0].output
    except OverwrittenError:
        return
    assert value is not None and torch.equal(value, net[0](X))


def test_a_value_read_and_used_at_once_is_right_though_it_is_overwritten_later(
    net: nn.Sequential,
) -> None:
    model = Model(net)
    with model.trace(X):
        mean = model[0].output.mean()
    assert torch.equal(mean, net[0](X).mean())


def test_the_users_own_edit_in_place_is_no_overwriting() -> None:
    net = small()
    model = Model(net)
    with torch.no_grad(), model.trace(X) as tracer:
        value = model[0].output
        value[:, 0] = 7
        value += 1
        got = tracer.result
    assert (value[:, 0] == 8).all()
    expected = net[0](X)
    expected[:, 0] = 7
    assert torch.equal(got, net[2](net[1](expected + 1)))


def test_falcon_reads_of_what_it_overwrites_are_refused() -> None:
    model, inputs = make("falcon")
    traced = Model(model)
    with pytest.raises(OverwrittenError), torch.no_grad():
        with traced.trace(**inputs):
            value = traced.transformer.h[0].mlp.output
    assert value is not None  # bound all the same


def test_a_value_changed_by_an_edit_further_on_that_shares_its_memory_is_refused() -> None:
    model, inputs = make("gpt2")  # in eval mode the dropout returns what it was given
    traced = Model(model)
    with pytest.raises(OverwrittenError, match=r"mlp\.c_proj"), torch.no_grad():
        with traced.trace(**inputs):
            value = traced.transformer.h[0].mlp.c_proj.output
            traced.transformer.h[0].mlp.output[:] = 0
    assert value is not None  # bound all the same


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("runs", [1, 2, 3])
def test_a_cache_holds_what_was_there_before_it_was_overwritten(
    runs: int, grad: bool, net: nn.Sequential
) -> None:
    model = Model(net)
    with torch.set_grad_enabled(grad):
        for _ in range(runs):
            with model.trace(X) as tracer:
                cache = tracer.cache(include_inputs=True)
    assert torch.equal(cache["model.0"].output, net[0](X))
    assert torch.equal(cache["model.1"].input, net[0](X))
    assert torch.equal(cache["model.1"].output, net[0](X).relu())


@pytest.mark.parametrize("runs", [1, 2])
def test_a_cache_under_inference_mode_holds_what_was_there(runs: int, net: nn.Sequential) -> None:
    model = Model(net)
    with torch.inference_mode():
        for _ in range(runs):
            with model.trace(X) as tracer:
                cache = tracer.cache()
    assert torch.equal(cache["model.0"].output, net[0](X))


def test_a_cache_after_a_run_that_was_stopped_before_the_overwriting_is_right(
    net: nn.Sequential,
) -> None:
    model = Model(net)
    with model.trace(X) as tracer:
        tracer.cache(modules=[model[0]])
        model[0].output.sum()
        tracer.stop()
    with model.trace(X) as tracer:
        cache = tracer.cache(modules=[model[0]])
    assert torch.equal(cache["model.0"].output, net[0](X))


def test_a_cache_after_a_run_whose_overwriting_module_was_skipped_is_right(
    net: nn.Sequential,
) -> None:
    model = Model(net)
    with model.trace(X) as tracer:
        tracer.cache(modules=[model[0]])
        model[1].skip(torch.zeros(3, 4))
    with model.trace(X) as tracer:
        cache = tracer.cache(modules=[model[0]])
    assert torch.equal(cache["model.0"].output, net[0](X))


def test_a_cache_after_a_run_that_failed_before_the_overwriting_is_right(
    net: nn.Sequential,
) -> None:
    model = Model(net)
    with pytest.raises(ZeroDivisionError):
        with model.trace(X) as tracer:
            tracer.cache(modules=[model[0]])
            model[0].output.sum()
            1 / 0
    with model.trace(X) as tracer:
        cache = tracer.cache(modules=[model[0]])
    assert torch.equal(cache["model.0"].output, net[0](X))


def test_a_model_that_begins_to_overwrite_is_refused_once_and_right_from_then_on() -> None:
    net = small(nn.ReLU())
    model = Model(net)
    with model.trace(X) as tracer:
        tracer.cache()
    net[1].inplace = True
    with pytest.raises(OverwrittenError, match="clone=True"):
        with model.trace(X) as tracer:
            tracer.cache()
    with model.trace(X) as tracer:
        cache = tracer.cache()
    assert torch.equal(cache["model.0"].output, net[0](X))


def test_copies_are_right_whatever_the_model_does() -> None:
    model, inputs = make("falcon")
    traced = Model(model)
    with torch.no_grad():
        with plain_hooks(model) as seen:
            model(**inputs)
        with traced.trace(**inputs) as tracer:
            cache = tracer.cache(modules="transformer.h.*.mlp", clone=True)
    for path in cache:
        assert torch.equal(cache[path].output, seen[path][0])


def test_a_value_kept_by_the_user_and_changed_after_the_trace_leaves_the_cache_alone() -> None:
    net = small()
    model = Model(net)
    with torch.no_grad():
        for _ in range(2):
            with model.trace(X) as tracer:
                cache = tracer.cache()
                value = model[0].output
        value -= value.mean()
    assert torch.equal(cache["model.0"].output, net[0](X))


# -- what a block writes --------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["output", "hidden", "after a read", "skip"])
def test_a_tensor_that_a_block_writes_is_not_overwritten_by_the_model(write: str) -> None:
    """As in patching: the model would go on in the memory of `clean`, and the next run be wrong."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    model = Model(net)
    clean, kept = -torch.ones(3, 4), -torch.ones(3, 4)
    with torch.no_grad(), model.trace(X) as tracer:
        if write == "output":
            model[0].output = clean
        elif write == "hidden":
            model[0].hidden = clean
        elif write == "skip":
            model[0].skip(clean)
        else:
            model[0].output.mean()
            model[0].output = clean
            seen = model[0].output
        result = tracer.result
    assert torch.equal(clean, kept)
    assert write != "after a read" or torch.equal(seen, kept)
    assert torch.equal(result, torch.zeros(3, 4))


def test_a_replaced_value_that_the_model_adds_into_can_be_read_further_on() -> None:
    """Falcon's layers return the tensor that was their MLP's output, with attention added."""
    net, inputs = make("falcon")
    model = Model(net)
    with torch.no_grad(), model.trace(**inputs, use_cache=False):
        zeros = torch.zeros_like(model.transformer.h[0].mlp.input)
        model.transformer.h[0].mlp.output = zeros
        layer = model.transformer.h[0].hidden
    path = "transformer.h.0.mlp"
    with torch.no_grad(), changing(net.get_submodule(path), lambda out: torch.zeros_like(out)):
        with plain_hooks(net) as seen:
            net(**inputs, use_cache=False)
    assert not zeros.any()
    assert is_same(layer, seen["model.transformer.h.0"][0][0])


def test_a_value_may_be_written_in_several_places_and_changed_by_the_block_in_between() -> None:
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    model = Model(net)
    total = torch.zeros(3, 4)
    with torch.no_grad(), model.trace(X) as tracer:
        model[0].output = total
        model[1].input
        total += 1
        model[1].output = total
        result = tracer.result
        total += 1
    with torch.no_grad():
        assert torch.equal(result, net[2](torch.ones(3, 4)))
    assert torch.equal(total, torch.full((3, 4), 2.0))

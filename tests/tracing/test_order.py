"""Any two values: in the model's order both are right, in the other order it is an error."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import X, copied, is_same
from tracekit import Envoy, Model
from tracekit.errors import OverwrittenError, SiteOrderError

pytestmark = pytest.mark.usefixtures("each_way")

PAIRS = 150  # of each model, drawn from a seed


def events_of(model: nn.Module, inputs: Any) -> dict[tuple[str, str], Any]:
    """The first value at every site, in the order in which plain hooks see them."""
    seen: dict[tuple[str, str], Any] = {}
    handles: list[Any] = []
    for path, module in model.named_modules():

        def before(_: Any, args: Any, kwargs: Any, path: str = path) -> None:
            seen.setdefault((path, "inputs"), copied([*args, kwargs]))

        def after(_: Any, __: Any, output: Any, path: str = path) -> None:
            seen.setdefault((path, "output"), copied(output))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def value_at(model: Model, site: tuple[str, str]) -> Any:
    """What the block gets at `site`, copied at once."""
    path, slot = site
    envoy: Envoy = model
    for name in path.split(".") if path else ():
        envoy = envoy[name]
    if slot == "output":
        return copied(envoy.output)
    args, kwargs = envoy.inputs
    return copied([*args, kwargs])


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "albert", "t5", "falcon", "bert", "mixtral", "mamba", "deberta-v2"]
)
def test_two_values_are_right_in_the_models_order_and_refused_in_the_other(name: str) -> None:
    model, inputs = make(name)
    with torch.no_grad():
        seen = events_of(model, inputs)
        sites = list(seen)
        pairs = [(one, other) for one in sites for other in sites if one != other]
        traced = Model(model)
        for one, other in random.Random(0).sample(pairs, PAIRS):
            got: list[Any] = []
            try:
                with traced.trace(**inputs):
                    got.append(value_at(traced, one))
                    got.append(value_at(traced, other))
            except SiteOrderError:
                assert sites.index(one) > sites.index(other), f"{one} before {other}"
                continue
            except OverwrittenError:
                pytest.fail("copies were taken at once")
            assert sites.index(one) < sites.index(other), f"{one} after {other}"
            assert is_same(got[0], seen[one]) and is_same(got[1], seen[other])


class Thrice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(self.inner(x)))


def test_a_later_call_of_a_shared_module_is_known_though_an_earlier_one_was_not_asked_for() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(nn.Sequential(shared), nn.Sequential(nn.ReLU(), shared))
    model = Model(net)
    with torch.no_grad(), model.trace(X):
        first = model[0].output
        second = model[1][1].calls[1].output
    assert torch.equal(first, shared(X))
    assert torch.equal(second, net(X))


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_a_value_of_an_earlier_call_is_never_that_of_a_later_one(call: int) -> None:
    net = Thrice(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    model = Model(net)
    with pytest.raises(SiteOrderError, match="uncounted" if call else "if the model ran it at all"):
        with model.trace(X):
            model.inner.calls[1].input  # nothing in it was watched in its first call
            model.inner[0].calls[call].output
    with torch.no_grad(), model.trace(X):
        model.inner[0].input
        model.inner.calls[1].input
        second = model.inner[0].calls[1].output
    assert torch.equal(second, net.inner[0](net.inner(X)))


class Either(nn.Module):
    """Takes one of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.taken(x)


def test_of_a_branch_that_was_not_watched_it_is_not_said_that_it_ran() -> None:
    model = Model(nn.Sequential(Either(), nn.Tanh()))
    with pytest.raises(SiteOrderError, match=r"model\.0, which contains it, had run: if") as caught:
        with model.trace(X):
            model[0].output
            model[0].other.output
    assert "the model runs it before" not in str(caught.value)
    assert "model.0.output (step 0)" in str(caught.value)


def test_a_call_that_cannot_be_counted_is_refused_in_words() -> None:
    net = Thrice(Thrice(nn.Linear(4, 4)))
    model = Model(net)
    with pytest.raises(SiteOrderError, match=r"inner\.inner\.output \(step 0, call 4\).*uncounted"):
        with model.trace(X):
            model.inner.output
            model.inner.inner.calls[4].output
    with torch.no_grad(), model.trace(X):
        model.inner.inner.output
        model.inner.output
        later = model.inner.inner.calls[4].output
    expected = X
    for _ in range(5):
        expected = net.inner.inner(expected)
    assert torch.equal(later, expected)


def test_where_a_later_call_was_skipped_the_first_has_passed() -> None:
    model = Model(Thrice(nn.Sequential(nn.Linear(4, 4))))
    with pytest.raises(SiteOrderError, match=r"inner\.0\.input \(step 0\) was asked for after"):
        with model.trace(X):
            model.inner.calls[1].skip(torch.ones_like(X))
            model.inner[0].input

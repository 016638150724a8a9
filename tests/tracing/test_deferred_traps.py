"""Models and blocks that do something between a read and the end of the run that stores it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tracing.plain import X, stack
from tracekit import Model, settings
from tracekit.errors import (
    CaptureError,
    MisfitError,
    NeverRanError,
    OverwrittenError,
    SiteOrderError,
    TracekitError,
)


@pytest.fixture(params=["deferred", "live"])
def each_setting(request: pytest.FixtureRequest) -> Iterator[None]:
    with settings.changed(defer_reads=request.param == "deferred"):
        yield


def line_of(error: BaseException) -> str | None:
    return traceback.extract_tb(error.__traceback__)[-1].line


# -- which value ----------------------------------------------------------------------------------


class Again(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        return self(x, times - 1) * 2 if times else self.inner(x)


@pytest.mark.usefixtures("each_setting")
def test_the_output_of_a_module_that_calls_itself_is_that_of_its_first_call() -> None:
    again = Again()
    model = Model(nn.Sequential(again, nn.Linear(4, 4)))
    for _ in range(3):
        with model.trace(X):
            first = model[0].output
            last = model[1].output
        assert torch.equal(first, again.inner(X) * 4)
        assert torch.equal(last, model.module(X))


class GenerationMixin:
    """By its name: what asks stopping criteria."""

    def generate(self, x: Tensor, way: str, stopping_criteria: Any = None) -> Tensor:
        module: Any = self
        for step in way:
            x = module(x, step)
            for criterion in stopping_criteria or []:
                criterion(torch.zeros(1, 1, dtype=torch.long), None)
        return x

    generate.__signature__ = None


class Steps(nn.Module, GenerationMixin):
    """Generates; each step goes through one of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, step: str) -> Tensor:
        return getattr(self, step)(x) if step in "ab" else self.b(self.a(x))

    def generate(self, x: Tensor, way: str, **kwargs: Any) -> Tensor:
        kwargs.pop("disable_compile", None)
        return GenerationMixin.generate(self, x, way, **kwargs)


@pytest.mark.usefixtures("each_setting")
def test_what_first_runs_in_a_later_step_is_not_taken_for_the_first() -> None:
    pytest.importorskip("transformers")
    net = Steps()
    model = Model(net)

    def run(way: str, kept: list[Any]) -> None:
        with model.generate(x=X, way=way):
            kept.append(model.a.output)
            kept.append(model.b.output)

    for _ in range(2):
        run("cc", found := [])
        assert torch.equal(found[1], net.b(net.a(X)))
    with pytest.raises(NeverRanError) as no:
        run("ab", found := [])
    assert len(found) == 1 and torch.equal(found[0], net.a(X))
    assert line_of(no.value) == "kept.append(model.b.output)"


@pytest.mark.usefixtures("each_setting")
def test_the_order_of_an_earlier_run_is_checked_in_each() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, way: str) -> Tensor:
            for name in way:
                x = getattr(self, name)(x)
            return x

    net = Named()
    model = Model(net)

    def run(way: str, kept: list[Any]) -> None:
        with model.trace(X, way):
            kept.append(model.a.output)
            kept.append(model.b.output)
            kept.append(model.c.output)

    for way in ("abc", "abc", "aabc", "abcab"):
        run(way, kept := [])
        assert torch.equal(kept[0], net.a(X))
        assert torch.equal(kept[2], net.c(kept[1]))
    for way, kind, count in [
        ("ac", NeverRanError, 1),
        ("acb", SiteOrderError, 2),
        ("bac", SiteOrderError, 1),
        ("acb!", SiteOrderError, 2),  # the block fails before the model does
        ("ab!", AttributeError, 2),
    ]:
        with pytest.raises(kind) as no:
            run(way, kept := [])
        assert len(kept) == count
        if issubclass(kind, TracekitError):
            assert line_of(no.value) == f"kept.append(model.{'abc'[count]}.output)"


# -- what it holds --------------------------------------------------------------------------------


class Filling(nn.Module):
    """Puts what it computes into what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        state["h"] = self.inner(state["h"])
        state.setdefault("all", []).append(state["h"])
        return state


@pytest.mark.usefixtures("each_setting")
def test_containers_that_the_model_fills_later_are_not_overwritten_tensors() -> None:
    model = Model(nn.Sequential(Filling(), Filling()))
    for _ in range(3):
        with model.trace({"h": X}):
            first = model[0].output
            second = model[1].output
        assert first is second and len(first["all"]) == 2


class Shapes(nn.Module):
    """Returns what it is told to, and empties it when it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Returning(), nn.Linear(4, 4)

    def forward(self, x: Tensor, kind: str) -> Tensor:
        found = self.inner(x, kind)
        if isinstance(found, list):
            found[0] = torch.zeros(1)
        if kind == "list in tuple":
            found[0][0] = torch.zeros(1)
        return self.head(x)


class Returning(nn.Module):
    def forward(self, x: Tensor, kind: str) -> Any:
        kinds: dict[str, Any] = {"list": [x, x], "list in tuple": ([x],), "none": None}
        return kinds.get(kind, x)


@pytest.mark.usefixtures("each_setting")
def test_parts_are_those_of_the_moment_whatever_the_module_returns_this_time() -> None:
    model = Model(Shapes())

    def hidden(kind: str) -> Any:
        with model.trace(X, kind):
            found = [model.inner.hidden, model.head.output]
        return found[0]

    def first(kind: str) -> Any:
        with model.trace(X, kind):
            found = [model.inner.output[0], model.head.output]
        return found[0]

    for kind in ("tensor", "tensor", "list", "list in tuple"):
        assert torch.equal(hidden(kind), X)
    with pytest.raises(MisfitError, match="with no tensor"):
        hidden("none")
    for kind in ("tensor", "tensor"):
        assert torch.equal(first(kind), X[0])
    assert torch.equal(first("list"), X)
    assert first("list in tuple")[0].shape == (1,)  # the list itself
    with pytest.raises(TypeError):
        first("none")


@pytest.mark.usefixtures("each_setting")
def test_an_input_by_keyword_is_that_of_the_moment() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Bilinear(4, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input1=x, input2=x)

    def scaled(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["input1"] = kwargs["input1"] * 0
        return args, kwargs

    net = ByKeyword()
    net.inner.register_forward_pre_hook(scaled, with_kwargs=True)
    model = Model(net)
    for _ in range(3):
        with model.trace(X):
            given = model.inner.input
            out = model.inner.output
        assert torch.equal(given, X)
        assert torch.equal(out, net(X))


@pytest.mark.usefixtures("each_setting")
def test_tensors_that_count_no_versions_are_watched_in_every_run() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.relu = nn.Identity(), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                return self.relu(self.inner(x + 0))

    model = Model(Inside())

    def run(x: Tensor) -> Any:
        with model.trace(x):
            inner = model.inner.output
            out = model.relu.output
        return inner, out

    for _ in range(2):
        inner, _ = run(X.abs())
        assert torch.equal(inner, X.abs())
    with pytest.raises(OverwrittenError):
        run(-X.abs())


# -- what the block sees besides ------------------------------------------------------------------

ran = 0


class Noted:
    """A model that notes in a list, a cell and a global that its second layer has run."""

    def __init__(self) -> None:
        self.log: list[int] = []
        net = stack()
        net[1].register_forward_hook(self._note)
        self.model = Model(net)

    def _note(self, *_: Any) -> None:
        global ran  # noqa: PLW0603 - what is tested
        ran += 1
        self.log.append(1)


def looks_at_a_length(noted: Noted) -> Any:
    model, log = noted.model, noted.log
    with model.trace(X):
        first = model[0].output
        found = len(log)
        second = model[2].output
    return found, first, second


def looks_at_a_global(noted: Noted) -> Any:
    model = noted.model
    acts: dict[int, Any] = {}
    with model.trace(X):
        acts[ran] = model[0].output
        acts[ran + 1] = model[2].output
    return acts


def looks_at_a_cell(noted: Noted) -> Any:
    model = noted.model
    acts: dict[int, Any] = {}
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    handle = model.module[1].register_forward_hook(note)
    try:
        with model.trace(X):
            acts[count] = model[0].output
            acts[count] = model[2].output
    finally:
        handle.remove()
    return acts


def looks_before_it_reads(noted: Noted) -> Any:
    model, log = noted.model, noted.log
    with model.trace(X):
        found = len(log)
        second = model[2].output
    return found, second


def looks_and_reads_nothing(noted: Noted) -> Any:
    log = noted.log
    with noted.model.trace(X):
        found = len(log)
    return found


LOOKS = [
    looks_at_a_length,
    looks_at_a_global,
    looks_at_a_cell,
    looks_before_it_reads,
    looks_and_reads_nothing,
]


@pytest.mark.parametrize("look", LOOKS)
def test_what_the_model_changes_and_the_block_looks_at_is_refused(
    look: Callable[[Noted], Any],
) -> None:
    noted = Noted()
    for _ in range(2):  # an earlier run does not matter
        with pytest.raises(CaptureError, match="defer_reads"):
            look(noted)
    noted.log.clear()
    with settings.changed(defer_reads=False):
        found = look(noted)
    if isinstance(found, tuple):
        assert found[0] == 0


def test_a_counter_of_a_module_is_refused_where_it_changed() -> None:
    class Counting(nn.Linear):
        calls = None

        def __init__(self) -> None:
            super().__init__(4, 4)
            self.count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x)

    model = Model(nn.Sequential(Counting(), nn.Linear(4, 4)))
    with pytest.raises(CaptureError, match="changed while the model ran"):
        with model.trace(X):
            before = model[0].count
            first = model[0].output
            second = model[1].output
    with settings.changed(defer_reads=False), model.trace(X):
        before = model[0].count
        first = model[0].output
        second = model[1].output
    assert before == 1 and first is not None and second is not None


def test_an_error_of_the_model_comes_before_what_it_changed() -> None:
    log: list[int] = []

    def fail(*_: Any) -> None:
        log.append(1)
        raise LookupError("in the model")

    net = stack()
    model = Model(net)

    def run(log: list[int], kept: list[Any]) -> None:
        with model.trace(X):
            kept.append(len(log))
            kept.append(model[0].output)
            kept.append(model[2].output)

    run(log, [])
    handle = net[1].register_forward_hook(fail)
    with pytest.raises(LookupError):
        run(log, [])
    handle.remove()


@pytest.mark.usefixtures("each_setting")
def test_a_loop_over_what_its_body_fills_goes_on_as_far_as_live() -> None:
    model = Model(stack())
    kept: list[Any] = [0]
    with model.trace(X):
        for _, layer in zip(kept, model):  # noqa: B905 - plain, as users write it
            kept.append(layer.output)
    assert len(kept) == 4


@pytest.mark.usefixtures("each_setting")
def test_fields_of_a_value_are_the_values_own() -> None:
    @dataclass
    class Out:
        value: Tensor
        is_whole: bool = False

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Out:
            return Out(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Inner(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x).value)

    model = Model(Outer())
    with model.trace(X):
        found = model.inner.output
        if found.is_whole:
            last = model.head.output
        if not found.is_whole:
            last = model.head.input
    assert torch.equal(last, X)


# -- several invokes ------------------------------------------------------------------------------


def filled_by_two_names(model: Any, first: Tensor, second: Tensor) -> list[Tensor]:
    box = SimpleNamespace(items=[])
    items: list[Tensor] = box.items
    with model.trace() as tracer:
        with tracer.invoke(first):
            box.items.append(model[1].output)
        with tracer.invoke(second):
            items.append(model[0].output)
    return items


def filled_by_one_line(model: Any, first: Tensor, second: Tensor) -> list[Tensor]:
    items: list[Tensor] = []
    with model.trace() as tracer:
        for index, x in ((1, first), (0, second)):
            with tracer.invoke(x):
                items.append(model[index].output)
    return items


def filled_by_key(model: Any, first: Tensor, second: Tensor) -> list[Tensor]:
    items: dict[int, Tensor] = {}
    with model.trace() as tracer:
        for index, x in ((1, first), (0, second)):
            with tracer.invoke(x):
                items[index] = model[index].output
    return list(items.values())


@pytest.mark.usefixtures("each_setting")
@pytest.mark.parametrize("fill", [filled_by_two_names, filled_by_one_line, filled_by_key])
def test_blocks_of_invokes_fill_a_container_in_the_models_order(
    fill: Callable[..., list[Tensor]],
) -> None:
    net = stack(2)
    model = Model(net)
    early, late = fill(model, X[:1], X[1:2])
    assert torch.allclose(early, net[0](X[1:2]), atol=1e-6)
    assert torch.allclose(late, net(X[:1]), atol=1e-6)


@pytest.mark.usefixtures("each_setting")
def test_a_block_of_an_invoke_that_looks_what_its_siblings_stored_sees_it() -> None:
    net = stack(2)
    model = Model(net)
    found: list[Tensor] = []
    with model.trace() as tracer:
        for x in (X[:1], X[1:2]):
            with tracer.invoke(x):
                found.append(model[len(found)].output)
    assert torch.allclose(found[0], net[0](X[:1]), atol=1e-6)
    assert torch.allclose(found[1], net[0](X[1:2]), atol=1e-6)

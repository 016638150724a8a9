"""Reads that a block only stores: no hand-over, and everything else as if there had been one."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tracing.plain import X, check_nothing_stays, plain_hooks
from tracekit import Model, save, settings
from tracekit.errors import (
    CaptureError,
    NeverRanError,
    OverwrittenError,
    SiteOrderError,
    UnknownModuleError,
)
from tracekit.interleave.worker import Worker

# --- how often a worker was woken ----------------------------------------------------------------


@contextmanager
def hand_overs(monkeypatch: pytest.MonkeyPatch) -> Generator[list[Worker]]:
    """Every time that a worker is resumed."""
    resumed: list[Worker] = []
    plain = Worker.resume_worker

    def counting(self: Worker) -> None:
        resumed.append(self)
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "resume_worker", counting)
        yield resumed


class Layer(nn.Module):
    """Returns a tuple of a tensor and its input; its leaf `up` returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.up(x), x


class Stack(nn.Module):
    """Layers, a shared norm that runs behind each of them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
            x = self.norm(x)
        return self.head(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(Stack())


def outputs(model: Model, *paths: str) -> list[Any]:
    """By plain hooks: what each module returned, at its first call."""
    with plain_hooks(model.module) as seen:
        model.module(X)
    return [seen[f"model.{path}"][0] for path in paths]


UPS = [f"layers.{index}.up" for index in range(3)]


def same(found: list[Any], expected: list[Any]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(one, other) for one, other in zip(found, expected, strict=True)
    )


# --- no hand-over --------------------------------------------------------------------------------


def test_a_loop_that_appends_needs_no_hand_over(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ups: list[Tensor] = []
    with hand_overs(monkeypatch) as resumed, model.trace(X):
        for layer in model.layers:
            ups.append(layer.up.output)
    assert not resumed
    assert same(ups, outputs(model, *UPS))


def test_a_comprehension_needs_no_hand_over(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with hand_overs(monkeypatch) as resumed, model.trace(X):
        ups = [layer.up.output for layer in model.layers]
    assert not resumed
    assert same(ups, outputs(model, *UPS))


def test_names_dictionaries_attributes_and_lists_made_in_the_block_need_none(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts: dict[str, Any] = {}
    box = SimpleNamespace()
    with hand_overs(monkeypatch) as resumed, model.trace(X) as tracer:
        kept = []
        for index, layer in enumerate(model.layers):
            acts[f"up {index}"] = layer.up.output.save()
            if index == 1:
                box.middle = layer.output[0]
            kept.append(save(layer.output[0][:, -1].detach()))
        first, second = model.norm.calls[2].output, model.head.inputs
        result = tracer.result
    assert not resumed
    assert same(list(acts.values()), outputs(model, *UPS))
    layers = [value[0] for value in outputs(model, *(f"layers.{index}" for index in range(3)))]
    assert torch.equal(box.middle, layers[1])
    assert same(kept, [value[:, -1] for value in layers])
    assert torch.equal(first, second[0][0])
    assert torch.equal(result, model.module(X))


def test_caches_and_stored_reads_need_none(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with hand_overs(monkeypatch) as resumed, model.trace(X) as tracer:
        cache = tracer.cache(modules=[model.layers[0].up, "layers.1.*"])
        logits = model.head.output
    assert not resumed
    assert torch.equal(cache["layers.0.up"].output, outputs(model, "layers.0.up")[0])
    assert torch.equal(logits, model.module(X))


def test_stop_behind_stored_reads_needs_none(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    model.module.head.register_forward_hook(lambda *_: ran.append("head"))
    with hand_overs(monkeypatch) as resumed, model.trace(X) as tracer:
        up = model.layers[1].up.output
        tracer.stop()
    assert not resumed and not ran
    assert torch.equal(up, outputs(model, "layers.1.up")[0])


def test_a_group_between_other_statements_costs_one_hand_over(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ups: list[Tensor] = []
    with hand_overs(monkeypatch) as resumed, model.trace(X):
        model.layers[0].up.output[:] = 0
        for layer in model.layers[1:]:
            ups.append(layer.up.output)
        norm, head = model.norm.calls[2].output, model.head.output
        total = head.sum() + norm.sum()
    assert len(resumed) == 3  # to its first request, for that, for the whole group
    assert len(ups) == 2
    assert torch.equal(total, head.sum() + norm.sum())


def test_reads_that_the_block_uses_are_live(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    with hand_overs(monkeypatch) as resumed, model.trace(X):
        for layer in model.layers:
            norms.append(layer.up.output.norm().item())
    assert len(resumed) == 4
    assert norms == [value.norm().item() for value in outputs(model, *UPS)]


def test_the_setting_makes_every_read_live(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ups: list[Tensor] = []
    with settings.changed(defer_reads=False), hand_overs(monkeypatch) as resumed, model.trace(X):
        for layer in model.layers:
            ups.append(layer.up.output)
    assert len(resumed) == 4
    assert same(ups, outputs(model, *UPS))


def test_a_name_that_another_function_sees_is_bound_live(model: Model) -> None:
    seen: list[Any] = []
    up: Any = None
    handle = model.module.head.register_forward_hook(lambda *_: seen.append(up))
    with model.trace(X):
        up = model.layers[0].up.output
        norm = model.norm.output
    handle.remove()
    assert seen[0] is up
    assert norm is not None


def test_a_list_that_another_function_sees_is_filled_live(model: Model) -> None:
    seen: list[int] = []
    ups: list[Tensor] = []
    handle = model.module.head.register_forward_hook(lambda *_: seen.append(len(ups)))
    with model.trace(X):
        for layer in model.layers:
            ups.append(layer.up.output)
    handle.remove()
    assert seen == [3]


# --- the same errors, at the same lines ----------------------------------------------------------


def test_reads_out_of_order_fail_at_the_second_line_and_bind_the_first(model: Model) -> None:
    late: Any = None
    early: Any = None
    with pytest.raises(SiteOrderError, match=r"layers\.0\.up\.output .*layers\.2\.up\.output") as e:
        with model.trace(X):
            late = model.layers[2].up.output
            early = model.layers[0].up.output
    assert torch.equal(late, outputs(model, "layers.2.up")[0])
    assert early is None
    assert (
        traceback.extract_tb(e.value.__traceback__)[-1].line == "early = model.layers[0].up.output"
    )


def test_a_module_that_never_runs_fails_at_its_line_and_binds_what_came_before(
    model: Model,
) -> None:
    kept: list[Tensor] = []
    with pytest.raises(NeverRanError, match=r"layers\.2\.idle") as e:
        with model.trace(X):
            kept.append(model.layers[2].up.output)
            kept.append(model.layers[2].idle.output)
    assert same(kept, outputs(model, "layers.2.up"))
    last = traceback.extract_tb(e.value.__traceback__)[-1]
    assert last.line == "kept.append(model.layers[2].idle.output)"


def test_a_misspelt_module_fails_at_its_line(model: Model) -> None:
    kept: list[Tensor] = []
    with pytest.raises(UnknownModuleError, match="is not in Layer") as e:
        with model.trace(X):
            kept.append(model.layers[0].up.output)
            kept.append(model.layers[0].pu.output)
    assert same(kept, outputs(model, "layers.0.up"))
    last = traceback.extract_tb(e.value.__traceback__)[-1]
    assert last.line == "kept.append(model.layers[0].pu.output)"


def test_an_index_that_is_not_there_fails_at_its_line(model: Model) -> None:
    kept: list[Any] = [None]
    with pytest.raises(IndexError) as e:
        with model.trace(X):
            kept[0] = model.layers[0].up.output
            kept[7] = model.layers[1].up.output
    assert same(kept, outputs(model, "layers.0.up"))
    last = traceback.extract_tb(e.value.__traceback__)[-1]
    assert last.line == "kept[7] = model.layers[1].up.output"


def test_an_error_of_the_model_binds_what_came_before_it(model: Model) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("in the model")

    handle = model.module.layers[2].register_forward_hook(fail)
    ups: list[Tensor] = []
    with pytest.raises(ArithmeticError, match="in the model"):
        with model.trace(X):
            for layer in model.layers:
                ups.append(layer.up.output)
            ups.append(model.head.output)
    handle.remove()
    assert same(ups, outputs(model, *UPS))


def test_a_value_that_the_model_overwrites_is_refused() -> None:
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)))
    kept: list[Any] = []
    with pytest.raises(OverwrittenError, match=r"model\.0\.output"):
        with model.trace(X):
            kept.append(model[0].output)
            kept.append(model[2].output)
    assert len(kept) == 2


def test_a_value_that_the_model_overwrites_and_nobody_holds_is_not_refused() -> None:
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)))
    kept: dict[str, Any] = {}
    with torch.no_grad(), model.trace(X):
        kept["it"] = model[0].output
        kept["it"] = model[2].output
    assert torch.equal(kept["it"], model.module(X))


def test_what_a_module_changes_between_the_forecast_and_the_block_is_noticed(model: Model) -> None:
    def swap(*_: Any) -> None:
        picked.reverse()

    picked = [model.layers[0], model.layers[1]]
    handle = model.module.layers[2].register_forward_hook(swap)
    ups: list[Tensor] = []
    with pytest.raises(CaptureError, match="defer_reads"):
        with model.trace(X):
            for layer in picked:
                ups.append(layer.up.output)
    handle.remove()


# --- programs drawn at random --------------------------------------------------------------------

PLACES = ["layers[0]", "layers[1]", "layers[2]", "layers[1].up", "norm", "head", "layers[0].idle"]
READS = ["output", "inputs", "input", "hidden", "output[0]", "output.save()", "output[0].detach()"]
NAMES = ["a", "b", "c"]
READ = [f"model.{place}.{read}" for place in PLACES for read in READS]
# One is drawn for each statement, and then what stands in the place of each `{}`.
FORMS: list[tuple[str, list[list[Any]]]] = [
    ("{} = {}", [NAMES, READ]),
    ("{} = {}", [NAMES, READ]),
    ("{}, {} = {}, {}", [NAMES, NAMES, READ, READ]),
    ("kept.append({})", [READ]),
    ("kept.append({})", [READ]),
    ("acts[{!r}] = {}", [NAMES, READ]),
    ("first, second = model.layers[{}].output", [[0, 1, 2]]),
    ("{} = [layer.up.output for layer in model.layers[{}:]]", [NAMES, [0, 1, 2]]),
    ("{} = {{i: model.layers[i].up.{} for i in range({})}}", [NAMES, READS, [1, 2, 3]]),
    ("for i, layer in enumerate(model.layers[{}:]): acts[i] = layer.up.output", [[0, 1, 2]]),
    ("for layer in model.layers: x = layer.output", []),
    ("if {}: kept.append({})", [["True", "len(kept) > 1", "a is None"], READ]),
    ("model.{}.output[:] = 0", [["layers[1].up", "norm", "head"]]),
    ("model.layers[0].up.output = model.layers[0].up.output * {}", [[1, 2]]),
    ("b = model.{}.output.sum()", [["norm", "layers[0].up"]]),
    ("model.layers[{}].skip((zeros, zeros))", [[0, 1, 2]]),
    ("kept.append(tracer.result)", []),
    ("local = []", []),
    ("local.append(model.head.output)", []),
    (
        "try:\n    c = model.{}.output\n    b = model.norm.output\nexcept Exception: c = 1",
        [["head"]],
    ),
    ("tracer.stop()", []),
]


@st.composite
def statements(draw: st.DrawFn) -> list[str]:
    forms = draw(st.lists(st.sampled_from(FORMS), min_size=1, max_size=6))
    return [form.format(*[draw(st.sampled_from(each)) for each in of]) for form, of in forms]


def program(lines: list[str], name: str) -> Callable[..., dict[str, Any]]:
    body = "\n".join("        " + part for line in lines for part in line.split("\n"))
    source = (
        "def run(model, X, zeros, kept, acts, caught):\n"
        "    a = b = c = None\n"
        "    try:\n"
        "      with model.trace(X) as tracer:\n"
        f"{body}\n"
        "    except Exception as error: caught.append(error)\n"
        "    return locals()\n"
    )
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {}
    exec(compile(source, name, "exec"), names)
    return names["run"]


def outcome(run: Callable[..., dict[str, Any]], model: Model) -> tuple[Any, ...]:
    kept, acts, caught = [], {}, []
    bound = run(model, X, torch.zeros(3, 4), kept, acts, caught)
    for name in ("model", "X", "zeros", "tracer", "layer", "error"):
        bound.pop(name, None)
    errors = [(type(error), str(error), lines(error)) for error in caught]
    bound["caught"] = None
    return plain(bound), errors


def lines(error: Exception) -> list[int | None]:
    return [entry.lineno for entry in traceback.extract_tb(error.__traceback__)]


def plain(value: Any) -> Any:
    """Something that `==` compares: tensors by their numbers."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.detach().reshape(-1).tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(plain, value)]
    return value


@hypothesis_settings(max_examples=300, deadline=None)
@given(statements())
def test_programs_do_the_same_with_and_without(lines: list[str]) -> None:
    torch.manual_seed(0)
    model = Model(Stack())
    run = program(lines, "<program>")
    deferred = outcome(run, model)
    with settings.changed(defer_reads=False):
        live = outcome(run, model)
    assert deferred == live


# -- at a glance: what a block asked in an earlier run is noted by one hook -----------------------


def test_a_block_gives_the_same_in_its_first_run_and_in_later_ones() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh())
    model = Model(net)

    def run(x: Tensor) -> tuple[Any, ...]:
        kept: dict[str, Any] = {}
        with model.trace(x) as tracer:
            first = model[0].input
            kept["hidden"] = model[0].output.save()
            outs = [layer.output for layer in model]
            result = tracer.result
        return first, kept["hidden"], *outs, result

    for i in range(3):
        x = torch.full((2, 3), float(i))
        first, hidden, *outs, result = run(x)
        plain = [x]
        for layer in net:
            plain.append(layer(plain[-1]))
        assert torch.equal(first, x) and torch.equal(hidden, plain[1])
        assert all(torch.equal(one, other) for one, other in zip(outs, plain[1:], strict=True))
        assert torch.equal(result, plain[-1])
    assert len(model._tree.proven) == 1


def test_a_model_that_takes_another_way_later_is_an_error_and_binds_what_came() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(x)) if x.shape[0] > 1 else self.b(self.a(x))

    model = Model(Branch())
    found: list[dict[str, Tensor]] = []

    def run(rows: int) -> None:
        kept: dict[str, Tensor] = {}
        try:
            with model.trace(torch.ones(rows, 2)):
                kept["a"] = model.a.output
                kept["b"] = model.b.output
        finally:
            found.append(kept)

    run(1)
    run(1)
    with pytest.raises(SiteOrderError, match=r"model\.b\.output .*runs it before") as no:
        run(2)
    assert list(found[-1]) == ["a"]
    assert traceback.extract_tb(no.value.__traceback__)[-1].line == 'kept["b"] = model.b.output'


def test_a_model_that_fails_later_leaves_what_came_before() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if x.shape[0] > 1:
                raise LookupError("too many rows")
            return self.b(x)

    model = Model(Fails())
    found: list[dict[str, Tensor]] = []

    def run(x: Tensor) -> None:
        kept: dict[str, Tensor] = {}
        try:
            with model.trace(x):
                kept["a"] = model.a.output
                kept["b"] = model.b.output
        finally:
            found.append(kept)

    run(torch.ones(1, 2))
    assert len(model._tree.proven) == 1
    with pytest.raises(LookupError, match="too many rows"):
        run(torch.ones(2, 2))
    assert list(found[-1]) == ["a"] and found[-1]["a"].shape == (2, 2)


def test_what_is_overwritten_later_is_refused_in_every_run() -> None:
    model = Model(nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)))

    def run() -> Tensor:
        with model.trace(torch.randn(1, 2)):
            hidden = model[0].output
            out = model[1].output
        return hidden + out

    for _ in range(3):
        with pytest.raises(OverwrittenError):
            run()


def test_a_later_run_leaves_no_hook_and_keeps_nothing() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = Model(net)

    def run() -> list[Tensor]:
        with model.trace(torch.ones(1, 2)):
            first = model[0].output
            second = model[1].output
        return [first, second]

    check_nothing_stays(net, run)


def test_the_graph_of_a_later_run_is_that_of_the_first() -> None:
    model = Model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    graphs: list[Any] = []

    def run() -> None:
        with model.trace(torch.ones(1, 2)) as tracer:
            first = model[0].output  # noqa: F841
            second = model[1].output  # noqa: F841
        graphs.append(tracer.graph)

    run()
    run()
    assert graphs[0].to_json() == graphs[1].to_json()

"""tracer.graph: what a block asked for, in order, and where."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import X, small
from tracekit import Graph, LanguageModel, Model, settings
from tracekit.errors import DryRunError, OverwrittenError, RowsError


def traced(model: Model) -> Graph:
    with model.trace(X) as tracer:
        hidden = model[0].output
        hidden[:] = 0
        model[1].output = torch.ones(3, 4)
        kept = [model[2].output, tracer.result]
    assert len(kept) == 2
    return tracer.graph


def test_nodes_come_in_order_with_kind_visit_shape_and_line() -> None:
    graph = traced(Model(small()))
    found = [(node.kind, node.what, node.shape, node.dtype) for node in graph]
    assert found == [
        ("read", "model.0.output", (3, 4), "float32"),
        ("edit", "model.0.output", (3, 4), "float32"),
        ("write", "model.1.output", (3, 4), "float32"),
        ("read", "model.2.output", (3, 4), "float32"),
        ("read", "model.result", (3, 4), "float32"),
    ]
    assert graph[0].source == "hidden = model[0].output"
    assert graph[2].source == "model[1].output = torch.ones(3, 4)"
    assert {(node.step, node.call, node.invoke, node.file) for node in graph} == {
        (0, 0, 0, __file__)
    }


def test_it_says_which_reads_were_deferred() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        first = model[0].output.sum()
        kept = [model[1].output, model[2].output]
    assert first.ndim == 0 and len(kept) == 2
    assert [node.is_deferred for node in tracer.graph] == [False, True, True]
    with settings.changed(defer_reads=False):
        assert not any(node.is_deferred for node in traced(model))


def test_caches_and_stop_are_nodes() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        cache = tracer.cache(modules=[model[0]])
        model[0].output[:] = 1
        tracer.stop()
    assert torch.equal(cache["0"].output, torch.ones(3, 4))
    kinds = [(node.kind, node.what) for node in tracer.graph]
    assert kinds == [
        ("cache", "1 module"),
        ("read", "model.0.output"),
        ("stop", "tracer.stop()"),
        ("edit", "model.0.output"),
    ]


def test_it_goes_to_json_and_back_and_is_shown_as_a_table() -> None:
    graph = traced(Model(small()))
    assert Graph.from_json(graph.to_json()) == graph
    lines = repr(graph).splitlines()
    assert len(lines) == 1 + len(graph)
    assert "model.1.output" in lines[3] and "[3, 4] float32" in lines[3]
    page = graph.to_html()
    assert page.count("<tr>") == 1 + len(graph)


def test_lines_are_escaped_in_html() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        low = model[0].output < 0
    assert low.dtype is torch.bool
    assert "output &lt; 0" in tracer.graph.to_html()


def test_the_difference_between_two_runs_is_said_in_words() -> None:
    model = Model(small())
    graph = traced(model)
    assert graph.difference(traced(model)) == []
    with model.trace(X[:2]) as tracer:
        hidden = model[0].output
        total = model[2].output.sum()
    assert total.ndim == 0 and hidden.shape == (2, 4)
    told = graph.difference(tracer.graph)
    assert any("model.0.output" in line and "[2, 4]" in line for line in told)
    assert any(line.startswith("only in this one: write of model.1.output") for line in told)


def test_what_is_asked_twice_is_compared_one_by_one() -> None:
    model = Model(small())

    def asked(times: int) -> Graph:
        with model.trace(X) as tracer:
            for factor in range(times):
                model[1].output = torch.full((3, 4), float(factor))
        return tracer.graph

    assert asked(2).difference(asked(2)) == []
    (told,) = asked(2).difference(asked(1))
    assert told.startswith("only in this one: write of model.1.output")
    assert len(asked(1).difference(asked(3))) == 2


def test_what_comes_in_another_order_is_a_difference() -> None:
    model = Model(small())
    one, other = traced(model), Graph([*traced(model)][::-1])
    assert set(one) == set(other)
    (told,) = one.difference(other)
    assert told.startswith("in another order: read of model.0.output")
    assert "read of model.result" in told


# -- several blocks -------------------------------------------------------------------------------


def test_each_node_says_whose_block_asked() -> None:
    model = Model(small())
    with model.edit() as edited:
        model[0].output[:] += 1
    with edited.trace() as tracer:
        around = tracer.cache()
        with tracer.invoke(X):
            model[0].output
        with tracer.invoke(X * 2):
            own = tracer.cache([model[1]])
            model[0].output[:] = 0
    assert around["2"].output.shape == (6, 4) and own["1"].output.shape == (3, 4)
    found = [(node.kind, node.what, node.invoke) for node in tracer.graph]
    site = "model.0.output"
    assert sorted(found, key=str) == sorted(
        [
            ("cache", "4 modules", None),
            ("cache", "1 module", 1),
            ("read", site, None),
            ("edit", site, None),
            ("read", site, 0),
            ("read", site, 1),
            ("edit", site, 1),
        ],
        key=str,
    )
    _, *rows = [line.split() for line in repr(tracer.graph).splitlines()]
    shown = [(row[1], row[6] if row[1] == "cache" else row[5]) for row in rows]
    assert ("cache", "all") in shown and ("read", "edit") in shown


# -- of a scan and of a run -----------------------------------------------------------------------


def pictures(model: Any, block: Any, *args: Any, **kwargs: Any) -> tuple[Graph, Graph]:
    """The graphs of a scan and of a run; each may end in an error."""
    graphs: list[Graph] = []
    for tracer in (model.scan(*args, **kwargs), model.trace(*args, **kwargs)):
        with contextlib.suppress(DryRunError):
            tracer.run(block)
        graphs.append(tracer.graph)
    return graphs[0], graphs[1]


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "t5", "falcon", "bert", "mamba"])
def test_a_scan_has_the_picture_of_a_run(family: str) -> None:
    module, inputs = make(family)
    model = Model(module)
    with torch.no_grad(), model.trace(**inputs) as tracer:
        cache = tracer.cache()
    by_path = {envoy.path: envoy for _, envoy in model.named_modules()}
    leaves = [by_path[path] for path in cache if not list(by_path[path].module.children())]

    def block(tracer: Any) -> None:
        tracer.cache([leaves[-1]])
        for leaf in leaves:
            value = leaf.output
            if isinstance(value, Tensor) and value.is_floating_point():
                value.mul_(1)
                leaf.output = value.clone()
        tracer.result

    with torch.no_grad():
        scan, run = pictures(model, block, **inputs)
    assert {node.kind for node in run} == {"cache", "read", "edit", "write"}
    assert scan == run
    assert scan.difference(run) == []


def test_a_scan_of_invokes_has_the_picture_of_a_run() -> None:
    model = LanguageModel("tracekit/tiny")
    graphs = []
    for open_one in (model.scan, model.trace):
        with open_one() as tracer:
            with tracer.invoke("The Eiffel Tower"):
                model.transformer.h[0].output[:] = 0
            with tracer.invoke("Hello"):
                tracer.cache([model.lm_head])
                kept = [model.transformer.h[0].output, model.lm_head.output]
        assert len(kept) == 2
        graphs.append(tracer.graph)
    assert len(graphs[0]) == 5
    assert graphs[0] == graphs[1]


class Routed(nn.Module):
    """Takes one of two ways, by the sign of a sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.plus, self.minus, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(self.plus(hidden) if self.is_plus(hidden) else self.minus(hidden))

    def is_plus(self, hidden: Tensor) -> bool:
        return bool(hidden.sum() > -1000)


class Careful(Routed):
    """Goes on where there are no numbers to look at."""

    def is_plus(self, hidden: Tensor) -> bool:
        try:
            return super().is_plus(hidden)
        except DryRunError:
            return False


class Counting(Routed):
    """Takes its way by integers, which a scan knows."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(self.plus(hidden) if ids.sum() > 2 else self.minus(hidden))


def test_the_difference_says_what_a_scan_did_not_come_to() -> None:
    model = Model(Routed())

    def block(_: Any) -> None:
        kept = [model.first.output.shape, model.plus.output.shape, model.last.output.shape]
        assert len(kept) == 3

    scan, run = pictures(model, block, X)
    assert [node.what for node in scan] == ["model.first.output"]
    assert [line.split(" (")[0] for line in scan.difference(run)] == [
        "only in the other: read of model.plus.output",
        "only in the other: read of model.last.output",
    ]


def test_the_difference_says_which_other_way_a_scan_took() -> None:
    model = Model(Careful())

    with model.scan(X) as tracer:
        model.first.output
        model.minus.output
    scan = tracer.graph
    with model.trace(X) as tracer:
        model.first.output
        model.plus.output
    assert [line.split(" (")[0] for line in scan.difference(tracer.graph)] == [
        "only in this one: read of model.minus.output",
        "only in the other: read of model.plus.output",
    ]


@pytest.mark.parametrize("ids", [[1, 0], [1, 2]])
def test_a_scan_takes_the_way_that_integers_tell(ids: list[int]) -> None:
    model = Model(Counting())
    way = model.plus if sum(ids) > 2 else model.minus

    def block(tracer: Any) -> None:
        model.first.output
        way.output
        tracer.result

    scan, run = pictures(model, block, X, torch.tensor(ids))
    assert len(scan) == 3
    assert scan == run


def test_edits_in_place_that_a_run_refuses_are_refused_by_a_scan() -> None:
    class Shifted(nn.Module):
        """Adds to all rows alike."""

        def __init__(self) -> None:
            super().__init__()
            self.shift, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.shift(torch.ones(1, 4)))

    model = Model(Shifted())
    for open_one in (model.trace, model.scan):
        with pytest.raises(RowsError, match="belongs to all rows"):
            with open_one() as tracer:
                for _ in range(2):
                    with tracer.invoke(X):
                        model.shift.output[:] = 0


def test_what_a_run_says_was_overwritten_a_scan_says_too() -> None:
    model = Model(small(nn.ReLU(inplace=True)))
    for open_one in (model.trace, model.scan):
        with torch.no_grad(), pytest.raises(OverwrittenError, match=r"model\.0\.output"):
            with open_one(X):
                kept = model[0].output
        del kept
        with torch.no_grad(), open_one(X):
            own = model[0].output.clone()
        assert own.shape == (3, 4)


# -- what it holds --------------------------------------------------------------------------------


def test_a_graph_keeps_no_tensor_alive() -> None:
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    kept: list[Any] = []
    with torch.no_grad(), model.trace(X) as tracer:
        kept.append(model[0].output)
    graph, gone = tracer.graph, weakref.ref(kept[0])
    gc.disable()
    try:
        kept.clear()
        assert gone() is None
    finally:
        gc.enable()
    assert len(graph) == 1

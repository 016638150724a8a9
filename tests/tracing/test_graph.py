"""tracer.graph: what a block asked for, in order, and where."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn

from tests.tracing.plain import X, small
from tracekit import Graph, Model, settings


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
        ("cache", "1 modules"),
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

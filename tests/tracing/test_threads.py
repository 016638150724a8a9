"""Threads that trace one model at the same time get what each gets alone."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import X, small, state_of
from tracekit import Model
from tracekit.errors import SiteOrderError

THREADS, TIMES = 4, 20


def test_threads_that_trace_one_model_get_the_numbers_of_each_alone() -> None:
    model, inputs = make("gpt2")
    traced, before = Model(model), state_of(model)
    ids = [torch.roll(inputs["input_ids"], n, 1) for n in range(THREADS)]

    def run(number: int) -> list[tuple[Tensor, ...]]:
        seen = []
        for _ in range(TIMES):
            with torch.no_grad():
                with traced.trace(input_ids=ids[number]) as tracer:
                    cache = tracer.cache(modules=traced.transformer.h)
                    traced.transformer.h[0].output[:, number] += number
                    hidden = traced.transformer.h[1].output
                    logits = tracer.result.logits
            seen.append((cache["model.transformer.h.0"].output, hidden, logits))
        return seen

    alone = [run(number)[0] for number in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(run, range(THREADS)))
    for expected, got in zip(alone, together, strict=True):
        for values in got:
            assert all(torch.equal(one, other) for one, other in zip(values, expected, strict=True))
    assert state_of(model) == before


def test_a_plain_forward_beside_a_trace_is_not_seen_and_not_changed() -> None:
    net = small()
    model = Model(net)
    other: list[Tensor] = []
    with model.trace(X) as tracer:
        cache = tracer.cache()
        model[0].output
        thread = threading.Thread(target=lambda: other.append(net(X * 2)))
        thread.start()
        thread.join()
        model[1].output = torch.zeros(3, 4)
        got = tracer.result
    assert torch.equal(other[0], net(X * 2))
    assert torch.equal(got, net[2](torch.zeros(3, 4)))
    assert [len(cache[path]) for path in cache] == [1, 1, 1, 1]


class Meeting(nn.Module):
    """Lets two threads overlap in a set order: A is inside, B comes in, A ends, B goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.a_is_in, self.b_is_in = threading.Event(), threading.Event()
        self.a_has_ended = threading.Event()

    def forward(self, value: Tensor) -> Tensor:
        name = threading.current_thread().name
        if name == "A":
            self.a_is_in.set()
            assert self.b_is_in.wait(60)
        elif name == "B":
            self.b_is_in.set()
            assert self.a_has_ended.wait(60)
        return value


def test_two_threads_skip_the_same_module_with_values_of_their_own() -> None:
    meeting = Meeting()
    net = nn.Sequential(meeting, nn.Linear(4, 4), nn.Linear(4, 4))
    model, before = Model(net), state_of(net)
    got: dict[str, Any] = {}

    def first() -> None:
        with model.trace(X) as tracer:
            model[1].skip(torch.zeros(3, 4))
            got["A"] = tracer.result
        meeting.a_has_ended.set()

    def second() -> None:
        assert meeting.a_is_in.wait(60)
        with model.trace(X) as tracer:
            model[1].skip(torch.ones(3, 4))
            got["B"] = tracer.result

    threads = [threading.Thread(target=first, name="A"), threading.Thread(target=second, name="B")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert torch.equal(got["A"], net[2](torch.zeros(3, 4)))
    assert torch.equal(got["B"], net[2](torch.ones(3, 4)))
    assert state_of(net) == before


# -- many threads, several models, early stops and errors -----------------------------------------

MANY = 16 if "TRACEKIT_EXAMPLES" in os.environ else 8
ROUNDS = 200 if "TRACEKIT_EXAMPLES" in os.environ else 8


class Wrong(Exception):
    """Raised in a block, on purpose."""


def one_round(model: Model, net: nn.Module, x: Tensor, kind: int) -> None:
    """A trace of one of several kinds; every number is checked against plain PyTorch."""
    first = net[0](x)
    if kind == 0:
        with model.trace(x) as tracer:
            got = model[0].output.clone()
            model[1].output = got * 2
            result = tracer.result
        assert torch.equal(got, first)
        assert torch.equal(result, net[2](first * 2))
    elif kind == 1:
        with model.trace(x) as tracer:
            got = model[0].output.clone()
            tracer.stop()
        assert torch.equal(got, first)
    elif kind == 2:
        with pytest.raises(Wrong):
            with model.trace(x):
                got = model[0].output.clone()
                raise Wrong
        assert torch.equal(got, first)
    elif kind == 3:
        with pytest.raises(SiteOrderError):
            with model.trace(x):
                model[2].output
                model[0].output
    elif kind == 4:
        with model.trace(x) as tracer:
            cache = tracer.cache()
        assert torch.equal(cache["model.0"].output, first)
        assert torch.equal(cache["model"].output, net(x))
    else:
        with model.trace(x) as tracer:
            model[1].skip(model[1].input.clone())
            result = tracer.result
        assert torch.equal(result, net[2](first))


KINDS = 6


def test_many_threads_on_several_models_with_stops_and_errors_get_every_number_right() -> None:
    nets = [small(), small(nn.Tanh()), small(nn.ReLU(inplace=True)), small(nn.Identity())]
    models = [Model(net) for net in nets]
    before = [state_of(net) for net in nets]
    alive = {thread.ident for thread in threading.enumerate()}

    def work(number: int) -> None:
        draw = random.Random(number)
        for _ in range(ROUNDS):
            which = draw.randrange(len(nets))
            x = torch.full((3, 4), draw.uniform(-2, 2))
            with torch.no_grad():
                one_round(models[which], nets[which], x, draw.randrange(KINDS))

    with ThreadPoolExecutor(MANY) as pool:
        for done in [pool.submit(work, number) for number in range(MANY)]:
            done.result()
    assert [state_of(net) for net in nets] == before
    left = [thread for thread in threading.enumerate() if thread.ident not in alive]
    assert not [thread for thread in left if not thread.daemon]
    assert len(left) <= MANY  # parked in the pool, one for each trace that ran at a time

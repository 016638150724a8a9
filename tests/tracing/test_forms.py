"""One table of forms of `with`: each gives what plain hooks give, in every way that it can run."""

from __future__ import annotations

import asyncio
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.capture.fake_tracer import load
from tests.tracing.plain import X, changing
from tracekit import Model, settings


class Form(NamedTuple):
    """A function `run(trace)` that has h, the output of model[0], and y, the result, where the
    output of model[1] was replaced by twice h; whether its block can be lifted out of its place."""

    text: str
    is_liftable: bool = True


FORMS = {
    "a block": Form("""
        def run(trace):
            with trace() as t:
                h = model[0].output
                model[1].output = h * 2
                y = t.result
            return h, y
    """),
    "one line": Form("""
        def run(trace):
            with trace() as t: h = model[0].output; model[1].output = h * 2; y = t.result
            return h, y
    """),
    "return": Form(
        """
        def run(trace):
            with trace() as t:
                h = model[0].output
                model[1].output = h * 2
                return h, t.result
    """,
        False,
    ),
    "return before the model has ended": Form(
        """
        def run(trace):
            def half():
                with trace() as t:
                    cache = t.cache(model)
                    h = model[0].output
                    model[1].output = h * 2
                    return h, cache
            h, cache = half()
            return h, cache["model"].output
    """,
        False,
    ),
    "return in a finally around the block": Form("""
        def run(trace):
            try:
                with trace() as t:
                    h = model[0].output
                    model[1].output = h * 2
                    y = t.result
            finally:
                return h, y
    """),
    "break": Form(
        """
        def run(trace):
            while True:
                with trace() as t:
                    h = model[0].output
                    model[1].output = h * 2
                    y = t.result
                    break
            return h, y
    """,
        False,
    ),
    "continue": Form(
        """
        def run(trace):
            for number in range(2):
                with trace() as t:
                    h = model[0].output
                    model[1].output = h * (number + 1)
                    y = t.result
                    if number == 0:
                        continue
                    number = 7
            return h, y
    """,
        False,
    ),
    "yield": Form(
        """
        def run(trace):
            def values():
                with trace() as t:
                    yield model[0].output
                    model[1].output = (yield) * 2
                    yield t.result
            generator = values()
            h = next(generator)
            next(generator)
            y = generator.send(h)
            assert next(generator, None) is None
            return h, y
    """,
        False,
    ),
    "yield from": Form(
        """
        def run(trace):
            def inner(t):
                yield model[0].output
                model[1].output = h * 2
                yield t.result
            def values():
                with trace() as t:
                    yield from inner(t)
            generator = values()
            h = next(generator)
            return h, next(generator)
    """,
        False,
    ),
    "two generators in turns": Form(
        """
        def run(trace):
            def values(factor):
                with trace() as t:
                    h = model[0].output
                    yield h
                    model[1].output = h * factor
                    yield t.result
            one, other = values(2), values(3)
            h, same = next(one), next(other)
            assert torch.equal(h, same)
            y, more = next(one), next(other)
            assert not torch.equal(y, more)
            return h, y
    """,
        False,
    ),
    "await": Form(
        """
        async def run(trace):
            with trace() as t:
                h = model[0].output
                await asyncio.sleep(0)
                model[1].output = h * 2
                await asyncio.sleep(0)
                y = t.result
            return h, y
    """,
        False,
    ),
    "two tasks in turns": Form(
        """
        async def run(trace):
            async def task(factor):
                with trace() as t:
                    h = model[0].output
                    await asyncio.sleep(0)
                    model[1].output = h * factor
                    await asyncio.sleep(0)
                    return h, t.result
            one, other = await asyncio.gather(task(2), task(3))
            assert not torch.equal(one[1], other[1])
            return one
    """,
        False,
    ),
    "async for, async with and an async comprehension": Form(
        """
        async def run(trace):
            async def numbers():
                for number in (1, 2):
                    await asyncio.sleep(0)
                    yield number
            @contextlib.asynccontextmanager
            async def manager():
                await asyncio.sleep(0)
                yield 2
            with trace() as t:
                h = model[0].output
                async for number in numbers():
                    last = number
                async with manager() as two:
                    twice = [h * last async for last in numbers()]
                model[1].output = twice[1] * last / two
                y = t.result
            return h, y
    """,
        False,
    ),
    "a block that awaits nothing in a coroutine": Form("""
        async def run(trace):
            await asyncio.sleep(0)
            with trace() as t:
                h = model[0].output
                model[1].output = h * 2
                y = t.result
            return h, y
    """),
    "try first": Form("""
        def run(trace):
            with trace() as t:
                try:
                    h = model[0].output
                    1 / 0
                except ZeroDivisionError:
                    model[1].output = h * 2
                finally:
                    y = t.result
            return h, y
    """),
    "match": Form("""
        def run(trace):
            with trace() as t:
                match model[0].output:
                    case torch.Tensor() as h:
                        model[1].output = h * 2
                    case _:
                        h = None
                y = t.result
            return h, y
    """),
    "nonlocal and global": Form("""
        y = None
        def run(trace):
            global y
            h = None
            def inner():
                nonlocal h
                global y
                with trace() as t:
                    h = model[0].output
                    model[1].output = h * 2
                    y = t.result
            inner()
            return h, y
    """),
    "a walrus in a comprehension": Form("""
        def run(trace):
            with trace() as t:
                many = [(h := model[index].output) for index in range(1)]
                model[1].output = sum(h for _ in range(2))
                y = t.result
            return h, y
    """),
    "stars": Form("""
        def run(trace):
            with trace() as t:
                h, *rest = [model[0].output, 1, 2]
                model[1].output = h * [*rest][-1]
                pair = *rest, t.result
            return h, pair[-1]
    """),
    "functions that outlive the block": Form("""
        def run(trace):
            with trace() as t:
                h = model[0].output
                def first():
                    return h
                last = lambda: y
                model[1].output = first() * 2
                y = t.result
            return first(), last()
    """),
    "functions of outside that ask": Form("""
        def run(trace):
            def read():
                return model[0].output
            def write(value):
                model[1].output = value
            with trace() as t:
                h = read()
                write(h * 2)
                y = t.result
            return h, y
    """),
    "a class in the block": Form("""
        def run(trace):
            with trace() as t:
                class Values:
                    h = model[0].output
                    model[1].output = h * 2
                    __y = t.result
                    y = __y
            return Values.h, Values.y
    """),
    "a block in a class": Form(
        """
        def run(trace):
            class Values:
                with trace() as t:
                    h = model[0].output
                    model[1].output = h * 2
                    y = t.result
            return Values.h, Values.y
    """,
    ),
    "a block in a class, with a private name": Form(
        """
        class Values:
            @classmethod
            def run(cls, trace):
                class Inner:
                    with trace() as t:
                        __h = model[0].output
                        model[1].output = __h * 2
                        y = t.result
                        h = __h
                return Inner.h, Inner.y
        run = Values.run
    """,
        False,
    ),
    "managers before": Form("""
        def run(trace):
            with torch.no_grad(), contextlib.nullcontext(2) as two, trace() as t:
                h = model[0].output
                model[1].output = h * two
                y = t.result
            return h, y
    """),
    "a manager after": Form(
        """
        def run(trace):
            with trace() as t, contextlib.nullcontext(2) as two:
                h = model[0].output
                model[1].output = h * two
                y = t.result
            return h, y
    """,
        False,
    ),
    "parentheses": Form("""
        def run(trace):
            with (
                contextlib.nullcontext(2) as two,
                trace() as t,
            ):
                h = model[0].output
                model[1].output = h * two
                y = t.result
            return h, y
    """),
    "a name after as that is no name": Form(
        """
        def run(trace):
            where = {}
            with trace() as where["t"]:
                try:
                    h = model[0].output
                finally:
                    model[1].output = h * 2
                y = where["t"].result
            return h, y
    """,
        False,
    ),
    "raise alone": Form(
        """
        def run(trace):
            try:
                raise KeyError("mine")
            except KeyError:
                try:
                    with trace() as t:
                        h = model[0].output
                        model[1].output = h * 2
                        y = t.result
                        raise
                except KeyError as error:
                    assert error.args == ("mine",)
            return h, y
    """,
        False,
    ),
    "import of everything": Form(
        """
        def opened():
            global trace
            return trace()
        with opened() as t:
            from math import *
            h = model[0].output
            model[1].output = h * floor(2.5)
            y = t.result
        def run(trace):
            return h, y
    """,
        False,
    ),
    "del": Form("""
        def run(trace):
            with trace() as t:
                spare = model[0].output
                h = spare
                del spare
                model[1].output = h * 2
                y = t.result
            return h, y
    """),
    "annotations and augmented assignment": Form("""
        def run(trace):
            with trace() as t:
                h: torch.Tensor = model[0].output
                model[1].output *= 0
                model[1].output += h
                model[1].output += h
                y: "a tensor" = t.result
            return h, y
    """),
    "decorators": Form("""
        def run(trace):
            with trace() as t:
                h = model[0].output
                @lambda function: function()
                def twice():
                    return h * 2
                model[1].output = twice
                y = t.result
            return h, y
    """),
    "loops and their else": Form("""
        def run(trace):
            with trace() as t:
                for index in range(5):
                    if index == 0:
                        h = model[index].output
                        continue
                    break
                else:
                    h = None
                while index < 2:
                    index += 1
                    model[1].output = h * 2
                else:
                    y = t.result
            return h, y
    """),
    "ExitStack": Form(
        """
        def run(trace):
            with contextlib.ExitStack() as stack:
                t = stack.enter_context(trace())
                h = model[0].output
                model[1].output = h * 2
                y = t.result
            return h, y
    """,
        False,
    ),
    "an ExitStack that another function fills": Form(
        """
        def run(trace):
            def opened(stack):
                return stack.enter_context(trace())
            with contextlib.ExitStack() as stack:
                t = opened(stack)
                h = model[0].output
                model[1].output = h * 2
                y = t.result
            return h, y
    """,
        False,
    ),
    "calls of __enter__ and __exit__": Form(
        """
        def run(trace):
            t = trace().__enter__()
            h = model[0].output
            model[1].output = h * 2
            y = t.result
            t.__exit__(None, None, None)
            return h, y
    """,
        False,
    ),
    "a contextmanager of the user's": Form(
        """
        @contextlib.contextmanager
        def traced(trace, factor):
            with trace() as t:
                h = model[0].output
                model[1].output = h * factor
                yield h, t
        def run(trace):
            with traced(trace, 2) as (h, t):
                with traced(trace, 3) as (again, other):
                    assert torch.equal(h, again)
                    assert not torch.equal(other.result, h)
                y = t.result
            return h, y
    """,
        False,
    ),
    "a contextmanager in a generator, in turns with another": Form(
        """
        @contextlib.contextmanager
        def traced(trace):
            with trace() as t:
                yield t
        def values(trace, factor):
            with traced(trace) as t:
                h = model[0].output
                yield h
                model[1].output = h * factor
                yield t.result
        def run(trace):
            one, other = values(trace, 2), values(trace, 3)
            h, _ = next(one), next(other)
            y = next(one)
            other.close()
            return h, y
    """,
        False,
    ),
    "a decorator made of a contextmanager": Form(
        """
        @contextlib.contextmanager
        def traced(trace):
            with trace():
                yield
        def run(trace):
            @traced(trace)
            def block():
                h = model[0].output
                model[1].output = h * 2
                return h, model[2].output
            return block()
    """,
        False,
    ),
    "a lifted block in one that stays": Form(
        """
        def run(trace):
            with trace() as t:
                h = model[0].output
                with trace() as inner:
                    twice = model[0].output * 2
                    again = inner.result
                model[1].output = twice
                return h, t.result
    """,
        False,
    ),
    "a block that stays in a lifted one": Form("""
        def run(trace):
            def inner():
                with trace() as t:
                    return model[0].output * 2
            with trace() as t:
                h = model[0].output
                model[1].output = inner()
                y = t.result
            return h, y
    """),
}
SPACES = {
    "asyncio": "import asyncio\n",
    "contextlib": "import contextlib\n",
    "torch": "import torch\n",
}


def expected(net: nn.Sequential) -> tuple[Tensor, Tensor]:
    """By plain hooks alone."""
    seen: list[Tensor] = []
    with changing(net[0], lambda output: seen.append(output)):
        net(X)
    with changing(net[1], lambda _: seen[0] * 2):
        return seen[0], net(X)


def result_of(run: Callable[..., Any], trace: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    got = run(trace)
    return asyncio.run(got) if inspect.isawaitable(got) else got


def check(namespace: dict[str, Any], net: nn.Sequential) -> None:
    got = result_of(namespace["run"], namespace["trace"])
    for value, other in zip(got, expected(net), strict=True):
        assert torch.equal(value, other)


def names_for(model: Model) -> dict[str, Any]:
    tracers: list[Any] = []

    def trace() -> Any:
        tracers.append(model.trace(X))
        return tracers[-1]

    return {"model": model, "trace": trace, "tracers": tracers}


def source_of(name: str) -> str:
    return "".join(SPACES.values()) + textwrap.dedent(FORMS[name].text)


each_form = pytest.mark.parametrize("name", FORMS)


@each_form
def test_a_form_in_a_file(name: str, model: Model, net: nn.Sequential, tmp_path: Path) -> None:
    names = load(source_of(name), tmp_path / "form.py", **names_for(model))
    check(names, net)
    is_lifted = "was lifted" in names["tracers"][0].explain()
    assert is_lifted == FORMS[name].is_liftable, names["tracers"][0].explain()


@each_form
def test_a_form_in_place(name: str, model: Model, net: nn.Sequential, tmp_path: Path) -> None:
    with settings.changed(lift_blocks=False):
        check(load(source_of(name), tmp_path / "form.py", **names_for(model)), net)


@each_form
def test_a_form_without_source(name: str, model: Model, net: nn.Sequential) -> None:
    names = names_for(model)
    exec(source_of(name), names)
    check(names, net)
    assert "in place" in names["tracers"][0].explain()

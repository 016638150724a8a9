"""A function in the place of a block: it runs on a worker beside the model, and needs no source."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, final

from tracekit.errors import InputError
from tracekit.tracing.execution import Execution, Intervention
from tracekit.tracing.gradients import with_methods_of_blocks
from tracekit.tracing.ways import Way

T = TypeVar("T")


@final
class Called(Way):
    """A function that is run as a block."""

    told = "A function ran in the place of a block, on a worker beside the model."

    def __init__(self, function: Callable[[], Any], execution: Execution) -> None:
        self._function: Callable[[], Any] | None = function
        self.execution = execution
        self.value: Any = None  # what the function returned

    def abandon(self, error: BaseException) -> None:
        assert self.execution is not None
        self.execution.abandon()

    def finish(self) -> BaseException | None:
        assert self.execution is not None
        return self.execution.run([Intervention(self._call)])

    def _call(self) -> None:
        function, self._function = self._function, None
        assert function is not None
        self.value = with_methods_of_blocks(function)


def call_of(function: Callable[..., T], tracer: object) -> Callable[[], T]:
    """`function`, with `tracer` if it requires an argument."""
    if not callable(function):
        raise InputError(f"tracer.run() takes a function, not {type(function).__name__}.")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise InputError(
            f"tracer.run() takes a function that runs when it is called; {function.__name__} is a "
            f"generator or coroutine: write `with model.trace(...)` in it instead."
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some of those written in C
        return function
    required = [
        parameter
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(required) > 1 or any(each.kind is each.KEYWORD_ONLY for each in required):
        names = ", ".join(parameter.name for parameter in required)
        raise InputError(
            f"tracer.run() calls function() or function(tracer), and this one needs ({names}): "
            f"bind the rest with functools.partial or a lambda."
        )
    return partial(function, tracer) if required else function

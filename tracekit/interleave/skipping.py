"""Keep a module from running: its `forward`, replaced on the instance while any run may skip it."""

# Guarantees:
#   - runs in several threads may skip the same module, each with its own values, and end in any
#     order; the last one to end puts the module's own `forward` back.

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, TypeAlias, final

from torch import nn

from tracekit.interleave.protocol import Skip
from tracekit.interleave.worker import exclusively

# Says what stands in the place of the call that is about to run, if something does.
Answer: TypeAlias = Callable[[], "Skip | None"]

_NOTHING = object()


def skippable(module: nn.Module, answer: Answer) -> Callable[[], None]:
    """Ask `answer` before each call of `module`; what is returned takes that back."""
    with exclusively:
        forward = module.__dict__.get("forward", _NOTHING)
        if not isinstance(forward, _Skippable):
            forward = module.__dict__["forward"] = _Skippable(module.forward, forward)
        forward.answers = (*forward.answers, answer)
    return partial(_take_back, module, forward, answer)


def _take_back(module: nn.Module, forward: _Skippable, answer: Answer) -> None:
    with exclusively:
        forward.answers = tuple(other for other in forward.answers if other is not answer)
        if forward.answers or module.__dict__.get("forward") is not forward:
            return
        if forward.had is _NOTHING:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = forward.had


@final
class _Skippable:
    """A `forward` that may be answered for."""

    def __init__(self, forward: Callable[..., Any], had: object) -> None:
        self._forward = forward
        self.had = had  # what the instance had as `forward` of its own
        self.answers: tuple[Answer, ...] = ()
        update_wrapper(self, forward)  # transformers looks at its signature

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._forward, memo)  # a twin of the module is skipped by nobody

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for answer in self.answers:
            request = answer()
            if request is not None:
                return request.value
        return self._forward(*args, **kwargs)

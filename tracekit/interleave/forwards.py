"""What a module runs: its `forward`, replaced on the instance while any run has a say in it."""

# Guarantees:
#   - runs in several threads may replace the same module's, each with its own values, and end in
#     any order; the last one to end puts the module's own `forward` back.

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
# Says which function, made from the module's own `forward`, is to run instead of it, if one is.
Body: TypeAlias = Callable[[Callable[..., Any]], "Callable[..., Any] | None"]

_NOTHING = object()


def skippable(module: nn.Module, answer: Answer) -> Callable[[], None]:
    """Ask `answer` before each call of `module`; what is returned takes that back."""
    return _placed(module, "forward", answer=answer)


def rewritable(module: nn.Module, body: Body) -> Callable[[], None]:
    """Ask `body` what to run at each call of `module`; what is returned takes that back."""
    return _placed(module, _attribute(module), body=body)


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """What the module runs when no run has a say."""
    forward = getattr(module, _attribute(module))
    return forward.forward if isinstance(forward, _StandIn) else forward


def _attribute(module: nn.Module) -> str:
    """accelerate keeps the module's own `forward` beside the one that it puts around it."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _placed(
    module: nn.Module, attribute: str, answer: Answer | None = None, body: Body | None = None
) -> Callable[[], None]:
    with exclusively:
        had = vars(module).get(attribute, _NOTHING)
        if isinstance(had, _StandIn):
            stand_in = had
        else:
            stand_in = vars(module)[attribute] = _StandIn(getattr(module, attribute), had)
        if answer is not None:
            stand_in.answers = (*stand_in.answers, answer)
        if body is not None:
            stand_in.bodies = (*stand_in.bodies, body)
    return partial(_take_back, module, attribute, stand_in, answer or body)


def _take_back(module: nn.Module, attribute: str, stand_in: _StandIn, what: object) -> None:
    with exclusively:
        stand_in.answers = tuple(other for other in stand_in.answers if other is not what)
        stand_in.bodies = tuple(other for other in stand_in.bodies if other is not what)
        if stand_in.answers or stand_in.bodies or vars(module).get(attribute) is not stand_in:
            return
        if stand_in.had is _NOTHING:
            del vars(module)[attribute]
        else:
            vars(module)[attribute] = stand_in.had


@final
class _StandIn:
    """A `forward` that may be answered for, or run another function."""

    def __init__(self, forward: Callable[..., Any], had: object) -> None:
        self.forward = forward
        self.had = had  # what the instance had as `forward` of its own
        self.answers: tuple[Answer, ...] = ()
        self.bodies: tuple[Body, ...] = ()
        update_wrapper(self, forward)  # transformers looks at its signature

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.forward, memo)  # nobody has a say in a twin of the module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for answer in self.answers:
            request = answer()
            if request is not None:
                return request.value
        for body in self.bodies:
            other = body(self.forward)
            if other is not None:
                return other(*args, **kwargs)
        return self.forward(*args, **kwargs)

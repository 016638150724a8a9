"""A generation that is gone through step by step, with its text, its cache and its edits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor

from tracekit.capture import showing_own_lines
from tracekit.core.tree import Tree
from tracekit.errors import InputError, StreamError
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.protocol import Unwind
from tracekit.interleave.worker import current_mediator
from tracekit.models.generation import eager
from tracekit.models.signatures import is_transformers
from tracekit.models.texts import Texts
from tracekit.tracing.cache import Cache, empty_cache
from tracekit.tracing.call import TracedCall
from tracekit.tracing.called import call_of
from tracekit.tracing.declared import DeclaredEdit
from tracekit.tracing.execution import Intervention
from tracekit.tracing.relay import Relay
from tracekit.tracing.select import Selector, select
from tracekit.tracing.tracer import Tracer

_NOT_YET: Any = object()


@final
class Streamer:
    """What `generate` gives its tokens to: first the prompt, then those of each step.

    Its own, and that of the user's, if one was given.
    """

    def __init__(self, given: Any) -> None:
        self._given = given
        self._has_prompt = False
        self.hand_over: Callable[[Tensor], None] | None = None  # while it is iterated

    def put(self, value: Tensor) -> None:
        """Take what transformers says of this: the prompt (rows, tokens), then (rows) or a row."""
        if self._given is not None:
            self._given.put(value)
        if not self._has_prompt:
            self._has_prompt = True
        elif self.hand_over is not None:
            self.hand_over(value if value.dim() == 2 else value[:, None])

    def end(self) -> None:
        """The tokens have come to their end; another prompt may follow."""
        self._has_prompt = False
        if self._given is not None:
            self._given.end()


@final
@dataclass
class Gains:
    """What a stream has besides its items."""

    cache: Cache | None = None
    result: Any = field(default=_NOT_YET)
    value: Any = field(default=_NOT_YET)  # of the function that ran beside it
    not_yet: str = (  # why there is no cache
        "a stream records from its first item on: read stream.cache in the loop, or after."
    )


@final
@dataclass(frozen=True)
class Plan:
    """A generation, and what is to be recorded and changed in it."""

    tree: Tree
    call: TracedCall
    lasting: Sequence[Intervention]
    capture: Selector
    cache_options: Mapping[str, Any]
    edits: Iterable[Any]
    function: Callable[..., Any] | None


class _Items(Iterator[Any]):
    """Goes through a stream once; when it is dropped, the stream is closed."""

    def __init__(self, relay: Relay, texts: Texts | None) -> None:
        self._relay = relay
        self._texts = texts

    @showing_own_lines
    def __next__(self) -> Any:
        try:
            items = self._relay.advance()
            return self._shown(items[0]) if items else self._rest()
        except BaseException:  # the end, too
            self._texts = None
            self._relay.close()
            raise

    def _shown(self, tokens: Tensor) -> Any:
        return tokens.clone() if self._texts is None else self._texts.add(tokens)

    def _rest(self) -> Any:
        texts, self._texts = self._texts, None
        rest = texts.end() if texts is not None and not self._relay.was_left else None
        if rest is None:
            raise StopIteration
        return rest

    def __del__(self) -> None:
        if not sys.is_finalizing():  # no other thread runs any more then
            self._relay.close()


@final
class Stream(Iterable[Any]):
    """What `model.generate_stream(...)` gives: to be gone through once, in a `for`.

    The model stands still between two items. However the loop is left, it has ended then, with
    every hook off; `with model.generate_stream(...) as stream:` says so of a block.
    """

    def __init__(self, relay: Relay, gains: Gains, texts: Texts | None) -> None:
        self._relay = relay
        self._gains = gains
        self._texts = texts
        self._is_used = False

    @showing_own_lines
    def __iter__(self) -> Iterator[Any]:
        if self._is_used or self._relay.is_over:
            raise StreamError(
                "a stream is gone through once: call model.generate_stream(...) again for another."
            )
        self._is_used = True
        texts, self._texts = self._texts, None
        return _Items(self._relay, texts)

    @property
    def cache(self) -> Cache:
        """What `capture` names, up to the last item, and all of it at the end.

        What is read while the stream goes is a copy of the model's: it is safe to keep and change.
        """
        if self._gains.cache is None:
            raise StreamError(self._gains.not_yet)
        return self._gains.cache

    @property
    def result(self) -> Any:
        """What `generate` returned: the tokens of the prompt and the new ones."""
        return self._ended(self._gains.result, "result", "generate")

    @property
    def value(self) -> Any:
        """What the function of `run=` returned."""
        return self._ended(self._gains.value, "value", "the function of run=")

    def _ended(self, gained: Any, name: str, what: str) -> Any:
        if gained is not _NOT_YET:
            return gained
        over = self._relay.is_over
        raise StreamError(
            f"stream.{name} is what {what} returned, and it "
            f"{'was left before that' if over else 'has not yet: go through the stream first'}."
        )

    @showing_own_lines
    def close(self) -> None:
        """Stop here, and leave nothing on the model. A stream that has ended may be closed."""
        self._relay.close()

    def __enter__(self) -> Stream:
        return self

    @showing_own_lines
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._relay.close()


def stream(plan: Callable[[Streamer], Plan], given: Any, texts: Texts | None) -> Stream:
    """The Stream of the plan that is made with its Streamer, before the one that was `given`.

    Raises UnknownPathError, with near matches, for unknown modules.
    """
    streamer = Streamer(given)
    planned = plan(streamer)
    declared = [DeclaredEdit(planned.tree, edit) for edit in planned.edits]
    gains = Gains()
    if isinstance(planned.capture, tuple) and not planned.capture:
        gains.cache = empty_cache()
    else:
        select(planned.tree, planned.capture)
    if planned.function is not None:
        call_of(planned.function, None)  # whether it can be called
    if planned.tree.is_compiled():
        with eager(planned.tree):  # which tells, at the user's line
            pass
    relay = Relay(partial(_run, planned, declared, streamer, gains))
    return Stream(relay, gains, texts)


def check_streams(module: Any, options: Mapping[str, Any]) -> None:
    """InputError for what has no tokens to give before its end."""
    if not is_transformers(module):
        raise InputError(
            f"generate_stream() needs the generate() of transformers, which tells of each token; "
            f"that of {type(module).__name__} is its own."
        )
    config = options.get("generation_config") or module.generation_config
    beams = options.get("num_beams") or getattr(config, "num_beams", None) or 1
    if beams > 1:
        raise InputError(
            f"a stream has no beams: which of {beams} goes on is known at the end alone. Leave "
            f"num_beams out, or write model.generate(...)."
        )


# -- beside the model, on its thread ------------------------------------------------------------


def _run(
    plan: Plan, declared: list[DeclaredEdit], streamer: Streamer, gains: Gains, relay: Relay
) -> None:
    made = [each for edit in declared for each in edit.interventions()]
    call = replace(plan.call, make=partial(_kept, plan.call, gains))
    tracer = Tracer(plan.tree, call, False, [*plan.lasting, *made])
    streamer.hand_over = partial(_hand_over, plan.tree, relay)
    try:
        value = tracer.run(partial(_block, plan, gains, relay, tracer))
    finally:
        streamer.hand_over = None
    if gains.result is not _NOT_YET:
        gains.value = value
        for edit in declared:
            edit.check()


def _kept(call: TracedCall, gains: Gains, follower: Any) -> Any:
    gains.result = call.make(follower)
    return gains.result


def _block(plan: Plan, gains: Gains, relay: Relay, tracer: Tracer) -> Any:
    """What runs in the place of a block, from before the model on."""
    mediator = current_mediator()
    assert mediator is not None
    relay.leave = partial(_leave, mediator)
    if gains.cache is None:
        cache = tracer.cache(plan.capture, **plan.cache_options)
        cache._open_early(partial(_is_standing, relay))  # pyright: ignore[reportPrivateUsage] - for streams
        gains.cache = cache
    if plan.function is None:
        return None
    return call_of(plan.function, tracer)()


def _leave(mediator: Mediator) -> None:
    mediator.has_stopped = True
    raise Unwind(mediator)


def _is_standing(relay: Relay) -> bool:
    return relay.is_standing


def _hand_over(tree: Tree, relay: Relay, tokens: Tensor) -> None:
    with _as_outside(tree):
        relay.hand_over(tokens)


def _as_outside(tree: Tree) -> AbstractContextManager[Any]:
    """While the model stands still, what else is compiled runs compiled: the stance is global."""
    return torch.compiler.set_stance("default") if tree.is_compiled() else nullcontext()

"""Run a generation's model again in one forward, with its changes made, and look at the values."""

# The forward is made with plain hooks, apart from all that recorded the run.

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tracekit.core.site import Site, Slot
from tracekit.errors import CacheError
from tracekit.interleave.hooks import is_elsewhere
from tracekit.interleave.places import tapped
from tracekit.interleave.worker import this_thread
from tracekit.tracing.changes import Changes
from tracekit.tracing.replay import Replay
from tracekit.tracing.sequence import TokenSequence
from tracekit.tracing.timeline import Pass, axis_of, by_rows, tensor_of

# Takes a site, its how-manieth visit, the value that the model goes on with, and the forward.
See: TypeAlias = Callable[[Site, int, Any, Pass], None]


def run_again(changes: Changes, paths: set[str], see: See, include_last: bool = False) -> None:
    """Let `see` look at what the modules at `paths` are given, and give, in one forward.

    It goes over the tokens that the run went over, and the last one with `include_last`.
    CacheError where the run can't be made again.
    """
    timeline = changes.whole.timeline
    if timeline.rerun is None or timeline.transcript is None:
        raise CacheError(
            "this can't be run again in one forward: it was not recorded in a generation of "
            "transformers, or that was stopped before its first step was over, or the cache is a "
            "copy or from a file, and has left the model behind."
        )
    missed = changes.whole.missed
    if missed is not None:
        raise CacheError(
            f"this can't be run again in one forward: {missed} was edited before there was a "
            f"cache, so it is not known how. Make the cache first in the block."
        )
    length = timeline.total + include_last
    replay = Replay(changes.whole, timeline.transcript, length)
    tree = timeline.rerun.tree
    with ExitStack() as placed:
        calls: Counter[str] = Counter()
        every = {*paths, *(site.path for site in replay.sites)}
        for path in every:
            watch = see if path in paths else _look_away
            _place(placed, tree.module(path), path, replay, calls, watch)
        placed.callback(tapped(tree, every).remove)
        timeline.rerun(timeline.transcript, length == timeline.transcript.tokens.shape[1])


def by_position(site: Site, value: Any, one: Pass) -> tuple[int, Tensor]:
    """Where the positions are in a value of that forward, and it as `[rows, positions, ...]`."""
    tensor = tensor_of(site.slot, value)
    if tensor is None:
        raise CacheError(f"{site} has no tensor.")
    axis, _ = axis_of(site, tensor, one)
    laid = by_rows(tensor, axis, one.rows, one.length)
    return axis, laid if laid.shape[0] == one.rows else laid.expand(one.rows, *laid.shape[1:])


def with_last(sequence: TokenSequence, site: Site, call: int, changes: Changes) -> TokenSequence:
    """`sequence`, and what the last token gives, which the run did not go over.

    CacheError if a block edited step by step: the last token had no step.
    """
    transcript = changes.timeline.transcript
    assert transcript is not None
    if changes.timeline.total == transcript.tokens.shape[1]:
        return sequence  # a plain trace, or a step that was left: it is there
    if changes.whole.made and changes.whole.missed is None:
        raise CacheError(
            f"include_last=True runs the last token once more, and {changes.whole.made[0].site} "
            f"was edited step by step, of which the last token had none: edit tokens instead, "
            f"with .at('generated') or .at('all')."
        )
    found: list[Tensor] = []

    def see(at: Site, visit: int, value: Any, one: Pass) -> None:
        if at == site and visit == call:
            found.append(by_position(site, value, one)[1][:, -1:].clone())

    run_again(changes, {site.path}, see, include_last=True)
    if not found:
        raise CacheError(f"{site.path} did not run for the last token.")
    last = found[0] if changes.span is None else found[0][changes.span.of(len(found[0]))]
    plain = sequence.as_subclass(Tensor)
    joined = torch.cat([plain, last.to(plain)], 1).as_subclass(TokenSequence)
    joined.columns = [*sequence.columns, transcript.tokens.shape[1] - 1]
    joined.tokens = torch.cat([sequence.tokens, transcript.tokens[:, -1:]], 1)
    joined.positions = torch.cat([sequence.positions, transcript.own_positions()[:, -1:]], 1)
    joined.valid = torch.cat([sequence.valid, transcript.is_real[:, -1:]], 1)
    return joined


def _place(
    placed: ExitStack,
    module: nn.Module,
    path: str,
    replay: Replay,
    calls: Counter[str],
    see: See,
) -> None:
    thread = this_thread()

    def before(_: nn.Module, args: Any, kwargs: Any = None) -> Any:
        if is_elsewhere(thread):
            return None
        site = Site(path, Slot.INPUT)
        value = replay.change(site, calls[path], (args, kwargs or {}))
        see(site, calls[path], value, replay.one)
        return value

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        if is_elsewhere(thread):
            return None
        site, call = Site(path, Slot.OUTPUT), calls[path]
        calls[path] += 1
        value = replay.change(site, call, output)
        see(site, call, value, replay.one)
        return value

    begins: Any = before
    placed.callback(module.register_forward_pre_hook(begins, with_kwargs=True).remove)
    placed.callback(module.register_forward_hook(after).remove)


def _look_away(site: Site, call: int, value: Any, one: Pass) -> None:
    pass

"""Run a block anew in each step of a run, as lasting edits do."""

# Guarantees:
#   - each step begins the block anew, wherever it waited in the step before;
#   - what does not run in some step is no error, but a block that never came to its end in a whole
#     run is one, at its own line;
#   - an edit is not silently missed in a step because the block waited in it, in vain, for what
#     comes before in the block: that is refused.

from __future__ import annotations

from collections.abc import Callable

from tracekit.core.site import Site
from tracekit.errors import UnsupportedError
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.protocol import StepOver
from tracekit.interleave.worker import current_mediator


def in_each_step(block: Callable[[], None], name: str) -> None:
    """Run `block` from its beginning in each step; on a worker, until the run ends."""
    mediator = current_mediator()
    assert mediator is not None
    assert mediator.rounds is not None
    stuck: list[Site] = []  # where earlier rounds waited in vain, while it is not known for what
    step = 0
    while mediator.wait_for_step(step):
        mediator.step = max(step, mediator.steps_begun - 1)
        mediator.rounds.append([])
        step = _run_round(block, mediator, stuck, name)
        del mediator.rounds[:-1]  # the last that ended tells what comes after what


def _run_round(block: Callable[[], None], mediator: Mediator, stuck: list[Site], name: str) -> int:
    """The step to go on with."""
    assert mediator.rounds is not None
    try:
        block()
    except StepOver as over:
        over.__traceback__ = None  # it leads to frames that refer to it
        asked = mediator.rounds.pop()
        later = _after(asked[-1], mediator.rounds[-1]) if mediator.rounds else None
        if later is None:
            stuck.append(asked[-1])
        for site in later or ():
            if mediator.ran_in(site.path, mediator.step):
                raise _missed(asked[-1], site, mediator.step, name) from None
        return mediator.steps_begun - 1
    mediator.has_finished_a_round = True
    for site in stuck:
        for missed in _after(site, mediator.rounds[-1]) or ():
            raise _missed(site, missed, None, name)
    stuck.clear()
    return mediator.step + 1


def _after(site: Site, order: list[Site]) -> list[Site] | None:
    """What a round asked for after `site`, of other modules; None if it did not ask for it."""
    if site not in order:
        return None
    return [each for each in order[order.index(site) + 1 :] if each.path != site.path]


def _missed(site: Site, later: Site, step: int | None, name: str) -> UnsupportedError:
    when = "an earlier step" if step is None else f"step {step}"
    return UnsupportedError(
        f"{name} waits for {site} before it comes to {later}, and in {when} {site.path} did not "
        f"run, so {later} was missed; make two edits of it, one for each module."
    )

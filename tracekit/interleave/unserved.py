"""Why a request was not served, in words for whoever wrote the block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracekit.core.annex import owner_of
from tracekit.core.site import Slot, Visit
from tracekit.errors import MisfitError, NeverCameError, NeverRanError, SiteOrderError, StepError

if TYPE_CHECKING:
    from tracekit.interleave.passage import Passage


def too_late(visit: Visit, last: tuple[Visit, str] | None) -> SiteOrderError:
    """The model has passed `visit` in this step; `last` is what the block got before."""
    if last is None:
        return SiteOrderError(
            f"{visit} was asked for after the model had passed it; ask in the model's order, "
            f"or use tracer.cache()."
        )
    before, line = last
    if before == visit:
        return SiteOrderError(
            f"{visit} was asked for a second time, after the model had gone on ({line} had it); "
            f"keep the first value in a name. If the module runs several times in a step, "
            f"module.calls[1] is its second call."
        )
    return SiteOrderError(
        f"{visit} was asked for after {before} ({line}), but the model runs it before; "
        f"ask in the model's order, or use tracer.cache()."
    )


def too_late_after_sleep(visit: Visit, what_for: str) -> SiteOrderError:
    """The model has passed `visit` while the block waited for another block."""
    return SiteOrderError(
        f"{visit} was asked for when the block had waited for {what_for}, and the model had passed "
        f"it by then; ask for it before, or take the other block's value in a trace of its own."
    )


def skipped_too_late(visit: Visit, last: tuple[Visit, str] | None) -> SiteOrderError:
    """The module of `visit` has begun, so it can't be kept from running any more."""
    got = f" The block's last value was {last[0]} ({last[1]})." if last else ""
    return SiteOrderError(
        f"{visit.site.path}.skip() came when the module had begun (step {visit.step}): skip it "
        f"before you ask for what it returns, or for anything that runs after it began; to replace "
        f"what it returned, assign {visit.site.path}.output.{got}"
    )


def too_late_if_at_all(
    visit: Visit, callers: list[str], last: tuple[Visit, str] | None
) -> SiteOrderError:
    """What would call the module had run before that was watched: whether it did is not known."""
    got = f"after {last[0]} ({last[1]}), " if last else ""
    names = " or ".join(callers)
    return SiteOrderError(
        f"{visit} was asked for {got}when {names}, which contains it, had run: if the model ran it "
        f"at all, that has passed; ask in the model's order, or use tracer.cache()."
    )


def uncounted(visit: Visit) -> SiteOrderError:
    """The module ran before anybody asked for it, so which call comes next is not known."""
    return SiteOrderError(
        f"{visit} was asked for when calls of the module had gone by uncounted: nothing of it, nor "
        f"beside it, had been asked for before; ask for an earlier call of it first."
    )


def uncounted_behind(visit: Visit, skipped: str) -> SiteOrderError:
    """The block skipped a module that calls this one too, and that ran for other blocks' rows."""
    return SiteOrderError(
        f"{visit} was asked for after the block had skipped {skipped}, which calls it too: "
        f"{skipped} ran for the rows of other blocks, and the calls in it go uncounted for this "
        f"one; ask for it before the skip, or trace this input alone."
    )


def was_skipped(visit: Visit, above: str) -> NeverRanError:
    """The module is inside one that the block skipped."""
    return NeverRanError(
        f"{visit} was asked for, but {above}, which contains it, was skipped; nothing in it runs."
    )


def opened_too_late(path: str, step: int, last: tuple[Visit, str] | None) -> SiteOrderError:
    """The function at `path` runs already, without its operations being watched."""
    got = f" The block's last value was {last[0]} ({last[1]})." if last else ""
    return SiteOrderError(
        f"{path}.source was asked for when {path} was running already (step {step}); ask for "
        f"{path}.source before, at the beginning of the block.{got}"
    )


def tapped_too_late(visit: Visit, around: str, last: tuple[Visit, str] | None) -> SiteOrderError:
    """The attention runs already, without its values being led through their modules."""
    got = f" The block's last value was {last[0]} ({last[1]})." if last else ""
    return SiteOrderError(
        f"{visit} was asked for when {around} was running already: ask for a value of "
        f"{around}.attention before anything else inside it, or use tracer.cache().{got}"
    )


def after_the_end(visit: Visit, last: tuple[Visit, str] | None) -> SiteOrderError:
    """The traced call has returned."""
    got = f" The block's last value was {last[0]} ({last[1]})." if last else ""
    return SiteOrderError(
        f"{visit} was asked for when the run had ended; ask for it before tracer.result and "
        f"within the loop over the steps, in the model's order.{got}"
    )


def step_is_over(visit: Visit, step: int, last: tuple[Visit, str] | None) -> SiteOrderError:
    """The whole step of `visit` is over."""
    got = f" The block's last value was {last[0]} ({last[1]})." if last else ""
    return SiteOrderError(
        f"{visit} was asked for when the model had gone on to step {step}; "
        f"ask for it within its step, in the model's order.{got}"
    )


def step_has_gone(step: int, current: int) -> StepError:
    """A loop or next() asked to go back."""
    return StepError(
        f"step {step} was asked for when the model was at step {current}; "
        f"ask for steps in ascending order, each once."
    )


def step_never_came(step: int) -> StepError:
    """next() went beyond the run."""
    return StepError(f"step {step} was asked for, but the run ended before it began.")


def unlike_before(visit: Visit) -> NeverRanError:
    """The module of `visit` was not called, as it was in earlier runs of the same block."""
    return NeverRanError(
        f"{visit} was asked for, but the module was not called, as it was in an earlier run of "
        f"this block: the model takes another way now; ask for a module that takes part in it."
    )


def never_came(what_for: str) -> NeverCameError:
    """A block slept for what another block was to bring about."""
    return NeverCameError(
        f"the block waited for {what_for}, and the run ended before that came; read the value "
        f"where the model still can go on to it, or in a trace of its own."
    )


def miscounted(told: int, line: str, had: int) -> StepError:
    """The run had another number of steps than a block went by that counts from its end."""
    return StepError(
        f"steps were counted from the end of {told} ({line}), and the generation ended after "
        f"{had}: something that its arguments do not tell (a logits processor, an edit) made it "
        f"end so; loop over tracer.iter[:] and keep what came last."
    )


def no_such_step(visit: Visit, steps: int) -> StepError:
    """The run ended before the step of `visit`."""
    had = {0: "no step began", 1: "the run had 1 step, step 0"}.get(
        steps, f"the run had {steps} steps, 0 to {steps - 1}"
    )
    return StepError(
        f"{visit} did not happen: {had}; ask for a step that there is, generate more tokens, "
        f"or loop over tracer.iter[:], which ends with the run."
    )


def no_such_call(visit: Visit) -> NeverRanError:
    """The module ran, but not that often."""
    return NeverRanError(
        f"{visit} did not happen: the module was called at most {visit.call} times in that step."
    )


def at_the_end(visit: Visit, steps: int, passage: Passage) -> BaseException:
    """The run is over, after so many steps, and did not come to `visit`."""
    if visit.step >= max(steps, 1):
        return no_such_step(visit, steps)
    if visit.call > 0:
        return no_such_call(visit)
    skipped = passage.skipped_above(visit.site.path, visit.step)
    if skipped is not None:
        return was_skipped(visit, skipped)
    callers = passage.callers(visit.site.path)
    ran = [caller for caller in callers if passage.has_run(caller)]
    return never_ran(visit, callers, ran)


def never_ran(visit: Visit, callers: list[str], ran: list[str]) -> NeverRanError:
    """The module of `visit` was not called; `ran` are those of its `callers` that were."""
    if not callers:
        return NeverRanError(f"{visit} was asked for, but the model was never called.")
    around, _, name = visit.site.path.rpartition(".source.")
    if callers == [around] and ran:
        return NeverRanError(
            f"{visit} was asked for, but {around} ran without making the call {name}: it is on a "
            f"line that this run did not come to."
        )
    if ran and callers == [owner_of(visit.site.path)]:
        return NeverRanError(
            f"{visit} was asked for, but {callers[0]} ran without it: it made no call of an "
            f"attention function that is given q, k and v. Of one that computes its pattern "
            f"itself, scores, pattern and z can be had."
        )
    names = " and ".join(callers)
    if ran:
        ended = " and ".join(ran)
        why = f"{ended} ran without calling it (its weights may be used directly)"
        return NeverRanError(
            f"{visit} was asked for, but the module was not called: {why}; "
            f"ask for {ended} or a module that it calls."
        )
    return NeverRanError(
        f"{visit} was asked for, but the module was not called, nor was {names}, which "
        f"contains it; ask for a module that takes part in this run."
    )


def misfit_error(visit: Visit, found: str) -> MisfitError:
    """The error for a written value that can't stand in the place of the one it replaces."""
    cure = "write a value of the same structure, shape, dtype and device"
    if visit.site.slot is Slot.OUTPUT and "tuple" in found:
        cure += ", or assign to .hidden to replace the hidden-state tensor alone"
    if visit.site.slot is Slot.INPUT and "tuple" in found:
        cure = "write a pair of (args, kwargs), or assign to .input to replace the first alone"
    return MisfitError(f"{visit.site} cannot be replaced so: {found}; {cure}.")

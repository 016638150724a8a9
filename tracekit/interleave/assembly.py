"""One run of a model that lies on several ranks: values are whole where anybody looks at them."""

# Guarantees:
#   - blocks, functions and caches are given whole values, and the model goes on with its share;
#   - ranks that ask for different things, or write different values, all end with an error: none of
#     them waits for the others, and no sum is made of what they do not have in common;
#   - of a value that is neither whole nor known to be divided along one axis, none is handed out.
#
# Ranks meet where one of them asks for a value, and in front of every module that makes a whole of
# shares: the model itself would wait for the other ranks in there. A rank that asks for nothing
# meets the others there, so that those who asked for something learn it. Without a block there is
# nothing to ask while the model runs: then what is recorded is compared before it begins, and ranks
# meet no more until it has ended.

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from tracekit.core.annex import ANNEX, INNER
from tracekit.core.nest import tensors
from tracekit.core.pieces import Piece
from tracekit.core.sharding import Sharding
from tracekit.core.shares import Share
from tracekit.core.site import Site, Slot, Visit
from tracekit.core.versions import UNKNOWN, version
from tracekit.errors import RankError, UnsupportedError
from tracekit.interleave.hooks import ForwardHook, Hooks, is_elsewhere
from tracekit.interleave.interleaver import Interleaver
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.meeting import Meeting, adopt_random, mark, random_mark
from tracekit.interleave.protocol import KINDS, NextStep, Read, Skip, Sleep, State, Write
from tracekit.interleave.wholes import Values

_NO_BLOCK: Final = "has no block that asks for anything here"
Act = Callable[[Any], Any]


@final
class Assembly:
    """What the ranks of a model do together in one run."""

    def __init__(
        self, sharding: Sharding, meeting: Meeting, run: Interleaver, hooks: Hooks
    ) -> None:
        self._sharding = sharding
        self._meeting = meeting
        self._values = Values(sharding, self._differs)
        self._run: Interleaver | None = run
        self._hooks: Hooks | None = hooks
        self._placed = 0  # what was put on the model so far, as a number
        self._described = ""  # and as text, as far as it differs between ranks most likely
        self._is_live = False  # blocks run beside the model, on one rank at least
        self._is_over = False  # this rank meets the others no more

    # -- the run --------------------------------------------------------------------------------

    def begin(self) -> None:
        """The model is about to run: all ranks do so, and draw the same random numbers."""
        assert self._run is not None
        mediators = [each for each in self._run.mediators if each.state is not State.DONE]
        own = mark("begin", str(self._placed))
        device = self._sharding.device
        came = self._meeting.exchange(own, bool(mediators), random_mark(device))
        if any(each[0] != own for each in came):
            self._fail(self._meeting.told(f"begins a run in which it {self._does(mediators)}"))
        if any(each[2] != came[0][2] for each in came):
            adopt_random(self._meeting, device)
        self._is_live = any(each[1] for each in came)
        for path in self._sharding.joints if self._is_live else ():
            assert self._hooks is not None
            module = self._hooks.module_at(path)
            self._hooks.look_at_inputs(module, partial(self._meet_at, path))

    def end(self) -> None:
        """The run is over, with nothing left to ask."""
        self._meet("end", "has come to the end of the run")
        self._is_over = True

    def leave(self, is_by_block: bool) -> None:
        """This rank leaves the run; unless it has ended, the others learn that."""
        run, self._run, self._hooks = self._run, None, None
        if self._is_over or not is_by_block or run is None:
            return
        self._is_over = True
        error = next((each.error for each in run.mediators if each.error is not None), None)
        why = "its block has stopped" if error is None else f"{type(error).__name__}: {error}"
        differing = self._meeting.differ("left", f"left the run ({why})")
        if differing is not None and error is None:
            run.mediators[0].error = self._error(differing)

    # -- meeting --------------------------------------------------------------------------------

    def _meet_at(self, path: str, module: Any, args: Any, kwargs: Any = None) -> None:
        if self._hooks is not None and not is_elsewhere(self._hooks.thread):
            self._meet(f"at {path}", f"has come to {path}, where it {_NO_BLOCK}")

    def _meet(
        self,
        key: str,
        text: str,
        asking: Sequence[Mediator] = (),
        values: Sequence[Tensor] = (),
    ) -> None:
        """Meet the other ranks; if they come from elsewhere, raise at a block's line.

        So too if they come with other `values`.
        """
        if self._is_over:
            return
        shapes = [f"{list(each.shape)}{each.dtype}" for each in values]
        differing = self._meeting.differ(f"{key}|{self._placed}|{shapes}", text, values)
        if differing is not None:
            self._fail(differing, asking)

    def _differs(self, site: Site, values: Sequence[Tensor]) -> bool:
        """Whether the ranks have other `values` there, none of which is known to be whole."""
        return not self._is_over and bool(self._meeting.differ(f"compare {site}", "", values))

    def _fail(self, texts: Sequence[str], asking: Sequence[Mediator] = ()) -> None:
        self._is_over = True
        run, error = self._run, self._error(texts)
        if run is not None:
            waiting = [each for each in run.mediators if each.state is State.WAITING]
            run.refuse((list(asking) or waiting)[:1], error)
        raise error  # the block may have caught it

    def _error(self, texts: Sequence[str]) -> RankError:
        return RankError(
            f"the ranks of this model do not do the same: {_told(texts)}. They compute one model "
            f"together: let all of them run the same block and write the same values (with random "
            f"numbers of the same seed); print and save on one rank behind the trace."
        )

    def _does(self, mediators: Sequence[Mediator]) -> str:
        asked = "; ".join(_request(each) for each in mediators)
        recorded = f"has {self._described}" if self._described else ""
        return " and ".join(filter(None, [asked, recorded])) or "asks for nothing"

    # -- values ---------------------------------------------------------------------------------

    def serve(
        self, run: Interleaver, visit: Visit, value: object, asking: Sequence[Mediator]
    ) -> object:
        """Have `asking` served the whole of `value`; what the model goes on with."""
        what = "; ".join(_request(each) for each in asking)
        written = [each.request.value for each in asking if isinstance(each.request, Write | Skip)]
        kinds = [type(each.request).__name__ for each in asking]
        self._meet(f"{visit} {kinds}", what, asking, list(tensors(written)))
        is_skipped = any(isinstance(each.request, Skip) and each.skips_for_all for each in asking)
        try:
            whole = value if is_skipped else self._values.whole(visit.site, value)
        except UnsupportedError as error:
            run.refuse(asking, error)
            return value
        given = None if is_skipped else value
        lines = partial(_lines, asking)
        return self._through(visit.site, given, whole, partial(run.serve_here, visit), lines)

    def shown(self, visit: Visit, value: object) -> object:
        """What blocks are shown of a value that the model does not go on with."""
        self._meet(f"{visit}", f"asks for {visit}")
        return self._values.whole(visit.site, value)

    def seen(self, module: nn.Module, slot: Slot, hook: ForwardHook) -> ForwardHook:
        """`hook`, which is given whole values."""
        site = self._note("records", module, slot)
        return hook if self._is_plain(site) else partial(self._observe, site, hook)

    def edited(self, module: nn.Module, slot: Slot, change: Act) -> Act:
        """`change`, which is given the whole value, and whose share the model goes on with."""
        return partial(self._change, self._note("edits", module, slot), change)

    def on_whole(self, path: str, call: Act, value: Tensor) -> tuple[Act, Tensor]:
        """`call`, of the module at `path`, for a whole input, and the whole of `value`."""
        site = Site(path, Slot.INPUT)
        if self._is_live:
            self._meet(f"inside {path}", f"asks for a value inside {path}")
        ranks, known = self._sharding.ranks, self._sharding.known(site, (0, 0))
        if not isinstance(known, Share):
            return call, value
        return lambda whole, *a, **k: call(known.cut(whole, ranks), *a, **k), known.gathered(
            value, ranks
        )

    def _note(self, what: str, module: nn.Module, slot: Slot) -> Site:
        site = Site(_path(self._sharding, module), slot)
        self._placed = zlib.crc32(f"{what} {site}".encode(), self._placed)
        self._described = f"hooks ({what} {site} last)"
        return site

    def _is_plain(self, site: Site) -> bool:
        return not self._sharding.has_chance and self._sharding.is_whole(site)

    def _observe(self, site: Site, hook: Any, module: Any, args: Any, value: Any = None) -> Any:
        if self._hooks is None or is_elsewhere(self._hooks.thread):
            return hook(module, args, value)
        is_output = site.slot is Slot.OUTPUT
        given = value if is_output else (args, value or {})
        if self._is_live:
            self._meet(f"{site}", f"records {site}")
        whole = self._values.whole(site, given)
        hook(module, args, whole) if is_output else hook(module, *whole)
        return self._values.cut(site, whole) if _needs_grad(given, whole) else None

    def _change(self, site: Site, change: Act, value: Any) -> Any:
        if self._is_live:
            self._meet(f"edit {site}", f"edits {site}")
        lines = partial(str, "its function")
        return self._through(site, value, self._values.whole(site, value), change, lines)

    def _through(
        self, site: Site, value: Any, whole: Any, act: Act, lines: Callable[[], str]
    ) -> Any:
        """What the model goes on with after `act` had the whole; all ranks wrote the same."""
        before = [(tensor, version(tensor), _kept(tensor)) for tensor in tensors(whole)]
        new = act(whole)
        news = list(tensors(new))
        olds = {id(tensor) for tensor, _, _ in before}
        changed = [each for each in news if id(each) not in olds]
        changed += [tensor for tensor, was, kept in before if _is_changed(tensor, was, kept)]
        changed = news if value is None else changed  # it stands for a module that did not run
        if not changed:
            return self._values.cut(site, whole) if _needs_grad(value, whole) else value
        self._meet(f"wrote {site}", f"wrote {site} ({lines()})", (), changed)
        return self._values.cut(site, new)


def _path(sharding: Sharding, module: nn.Module) -> str:
    if isinstance(module, Piece):
        inside = "" if module.name in INNER else f"{ANNEX}."
        return f"{module.owner}.{inside}{module.name}"
    return sharding.path_of(module)


def _told(texts: Sequence[str]) -> str:
    """What the ranks say, those together that say the same."""
    said: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        said.setdefault(text, []).append(str(rank))
    ranks = ((f"rank{'s' * (len(who) > 1)} {', '.join(who)}", text) for text, who in said.items())
    return "; ".join(f"{who}: {text}" for who, text in ranks)


def _needs_grad(value: Any, whole: Any) -> bool:
    """Whether what was looked at is another tensor, and gradients are to come to it."""
    if not torch.is_grad_enabled():
        return False
    pairs = zip(tensors(value), tensors(whole), strict=True)
    return any(old is not new and new.requires_grad for old, new in pairs)


def _kept(tensor: Tensor) -> Tensor | None:
    return tensor.clone() if version(tensor) == UNKNOWN else None


def _is_changed(tensor: Tensor, before: int, kept: Tensor | None) -> bool:
    return version(tensor) != before if kept is None else not torch.equal(tensor, kept)


def _request(mediator: Mediator) -> str:
    request, last = mediator.request, mediator.last
    after = f" after {last[0]} ({last[1]})" if last is not None else ""
    if isinstance(request, (Read, Write, Skip)):
        return f"asks to {KINDS[type(request)]} {request.visit}{after}"
    if isinstance(request, NextStep):
        return f"waits for step {request.step}{after}"
    return f"waits for {request.what_for}" if isinstance(request, Sleep) else f"runs{after}"


def _lines(asking: Sequence[Mediator]) -> str:
    known = [each.last[1] for each in asking if each.last is not None]
    return " and ".join(dict.fromkeys(known)) or "the block"

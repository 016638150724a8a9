"""Write a cache to its folder while the model runs, so that it never has to fit in memory."""

# Between two forwards of the decoder everything that was recorded is right, or is known not to be:
# what a block may edit was copied, and version counters tell what else was overwritten. So it is
# written then, and let go of. A part is written when as many forwards wait as were written before,
# so that little is lost early on, or when what waits is large.

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from torch import Tensor, nn

from tracekit.core.nest import map_leaves
from tracekit.core.ring import Parcel
from tracekit.core.site import Slot
from tracekit.errors import OverwrittenError, TracekitError
from tracekit.tracing.cache_parts import PartWriter
from tracekit.tracing.entries import Entry

if TYPE_CHECKING:
    from tracekit.tracing.cache import Recorded
    from tracekit.tracing.listing import Record
    from tracekit.tracing.recorder import Recorder

BUFFER = 64 << 20  # bytes of recorded tensors that wait in memory
_WRITTEN: Any = None  # in the place of a record


@final
class Spool:
    """Takes what a recorder has, and writes it."""

    def __init__(self, writer: PartWriter, has_both: bool) -> None:
        self._writer = writer
        self._has_both = has_both  # inputs and outputs, in one entry
        self._error: TracekitError | None = None  # nothing more is written
        self._late: OverwrittenError | None = None  # to be raised when all is over
        self._seen = 0  # records that were looked at
        self._nbytes = 0  # of tensors that wait
        self._waiting = self._written = 0  # forwards

    def spill(self, recorder: Recorder, *, is_over: bool = False) -> None:
        """Write what was recorded, if it is time to: in front of a forward, or when all is over.

        StorageError or UnsupportedError if that can't be; when all is over, `check` raises it.
        """
        if self._error is not None or not (is_over or self._is_due(recorder._records)):
            return
        try:
            recorder._refuse_overwritten()
        except OverwrittenError as error:
            self._late = self._late or error.with_traceback(None)  # it is left out
        recorder._habits.learn(was_whole=False)  # and hold no originals
        if not is_over:
            recorder._fence()
        try:
            self._write(recorder, is_over)
        except TracekitError as error:
            self._error = error.with_traceback(None)
            if not is_over:
                raise

    def end(self, told: Recorded) -> None:
        """The run is over, and all was recorded."""
        if self._error is None:
            try:
                self._writer.end(told.changes, told.aliases)
            except TracekitError as error:
                self._error = error.with_traceback(None)

    def check(self) -> None:
        """Raise what kept it, or some of it, from being written."""
        error = self._error or self._late
        if error is not None:
            raise error

    def _is_due(self, records: list[Record]) -> bool:
        for record in records[self._seen :]:
            self._nbytes += _size(record[3])
        self._seen = len(records)
        self._waiting += self._nbytes > 0
        return self._nbytes >= BUFFER or self._waiting > self._written

    def _write(self, recorder: Recorder, is_over: bool) -> None:
        first, records = recorder._read, recorder._records
        until = len(records) if is_over else self._end_of_calls(records, first)
        listing = recorder._listing
        new = listing.new = list[Entry]()
        passes = recorder.timeline.passes
        listing.add(records[:until], recorder._refused, {}, recorder._marks, passes)
        listing.new = None
        self._writer.add(new)
        self._writer.flush()
        records[first:until] = [_WRITTEN] * (until - first)
        recorder._read = until
        self._written += self._waiting
        self._nbytes = self._waiting = 0

    def _end_of_calls(self, records: list[Record], first: int) -> int:
        """Where the first call begins that has not ended: of it the output is still to come."""
        if not self._has_both:
            return len(records)
        begun: dict[nn.Module, list[int]] = {}
        for index in range(first, len(records)):
            module, slot, *_ = records[index]
            if slot is Slot.INPUT:
                begun.setdefault(module, []).append(index)
            elif begun.get(module):
                begun[module].pop()
        return min((each[0] for each in begun.values() if each), default=len(records))


def _size(value: Any) -> int:
    """The bytes of what was recorded, also of what is on its way from an accelerator."""
    sizes: list[int] = []

    def see(leaf: Any) -> None:
        if isinstance(leaf, Parcel):
            sizes.append(leaf.nbytes)
        elif isinstance(leaf, Tensor):
            sizes.append(leaf.numel() * leaf.element_size())  # of a sparse one, too: it is refused

    map_leaves(see, value)
    return sum(sizes)

"""Find the user's frame, and see whether it is entering a `with`."""

from __future__ import annotations

import contextlib
import dis
import inspect
import os
import sys
import warnings
from types import FrameType
from typing import Final

from tracekit.capture.bytecode import with_sites
from tracekit.errors import CaptureError, TracekitWarning

_PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# The floors that a trace runs through. What stands above them (analysis, the command line) opens
# traces as a user does, and its lines are shown as a user's are.
_MACHINERY: Final = tuple(
    _PACKAGE + part
    for part in ("core", "capture", "distributed", "interleave", "tracing", "models", "errors.py")
)

# Where torch runs an operation in Python, which it does for fake tensors alone (2.13).
_DISPATCH: Final = tuple(
    os.path.join(f"{os.sep}torch", *part.split("/"))
    for part in (
        *(
            "_subclasses/",
            "_dynamo/",
            "_prims/",
            "_prims_common/",
            "_refs/",
            "_decomp/",
            "_library/",
        ),
        *("_meta_registrations.py", "_compile.py", "_ops.py", "library.py", "__init__.py"),
        "utils/_stats.py",
    )
)
_CONTEXTLIB: Final = contextlib.contextmanager.__code__.co_filename
_SUSPENDABLE: Final = (
    inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
) | inspect.CO_ITERABLE_COROUTINE

_is_own: dict[str, bool] = {}


def is_own_file(filename: str) -> bool:
    """Is this a file of tracekit's machinery?"""
    known = _is_own.get(filename)
    if known is None:
        known = _is_own[filename] = filename.startswith(_MACHINERY)
    return known


def is_dispatch_file(filename: str) -> bool:
    """Is this a file in which torch runs operations, of no interest to whoever called one?"""
    return any(part in filename for part in _DISPATCH)


def caller_frame() -> FrameType:
    """The nearest frame outside tracekit's machinery: the user's."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and is_own_file(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        raise CaptureError(
            "no frame outside tracekit is calling; open the trace from your own code"
        )
    return frame


def users_frame() -> FrameType:
    """The nearest frame that is neither of tracekit nor of contextlib, for messages."""
    frame: FrameType | None = caller_frame()
    while frame is not None and _is_of_contextlib(frame):
        frame = frame.f_back
    return frame or caller_frame()


def warn_user(text: str, category: type[TracekitWarning] = TracekitWarning) -> None:
    """Warn at the user's line."""
    frame = caller_frame()
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno)


def suspendable(frame: FrameType) -> int | None:
    """The `id` of the nearest generator or coroutine from `frame` outwards that may be suspended.

    One that contextlib drives as a context manager is suspended while its `with` block runs, so
    the frame of that `with` counts in its place. A frame that runs, or may run again, keeps its
    `id`; the frame itself would keep the user's values alive.
    """
    outer: FrameType | None = frame
    while outer is not None:
        driver = outer.f_back
        is_driven = _is_of_contextlib(outer) or (driver is not None and _is_of_contextlib(driver))
        if outer.f_code.co_flags & _SUSPENDABLE and not is_driven:
            return id(outer)
        outer = driver
    return None


def is_running(identity: int) -> bool:
    """Whether the frame of that `id` is on this thread's stack."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if id(frame) == identity:
            return True
        frame = frame.f_back
    return False


def _is_of_contextlib(frame: FrameType) -> bool:
    return frame.f_code.co_filename == _CONTEXTLIB


_POP_TOP: Final = dis.opmap["POP_TOP"]


def is_with_item(frame: FrameType) -> bool:
    """Is the call that `frame` executes now the context expression of a `with` or `async with`?"""
    return frame.f_lasti in with_sites(frame.f_code).calls


def is_dropping(frame: FrameType) -> bool:
    """Is `frame` throwing away what the call that is its whole statement returned?

    Errors and iterators are popped so as well, with whatever they hold alive, but after no call.
    """
    code, place = frame.f_code.co_code, frame.f_lasti
    if place < 0 or code[place] != _POP_TOP:
        return False
    place -= 2
    while place > 0 and dis.opname[code[place]] in ("CACHE", "<0>"):
        place -= 2
    return dis.opname[code[place]].startswith("CALL")

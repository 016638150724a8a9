"""Find the user's frame, and see whether it is entering a `with`."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Final

from tracekit.capture.bytecode import with_sites
from tracekit.errors import CaptureError

_PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# The floors that a trace runs through. What stands above them (analysis, the command line) opens
# traces as a user does, and its lines are shown as a user's are.
_MACHINERY: Final = tuple(
    _PACKAGE + part for part in ("core", "capture", "interleave", "tracing", "models", "errors.py")
)

_is_own: dict[str, bool] = {}


def is_own_file(filename: str) -> bool:
    """Is this a file of tracekit's machinery?"""
    known = _is_own.get(filename)
    if known is None:
        known = _is_own[filename] = filename.startswith(_MACHINERY)
    return known


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


def is_with_item(frame: FrameType) -> bool:
    """Is the call that `frame` executes now the context expression of a `with` or `async with`?"""
    return frame.f_lasti in with_sites(frame.f_code).calls

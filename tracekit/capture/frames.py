"""Find the user's frame, and see whether it is entering a `with`."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Final

from tracekit.capture.bytecode import with_sites
from tracekit.errors import CaptureError

PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

_is_own: dict[str, bool] = {}


def is_own_file(filename: str) -> bool:
    """Is this a file of the tracekit package?"""
    known = _is_own.get(filename)
    if known is None:
        known = _is_own[filename] = filename.startswith(PACKAGE)
    return known


def caller_frame() -> FrameType:
    """The nearest frame outside the tracekit package."""
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

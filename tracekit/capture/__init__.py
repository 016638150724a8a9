"""Lift the body of a `with` out: find it, keep it from running in place, run it elsewhere.

Knows nothing of models and imports no torch.
"""

from tracekit.capture.block import Block, Body, capture
from tracekit.capture.frames import caller_frame, is_with_item
from tracekit.capture.skip import Skip, skip_body
from tracekit.capture.tracebacks import show_own_lines, user_traceback

__all__ = [
    "Block",
    "Body",
    "Skip",
    "caller_frame",
    "capture",
    "is_with_item",
    "show_own_lines",
    "skip_body",
    "user_traceback",
]

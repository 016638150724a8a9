"""Lift the body of a `with` out: find it, keep it from running in place, run it elsewhere.

Knows nothing of models and imports no torch.
"""

from tracekit.capture.attributes import takes_next
from tracekit.capture.block import Block, Body, capture
from tracekit.capture.family import Family, Member
from tracekit.capture.forecast import Plan
from tracekit.capture.frames import (
    caller_frame,
    is_dropping,
    is_running,
    is_with_item,
    suspendable,
    users_frame,
    warn_user,
)
from tracekit.capture.lasting import LastingBody, from_text, keep, text_of
from tracekit.capture.shipped import (
    HAND_BACK,
    TRACE,
    Shipped,
    compiled,
    function_of,
    hand_back,
    lines_shown,
    ship,
)
from tracekit.capture.skip import Skip, skip_body
from tracekit.capture.tracebacks import (
    drop_machinery,
    show_own_lines,
    showing_own_lines,
    user_traceback,
)
from tracekit.capture.world import Scope, Unsure

__all__ = [
    "HAND_BACK",
    "TRACE",
    "Block",
    "Body",
    "Family",
    "LastingBody",
    "Member",
    "Plan",
    "Scope",
    "Shipped",
    "Skip",
    "Unsure",
    "caller_frame",
    "capture",
    "compiled",
    "drop_machinery",
    "from_text",
    "function_of",
    "hand_back",
    "is_dropping",
    "is_running",
    "is_with_item",
    "keep",
    "lines_shown",
    "ship",
    "show_own_lines",
    "showing_own_lines",
    "skip_body",
    "suspendable",
    "takes_next",
    "text_of",
    "user_traceback",
    "users_frame",
    "warn_user",
]

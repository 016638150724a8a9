"""Tell from bytecode which attribute is taken next of what an attribute is about to give."""

from __future__ import annotations

import re
from itertools import pairwise
from types import CodeType, FrameType
from typing import Final

from tracekit.capture.bytecode import steps_of
from tracekit.capture.percode import PerCode

_TAKES_ATTRIBUTE: Final = frozenset({"LOAD_ATTR", "LOAD_METHOD"})

_followed: Final[PerCode[dict[str, frozenset[int]]]] = PerCode()


def takes_next(frame: FrameType, name: str) -> bool:
    """Does `frame`, which is taking an attribute now, take `.name` of it at once?"""
    code = frame.f_code
    if name not in code.co_names:  # of most code; this is asked at every read
        return False
    known = _followed.get(code)
    if known is None:
        known = dict[str, frozenset[int]]()
        _followed.put(code, known)
    if name not in known:
        known[name] = _followed_by(code, name)
    return frame.f_lasti in known[name]


def _followed_by(code: CodeType, name: str) -> frozenset[int]:
    """Where attributes are taken of which `name` is taken next, as `f_lasti` may say it."""
    found: set[int] = set()
    steps = steps_of(code)
    for step, after in pairwise(steps):
        is_pair = step.name in _TAKES_ATTRIBUTE and after.name in _TAKES_ATTRIBUTE
        if is_pair and name in re.split(r"\W+", after.detail):
            found.update(range(step.reported, after.first, 2))
    return frozenset(found)

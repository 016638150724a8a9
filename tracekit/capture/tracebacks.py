"""Show users their own lines: tracebacks without the frames of tracekit."""

# The way to raise a body's error from `__exit__`, which runs while the skip exception is handled:
#
#     context = error.__context__
#     try:
#         raise error
#     except BaseException as raised:
#         show_own_lines(raised, context)
#         raise
#
# The bare `raise` adds no entry for its own frame on 3.11+, so what is left is the user's `with`
# line and the user's lines of the body. On 3.10 the entry of `__exit__` itself stays, and no other.

from __future__ import annotations

import sys
from types import TracebackType

from tracekit.capture.frames import is_own_file


def user_traceback(error: BaseException) -> TracebackType | None:
    """The error's traceback without the frames of the tracekit package."""
    entries: list[TracebackType] = []
    entry = error.__traceback__
    while entry is not None:
        if not is_own_file(entry.tb_frame.f_code.co_filename):
            entries.append(entry)
        entry = entry.tb_next
    chain: TracebackType | None = None
    for kept in reversed(entries):
        chain = TracebackType(chain, kept.tb_frame, kept.tb_lasti, kept.tb_lineno)
    return chain


def show_own_lines(error: BaseException, context: BaseException | None) -> None:
    """Prepare a caught error for a bare `raise`: its own context, and only the user's lines.

    Raising it in `__exit__` had put the skip exception in the place of its context.
    """
    error.__context__ = context
    chain = user_traceback(error)
    if sys.version_info < (3, 11) and error.__traceback__ is not None:
        # 3.10 re-raises with this very head, whatever __traceback__ says by then
        error.__traceback__.tb_next = chain
    else:
        error.__traceback__ = chain

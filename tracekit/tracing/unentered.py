"""Say it where a context was made and thrown away: without its `with`, nothing runs."""

from __future__ import annotations

import sys
import warnings

from tracekit.capture import is_dropping
from tracekit.errors import TracekitWarning


def warn_if_dropped(what: str) -> None:
    """For `__del__`: warn if the user's line is a statement that drops the object there and then.

    Wherever else it ends (a name that goes away, an error on its way, the end of Python) it is not
    certain that it was meant to run.
    """
    if sys.is_finalizing():
        return
    if is_dropping(sys._getframe(2)):  # pyright: ignore[reportPrivateUsage]
        text = f"{what}(...) does nothing without its block: write `with {what}(...):`."
        warnings.warn(text, TracekitWarning, stacklevel=3)

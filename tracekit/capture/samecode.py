"""Whether code that was compiled from a source is the code that runs."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType


def is_same(
    found: CodeType, running: CodeType, is_same_constant: Callable[[object, object], bool]
) -> bool:
    """Whether both do the same with the same names; not whether they stand on the same lines."""
    return (
        found.co_code == running.co_code
        and found.co_names == running.co_names
        and found.co_varnames == running.co_varnames
        and found.co_cellvars == running.co_cellvars
        and found.co_freevars == running.co_freevars
        and len(found.co_consts) == len(running.co_consts)
        and all(map(is_same_constant, found.co_consts, running.co_consts))
    )


def is_alike(found: CodeType, running: CodeType) -> bool:
    """The weaker test for code that was rewritten on import, which may have added names."""
    has_names = set(found.co_names) <= set(running.co_names)
    return has_names and set(found.co_varnames) <= set(running.co_varnames)

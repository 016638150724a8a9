"""Read and write the variables of a frame that is suspended in a call."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from inspect import CO_OPTIMIZED
from types import CellType, CodeType, FrameType
from typing import TYPE_CHECKING, Any, Final, final

from tracekit.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

CAN_UNBIND: Final = sys.version_info < (3, 12)  # 3.12 warns and binds None instead
HAS_LIVE_LOCALS: Final = sys.version_info >= (3, 13)  # PEP 667: frame.f_locals writes through
_REFERENCES_TO_A_SNAPSHOT: Final = 3  # the frame, a variable here, the argument of getrefcount


@final
@dataclass(frozen=True)
class FrameNames:
    """What a code object says about its frame's names; holds no reference to the code object."""

    function_name: str
    is_function: bool
    plain: frozenset[str]  # locals that no other scope can see
    shared: frozenset[str]  # locals in cells: other functions may read or write them at any time
    slots: Mapping[str, int]  # of the shared names: their index in the frame's memory
    future_flags: int

    @property
    def all(self) -> frozenset[str]:
        return self.plain | self.shared


def names_of(code: CodeType, future_mask: int) -> FrameNames:
    shared = frozenset(code.co_cellvars + code.co_freevars)
    return FrameNames(
        function_name=code.co_name,
        is_function=bool(code.co_flags & CO_OPTIMIZED),
        plain=frozenset(code.co_varnames) - shared,
        shared=shared,
        slots={name: slot for name, slot in _slots(code).items() if name in shared},
        future_flags=code.co_flags & future_mask,
    )


def _slots(code: CodeType) -> dict[str, int]:
    """Each variable's index in the frame's memory; a cell's argument keeps its own from 3.11 on."""
    names = [*code.co_varnames]
    if sys.version_info >= (3, 11):
        names += [name for name in code.co_cellvars if name not in code.co_varnames]
    else:
        names += code.co_cellvars
    return {name: index for index, name in enumerate([*names, *code.co_freevars])}


def bind(frame: FrameType, values: Mapping[str, object], removed: Collection[str] = ()) -> None:
    """Bind and unbind local variables of a frame that is suspended in a call.

    Raises CaptureError for a name in `removed` on 3.12 and later, whose frames cannot unbind.
    """
    if not frame.f_code.co_flags & CO_OPTIMIZED:
        frame.f_locals.update(values)
        for name in removed:
            frame.f_locals.pop(name, None)
        return
    if HAS_LIVE_LOCALS:
        frame.f_locals.update(values)
    elif values:
        _bind_through_snapshot(frame, values)
    if removed:
        _unbind(frame, removed)


def _bind_through_snapshot(frame: FrameType, values: Mapping[str, object]) -> None:
    """Write these names and no other.

    The snapshot holds values of shared names too, which another thread may have changed by now.
    """
    snapshot = frame.f_locals
    before = dict(snapshot)
    snapshot.clear()
    snapshot.update(values)
    ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
    snapshot.update(before | dict(values))


def _unbind(frame: FrameType, removed: Collection[str]) -> None:
    if not CAN_UNBIND:
        raise CaptureError(
            f"{frame.f_code.co_filename}:{frame.f_lineno}: the block unbinds {', '.join(removed)}, "
            "which was bound before it; Python 3.12 and later cannot do that to a function's "
            "variable from outside; assign None instead of `del` (or rename `except ... as`)"
        )
    snapshot = frame.f_locals
    for name in removed:
        snapshot.pop(name, None)
    ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(1))


def forget_snapshot(frame: FrameType) -> None:
    """Empty the copy of its locals that a function's frame carries up to 3.12 once they were read.

    It would keep alive what the function deletes later. What `locals()` gave to the user is that
    same dictionary: then somebody else refers to it, and it stays.
    """
    if HAS_LIVE_LOCALS or not frame.f_code.co_flags & CO_OPTIMIZED:
        return
    variables = frame.f_locals
    if sys.getrefcount(variables) == _REFERENCES_TO_A_SNAPSHOT:
        variables.clear()


def bind_name(frame: FrameType, name: str, value: object) -> None:
    """Bind one name as an assignment in that frame would: what is no local of it is global."""
    code = frame.f_code
    is_local = name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
    if code.co_flags & CO_OPTIMIZED and not is_local:
        frame.f_globals[name] = value
    else:
        bind(frame, {name: value})


# A variable that other functions share lives in a cell, and the body must share that very cell: a
# copy would miss what the others write, and an object that reads through the frame would keep the
# frame alive in every closure that outlives the block. No Python API hands the cell out, so it is
# read from the frame's memory, where each of these guards must hold first:
#   - the layout is one that was tested (_LAYOUTS), on a 64-bit build with the GIL;
#   - the words that must be the frame's code, globals and builtins are exactly these objects;
#   - the word that must be a cell points to an object of type `cell`.
# Where a guard fails the body gets a copy, which is handed back at the end like any other name.
_WORD: Final = ctypes.sizeof(ctypes.c_void_p)
_HAS_KNOWN_OBJECTS: Final = (  # the head of an object is longer without the GIL
    sys.implementation.name == "cpython" and _WORD == 8 and object.__basicsize__ == 2 * _WORD
)


@final
@dataclass(frozen=True)
class _Layout:
    code: int  # offsets in bytes
    global_names: int
    builtins: int
    first_local: int
    is_behind_pointer: bool  # from 3.11 on the frame object points to the interpreter's frame


_LAYOUTS: Final = {
    (3, 10): _Layout(
        code=32, builtins=40, global_names=48, first_local=352, is_behind_pointer=False
    ),
    (3, 11): _Layout(code=32, builtins=16, global_names=8, first_local=72, is_behind_pointer=True),
    (3, 12): _Layout(code=0, builtins=32, global_names=24, first_local=72, is_behind_pointer=True),
    (3, 13): _Layout(code=0, builtins=32, global_names=24, first_local=72, is_behind_pointer=True),
}
_layout: Final = _LAYOUTS.get(sys.version_info[:2]) if _HAS_KNOWN_OBJECTS else None
_POINTER_TO_FRAME: Final = 24  # in the frame object: head (16 bytes), f_back, then this


def shared_cells(frame: FrameType, slots: Mapping[str, int]) -> dict[str, CellType]:
    """The frame's own cells in these slots (FrameNames.slots), as far as they can be reached."""
    start = _first_local(frame) if slots else None
    if start is None:
        return {}
    cells = {name: _cell_at(start + _WORD * slot) for name, slot in slots.items()}
    return {name: cell for name, cell in cells.items() if cell is not None}


def _first_local(frame: FrameType) -> int | None:
    if _layout is None:
        return None
    start = _word(id(frame) + _POINTER_TO_FRAME) if _layout.is_behind_pointer else id(frame)
    is_as_expected = (
        _word(start + _layout.code) == id(frame.f_code)
        and _word(start + _layout.global_names) == id(frame.f_globals)
        and _word(start + _layout.builtins) == id(frame.f_builtins)
    )
    return start + _layout.first_local if is_as_expected else None


def _cell_at(address: int) -> CellType | None:
    pointer = _word(address)
    if not pointer or _word(pointer + _WORD) != id(CellType):
        return None
    found: Any = ctypes.py_object.from_address(address).value  # ctypes.cast would leave a cycle
    return found


def _word(address: int) -> int:
    return ctypes.c_size_t.from_address(address).value

"""A block that lasts: its code, and the names it uses as they were, for any number of runs."""

from __future__ import annotations

import ast
import builtins
import dis
import linecache
from dataclasses import dataclass
from types import CellType, CodeType, FrameType, FunctionType
from typing import TYPE_CHECKING, Any, Final, final

from tracekit.capture.locate import Source
from tracekit.capture.reads import names_read
from tracekit.capture.rewrite import compile_text, helper_name
from tracekit.capture.variables import forget_snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tracekit.capture.block import Block

_BY_NAME: Final = frozenset({"LOAD_NAME", "STORE_NAME", "DELETE_NAME"})
_OF_A_MODULE: Final = ("__name__", "__file__", "__package__", "__spec__", "__loader__")


@final
@dataclass(frozen=True, eq=False)
class LastingBody:
    """A block's code with names of its own; refers to no frame, and hands nothing back."""

    code: CodeType
    names: Mapping[str, object]  # what the block reads of the frame, as it was
    helpers: Mapping[str, object]  # by the names that the code has for them
    module: Mapping[str, object]  # what tells in which module this is
    is_namespace: bool = False  # the code looks its names up in one namespace

    def __call__(self) -> None:
        """Run the statements; every run begins with the names as they were."""
        around: dict[str, Any] = {"__builtins__": builtins, **self.module, **self.names}
        if self.is_namespace:
            exec(self.code, {**around, **self.helpers})
            return
        known = {**self.names, **self.helpers}
        cells = tuple(
            CellType(known[name]) if name in known else CellType() for name in self.code.co_freevars
        )
        FunctionType(self.code, around, self.code.co_name, None, cells)()


def keep(
    block: Block,
    frame: FrameType,
    helpers: Mapping[str, object],
    exchange: Callable[[object], object],
) -> LastingBody:
    """`block` with the names of `frame` as they are now, each value exchanged for another.

    Names are kept, not copied: what they refer to may still be changed in place by others.
    """
    form = block.form(frame, helpers)
    code = block.compiled(form).code
    read = names_read(block.tree.body)
    try:
        known: dict[str, object] = {**_globals_of(code, frame), **frame.f_locals}
        visible = {*code.co_freevars, *_global_names(code)}
        names = {name: exchange(known[name]) for name in known if name in read and name in visible}
    finally:
        forget_snapshot(frame)
    given = {helper_name(name): value for name, value in helpers.items()}
    module = {name: frame.f_globals[name] for name in _OF_A_MODULE if name in frame.f_globals}
    return LastingBody(code, names, given, module, form.is_namespace)


def from_text(
    text: str, filename: str, names: Mapping[str, object], helpers: Mapping[str, object]
) -> LastingBody:
    """A body from its text alone, as it was saved; errors show its lines under `filename`.

    Raises SyntaxError if the text means something only inside of a function or class.
    """
    source = Source(filename, text, ast.parse(text, filename))
    code = compile_text(source, tuple(helpers))
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    given = {helper_name(name): value for name, value in helpers.items()}
    return LastingBody(code, names, given, {"__name__": filename}, is_namespace=True)


def text_of(block: Block) -> str:
    """The block's text, for `from_text`: as it stands, if it means the same on its own."""
    meant = ast.Module(block.tree.body, [])
    try:
        is_same = ast.dump(ast.parse(block.source)) == ast.dump(meant)
    except SyntaxError:
        is_same = False
    return block.source if is_same else ast.unparse(meant) + "\n"


def _globals_of(code: CodeType, frame: FrameType) -> dict[str, object]:
    found = frame.f_globals
    return {name: found[name] for name in _global_names(code) if name in found}


def _global_names(code: CodeType) -> set[str]:
    """The names that the code, or a function in it, looks up outside of functions."""
    own = {
        step.argval
        for step in dis.get_instructions(code)
        if "GLOBAL" in step.opname or step.opname in _BY_NAME
    }
    inner = [
        _global_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)
    ]
    return own.union(*inner)

"""A captured body: compiled once per place in the source, bound to a frame for each run."""

from __future__ import annotations

import ast
import builtins
import textwrap
from collections import ChainMap
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import CellType, FrameType, FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from tracekit.capture.bytecode import BodyStart, body_start
from tracekit.capture.extract import check, is_empty
from tracekit.capture.family import CellSpot, ItemSpot, Member, Spot
from tracekit.capture.forecast import Plan, groups
from tracekit.capture.locate import FUTURES, Place, locate
from tracekit.capture.percode import PerCode
from tracekit.capture.reads import names_read
from tracekit.capture.rewrite import (
    HELPERS,
    HIDDEN,
    CompiledBody,
    compile_function_body,
    compile_namespace_body,
    helper_name,
)
from tracekit.capture.variables import FrameNames, bind, forget_snapshot, names_of, shared_cells
from tracekit.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import CodeType

EMPTY: Final[Mapping[str, Any]] = MappingProxyType({})
_UNBOUND: Final = object()
_blocks: PerCode[dict[int, Block | str]] = PerCode()  # or why there is none


def capture(frame: FrameType) -> Block:
    """The block of the `with` that `frame` is entering; call it in `__enter__`.

    Raises CaptureError, before anything is installed, where the body cannot be lifted out.
    """
    known = _blocks.get(frame.f_code)
    found = known.get(frame.f_lasti) if known is not None else None
    if found is None:
        found = _capture_anew(frame)
    if isinstance(found, str):
        raise CaptureError(found)
    return found


def _capture_anew(frame: FrameType) -> Block | str:
    """The block, or why it cannot be lifted out; remembered for as long as its code lives."""
    found: Block | str
    try:
        found = _captured(frame)
    except CaptureError as error:
        found = error.args[0]
    known = _blocks.get(frame.f_code)
    if known is None:
        _blocks.put(frame.f_code, known := {})
    known[frame.f_lasti] = found
    return found


def _captured(frame: FrameType) -> Block:
    place = locate(frame)
    check(place)
    block = _block(place, frame.f_code, frame.f_lasti)
    if not block.is_empty:
        # Compiled now, so that what cannot be compiled is refused before anything runs.
        block.compiled(_Form(_is_namespace(block.names, frame), HELPERS))
    return block


def _block(place: Place, code: CodeType, entry: int) -> Block:
    statement = place.statement
    target = statement.items[place.item].optional_vars
    start = body_start(code, entry)
    return Block(
        filename=code.co_filename,
        first_line=statement.lineno,
        last_line=statement.end_lineno or statement.lineno,
        function_name=code.co_name,
        source=_body_text(place),
        tree=statement,
        target=target.id if isinstance(target, ast.Name) else None,
        is_empty=is_empty(statement.body),
        start=start,
        place=place,
        names=names_of(code, FUTURES),
    )


def _body_text(place: Place) -> str:
    lines = place.source.text.splitlines()
    body = place.statement.body
    first = min([body[0].lineno, *(node.lineno for node in getattr(body[0], "decorator_list", []))])
    text = lines[first - 1 : body[-1].end_lineno]
    if first <= place.statement.items[-1].context_expr.lineno:  # `with t: statement` on one line
        text[0] = text[0].encode()[body[0].col_offset :].decode()
    return textwrap.dedent("\n".join(text)) + "\n"


class _Form(NamedTuple):
    """What the compiled body of one place depends on besides the place."""

    is_namespace: bool  # a class body, or `exec` with separate locals
    helpers: tuple[str, ...]


@final
@dataclass(frozen=True, eq=False)
class Block:
    """The body of one `with` statement, wherever and however often it runs.

    Refers to no frame, no value and no code object of the user.
    """

    filename: str
    first_line: int  # of the `with` statement, from 1
    last_line: int
    function_name: str
    source: str  # of the body, dedented; for people
    tree: ast.With  # as written
    target: str | None  # the name after `as`, if it is a plain name
    is_empty: bool  # nothing but `pass` and constants
    start: BodyStart = field(repr=False)
    place: Place = field(repr=False)
    names: FrameNames = field(repr=False)
    _compiled: dict[_Form, CompiledBody] = field(
        default_factory=dict["_Form", CompiledBody], repr=False
    )
    _plans: dict[int | None, Plan] = field(default_factory=dict["int | None", Plan], repr=False)

    def plan(self, group: int | None = None) -> Plan:
        """The forecast of the whole block, or of the `group`-th run of statements in it."""
        known = self._plans.get(group)
        if known is None:
            body, shared = self.tree.body, self.names.shared
            statements = body if group is None else groups(body, shared)[group]
            known = self._plans[group] = Plan(statements, shared)
        return known

    @cached_property
    def reads(self) -> frozenset[str]:
        """The names that the block may read before it binds them."""
        return names_read(self.tree.body)

    @cached_property
    def fills_containers(self) -> bool:
        """Whether the block may store into something besides names, as far as its Plan goes."""
        nodes = [node for statement in self.tree.body for node in ast.walk(statement)]
        return any(_fills(node) for node in nodes)

    def compiled(self, form: _Form) -> CompiledBody:
        known = self._compiled.get(form)
        if known is None:
            compiler = compile_namespace_body if form.is_namespace else compile_function_body
            known = self._compiled[form] = compiler(self.place, self.names, form.helpers)
        return known

    def form(self, frame: FrameType, helpers: Mapping[str, object]) -> _Form:
        """What the compiled body for `frame` depends on."""
        return _Form(_is_namespace(self.names, frame), tuple(helpers))

    def body(self, frame: FrameType, helpers: Mapping[str, object]) -> Body:
        """The body bound to the names of `frame`, to be run once."""
        form = self.form(frame, helpers)
        bind_to = _body_in_namespace if form.is_namespace else _body_in_function
        return bind_to(self.compiled(form), frame, helpers, self.names)

    def member(self, frame: FrameType, helpers: Mapping[str, object]) -> Member:
        """The block bound to the names of `frame`, to be run once among siblings."""
        form = _Form(_is_namespace(self.names, frame), tuple(helpers))
        compiled = self.compiled(form)
        if form.is_namespace or not self.names.is_function:
            return _member_of_namespace(self, compiled, frame, helpers)
        return _member_of_function(self, compiled, frame, helpers)

    def explain(self) -> str:
        """The captured source and its syntax tree, for people."""
        try:
            from astor import dump_tree
        except ImportError:
            tree = '(for the syntax tree: pip install "astor")'
        else:
            tree = dump_tree(self.tree)
        lines = f"{self.filename}:{self.first_line}-{self.last_line}"
        return f"{lines} in {self.function_name}\n\n{self.source}\n{tree}\n"


def _fills(node: ast.AST) -> bool:
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        is_append = isinstance(node, ast.Attribute) and node.attr == "append"
        return is_append or isinstance(node.ctx, ast.Store)
    return False


def _is_namespace(names: FrameNames, frame: FrameType) -> bool:
    """Is this a class body, or `exec` with separate locals?"""
    return not names.is_function and frame.f_locals is not frame.f_globals


def _body_in_namespace(
    compiled: CompiledBody, frame: FrameType, helpers: Mapping[str, object], _: FrameNames
) -> Body:
    extra: dict[str, Any] = {helper_name(name): value for name, value in helpers.items()}
    namespace = ChainMap(frame.f_locals, extra)  # writes go to the first, so helpers stay unseen
    return Body(partial(exec, compiled.code, frame.f_globals, namespace), frame, {})


def _body_in_function(
    compiled: CompiledBody, frame: FrameType, helpers: Mapping[str, object], names: FrameNames
) -> Body:
    cells, copied = _cells(compiled, frame, helpers, names)
    function = _function(compiled, frame, cells, names)
    written = {name: cell for name, cell in copied.items() if name in compiled.handed_back}
    guarded = {name: _contents(cell) for name, cell in copied.items() if name in names.shared}
    return Body(function, frame, written, guarded)


def _cells(
    compiled: CompiledBody, frame: FrameType, helpers: Mapping[str, object], names: FrameNames
) -> tuple[dict[str, CellType], dict[str, CellType]]:
    """A cell for each free variable of the body; and those of them that are copies."""
    free = compiled.code.co_freevars
    hidden = {helper_name(name): value for name, value in helpers.items()}
    cells = {name: CellType(value) for name, value in hidden.items() if name in free}
    cells.update(
        shared_cells(frame, {name: names.slots[name] for name in free if name in names.slots})
    )
    missing = [name for name in free if name not in cells]
    copied = _copies(frame.f_locals, missing) if missing else {}
    cells.update(copied)
    return {name: cells[name] for name in free}, copied


def _function(
    compiled: CompiledBody, frame: FrameType, cells: Mapping[str, CellType], names: FrameNames
) -> FunctionType:
    closure = tuple(cells[name] for name in compiled.code.co_freevars)
    return FunctionType(compiled.code, frame.f_globals, names.function_name, None, closure)


def _member_of_namespace(
    block: Block, compiled: CompiledBody, frame: FrameType, helpers: Mapping[str, object]
) -> Member:
    body = block.body(frame, helpers)
    used, bound = compiled.global_names
    namespace: Any = frame.f_locals
    names = {name for name in used if not name.startswith(HIDDEN)}
    # What is neither there nor bound here, a sibling may bind: it is no builtin.
    known = {name for name in names if name in namespace or not hasattr(builtins, name)} | (
        names & bound
    )
    spots = {name: ItemSpot(namespace, name) for name in known}
    return Member(body, frame, spots, frozenset(bound & known), block.first_line)


def _member_of_function(
    block: Block, compiled: CompiledBody, frame: FrameType, helpers: Mapping[str, object]
) -> Member:
    names = block.names
    cells, copied = _cells(compiled, frame, helpers, names)
    run = _function(compiled, frame, cells, names)
    spots: dict[str, Spot] = {
        name: CellSpot(cell, name, frame, is_private=name in copied)
        for name, cell in cells.items()
        if not name.startswith(HIDDEN)
    }
    _, bound = compiled.global_names  # of a function that says `global`
    for name in bound:
        spots[name] = ItemSpot(frame.f_globals, name)
    return Member(run, frame, spots, compiled.handed_back | bound, block.first_line)


def _copies(values: Mapping[str, object], names: Iterable[str]) -> dict[str, CellType]:
    return {name: CellType(values[name]) if name in values else CellType() for name in names}


@final
class Body:
    """One run of a block. Drops the frame and the values in hand_back()."""

    def __init__(
        self,
        run: Callable[[], object],
        frame: FrameType,
        written: Mapping[str, CellType],
        guarded: Mapping[str, object] = EMPTY,
    ) -> None:
        self._run: Callable[[], object] | None = run
        self._frame: FrameType | None = frame
        self._written = written
        self._before = {name: _contents(cell) for name, cell in written.items()}
        self._guarded = guarded  # shared names whose cell is out of reach: the body had a copy

    def __call__(self) -> None:
        """Run the statements of the block, on whatever thread; the user's exceptions propagate."""
        run, self._run = self._run, None
        if run is None:
            raise CaptureError("this body has run already; a new one is made for each run")
        run()

    def hand_back(self) -> None:
        """Bind in the user's frame what the body bound, and unbind what it deleted.

        Also after an error in the body: what was bound before the error is bound.
        """
        frame, written, before = self._frame, self._written, self._before
        self._run, self._frame, self._written, self._before = None, None, {}, {}
        if frame is None:
            return
        self._refuse_stale(frame)
        after = {name: _contents(cell) for name, cell in written.items()}
        changed = {name: value for name, value in after.items() if value is not before[name]}
        bound = {name: value for name, value in changed.items() if value is not _UNBOUND}
        try:
            if changed:
                bind(frame, bound, [name for name in changed if name not in bound])
        finally:
            forget_snapshot(frame)

    def _refuse_stale(self, frame: FrameType) -> None:
        guarded, self._guarded = self._guarded, EMPTY
        values = frame.f_locals if guarded else EMPTY
        for name, before in guarded.items():
            if values.get(name, _UNBOUND) is not before:
                raise CaptureError(
                    f"{name!r} was changed by another function while the block ran, and on this "
                    f"Python the block works on a copy of it: pass it in and out explicitly"
                )


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return _UNBOUND

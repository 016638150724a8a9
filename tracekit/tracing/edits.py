"""The lasting edits of a model, and the `with` that makes one."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar, final, overload

from tracekit.capture import Block, Skip, caller_frame, capture, keep, skip_body, text_of
from tracekit.core.tree import Tree
from tracekit.errors import CaptureError
from tracekit.tracing import edit_files
from tracekit.tracing.call import Follower, TracedCall
from tracekit.tracing.edit import Edit, EditTracer, of_function
from tracekit.tracing.execution import Execution, Intervention
from tracekit.tracing.unentered import warn_if_dropped
from tracekit.tracing.ways import HELPERS

M = TypeVar("M")
_WAY_OUT = "or put it into a function of the model, and give that: model.edit(function)"


@final
class Edits(Sequence[Edit]):
    """The lasting edits of a model, in the order in which they are made to each value."""

    def __init__(self, model: Any, edits: list[Edit]) -> None:
        self._model = model  # without its edits
        self._edits = edits

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> list[Edit]: ...
    def __getitem__(self, index: int | slice) -> Edit | list[Edit]:
        return self._edits[index]

    def __delitem__(self, index: int | slice) -> None:
        del self._edits[index]

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits[:])

    def add(self, function: Callable[[Any], object]) -> Edit:
        """Make an edit of `function`, which is called with the model in every step of every run.

        A function, unlike a block, sees the names around it as they are when it runs.
        """
        self._edits.append(of_function(function, self._model))
        return self._edits[-1]

    def remove(self, edit: int | Edit) -> None:
        """Take an edit away, given itself or its index."""
        index = edit if isinstance(edit, int) else self._edits.index(edit)
        if not -len(self) <= index < len(self):
            raise IndexError(f"the model has {len(self)} lasting edits; there is no [{index}].")
        del self._edits[index]

    def clear(self) -> None:
        """Take all edits away."""
        self._edits.clear()

    def save(self, path: str | Path) -> None:
        """Write all edits to one safetensors file: their source, and the values they use.

        These may be tensors, numbers, text, lists and dictionaries of them, modules of the model,
        and whatever is imported from torch or from Python's own library. UnsupportedError names
        what can't be saved.
        """
        edit_files.save(path, self._edits, self._model)

    def load(self, path: str | Path) -> None:
        """Add the edits of a file that `save` wrote, behind those that there are.

        A file holds source, which runs when the model runs: load only files that you trust.
        Tensors that were where the model was come to where this one is. UnknownPathError names a
        module that this model does not have.
        """
        self._edits += edit_files.load(path, self._model)

    def __repr__(self) -> str:
        shown = "".join(f"\n  [{index}] {edit!r}" for index, edit in enumerate(self._edits))
        return f"Edits({len(self)}){':' if self else ''}{shown}"


@final
class Editing(Generic[M]):
    """The context of `with model.edit() as edited:`; its block becomes a lasting edit."""

    def __init__(self, model: M, edits: list[Edit], exchange: Callable[[object], object]) -> None:
        self._model = model
        self._edits = edits
        self._exchange = exchange
        self._frame: FrameType | None = None
        self._block: Block | None = None
        self._skip: Skip | None = None
        self._is_used = False

    def __del__(self) -> None:
        if not self._is_used:
            warn_if_dropped("model.edit")

    def __enter__(self) -> M:
        self._is_used = True
        frame = caller_frame()
        try:
            block = capture(frame)
            if block.is_empty:
                raise CaptureError("an empty block edits nothing: write the edit into it")
            is_alone = _tracer_name(block) is None
            bound: Any = self._model if is_alone else (EditTracer(), self._model)
            self._skip = skip_body(block, frame, entered=bound)
        except CaptureError as error:
            raise CaptureError(f"{error.args[0]}; {_WAY_OUT}") from None
        self._block, self._frame = block, frame
        return bound

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # To a type checker, as to a reader, this `with` swallows nothing.
        skip, frame, block = self._skip, self._frame, self._block
        self._skip = self._frame = self._block = None
        assert skip is not None
        assert frame is not None
        assert block is not None
        skip.restore()
        if not skip.is_own(error):
            if error is not None:
                return None
            raise CaptureError(
                "the block ran in place, where its values do not exist: something (a debugger, a "
                "coverage tool) took the trace function away while tracekit kept it from running."
            )
        body = keep(block, frame, HELPERS, self._exchange)
        line = block.tree.body[0].lineno
        own_steps = goes_through_steps(block.tree.body, _tracer_name(block))
        self._edits.append(Edit(body, text_of(block), block.filename, line, own_steps))
        return True  # pyright: ignore[reportReturnType] - it swallows the skip of the body


def _tracer_name(block: Block) -> str | None:
    """The first name, if the `with` says `as (tracer, edited)`, as in nnsight."""
    target = block.tree.items[block.place.item].optional_vars
    if not isinstance(target, (ast.Tuple, ast.List)) or len(target.elts) != 2:
        return None
    return ast.unparse(target.elts[0])


def goes_through_steps(statements: Sequence[ast.stmt], tracer: str | None) -> bool:
    """Whether a block says for itself in which steps it edits, so that it runs once."""
    nodes = (node for statement in statements for node in ast.walk(statement))
    return any(_names_steps(node, tracer) for node in nodes if isinstance(node, ast.Attribute))


def _names_steps(node: ast.Attribute, tracer: str | None) -> bool:
    is_of_tracer = isinstance(node.value, ast.Name) and node.value.id == tracer
    return node.attr == "next" or (is_of_tracer and node.attr in {"iter", "all"})


def run_edited(
    tree: Tree, call: TracedCall, grad: bool | None, edits: Sequence[Intervention]
) -> Any:
    """What `call` returns, with the model edited while it runs."""
    results: list[Any] = []

    def kept(follower: Follower | None) -> Any:
        results.append(call.make(follower))
        return results[0]

    failure = Execution(tree, replace(call, make=kept), grad, edits).run(())
    if failure is not None:
        try:
            raise failure
        finally:
            del failure
    return results.pop()

"""Compile the body of a `with` into a function that shares the names of the frame around it."""

# The module that is compiled, of which only the code object of `body` is used:
#
#     class C:                      # only in a class C, so that private names are mangled as there
#         def factory(<names>):     # every local name of the frame, and the helpers
#             def body():
#                 nonlocal ...      # names the body binds
#                 <the statements, at their own lines and columns>

from __future__ import annotations
import __future__

import ast
import copy
import dis
from dataclasses import dataclass
from functools import cached_property
from types import CodeType
from typing import TYPE_CHECKING, Any, Final, cast, final

from tracekit.capture.extract import check_namespace
from tracekit.capture.forecast import call_before_groups
from tracekit.capture.locate import quiet_compiler, remember_origin
from tracekit.capture.scope import own_names
from tracekit.capture.siblings import bound_by_siblings, waiting_for
from tracekit.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tracekit.capture.locate import Place, Source
    from tracekit.capture.variables import FrameNames

HIDDEN: Final = "tracekit "  # with its blank no name that a user can write
_FACTORY: Final = f"{HIDDEN}factory"
_BODY: Final = f"{HIDDEN}body"
SAVE: Final = "save"
WAIT: Final = "wait"
BACKWARD: Final = "backward"
AHEAD: Final = "ahead"
HELPERS: Final = (SAVE, BACKWARD, AHEAD)  # what a tracer gives its blocks
_SEE_ALL: Final = frozenset(
    {"locals", "vars", "dir", "eval", "exec", "breakpoint", "set_trace", "embed"}
)

_BINDS_BY_NAME: Final = frozenset({"STORE_GLOBAL", "STORE_NAME", "DELETE_GLOBAL", "DELETE_NAME"})
_BY_NAME: Final = _BINDS_BY_NAME | {"LOAD_GLOBAL", "LOAD_NAME"}


def helper_name(name: str) -> str:
    return HIDDEN + name


@final
@dataclass(frozen=True)
class CompiledBody:
    """The body as code; its free variables are names of the frame and helpers."""

    code: CodeType
    handed_back: frozenset[str]  # locals of the frame that the body binds or deletes

    @cached_property
    def global_names(self) -> tuple[frozenset[str], frozenset[str]]:
        """The names outside of functions that the body uses, and those of them that it binds."""
        used, bound = _global_names(self.code)
        return frozenset(used), frozenset(bound)


def compile_function_body(place: Place, names: FrameNames, helpers: Sequence[str]) -> CompiledBody:
    """The body for a frame of a function, or of a module (whose names are all global)."""
    visible = _visible(place, names)
    first_argument = _first_argument(place) if "__class__" in names.shared else None
    statements = _OwnScope(first_argument).rewrite(_statements(place, names, helpers))
    parameters = sorted(visible | {helper_name(name) for name in helpers})
    first = _body_code(_compile(place, names, parameters, statements))
    bound = {
        name for name in first.co_varnames + first.co_cellvars if not name.startswith((HIDDEN, "."))
    }
    declared: list[ast.stmt] = []
    if bound & visible:
        declared.append(ast.Nonlocal(sorted(bound & visible)))
    if bound - visible:
        declared.append(ast.Global(sorted(bound - visible)))
    if _looks_around(statements):
        declared.append(_mention(visible))
    second = _body_code(_compile(place, names, parameters, [*declared, *statements]))
    code = _with_own_name(second, names.function_name, _qualified_name(place))
    remember_origin(code, place.source)
    return CompiledBody(code, frozenset(_written(code) & visible))


def _looks_around(statements: Iterable[ast.stmt]) -> bool:
    nodes = [node for statement in statements for node in ast.walk(statement)]
    return any(
        {getattr(node, "id", None), getattr(node, "attr", None)} & _SEE_ALL for node in nodes
    )


def _mention(names: Iterable[str]) -> ast.stmt:
    """Code that is dropped, but makes the names visible to what looks at the body's frame."""
    mentioned: list[ast.expr] = [ast.Name(name, ast.Load()) for name in sorted(names)]
    return ast.If(ast.Constant(False), [ast.Expr(ast.Tuple(mentioned, ast.Load()))], [])


def _visible(place: Place, names: FrameNames) -> set[str]:
    """The frame's names that the body can mean; a module has none, as its names are global."""
    if not names.is_function:
        return set()
    own = own_names(place, names)
    return {name for name in own if "." not in name and not name.startswith(HIDDEN)}


def compile_namespace_body(place: Place, names: FrameNames, helpers: Sequence[str]) -> CompiledBody:
    """The body for a class body, or for `exec` with its own locals: it runs in that namespace."""
    check_namespace(place, names.shared)
    code = _compile_tree(ast.Module(_statements(place, names, helpers), []), place, names)
    code = _with_own_name(code, names.function_name, _qualified_name(place))
    remember_origin(code, place.source)
    return CompiledBody(code, frozenset())


def compile_text(source: Source, helpers: Sequence[str]) -> CodeType:
    """The statements of `source` as the code of a module; annotations are not evaluated."""
    tree = ast.fix_missing_locations(ast.Module(_calling(helpers, source.tree.body), []))
    flags = __future__.annotations.compiler_flag
    code = compile(tree, source.filename, "exec", flags=flags, dont_inherit=True)
    remember_origin(code, source)
    return code


# --- the tree ------------------------------------------------------------------------------------


def _compile(
    place: Place, names: FrameNames, parameters: Iterable[str], statements: list[ast.stmt]
) -> CodeType:
    body = _function(_BODY, (), statements)
    factory = _function(_FACTORY, parameters, [body])
    owner = next(
        (node for node in reversed(place.enclosing) if isinstance(node, ast.ClassDef)), None
    )
    outer = [factory] if owner is None else [_class(owner.name, [factory])]
    tree = ast.Module(outer, [])
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.arg)) and not hasattr(node, "lineno"):
            ast.copy_location(node, place.statement)
    return _compile_tree(ast.fix_missing_locations(tree), place, names)


def _compile_tree(tree: ast.Module, place: Place, names: FrameNames) -> CodeType:
    try:
        with quiet_compiler():
            return compile(
                tree, place.source.filename, "exec", flags=names.future_flags, dont_inherit=True
            )
    except SyntaxError as error:
        line = place.statement.lineno
        raise CaptureError(
            f"{place.source.filename}:{line}: the block cannot be compiled on its own: {error.msg}"
        ) from error


def _function(name: str, parameters: Iterable[str], body: list[ast.stmt]) -> ast.stmt:
    arguments = ast.arguments(
        posonlyargs=[],
        args=[ast.arg(name) for name in parameters],
        kwonlyargs=[],
        kw_defaults=[],
        defaults=[],
    )
    return _made(
        ast.FunctionDef, name=name, args=arguments, body=body, decorator_list=[], type_params=[]
    )


def _class(name: str, body: list[ast.stmt]) -> ast.stmt:
    return _made(
        ast.ClassDef, name=name, bases=[], keywords=[], body=body, decorator_list=[], type_params=[]
    )


def _made(kind: Any, **fields: object) -> ast.stmt:
    """A node with those of the fields that this Python knows (`type_params` came in 3.12)."""
    return cast(
        "ast.stmt", kind(**{name: value for name, value in fields.items() if name in kind._fields})
    )


def _statements(place: Place, names: FrameNames, helpers: Sequence[str]) -> list[ast.stmt]:
    statements = _calling(helpers, place.statement.body)
    if AHEAD in helpers:
        call_before_groups(statements, names.shared, helper_name(AHEAD))
    if WAIT not in helpers:
        return statements
    return waiting_for(bound_by_siblings(place), helper_name(WAIT), statements)


def _calling(helpers: Sequence[str], body: Iterable[ast.stmt]) -> list[ast.stmt]:
    """A copy of the body, calling the helpers."""
    statements = [copy.deepcopy(statement) for statement in body]
    if SAVE in helpers:
        statements = [_visited(_SaveCalls(), statement) for statement in statements]
    if BACKWARD in helpers:
        statements = [_visited(_BackwardItems(), statement) for statement in statements]
    return statements


def _visited(visitor: ast.NodeTransformer, statement: ast.stmt) -> ast.stmt:
    return cast("ast.stmt", visitor.visit(statement))


def _first_argument(place: Place) -> str | None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    nearest = next(
        (node for node in reversed(place.enclosing) if isinstance(node, functions)), None
    )
    arguments = [*nearest.args.posonlyargs, *nearest.args.args] if nearest is not None else []
    return arguments[0].arg if arguments else None


@final
class _SaveCalls(ast.NodeTransformer):
    """`x.save()` becomes `<save helper>(x)`, everywhere in the block."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if (
            not isinstance(function, ast.Attribute)
            or function.attr != SAVE
            or node.args
            or node.keywords
        ):
            return node
        helper = ast.copy_location(ast.Name(helper_name(SAVE), ast.Load()), function)
        return ast.copy_location(ast.Call(helper, [function.value], []), node)


@final
class _BackwardItems(ast.NodeTransformer):
    """`with x.backward(…):` becomes `with <backward helper>(x, …):`, everywhere in the block."""

    def visit_With(self, node: ast.With) -> ast.AST:
        self.generic_visit(node)
        for item in node.items:
            call = item.context_expr
            if isinstance(call, ast.Call) and _is_backward(call.func):
                owner = cast("ast.Attribute", call.func).value
                call.func = ast.copy_location(
                    ast.Name(helper_name(BACKWARD), ast.Load()), call.func
                )
                call.args.insert(0, owner)
        return node


def _is_backward(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and function.attr == BACKWARD


@final
class _OwnScope(ast.NodeTransformer):
    """Rewrites what a function of its own would change; enters no nested function or class."""

    def __init__(self, first_argument: str | None) -> None:
        self._first_argument = first_argument

    def rewrite(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        return [cast("ast.stmt", self.visit(statement)) for statement in statements]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """A global or nonlocal name cannot be annotated; that of a local is never evaluated."""
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`super()` looks for the first argument of its function, and the body has none."""
        self.generic_visit(node)
        is_super = (
            isinstance(node.func, ast.Name)
            and node.func.id == "super"
            and not node.args
            and not node.keywords
        )
        if is_super and self._first_argument is not None:
            node.args = [
                ast.copy_location(ast.Name(name, ast.Load()), node)
                for name in ("__class__", self._first_argument)
            ]
        return node

    def _leave_alone(self, node: ast.AST) -> ast.AST:
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_Lambda = _leave_alone


# --- the code object -----------------------------------------------------------------------------


def _body_code(code: CodeType) -> CodeType:
    """The code object of `body`, wherever it is nested."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for constant in inner:
        if constant.co_name == _BODY:
            return constant
    return next(_body_code(constant) for constant in inner if constant.co_consts)


def _global_names(code: CodeType) -> tuple[set[str], set[str]]:
    used: set[str] = set()
    bound: set[str] = set()
    for step in dis.get_instructions(code):
        if step.opname in _BY_NAME:
            used.add(step.argval)
        if step.opname in _BINDS_BY_NAME:
            bound.add(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_used, inner_bound = _global_names(constant)
            used |= inner_used
            bound |= inner_bound
    return used, bound


def _written(code: CodeType) -> set[str]:
    """Free variables that the body, or a function in it, writes."""
    own = {
        step.argval
        for step in dis.get_instructions(code)
        if step.opname in {"STORE_DEREF", "DELETE_DEREF"}
    }
    inner = [_written(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return own.union(*inner) & set(code.co_freevars)


def _qualified_name(place: Place) -> str:
    parts: list[str] = []
    for node in place.enclosing:
        parts.append(
            "<lambda>" if isinstance(node, ast.Lambda) else cast("ast.ClassDef", node).name
        )
        if not isinstance(node, ast.ClassDef):
            parts.append("<locals>")
    return ".".join(parts[:-1] if parts and parts[-1] == "<locals>" else parts)


def _with_own_name(code: CodeType, name: str, qualified_name: str) -> CodeType:
    """Named like the user's function, and so are the functions and classes defined in the body."""
    inside = f"{qualified_name}.<locals>." if qualified_name else ""
    renamed = cast("CodeType", _renamed(code, inside))
    changes: dict[str, Any] = {"co_name": name}
    if hasattr(code, "co_qualname"):
        changes["co_qualname"] = qualified_name or name
    return renamed.replace(**changes)


def _renamed(constant: object, inside: str) -> object:
    """`constant` with the prefix that the factory gave to qualified names replaced by `inside`."""
    prefix_end = f"{_BODY}.<locals>."
    if isinstance(constant, str) and prefix_end in constant and _FACTORY in constant:
        return inside + constant.split(prefix_end, 1)[1]
    if not isinstance(constant, CodeType):
        return constant
    changes: dict[str, Any] = {
        "co_consts": tuple(_renamed(inner, inside) for inner in constant.co_consts)
    }
    if hasattr(constant, "co_qualname"):
        changes["co_qualname"] = _renamed(getattr(constant, "co_qualname"), inside)  # noqa: B009
    return constant.replace(**changes)

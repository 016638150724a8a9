"""The calls in a function as operations: listed with their lines, and compiled to be stopped at."""

# Each call of the function, `f(x, y=z)`, is compiled as
#
#     <operate>(index, f, x, y=z)
#
# in a function of the same file, lines, globals, defaults and closure, where <operate> is one more
# free variable. What looks at the frame that calls it (`super()`, `locals()`) is left as it is.

from __future__ import annotations

import ast
import copy
from collections import Counter
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Final, cast, final

from tracekit.capture.functions import FunctionNode, Written, changed, function_like, written
from tracekit.capture.locate import FUTURES, is_rewritten_on_import, quiet_compiler
from tracekit.capture.percode import PerCode
from tracekit.capture.samecode import is_alike, is_same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_OPERATE: Final = "tracekit operate"  # with its blank no name that a user can write
_FACTORY: Final = "tracekit factory"
_SEE_THEIR_CALLER: Final = frozenset(
    (name,) for name in ("super", "locals", "globals", "vars", "dir", "eval", "exec", "breakpoint")
) | {("sys", "_getframe"), ("inspect", "currentframe"), ("pdb", "set_trace")}


@final
@dataclass(frozen=True)
class Call:
    """One call: its name in the listing, the line its name stands on, and what is written there."""

    name: str
    short_name: str  # of the last part, as in softmax_0 for F.softmax; the same name if none
    line: int
    text: str


@final
@dataclass(frozen=True, eq=False)
class Listing:
    """The calls of one function, in the order in which Python makes them."""

    name: str
    filename: str
    first_line: int
    lines: tuple[str, ...]
    calls: tuple[Call, ...]
    code: CodeType  # the function, with every call an operation


def operations_of(function: FunctionType) -> Listing:
    """The operations of `function`; SourceError where its source can't be had."""
    known = _listings.get(function.__code__)
    if known is None:
        known = _new_listing(function)
        _listings.put(function.__code__, known)
    return known


def with_operations(
    function: FunctionType, known: Listing, operate: Callable[..., Any]
) -> FunctionType:
    """A function like `function` that makes each call as `operate(index, called, *args, **kwargs)`.

    `index` is that of `known.calls`, which is the listing of `function`.
    """
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[_OPERATE] = CellType(operate)
    closure = tuple(cells[name] for name in known.code.co_freevars)
    return function_like(function, known.code, closure)


_listings: PerCode[Listing] = PerCode()


def _new_listing(function: FunctionType) -> Listing:
    code = function.__code__
    is_loose = is_rewritten_on_import(function.__globals__)
    for place in written(function):
        bare = _bare(place.node)
        if _matches(_compiled(function, place, bare), code, is_loose):
            break
    else:
        raise changed(function)
    calls = _Calls()
    new = _compiled(function, place, calls.visit(bare))
    last = place.node.end_lineno or place.node.lineno
    first = code.co_firstlineno
    return Listing(
        function.__qualname__,
        code.co_filename,
        first,
        tuple(place.source.text.splitlines()[first - 1 : last]),
        tuple(_named(calls.found)),
        new,
    )


# --- the calls -----------------------------------------------------------------------------------


@final
class _Calls:
    """Makes every call an operation, in a copy of the function.

    Names are numbered in the order in which Python makes the calls: of `f(f(x))` the inner is
    `f_0`. What is only annotated is not evaluated, or not each time, and has no operations.
    """

    def __init__(self) -> None:
        self.found: list[tuple[list[str], int, str]] = []  # the parts of a name, line, text

    def visit(self, node: ast.AST) -> ast.AST:
        """A copy of `node` with operations in the place of calls."""
        new = copy.copy(node)  # of the node alone; its children are copied as they are visited
        for name in _in_order(node):
            value = getattr(node, name, None)
            if isinstance(value, list):
                setattr(new, name, [self._child(item) for item in cast("list[Any]", value)])
            elif name not in {"annotation", "returns"}:
                setattr(new, name, self._child(value))
        return self._operation(node, new) if isinstance(new, ast.Call) else new

    def _child(self, value: Any) -> Any:
        return self.visit(value) if isinstance(value, ast.AST) else value

    def _operation(self, old: ast.AST, new: ast.Call) -> ast.expr:
        parts = _dotted(new.func)
        if tuple(parts) in _SEE_THEIR_CALLER:
            return _without_own(parts[0], new)
        line = new.func.end_lineno or new.lineno
        self.found.append((parts or ["call"], line, ast.unparse(old)))
        operate = ast.copy_location(ast.Name(_OPERATE, ast.Load()), new.func)
        index = ast.copy_location(ast.Constant(len(self.found) - 1), new.func)
        new.args = [index, new.func, *new.args]
        new.func = operate
        return new


def _without_own(name: str, call: ast.Call) -> ast.expr:
    """A call that looks at its frame, without the name that was added there."""
    template = {
        "locals": "{name: value for name, value in locals().items() if name != own}",
        "dir": "[name for name in dir() if name != own]",
    }.get("locals" if name == "vars" else name)
    if template is None or call.args or call.keywords:
        return call
    new = ast.parse(template.replace("own", repr(_OPERATE)), mode="eval").body
    for node in ast.walk(new):
        ast.copy_location(node, call)
    return new


def _named(found: list[tuple[list[str], int, str]]) -> Iterator[Call]:
    whole, last = Counter[str](), Counter[str]()
    stems = {"_".join(parts) for parts, _, _ in found}
    for parts, line, text in found:
        stem, end = "_".join(parts), parts[-1]
        name = f"{stem}_{whole[stem]}"
        short = name if end in stems else f"{end}_{last[end]}"  # never what another is called
        yield Call(name, short, line, text)
        whole[stem] += 1
        last[end] += 1


def _in_order(node: ast.AST) -> Iterable[str]:
    """The fields of a node, in the order in which Python evaluates them."""
    if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
        return ("generators", *(name for name in node._fields if name != "generators"))
    if isinstance(node, ast.IfExp):
        return ("test", "body", "orelse")
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return ("value", *(name for name in node._fields if name != "value"))
    return node._fields


def _dotted(function: ast.expr) -> list[str]:
    """The names of `self.a.b`, of `x[i].a` without the index, of `f(x).a` what follows the call."""
    parts: list[str] = []
    while isinstance(function, (ast.Attribute, ast.Subscript)):
        if isinstance(function, ast.Attribute):
            parts.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        parts.append(function.id)
    return parts[::-1]


# --- the code object -----------------------------------------------------------------------------


def _bare(node: FunctionNode) -> FunctionNode:
    """The function without what is evaluated where it is defined."""
    bare = copy.copy(node)
    bare.args = _without_defaults(bare.args)
    if not isinstance(bare, ast.Lambda):
        bare.decorator_list, bare.returns = [], None
        if "type_params" in bare._fields:
            setattr(bare, "type_params", [])  # noqa: B010 - came in 3.12
    return bare


def _compiled(function: FunctionType, place: Written, node: ast.AST) -> CodeType:
    """The code object of the function that `node` writes, with the free variables it had."""
    code = function.__code__
    names = ", ".join([*(f"a{index}" for index in range(len(code.co_freevars) + 1))])
    statement = ast.copy_location(ast.Expr(node), node) if isinstance(node, ast.Lambda) else node
    tree = ast.parse(f"class C:\n def factory({names}): pass")
    outer = cast("ast.ClassDef", tree.body[0])
    factory = cast("ast.FunctionDef", outer.body[0])
    for argument, name in zip(factory.args.args, (*code.co_freevars, _OPERATE), strict=True):
        argument.arg = name
    factory.name, factory.body = _FACTORY, [cast("ast.stmt", statement)]
    if place.owner is None:
        tree.body = [factory]
    else:
        outer.name = place.owner  # private names are mangled as there
    tree.body = [*_imports(place.source.tree), *tree.body]
    with quiet_compiler():
        compiled = compile(
            ast.fix_missing_locations(tree),
            code.co_filename,
            "exec",
            flags=code.co_flags & FUTURES,
            dont_inherit=True,
        )
    return _found_in(_found_in(compiled, _FACTORY), code.co_name)


def _imports(module: ast.Module) -> Iterator[ast.stmt]:
    """The imports of a module: Python 3.11 compiles a call on what is imported in its own way."""
    queue: list[ast.AST] = list(module.body)
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if getattr(node, "module", None) != "__future__":
                yield node
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            queue += ast.iter_child_nodes(node)


def _without_defaults(arguments: ast.arguments) -> ast.arguments:
    new = copy.deepcopy(arguments)  # few, and names alone
    new.defaults = []
    new.kw_defaults = [None] * len(new.kwonlyargs)
    every = [*new.posonlyargs, *new.args, *new.kwonlyargs, new.vararg, new.kwarg]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    return new


def _found_in(code: CodeType, name: str) -> CodeType:
    """The code object of that name in `code`, or in the class in it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    named = [constant for constant in inner if constant.co_name == name]
    return named[0] if named else _found_in(inner[0], name)


# --- is it what runs? ----------------------------------------------------------------------------


def _matches(found: CodeType, running: CodeType, is_loose: bool) -> bool:
    return is_alike(found, running) if is_loose else is_same(found, running, _is_same_constant)


def _is_same_constant(found: object, running: object) -> bool:
    if isinstance(found, CodeType) and isinstance(running, CodeType):
        return is_same(found, running, _is_same_constant)
    if isinstance(found, str) and isinstance(running, str) and _FACTORY in found:
        return found.rpartition(".")[2] == running.rpartition(".")[2]  # a qualified name, in 3.10
    return type(found) is type(running) and found == running

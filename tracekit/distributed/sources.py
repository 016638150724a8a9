"""Functions and classes that can't be imported elsewhere, as the text they are written in."""

# A pickled function is its code, which another Python can't run (it crashes). Its text can be run
# by any: compiled where it arrives, at the lines of the user's own file, with the values it uses.

from __future__ import annotations
import __future__

import ast
import builtins
import inspect
import sys
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any, Final, cast, final

import cloudpickle

from tracekit.capture.functions import written as functions_at
from tracekit.capture.locate import parse, quiet_compiler, text_of
from tracekit.capture.reads import names_read
from tracekit.capture.samecode import is_alike
from tracekit.errors import SourceError

_FACTORY: Final = "tracekit factory"  # with its blank no name that a user can write
_NOT_THERE: Final = object()


def is_importable(value: Any) -> bool:
    """Whether another process finds a function or class by its name alone."""
    home = getattr(value, "__module__", None)
    if home == "builtins":
        return True
    if home is None or home == "__main__" or _is_sent_by_value(home):
        return False
    found: Any = sys.modules.get(home)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, _NOT_THERE)
    return found is value or (found is _NOT_THERE and _is_found_by_copyreg(value))


def _is_sent_by_value(home: str) -> bool:
    """Whether the user has said so, by cloudpickle.register_pickle_by_value."""
    chosen: set[str] = cloudpickle.list_registry_pickle_by_value()
    parts = home.split(".")
    return any(".".join(parts[:end]) in chosen for end in range(1, len(parts) + 1))


def _is_found_by_copyreg(value: Any) -> bool:
    """Whether pickle knows another way to it: a builtin under another name, say."""
    return isinstance(value, type) and not value.__flags__ & (1 << 9)  # not made by Python code


@final
@dataclass(frozen=True)
class Written:
    """A function, or a class, as text."""

    text: str  # of the statement, or of the lambda, in its own indentation
    filename: str
    line: int  # from 1
    column: int
    name: str
    qualname: str
    module: str
    owner: str | None  # the class around a method
    free: tuple[str, ...]  # names of functions around it that it uses
    flags: int  # of the compiler: the `from __future__ import` of its file
    is_class: bool

    def given(self, value: Any) -> dict[str, Any]:
        """What a class needs when its statement runs."""
        if not self.is_class:
            return {}
        node = cast("ast.ClassDef", _node(self))
        return _values_for(names_read([_without_bodies(node)]) - {self.name}, value)

    def used(self, value: Any) -> Any:
        """What it uses when it runs; of a function, also its defaults and attributes."""
        node = _node(self)
        statement = ast.Expr(node) if isinstance(node, ast.Lambda) else cast("ast.stmt", node)
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        reads = names_read([statement])
        names = {name for name in names if name in reads}
        if self.is_class:
            return _values_for(frozenset(names - {self.name}), value)
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        closed = {name: _content(cell) for name, cell in cells.items()}
        closed = {name: held for name, held in closed.items() if held is not _NOT_THERE}
        outside = {name for name in names if name not in cells}
        found = value.__globals__
        around = {name: found[name] for name in sorted(outside) if name in found}
        own = (value.__defaults__, value.__kwdefaults__, tuple(vars(value).items()))
        return tuple(closed.items()), tuple(around.items()), own


def _values_for(names: Any, cls: type) -> dict[str, Any]:
    """The values that a class sees under these names, as far as they can be told."""
    around: dict[str, Any] = dict(vars(sys.modules[cls.__module__]))
    for member in vars(cls).values():
        function = getattr(member, "__func__", member)
        if isinstance(function, FunctionType) and function.__module__ == cls.__module__:
            around = {**function.__globals__, **around}
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            held = {name: _content(cell) for name, cell in cells if name != "__class__"}
            around.update({name: it for name, it in held.items() if it is not _NOT_THERE})
    own = {name: around[name] for name in sorted(names) if name in around}
    return {name: it for name, it in own.items() if it is not getattr(builtins, name, _NOT_THERE)}


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return _NOT_THERE


def _without_bodies(node: ast.ClassDef) -> ast.ClassDef:
    copy = ast.parse(ast.unparse(node)).body[0]
    for each in ast.walk(copy):
        if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)):
            each.body = [ast.Pass()]
    return cast("ast.ClassDef", copy)


# -- where it is written --------------------------------------------------------------------------


def written(value: FunctionType | type) -> Written:
    """The text of a function or class; LookupError, OSError or SourceError if it is not found."""
    if isinstance(value, type):
        return _class(value)
    code = value.__code__
    try:
        every = functions_at(value)
    except SourceError as error:
        raise LookupError(str(error)) from error
    fitting = [each for each in every if _runs(each.source.filename, each.node, code, each.owner)]
    if not fitting:
        raise LookupError(value.__qualname__)
    one = min(fitting, key=lambda each: not _is_exact(each, code))
    text = _segment(one.source.text, one.node, is_whole=isinstance(one.node, ast.Lambda))
    free = tuple(name for name in code.co_freevars)
    return _written(value, text, code.co_filename, one.node, one.owner, free, code.co_flags)


def _class(value: type) -> Written:
    filename = inspect.getsourcefile(value) or ""
    lines, line = inspect.getsourcelines(value)
    del lines
    module = sys.modules.get(value.__module__)
    source = parse(filename, text_of(filename, vars(module) if module is not None else {}))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef) and node.name == value.__name__:
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            if first == line:
                text = _segment(source.text, node, is_whole=False)
                return _written(value, text, filename, node, None, (), 0)
    raise LookupError(value.__qualname__)


def _segment(text: str, node: Any, is_whole: bool) -> str:
    """The lines of a statement, its decorators above; or just a lambda."""
    if is_whole:
        return ast.get_source_segment(text, node) or ""
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    return "\n".join(text.split("\n")[first - 1 : node.end_lineno])


def _written(
    value: Any, text: str, filename: str, node: Any, owner: str | None, free: Any, flags: int
) -> Written:
    decorators = [each.lineno for each in getattr(node, "decorator_list", [])]
    return Written(
        text=text,
        filename=filename,
        line=min([node.lineno, *decorators]),
        column=node.col_offset,
        name=value.__name__,
        qualname=value.__qualname__,
        module=value.__module__ or "__main__",
        owner=owner,
        free=tuple(free),
        flags=flags & __future__.annotations.compiler_flag,
        is_class=isinstance(value, type),
    )


def _runs(filename: str, node: Any, code: CodeType, owner: str | None) -> bool:
    """Whether that is what the code was compiled from."""
    try:
        made_anew = _code(node, filename, code.co_freevars, owner, code.co_flags)
    except SyntaxError:
        return False
    return made_anew is not None and is_alike(made_anew, code)


def _is_exact(one: Any, code: CodeType) -> bool:
    """Of several lambdas on one line, the one that was compiled to this very code."""
    again = _code(one.node, one.source.filename, code.co_freevars, one.owner, code.co_flags)
    return again is not None and (again.co_code, again.co_consts) == (code.co_code, code.co_consts)


# -- made again -----------------------------------------------------------------------------------


def _node(text: Written) -> ast.AST:
    """The syntax tree, at the lines and columns of the user's file."""
    if text.name == "<lambda>":
        tree = ast.parse(f"({text.text})", text.filename, "eval").body
        ast.increment_lineno(tree, text.line - 1)
        return tree
    is_indented = text.text[:1] in (" ", "\t")
    above = "\n" * (text.line - 1 - is_indented) + ("if True:\n" if is_indented else "")
    outer: Any = ast.parse(above + text.text + "\n", text.filename).body[0]
    return outer.body[0] if is_indented else outer


def _code(
    node: Any, filename: str, free: tuple[str, ...], owner: str | None, flags: int
) -> CodeType | None:
    """The code of a function, without its decorators, in functions that have its free names."""
    name = "<lambda>" if isinstance(node, ast.Lambda) else node.name
    if isinstance(node, ast.Lambda):
        statement: ast.stmt = ast.Expr(node)
    else:
        plain = {field: getattr(node, field) for field in node._fields}
        statement = type(node)(**{**plain, "decorator_list": []})
        ast.copy_location(statement, node)
    names = [ast.arg(each) for each in free]
    arguments = ast.arguments([], names, None, [], [], None, [])
    more: dict[str, Any] = {"type_params": []} if "type_params" in ast.FunctionDef._fields else {}
    body: list[ast.stmt] = [statement]
    if owner is not None:
        body = [ast.ClassDef(owner, [], [], body, [], **more)]
    factory = ast.FunctionDef(_FACTORY, arguments, body, [], None, None, **more)
    tree = ast.Module([factory], [])
    for each in ast.walk(tree):
        if isinstance(each, (ast.stmt, ast.expr, ast.arg)) and not hasattr(each, "lineno"):
            ast.copy_location(each, node)
    kept = flags & __future__.annotations.compiler_flag
    with quiet_compiler():
        whole = compile(
            ast.fix_missing_locations(tree), filename, "exec", flags=kept, dont_inherit=True
        )
    return _inner(whole, name)


def _inner(code: CodeType, name: str) -> CodeType | None:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found = constant if constant.co_name == name else _inner(constant, name)
            if found is not None:
                return found
    return None


def made(text: Written, given: dict[str, Any], namespace: dict[str, Any]) -> Any:
    """The function, not yet with the values that it uses; or the class."""
    node = _node(text)
    if text.is_class:
        namespace.update(given)
        with quiet_compiler():
            code = compile(
                ast.Module([cast("ast.stmt", node)], []),
                text.filename,
                "exec",
                flags=text.flags,
                dont_inherit=True,
            )
        exec(code, namespace)
        cls = namespace[text.name]
        cls.__qualname__ = text.qualname
        return cls
    code = _code(node, text.filename, text.free, text.owner, text.flags)
    assert code is not None
    cells = tuple(CellType() for _ in code.co_freevars)
    function = FunctionType(code, namespace, text.name, None, cells)
    function.__qualname__ = text.qualname
    function.__module__ = text.module
    return function


def fill(value: Any, content: Any, namespace: dict[str, Any]) -> None:
    """Give a function, or the functions of a class, the values that they use."""
    if isinstance(value, type):
        namespace.update(content)
        return
    closed, around, (defaults, keyword_defaults, attributes) = content
    cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
    for name, held in closed:
        if name in cells:
            cells[name].cell_contents = held
    namespace.update(around)
    value.__defaults__, value.__kwdefaults__ = defaults, keyword_defaults
    vars(value).update(attributes)

"""Evaluate, ahead of a block, those of its expressions that certainly have no effect."""

# What is said here of a block is a forecast: the block itself runs later, on the same names. So
# an expression is evaluated only if that has no effect and no cost worth naming; of every other
# the forecast is Unsure, and ends there.

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, Final, TypeAlias

from tracekit.capture.world import SCALARS, Scope, Taken, Unsure

READS: Final = frozenset({"output", "input", "inputs", "hidden", "result"})
Pure: TypeAlias = Callable[[Scope], Any]

_SEQUENCES: Final = (list, tuple, range)
_VIEWS: Final = (type({}.keys()), type({}.values()), type({}.items()))
_FIXED: Final = (tuple, range, frozenset)
_COLLECTIONS: Final = (*_SEQUENCES, dict, set, frozenset)
_MANY: Final = 1000  # elements; what has more is not looked through ahead

_OPERATORS: Final[Mapping[type[ast.AST], Callable[..., Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Div: operator.truediv,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Not: operator.not_,
    ast.USub: operator.neg,
}


def pure(node: ast.expr) -> Pure:
    """What evaluates `node`; Unsure, here or there, if it may have an effect."""
    make = _MAKERS.get(type(node))
    if make is None:
        raise Unsure
    return make(node)


def check_name(name: str) -> str:
    """`name`, unless a class around the block mangles it."""
    if name.startswith("__") and not name.endswith("__"):
        raise Unsure
    return name


def elements(of: object, scope: Scope) -> Iterable[Any]:
    """What a loop over `of` goes through."""
    if type(of) in _FIXED:
        return of  # pyright: ignore[reportReturnType] - a tuple, for one
    if type(of) in _COLLECTIONS or type(of) in _VIEWS:
        return scope.saw(of, lambda: list[Any](of))  # pyright: ignore[reportArgumentType]
    return scope.world.elements(of)


def is_scalar(value: object) -> bool:
    return type(value) in SCALARS


# --- by kind of node -----------------------------------------------------------------------------


def _constant(node: ast.Constant) -> Pure:
    value = node.value
    return lambda _: value


def _name(node: ast.Name) -> Pure:
    name = check_name(node.id)
    return lambda scope: scope.value(name)


def _attribute(node: ast.Attribute) -> Pure:
    of, name = pure(node.value), check_name(node.attr)
    if name in READS:  # of whatever it may be; a forecast of what it asks is in readings.py
        raise Unsure
    return lambda scope: _own_attribute(of(scope), name, scope)


def _own_attribute(of: object, name: str, scope: Scope) -> object:
    kind = type(of)
    if kind is Taken:
        raise Unsure
    if isinstance(of, ModuleType):
        if name in vars(of):
            return scope.saw(of, lambda: vars(of)[name])
        raise Unsure
    is_plain = kind.__getattribute__ is object.__getattribute__ or kind is SimpleNamespace
    if is_plain and not has_descriptor(kind, name):
        own = getattr(of, "__dict__", None)
        if type(own) is dict and name in own:
            return scope.saw(of, lambda: own[name])
    found = scope.world.attribute(of, name)
    return scope.saw(of, lambda: scope.world.attribute(of, name)) if is_scalar(found) else found


def has_plain_attributes(kind: type) -> bool:
    """Whether attributes of its instances are set without running code of the class."""
    return kind.__setattr__ is object.__setattr__ or kind is SimpleNamespace


def has_descriptor(kind: type, name: str) -> bool:
    """Whether reading or setting the attribute of an instance may run code of its class."""
    found = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    return hasattr(type(found), "__get__") or hasattr(type(found), "__set__")


def _subscript(node: ast.Subscript) -> Pure:
    of, index = pure(node.value), pure(node.slice)
    return lambda scope: _own_item(of(scope), index(scope), scope)


def _own_item(of: Any, index: Any, scope: Scope) -> object:
    kind = type(of)
    if kind in _SEQUENCES:
        if type(index) in (int, slice):
            return _tried(lambda: scope.saw(of, lambda: of[index]))
        raise Unsure
    if kind is dict:
        if is_key(index):
            return _tried(lambda: scope.saw(of, lambda: of[index]))
        raise Unsure
    return scope.world.item(of, index)


def is_key(value: object) -> bool:
    """Whether hashing and comparing `value` is harmless."""
    if type(value) is tuple:
        return all(map(is_key, value))
    return is_scalar(value)


def _tried(evaluate: Callable[[], Any]) -> Any:
    """What `evaluate` returns; where it fails, the block is to fail, not the forecast."""
    try:
        return evaluate()
    except Exception as error:
        raise Unsure from error


def _slice(node: ast.Slice) -> Pure:
    parts = [pure(part) if part is not None else _nothing for part in _bounds(node)]
    return lambda scope: slice(*[part(scope) for part in parts])


def _bounds(node: ast.Slice) -> tuple[ast.expr | None, ...]:
    return node.lower, node.upper, node.step


def _nothing(_: Scope) -> None:
    return None


def _display(node: ast.Tuple | ast.List | ast.Set) -> Pure:
    kind: Any = {ast.Tuple: tuple, ast.List: list, ast.Set: set}[type(node)]
    parts = [pure(part) for part in node.elts]
    if kind is set:
        return lambda scope: {_checked_key(part(scope)) for part in parts}
    return lambda scope: kind([part(scope) for part in parts])


def _dict(node: ast.Dict) -> Pure:
    keys = [pure(_present(key)) for key in node.keys]
    values = [pure(value) for value in node.values]
    return lambda scope: {
        _checked_key(key(scope)): value(scope) for key, value in zip(keys, values, strict=True)
    }


def _present(node: ast.expr | None) -> ast.expr:
    if node is None:
        raise Unsure
    return node


def _checked_key(value: object) -> Any:
    if not is_key(value):
        raise Unsure
    return value


def _compare(node: ast.Compare) -> Pure:
    if len(node.ops) > 1:
        raise Unsure
    left, right, kind = pure(node.left), pure(node.comparators[0]), type(node.ops[0])
    if kind in (ast.Is, ast.IsNot):
        is_not = kind is ast.IsNot
        return lambda scope: _is_same(left(scope), right(scope)) is not is_not
    if kind in (ast.In, ast.NotIn):
        is_not = kind is ast.NotIn
        return lambda scope: _is_in(left(scope), right(scope), scope) is not is_not
    return _with_scalars(kind, [left, right])


def _is_same(left: object, right: object) -> bool:
    if isinstance(left, Taken) or isinstance(right, Taken):
        raise Unsure
    return left is right


def _is_in(value: object, collection: Any, scope: Scope) -> bool:
    if type(collection) not in _COLLECTIONS or not is_scalar(value):
        raise Unsure
    if type(collection) is not range and not (
        len(collection) <= _MANY and all(map(is_key, scope.known(collection)))
    ):
        raise Unsure
    return scope.saw(collection, lambda: value in collection)


def _with_scalars(kind: type[ast.AST], parts: list[Pure]) -> Pure:
    operate = _OPERATORS.get(kind)
    if operate is None:
        raise Unsure
    return lambda scope: _tried(lambda: operate(*[_scalar(part(scope)) for part in parts]))


def _scalar(value: object) -> Any:
    if not is_scalar(value) or (isinstance(value, (str, bytes)) and len(value) > _MANY):
        raise Unsure
    return value


def _binary(node: ast.BinOp) -> Pure:
    return _with_scalars(type(node.op), [pure(node.left), pure(node.right)])


def _unary(node: ast.UnaryOp) -> Pure:
    return _with_scalars(type(node.op), [pure(node.operand)])


def _boolean(node: ast.BoolOp) -> Pure:
    parts, decides = [pure(part) for part in node.values], isinstance(node.op, ast.Or)

    def evaluate(scope: Scope) -> object:
        value: object = None
        for part in parts:
            value = _scalar(part(scope))
            if bool(value) is decides:
                return value
        return value

    return evaluate


def _choice(node: ast.IfExp) -> Pure:
    test, body, other = pure(node.test), pure(node.body), pure(node.orelse)
    return lambda scope: body(scope) if _scalar(test(scope)) else other(scope)


def _text(node: ast.JoinedStr) -> Pure:
    parts = [pure(part) for part in node.values]
    return lambda scope: "".join([part(scope) for part in parts])


def _formatted(node: ast.FormattedValue) -> Pure:
    if node.conversion != -1:
        raise Unsure
    value, form = pure(node.value), pure(node.format_spec) if node.format_spec else _no_form
    return lambda scope: _tried(lambda: format(_scalar(value(scope)), form(scope)))


def _no_form(_: Scope) -> str:
    return ""


def _call(node: ast.Call) -> Pure:
    if node.keywords:
        raise Unsure
    arguments = [pure(argument) for argument in node.args]
    if isinstance(node.func, ast.Attribute):
        return _view(pure(node.func.value), node.func.attr, arguments)
    function = pure(node.func)
    return lambda scope: _result(function(scope), [part(scope) for part in arguments], scope)


def _view(of: Pure, name: str, arguments: list[Pure]) -> Pure:
    if name not in ("items", "keys", "values") or arguments:
        raise Unsure

    def evaluate(scope: Scope) -> object:
        mapping = of(scope)
        if type(mapping) is not dict:
            raise Unsure
        return scope.saw(mapping, lambda: list(getattr(mapping, name)()))

    return evaluate


def _result(function: object, arguments: list[Any], scope: Scope) -> object:
    if function is range:
        return _tried(lambda: range(*map(_scalar, arguments)))
    if function is str or function is int:
        return _tried(lambda: function(*map(_scalar, arguments)))
    loops = _LOOPS.get(id(function))
    if loops is None:
        raise Unsure
    if function is enumerate:
        start = [_scalar(argument) for argument in arguments[1:]]
        return _tried(lambda: list(enumerate(elements(arguments[0], scope), *start)))
    if function is builtins.reversed and type(arguments[0]) not in _SEQUENCES:
        raise Unsure
    return _tried(lambda: loops(*[elements(argument, scope) for argument in arguments]))


def _count(values: Iterable[object]) -> int:
    return len(list(values))


# Functions that go through their arguments, and what stands for them: results are not iterators,
# so what the forecast goes through it uses up in its own copy.
_LOOPS: Final[Mapping[int, Callable[..., Any]]] = {
    id(enumerate): enumerate,
    id(zip): lambda *parts: list(zip(*parts, strict=False)),
    id(reversed): lambda part: list(reversed(part)),
    id(list): list,
    id(tuple): tuple,
    id(len): _count,
}

_MAKERS: Final[Mapping[type[ast.expr], Callable[[Any], Pure]]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.Subscript: _subscript,
    ast.Slice: _slice,
    ast.Tuple: _display,
    ast.List: _display,
    ast.Set: _display,
    ast.Dict: _dict,
    ast.Compare: _compare,
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.BoolOp: _boolean,
    ast.IfExp: _choice,
    ast.JoinedStr: _text,
    ast.FormattedValue: _formatted,
    ast.Call: _call,
}

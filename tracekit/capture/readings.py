"""Say ahead what an expression of a block will ask of the model, if it only passes that on."""

from __future__ import annotations

import ast
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, final

from tracekit.capture.pure import (
    READS,
    Pure,
    check_name,
    elements,
    is_key,
    is_scalar,
    pure,
)
from tracekit.capture.world import Scope, Taken, Unsure, World
from tracekit.core.words import ACTIVATIONS


class Asking(World, Protocol):
    """What is known of what a block asks: makes the requests, which are opaque here."""

    def has_value(self, of: object, name: str) -> bool:
        """Whether the model has a value of that standard name there; for a name that may be any."""
        ...

    def read(self, of: object, name: str) -> object:
        """The request that reading the attribute `name` is; else Unsure."""
        ...

    def given(self, name: str, value: object) -> object:
        """What the attribute is when its request was answered with `value`; else Unsure."""
        ...

    def part(self, value: object, index: object) -> object:
        """`value[index]` of a value of the model, if it will be the same later; else Unsure."""
        ...

    def kept(self, value: object, method: str) -> object:
        """`value.method()` of a value of the model, if it is all the same later; else Unsure."""
        ...

    def is_save(self, function: object) -> bool:
        """Whether `function` only returns its argument."""
        ...

    def made(self, of: object, name: str, args: list[Any], kwargs: dict[str, Any]) -> object:
        """The request that a call of a method is, as of tracer.cache(); else Unsure."""
        ...

    def steps(self, of: object, name: str, index: object) -> Iterable[tuple[int, object]]:
        """The steps that a loop goes through, each with the request to wait for it; else Unsure.

        The request is answered with False if the run has ended.
        """
        ...


Asked: TypeAlias = tuple[object, int]  # the request, and the line of the block
Forecast: TypeAlias = Generator[Asked, Any, Any]
Action: TypeAlias = Callable[[Scope], Forecast]
Store: TypeAlias = Callable[[Scope, Any], None]
_MADE: Final = Taken(None, is_whole=False)


def asking(scope: Scope) -> Asking:
    world: Any = scope.world  # those who make a Scope for a forecast give it an Asking
    return world


def reading(node: ast.expr) -> Action:
    """What asks for what `node` reads, and returns what its value will be."""
    make = _READINGS.get(type(node))
    found = make(node) if make is not None else None
    return found if found is not None else _evaluated(pure(node))


def is_read(node: ast.AST) -> bool:
    """Whether a value of the model may be read here."""
    return isinstance(node, ast.Attribute) and (node.attr in READS or node.attr in ACTIVATIONS)


def has_read(node: ast.AST) -> bool:
    return any(map(is_read, ast.walk(node)))


def _pure_if_it_can_be(node: ast.expr) -> Pure:
    try:
        return pure(node)
    except Unsure:
        return _unsure


def _unsure(_: Scope) -> Any:
    raise Unsure


def made(node: ast.Call) -> Action:
    """`tracer.cache(...)` and `tracer.stop()`."""
    if not isinstance(node.func, ast.Attribute):
        raise Unsure
    of, name = pure(node.func.value), node.func.attr
    args = [pure(argument) for argument in node.args]
    kwargs = [(_named(keyword.arg), pure(keyword.value)) for keyword in node.keywords]

    def act(scope: Scope) -> Forecast:
        given = {key: value(scope) for key, value in kwargs}
        request = asking(scope).made(of(scope), name, [value(scope) for value in args], given)
        yield request, node.lineno
        return _MADE

    return act


def _named(argument: str | None) -> str:
    if argument is None:
        raise Unsure
    return argument


def _evaluated(value: Pure) -> Action:
    def act(scope: Scope) -> Forecast:
        yield from ()
        return value(scope)

    return act


def _read(node: ast.Attribute) -> Action | None:
    if not is_read(node):
        return None
    of, name, line = pure(node.value), node.attr, node.end_lineno or node.lineno
    plain = None if name in READS else pure(node)

    def act(scope: Scope) -> Forecast:
        world = asking(scope)
        if plain is not None and not world.has_value(of(scope), name):
            return plain(scope)
        value = yield world.read(of(scope), name), line
        return Taken(world.given(name, value))

    return act


def _part(node: ast.Subscript) -> Action | None:
    if not has_read(node.value):
        return None
    read, index = reading(node.value), pure(node.slice)
    plain = _pure_if_it_can_be(node)

    def act(scope: Scope) -> Forecast:
        found = yield from read(scope)
        if not isinstance(found, Taken):  # an attribute that only has the name of a value
            return plain(scope)
        value = _whole(found)
        return Taken(asking(scope).part(value, index(scope)))

    return act


def _whole(value: object) -> object:
    if not isinstance(value, Taken) or not value.is_whole:
        raise Unsure
    return value.value


def _call(node: ast.Call) -> Action | None:
    if isinstance(node.func, ast.Attribute):
        if node.func.attr in ("save", "detach") and has_read(node.func.value):
            return _kept(node, node.func)
        return made(node) if node.func.attr == "cache" else None
    if len(node.args) == 1 and not node.keywords and has_read(node.args[0]):
        return _saved(pure(node.func), reading(node.args[0]))
    return None


def _kept(node: ast.Call, function: ast.Attribute) -> Action:
    if node.args or node.keywords:
        raise Unsure
    read, name = reading(function.value), function.attr

    def act(scope: Scope) -> Forecast:
        value = _whole((yield from read(scope)))
        return Taken(asking(scope).kept(value, name))

    return act


def _saved(function: Pure, read: Action) -> Action:
    def act(scope: Scope) -> Forecast:
        if not asking(scope).is_save(function(scope)):
            raise Unsure
        return (yield from read(scope))

    return act


def _display(node: ast.Tuple | ast.List) -> Action | None:
    if not has_read(node):
        return None
    reads = [reading(element) for element in node.elts]
    kind = tuple if isinstance(node, ast.Tuple) else list

    def act(scope: Scope) -> Forecast:
        values: list[Any] = []
        for read in reads:
            values.append((yield from read(scope)))
        return kind(values)

    return act


def _dict(node: ast.Dict) -> Action | None:
    if not has_read(node):
        return None
    keys = [pure(key) if key is not None else None for key in node.keys]
    reads = [reading(value) for value in node.values]

    def act(scope: Scope) -> Forecast:
        values: dict[Any, Any] = {}
        for key, read in zip(keys, reads, strict=True):
            if key is None:
                raise Unsure
            name = _key(key(scope))
            values[name] = yield from read(scope)
        return values

    return act


def _key(value: object) -> object:
    if not is_key(value):
        raise Unsure
    return value


# --- comprehensions ------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Loop:
    passes: Pure
    names: list[str]
    tests: list[Pure]

    @classmethod
    def of(cls, generator: ast.comprehension) -> _Loop:
        target = generator.target
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        if generator.is_async or not all(isinstance(part, ast.Name) for part in parts):
            raise Unsure
        names = [check_name(part.id) for part in parts if isinstance(part, ast.Name)]
        return cls(pure(generator.iter), names, [pure(test) for test in generator.ifs])

    def bind(self, scope: Scope, element: Any) -> None:
        values = [element] if len(self.names) == 1 else element
        if type(values) not in (list, tuple) or len(values) != len(self.names):
            raise Unsure
        scope.own.update(zip(self.names, values, strict=True))


def _comprehension(node: ast.ListComp | ast.DictComp) -> Action | None:
    if not has_read(node):
        return None
    if isinstance(node, ast.DictComp):
        parts = [_evaluated(pure(node.key)), reading(node.value)]
    else:
        parts = [reading(node.elt)]
    loops = [_Loop.of(generator) for generator in node.generators]

    def act(scope: Scope) -> Forecast:
        before, values = dict(scope.own), list[Any]()
        yield from _go_through(scope, loops, parts, values)
        scope.own = before  # a comprehension has names of its own
        if len(parts) == 1:
            return [value for (value,) in values]
        return {_key(key): value for key, value in values}

    return act


def _go_through(
    scope: Scope, loops: list[_Loop], parts: list[Action], values: list[Any]
) -> Forecast:
    if not loops:
        found: list[Any] = []
        for part in parts:
            found.append((yield from part(scope)))
        values.append(found)
        return
    loop, *inner = loops
    for element in elements(loop.passes(scope), scope):
        loop.bind(scope, element)
        if all(is_true(test(scope)) for test in loop.tests):
            yield from _go_through(scope, inner, parts, values)


def is_true(value: object) -> bool:
    """Whether a test holds."""
    if not is_scalar(value):
        raise Unsure
    return bool(value)


_READINGS: Final[dict[type[ast.expr], Callable[[Any], Action | None]]] = {
    ast.Attribute: _read,
    ast.Subscript: _part,
    ast.Call: _call,
    ast.Tuple: _display,
    ast.List: _display,
    ast.Dict: _dict,
    ast.ListComp: _comprehension,
    ast.DictComp: _comprehension,
}

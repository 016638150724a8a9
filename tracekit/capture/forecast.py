"""Say ahead what a block will ask of the model, where its statements only store what they read."""

# A forecast runs in the place of the block, and does nothing but ask: it stores nothing. When the
# block itself runs, later, it gets the answers in the same order. So the forecast may stop at any
# point, Unsure of what comes next: from there on the block asks for itself.

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Final, final

from tracekit.capture.pure import (
    Pure,
    check_name,
    elements,
    has_descriptor,
    has_plain_attributes,
    is_key,
    pure,
)
from tracekit.capture.readings import (
    Action,
    Forecast,
    Store,
    asking,
    is_read,
    is_true,
    made,
    reading,
)
from tracekit.capture.world import Scope, Taken, Unsure

_MIN_READS: Final = 2  # below that, asking ahead saves no hand-over


@final
class Plan:
    """The forecast of a list of statements, for any frame that they may run in.

    `shared` are names that other functions may see while the block runs.
    """

    def __init__(self, statements: Sequence[ast.stmt], shared: Collection[str]) -> None:
        self._actions = [_action_or_end(statement, shared) for statement in statements]

    @property
    def is_useful(self) -> bool:
        """Whether it says anything."""
        return bool(self._actions) and self._actions[0] is not _end

    @property
    def is_complete(self) -> bool:
        """Whether it says everything, should the names mean what they seem to mean."""
        return _end not in self._actions

    def run(self, scope: Scope) -> Forecast:
        """Ask; ends where the statements end, or raises Unsure."""
        for action in self._actions:
            yield from action(scope)


def groups(body: Sequence[ast.stmt], shared: Collection[str]) -> list[list[ast.stmt]]:
    """Runs of consecutive statements, wherever in the block, for which it is worth to ask ahead."""
    found: list[list[ast.stmt]] = []
    _collect_groups(body, shared, found)
    return found


def _collect_groups(
    body: Sequence[ast.stmt], shared: Collection[str], found: list[list[ast.stmt]]
) -> None:
    run: list[ast.stmt] = []
    for statement in body:
        if _action_or_end(statement, shared) is not _end:
            run.append(statement)
            continue
        _end_group(run, found)
        run = []
        for inner in _bodies(statement):
            _collect_groups(inner, shared, found)
    _end_group(run, found)


def _end_group(run: list[ast.stmt], found: list[list[ast.stmt]]) -> None:
    nodes = [node for statement in run for node in ast.walk(statement)]
    reads = sum(map(is_read, nodes))
    repeats = any(isinstance(node, (ast.For, ast.ListComp, ast.DictComp)) for node in nodes)
    if reads >= _MIN_READS or (reads and repeats):
        found.append(run)


def call_before_groups(body: list[ast.stmt], shared: Collection[str], function: str) -> None:
    """Put `function(index)` before the `index`-th of the groups, wherever that is in `body`."""
    before = {id(run[0]): index for index, run in enumerate(groups(body, shared))}
    for statements in [body, *_inner_bodies(body)]:
        for position in reversed(range(len(statements))):
            statement = statements[position]
            if id(statement) in before:
                index = ast.Constant(before[id(statement)])
                call = ast.Call(ast.Name(function, ast.Load()), [index], [])
                asks = ast.copy_location(ast.Expr(call), statement)
                statements.insert(position, ast.fix_missing_locations(asks))


def _inner_bodies(body: Sequence[ast.stmt]) -> list[list[ast.stmt]]:
    """All the lists of statements in `body` that run in the block's own frame."""
    found: list[list[ast.stmt]] = []
    for statement in body:
        for inner in _bodies(statement):
            found += [inner, *_inner_bodies(inner)]
    return found


def _bodies(statement: ast.stmt) -> list[list[ast.stmt]]:
    """The lists of statements in a compound statement that run in the block's own frame."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return []
    parts: list[Any] = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
    inner: list[Any] = [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]
    return [*parts, *(case.body for case in inner)]


# --- statements ----------------------------------------------------------------------------------


def _action_or_end(statement: ast.stmt, shared: Collection[str]) -> Action:
    try:
        return _action(statement, shared)
    except Unsure:
        return _end


def _end(_: Scope) -> Forecast:
    raise Unsure
    yield  # pyright: ignore[reportUnreachable] - this makes it a generator


def _action(statement: ast.stmt, shared: Collection[str]) -> Action:
    make = _ACTIONS.get(type(statement))
    if make is None:
        raise Unsure
    return make(statement, shared)


def _nothing(_statement: ast.stmt, _shared: Collection[str]) -> Action:
    return _rest


def _rest(_: Scope) -> Forecast:
    yield from ()


def _assign(statement: ast.Assign, shared: Collection[str]) -> Action:
    stores = [_store(target, shared) for target in statement.targets]
    return _stored(reading(statement.value), stores)


def _annotated(statement: ast.AnnAssign, shared: Collection[str]) -> Action:
    if statement.value is None or not isinstance(statement.target, ast.Name):
        raise Unsure
    return _stored(reading(statement.value), [_store(statement.target, shared)])


def _stored(read: Action, stores: list[Store]) -> Action:
    def act(scope: Scope) -> Forecast:
        value = yield from read(scope)
        for store in stores:
            store(scope, value)

    return act


def _expression(statement: ast.Expr, shared: Collection[str]) -> Action:
    node = statement.value
    if isinstance(node, ast.Constant):
        return _rest
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        raise Unsure  # a read that nobody stores would be held for nothing
    if node.func.attr == "append" and len(node.args) == 1 and not node.keywords:
        return _append(node.func.value, node.args[0], shared)
    if node.func.attr in ("cache", "stop"):
        return made(node)
    raise Unsure


def _append(to: ast.expr, value: ast.expr, shared: Collection[str]) -> Action:
    container, read = _container(to, shared), reading(value)

    def act(scope: Scope) -> Forecast:
        target = container(scope)
        if type(target) is not list:
            raise Unsure
        yield from read(scope)
        scope.note_change(target)

    return act


def _choice(statement: ast.If, shared: Collection[str]) -> Action:
    test = pure(statement.test)
    body = [_action(inner, shared) for inner in statement.body]
    other = [_action(inner, shared) for inner in statement.orelse]

    def act(scope: Scope) -> Forecast:
        for action in body if is_true(test(scope)) else other:
            yield from action(scope)

    return act


def _loop(statement: ast.For, shared: Collection[str]) -> Action:
    if statement.orelse:
        raise Unsure
    bind, body = _store(statement.target, shared), [_action(s, shared) for s in statement.body]
    steps = _steps(statement.iter)
    passes = pure(statement.iter) if steps is None else None

    def act(scope: Scope) -> Forecast:
        if passes is not None:
            with scope.looping(lambda of=passes: elements(of(scope), scope)) as found:
                for element in found:
                    bind(scope, element)
                    for action in body:
                        yield from action(scope)
            return
        assert steps is not None
        for step, request in steps(scope):
            if not (yield request, statement.lineno):
                return
            bind(scope, step)
            for action in body:
                yield from action(scope)

    return act


def _steps(node: ast.expr) -> Callable[[Scope], Iterable[tuple[int, object]]] | None:
    """`tracer.iter`, `tracer.iter[...]`, `tracer.all()`; None if it is not written so."""
    index: Pure | None = None
    if isinstance(node, ast.Subscript):
        if not (isinstance(node.value, ast.Attribute) and node.value.attr == "iter"):
            return None
        node, index = node.value, pure(node.slice)
    elif isinstance(node, ast.Call) and not node.args and not node.keywords:
        node = node.func
    if not isinstance(node, ast.Attribute) or node.attr not in ("iter", "all"):
        return None
    of, name = pure(node.value), node.attr

    def steps(scope: Scope) -> Iterable[tuple[int, object]]:
        return asking(scope).steps(of(scope), name, index(scope) if index is not None else None)

    return steps


_ACTIONS: Final[dict[type[ast.stmt], Callable[[Any, Collection[str]], Action]]] = {
    ast.Pass: _nothing,
    ast.Assign: _assign,
    ast.AnnAssign: _annotated,
    ast.Expr: _expression,
    ast.For: _loop,
    ast.If: _choice,
}


# --- where values go -----------------------------------------------------------------------------


def _store(target: ast.expr, shared: Collection[str]) -> Store:
    """What stores into `target`, which nobody else may see while the block runs."""
    if isinstance(target, ast.Name):
        return _store_name(check_name(target.id), shared)
    if isinstance(target, (ast.Tuple, ast.List)):
        return _store_each([_store(part, shared) for part in target.elts])
    if isinstance(target, ast.Subscript):
        return _store_item(_container(target.value, shared), pure(target.slice))
    if isinstance(target, ast.Attribute):
        return _store_attribute(_container(target.value, shared), check_name(target.attr))
    raise Unsure


def _store_name(name: str, shared: Collection[str]) -> Store:
    if name in shared:
        raise Unsure

    def store(scope: Scope, value: Any) -> None:
        # Live, the old value goes here; ahead of the block, all of them would be held.
        if isinstance(value, Taken) and isinstance(scope.own.get(name), Taken):
            raise Unsure
        scope.own[name] = value

    return store


def _store_each(stores: list[Store]) -> Store:
    def store(scope: Scope, value: Any) -> None:
        if isinstance(value, Taken):
            whole = value.value if value.is_whole else None
            parts: list[Any] = [Taken(part) for part in whole] if type(whole) is tuple else []
        else:
            parts = list(value) if type(value) in (tuple, list) else []
        if len(parts) != len(stores):
            raise Unsure
        for put, part in zip(stores, parts, strict=True):
            put(scope, part)

    return store


def _store_item(container: Pure, index: Pure) -> Store:
    def store(scope: Scope, _: Any) -> None:
        target, key = container(scope), index(scope)
        is_list = type(target) is list and type(key) is int
        if is_list:
            is_list = -len(scope.known(target)) <= key < len(target)
        if not is_list and not (type(target) is dict and is_key(key)):
            raise Unsure
        scope.note_change(target)

    return store


def _store_attribute(container: Pure, name: str) -> Store:
    def store(scope: Scope, _: Any) -> None:
        target = container(scope)
        kind = type(target)
        is_plain = has_plain_attributes(kind) and not has_descriptor(kind, name)
        if not is_plain or type(getattr(target, "__dict__", None)) is not dict:
            raise Unsure
        scope.note_change(target)

    return store


def _container(node: ast.expr, shared: Collection[str]) -> Pure:
    root = node
    while isinstance(root, (ast.Attribute, ast.Subscript)):
        root = root.value
    if isinstance(root, ast.Name) and root.id in shared:
        raise Unsure
    return pure(node)

"""Random blocks: each statement has a text, for tracekit, and a meaning, for hooks by hand."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import count
from types import CodeType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.tracing.by_hand import AtEnd, AtStep, AtVisit, ByHand, Leave, Program, Skipping, Visit
from tracekit import Envoy
from tracekit.errors import MisfitError, TracekitError


@dataclass(frozen=True)
class Spot:
    """A value of a module, as a block writes it."""

    path: str
    slot: str  # output, hidden, input, inputs
    call: int = 0

    @property
    def module(self) -> str:
        return "model" + "".join(map(_step_down, filter(None, self.path.split("."))))

    def __str__(self) -> str:
        call = f".calls[{self.call}]" if self.call else ""
        return f"{self.module}{call}.{self.slot}"

    def at(self, step: int) -> AtVisit:
        side = "input" if self.slot.startswith("input") else "output"
        return AtVisit(Visit(self.path, side, step, self.call))

    def get(self, value: Any) -> Any:
        if self.slot == "hidden":
            return first_tensor(value)
        if self.slot == "input":
            args, kwargs = value
            return args[0] if args else next(iter(kwargs.values()))
        return value

    def put(self, old: Any, new: Any) -> Any:
        """What the model goes on with, when `new` is written here."""
        if self.slot == "hidden":
            found = first_tensor(old)
            return swapped(old, found, new)
        if self.slot == "input":
            args, kwargs = old
            if args:
                return (new, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): new}
        return new


def _step_down(name: str) -> str:
    if hasattr(Envoy, name):  # BERT's layers have a child called "output"
        return f"[{name!r}]"
    return f"[{name}]" if name.isdigit() else f".{name}"


def first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor) or value is None:
        return value
    if not isinstance(value, (tuple, list, dict)):
        return None
    items = value.values() if isinstance(value, dict) else value
    found = (first_tensor(item) for item in items)
    return next((tensor for tensor in found if tensor is not None), None)


def swapped(value: Any, found: Any, new: Any) -> Any:
    if value is found:
        return new
    if isinstance(value, tuple):
        return tuple(swapped(item, found, new) for item in value)
    if isinstance(value, dict):
        items = {name: swapped(item, found, new) for name, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    return value


# -- the meaning ----------------------------------------------------------------------------------


@dataclass
class Meaning:
    """Runs statements as a generator, for ByHand."""

    names: dict[str, Any]
    step: int = 0
    line: int = 0  # of the statement that runs
    hands: ByHand | None = None
    has_unknown_end: bool = False  # when it ends by an error that a statement catches late

    def program(self, statements: list[Statement]) -> Program:
        for statement in statements:
            self.line = statement.line
            yield from statement.run(self)

    def evaluate(self, code: str, **more: Any) -> Any:
        return eval(_compiled(code), {**self.names, **more})


def stored(names: dict[str, Any]) -> dict[str, Any]:
    """What a program bound, by where it is."""
    found = {
        name: value
        for name, value in names.items()
        if name == "result" or (name[0] == "v" and name[1:2].isdigit())
    }
    for name in ("kept", "named", "steps"):
        found[name] = names[name]
    return {**found, "box": vars(names["box"])}


@lru_cache(maxsize=1024)
def _compiled(code: str) -> CodeType:
    return compile(code, "<by hand>", "eval")


class Text:
    """Lines of source, numbered."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, depth: int, line: str) -> int:
        self.lines.append("    " * depth + line)
        return len(self.lines)


# -- statements -----------------------------------------------------------------------------------


@dataclass
class Statement:
    """One statement of a block; `line` is where it asks for a value."""

    line: int = field(default=0, init=False)

    def write(self, text: Text, depth: int) -> None:
        raise NotImplementedError

    def run(self, meaning: Meaning) -> Program:
        raise NotImplementedError
        yield


STORES = {
    "name": "{name} = {value}",
    "list": "kept.append({value})",
    "dict": "named[{name!r}] = {value}",
    "attribute": "box.{name} = {value}",
    "walrus": "({name} := {value})",
    "pair": "{name}, {name}_too = {value}, 1",
    "twice": "{name} = box.{name} = {value}",
    "annotated": "{name}: torch.Tensor = {value}",
    "list +=": "kept += [{value}]",
}


def store(names: dict[str, Any], how: str, name: str, value: Any) -> None:
    """What the line STORES[how] does."""
    if how in {"list", "list +="}:
        names["kept"].append(value)
    elif how == "dict":
        names["named"][name] = value
    elif how == "attribute":
        setattr(names["box"], name, value)
    else:
        names[name] = value
        if how == "twice":
            setattr(names["box"], name, value)
        if how == "pair":
            names[name + "_too"] = 1


@dataclass
class Read(Statement):
    """Read a value, use it as `use` says, and store it."""

    spot: Spot
    use: str = "{}"
    how: str = "name"
    name: str = "v"

    def write(self, text: Text, depth: int) -> None:
        value = self.use.format(self.spot)
        self.line = text.add(depth, STORES[self.how].format(name=self.name, value=value))

    def run(self, meaning: Meaning) -> Program:
        pause = yield self.spot.at(meaning.step)
        value = self.spot.get(pause.value)
        found = meaning.evaluate(self.use.replace(".save()", "").format("value"), value=value)
        store(meaning.names, self.how, self.name, found)


@dataclass
class Gather(Statement):
    """Read several modules in one go, into `kept`."""

    spots: list[Spot]
    form: int = 0

    FORMS = (
        "kept += [envoy.output for envoy in [{}]]",
        "kept.extend(envoy.output for envoy in ({},))",
        "kept.extend([first for first in [{}] for first in [first.output]])",
        "kept.extend(map(look, [{}]))",
        "for envoy in [{}]: kept.append(envoy.output)",
        "kept.extend({{at: one.output for at, one in enumerate([{}])}}.values())",
    )

    def write(self, text: Text, depth: int) -> None:
        modules = ", ".join(spot.module for spot in self.spots)
        self.line = text.add(depth, self.FORMS[self.form % len(self.FORMS)].format(modules))

    def run(self, meaning: Meaning) -> Program:
        found = []
        for spot in self.spots:
            pause = yield spot.at(meaning.step)
            found.append(pause.value)
            if self.form % len(self.FORMS) in (1, 3, 4):
                meaning.names["kept"].append(found.pop())
        meaning.names["kept"].extend(found)


@dataclass
class Write(Statement):
    """Replace a value: `text` may use the value itself, as {}."""

    spot: Spot
    value: str

    def write(self, text: Text, depth: int) -> None:
        self.line = text.add(depth, f"{self.spot} = {self.value.format(self.spot)}")

    def run(self, meaning: Meaning) -> Program:
        new = None
        uses_old = "{}" in self.value
        if not uses_old:
            new = meaning.evaluate(self.value)
        pause = yield self.spot.at(meaning.step)
        old = self.spot.get(pause.value)
        if uses_old:
            new = meaning.evaluate(self.value.format("value"), value=old)
        if isinstance(old, Tensor) and (new.shape != old.shape or new.dtype != old.dtype):
            raise MisfitError
        pause.value = self.spot.put(pause.value, new)
        has_read = uses_old or self.spot.slot == "hidden"  # which is put into what was there
        pause.is_written |= pause.is_first and not has_read


@dataclass
class Edit(Statement):
    """Change a value in place."""

    spot: Spot
    change: str  # a statement on {}

    def write(self, text: Text, depth: int) -> None:
        self.line = text.add(depth, self.change.format(self.spot))

    def run(self, meaning: Meaning) -> Program:
        pause = yield self.spot.at(meaning.step)
        names = {**meaning.names, "value": self.spot.get(pause.value)}
        exec(self.change.format("value"), names)
        if self.change.startswith("{} "):  # `+=` on the attribute itself assigns to it
            pause.value = self.spot.put(pause.value, names["value"])


@dataclass
class Skip(Statement):
    """Skip a module; `value` may use its input, as {}."""

    spot: Spot  # of the output
    value: str

    def write(self, text: Text, depth: int) -> None:
        call = f".calls[{self.spot.call}]" if self.spot.call else ""
        value = self.value.format(replace(self.spot, slot="input"))
        self.line = text.add(depth, f"{self.spot.module}{call}.skip({value})")

    def run(self, meaning: Meaning) -> Program:
        visit = self.spot.at(meaning.step).visit
        if "{}" in self.value:
            inputs = replace(self.spot, slot="input")
            pause = yield inputs.at(meaning.step)
            old = inputs.get(pause.value)
            value = meaning.evaluate(self.value.format("value"), value=old)
        else:
            value = meaning.evaluate(self.value)
        yield Skipping(visit, value)


@dataclass
class Apply(Statement):
    """Call a module of the model on a value of the block."""

    function: str  # a path
    source: str  # a name
    name: str

    def write(self, text: Text, depth: int) -> None:
        module = Spot(self.function, "output").module
        self.line = text.add(depth, f"{self.name} = {module}({self.source})")

    def run(self, meaning: Meaning) -> Program:
        assert meaning.hands is not None
        module = meaning.names["net"].get_submodule(self.function)
        value = meaning.evaluate(self.source)
        meaning.names[self.name] = meaning.hands.aside(lambda: module(value))
        return
        yield


@dataclass
class Compute(Statement):
    """Something in between that asks the model for nothing."""

    code: str  # an expression
    name: str

    def write(self, text: Text, depth: int) -> None:
        self.line = text.add(depth, f"{self.name} = {self.code}")

    def run(self, meaning: Meaning) -> Program:
        meaning.names[self.name] = meaning.evaluate(self.code)
        return
        yield


@dataclass
class Guarded(Statement):
    """Catch what a statement raises, and go on."""

    inner: Statement
    name: str

    def write(self, text: Text, depth: int) -> None:
        text.add(depth, "try:")
        self.inner.write(text, depth + 1)
        self.line = self.inner.line
        text.add(depth, "except TracekitError as error:")
        text.add(depth + 1, f"{self.name} = str(error)")

    def run(self, meaning: Meaning) -> Program:
        try:
            yield from self.inner.run(meaning)
        except TracekitError as error:
            if error.slug == "never-ran":  # it may be known at once, or at the end of the run
                meaning.has_unknown_end = True
                raise Leave from None
            meaning.names[self.name] = str(error)


@dataclass
class When(Statement):
    """Go one of two ways, by a value of the model."""

    spot: Spot
    then: Statement
    other: Statement

    def write(self, text: Text, depth: int) -> None:
        self.line = text.add(depth, f"if {self.spot}.sum() > 0:")
        self.then.write(text, depth + 1)
        text.add(depth, "else:")
        self.other.write(text, depth + 1)

    def run(self, meaning: Meaning) -> Program:
        pause = yield self.spot.at(meaning.step)
        chosen = self.then if self.spot.get(pause.value).sum() > 0 else self.other
        yield from meaning.program([chosen])


@dataclass
class Inner(Statement):
    """A function of the block's own, called at once."""

    inner: Read

    def write(self, text: Text, depth: int) -> None:
        text.add(depth, "def inner():")
        value = self.inner.use.format(self.inner.spot)
        self.line = text.add(depth + 1, f"return {value}")
        text.add(depth, STORES[self.inner.how].format(name=self.inner.name, value="inner()"))

    def run(self, meaning: Meaning) -> Program:
        yield from self.inner.run(meaning)


@dataclass
class Result(Statement):
    """What the traced call returned."""

    name: str = "result"

    def write(self, text: Text, depth: int) -> None:
        self.line = text.add(depth, f"{self.name} = tracer.result")

    def run(self, meaning: Meaning) -> Program:
        pause = yield AtEnd()
        meaning.names[self.name] = pause.value


@dataclass
class Stop(Statement):
    """The end of the block and of the run."""

    def write(self, text: Text, depth: int) -> None:
        self.line = text.add(depth, "tracer.stop()")

    def run(self, meaning: Meaning) -> Program:
        raise Leave
        yield


@dataclass
class Record(Statement):
    """A cache beside everything else."""

    arguments: str

    def write(self, text: Text, depth: int) -> None:
        self.line = text.add(depth, f"cache = tracer.cache({self.arguments})")

    def run(self, meaning: Meaning) -> Program:
        return
        yield


@dataclass
class Steps(Statement):
    """A loop over steps; `body` holds statements by step, None for those of every step."""

    key: Any  # what stands in tracer.iter[...]; None for tracer.all()
    body: list[tuple[int | None, list[Statement]]]
    total: int  # how many steps the generation has

    def write(self, text: Text, depth: int) -> None:
        steps = "tracer.all()" if self.key is None else f"tracer.iter[{key_text(self.key)}]"
        self.line = text.add(depth, f"for step in {steps}:")
        text.add(depth + 1, "steps.append(step)")
        for step, statements in self.body:
            if step is not None:
                text.add(depth + 1, f"if step == {step}:")
            for statement in statements or [Compute("0", "nothing")]:
                statement.write(text, depth + 1 + (step is not None))

    def run(self, meaning: Meaning) -> Program:
        for step in self._steps():
            meaning.line = self.line
            has_begun = yield AtStep(step)
            if not has_begun:
                return
            meaning.step = step
            meaning.names["steps"].append(step)
            meaning.names["step"] = step
            for only, statements in self.body:
                if only is None or only == step:
                    yield from meaning.program(statements)

    def _steps(self) -> Iterator[int]:
        key = slice(None) if self.key is None else self.key
        if not isinstance(key, slice):
            listed = [key] if isinstance(key, int) else key
            return iter([step if step >= 0 else self.total + step for step in listed])
        if (key.start or 0) < 0 or (key.stop or 0) < 0:
            return iter(range(self.total)[key])
        first, stride = key.start or 0, key.step or 1
        return count(first, stride) if key.stop is None else iter(range(first, key.stop, stride))


def key_text(key: Any) -> str:
    if not isinstance(key, slice):
        return repr(key)
    parts = ["" if part is None else str(part) for part in (key.start, key.stop)]
    return ":".join(parts) + (f":{key.step}" if key.step else "")


@dataclass
class Invoke(Statement):
    """One input of several, with a block of its own."""

    given: str
    body: list[Statement]

    def write(self, text: Text, depth: int) -> None:
        self.line = text.add(depth, f"with tracer.invoke({self.given}):")
        for statement in self.body or [Compute("0", "nothing")]:
            statement.write(text, depth + 1)

    def run(self, meaning: Meaning) -> Program:
        raise NotImplementedError  # by hand, each is a run of its own
        yield


@dataclass
class Next(Statement):
    """Go to the next step, without a loop."""

    def write(self, text: Text, depth: int) -> None:
        self.line = text.add(depth, "tracer.next()")

    def run(self, meaning: Meaning) -> Program:
        meaning.step += 1
        has_begun = yield AtStep(meaning.step)
        assert has_begun


# -- the whole text, compiled and run -------------------------------------------------------------

HEAD = """\
def look(envoy):
    return envoy.output

"""
LAYOUTS = {
    "function": """\
def program():
    kept, named, steps, box = [], {}, [], new_box()
    failure = None
    try:
        with HEADER:
            BODY
    except Exception as error:
        failure = error
    return locals()
bound = program()
""",
    "closure": """\
def around():
    kept, named, steps, box = [], {}, [], new_box()
    def program():
        nonlocal kept
        failure = None
        try:
            with HEADER:
                BODY
        except Exception as error:
            failure = error
        return {"kept": kept, "named": named, "steps": steps, "box": box, **locals()}
    return program()
bound = around()
""",
    "module": """\
kept, named, steps, box = [], {}, [], new_box()
failure = None
try:
    with HEADER:
        BODY
except Exception as error:
    failure = error
bound = globals()
""",
}
_numbers = count()


@dataclass
class Source:
    """A whole program as text; writing it numbers the lines of its statements."""

    statements: list[Statement]
    header: str
    layout: str

    def __post_init__(self) -> None:
        text = Text()
        for line in (HEAD + LAYOUTS[self.layout]).splitlines():
            depth = (len(line) - len(line.lstrip())) // 4
            if line.strip() == "BODY":
                for statement in self.statements:
                    statement.write(text, depth)
                text.add(depth, "nothing = 0")
            else:
                text.add(depth, line.strip().replace("HEADER", self.header))
        self.text = "\n".join(text.lines) + "\n"

    def run(self, **names: Any) -> tuple[dict[str, Any], str]:
        """What it binds, and the name of its file."""
        filename = self._filename
        given = {"torch": torch, "new_box": SimpleNamespace, "TracekitError": TracekitError}
        space = {**given, **names, "__name__": "random_program"}
        lines = self.text.splitlines(keepends=True)
        linecache.cache[filename] = (len(self.text), None, lines, filename)
        try:
            exec(self._code, space)
        finally:
            linecache.cache.pop(filename, None)
        return dict(space["bound"]), filename

    @cached_property
    def _filename(self) -> str:
        return f"<random program {next(_numbers)}>"

    @cached_property
    def _code(self) -> CodeType:
        return compile(self.text, self._filename, "exec")


def by_hand(
    statements: list[Statement], net: nn.Module, call: Callable[[], Any]
) -> tuple[Meaning, ByHand]:
    """The same program by hand-written hooks; what it binds is in `names`."""
    names = {"kept": [], "named": {}, "steps": [], "box": SimpleNamespace(), "torch": torch}
    meaning = Meaning({**names, "net": net})
    hands = ByHand(net, meaning.program(statements), lambda: stored(meaning.names))
    meaning.hands = hands
    hands.run(call)
    return meaning, hands

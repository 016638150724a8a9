"""Blocks that only store what they read, run again and again on one model that changes meanwhile.

Each run gives what hand-written hooks give, bit for bit, or fails at the same line.
`TRACEKIT_EXAMPLES=50000 pytest tests/tracing/test_deferred_runs.py` draws that many.
"""

from __future__ import annotations

import copy
import linecache
import pickle
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import CodeType, SimpleNamespace
from typing import Any

import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor, nn

import tracekit
from tests.tracing.by_hand import ByHand, Program
from tests.tracing.plain import state_of
from tests.tracing.random_programs import (
    Meaning,
    Read,
    Record,
    Result,
    Source,
    Spot,
    Statement,
    Stop,
    Text,
    stored,
)
from tests.tracing.test_against_hooks import compare, examples, same
from tracekit import Model

WIDTH = 4
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "grad": nullcontext,
    "inference": torch.inference_mode,
}


# -- models that can change -----------------------------------------------------------------------


class Plain(nn.Module):
    """A linear layer, within a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.kind, self.times = "tensor", 2

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Varying(Plain):
    """Returns a structure that may be another one in the next run."""

    def forward(self, x: Tensor) -> Any:
        x = self.inner(x)
        kinds: dict[str, Any] = {"tuple": (x, x * 2), "list": [x, x * 2], "dict": {"it": x}}
        return {**kinds, "nested": ([x],)}.get(self.kind, x)


class Recursing(Plain):
    """Calls itself, more or less often."""

    def forward(self, x: Tensor, times: int | None = None) -> Tensor:
        times = self.times if times is None else times
        return self(x * 2, times - 1) + 1 if times > 1 else self.inner(x)


class InPlace(Plain):
    """Writes into what it was given, perhaps."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        return found.add_(1) if self.kind == "tensor" else found


class Repeating(Plain):
    """Calls what is in it, more or less often; not at all, too."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times - 1):
            x = self.inner(x)
        return x


class Catching(Plain):
    """Goes on where what is in it fails."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.inner(x[:, : self.times])
        except RuntimeError:
            return self.inner(x)


class Named(Plain):
    """Passes everything by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ByName()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x=x)


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Linear(WIDTH, WIDTH)

    def forward(self, *, x: Tensor) -> Tensor:
        return self.deep(x)


KINDS = [Plain, Varying, Recursing, InPlace, Repeating, Catching, Named]


class Broken(RuntimeError):
    """What the model fails with."""


class Net(nn.Module):
    """Goes through its layers in the order of its way, which may be another in the next run."""

    def __init__(self, kinds: list[type[Plain]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for kind in kinds)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.way = "012"

    def forward(self, x: Tensor) -> Tensor:
        for name in self.way:
            if name == "!":
                raise Broken("in the model")
            x = unpacked(self.layers[int(name)](x))
        return self.head(x)


def unpacked(found: Any) -> Tensor:
    """The tensor in what a layer returned, which the model changes then, where it can."""
    if isinstance(found, list):
        found.insert(0, found[0] * 0)
        return found[1]
    if isinstance(found, dict):
        found["it"], x = found["it"] * 0, found["it"]
        return x
    if isinstance(found, tuple):
        return unpacked(found[0])
    return found


# -- what stays from run to run, and what changes -------------------------------------------------


@dataclass
class Setting:
    """A model and what the block uses besides, in one run after the other."""

    model: Model
    x: Tensor
    count: int = 3  # a global of the block
    picked: str = "layers.1"  # what a global of the block stands for
    handles: dict[str, Any] = field(default_factory=dict[str, Any])
    is_edited: bool = False

    @property
    def net(self) -> Any:
        return self.model.module

    def names(self) -> dict[str, Any]:
        envoy = self.model.get(self.picked)
        own = {"model": self.model, "x": self.x, "save": tracekit.save}
        return {**own, "count": self.count, "picked": envoy}


WAYS = ["012", "012", "02", "102", "0012", "01", "21", "01!2", "0!", "10!", ""]


def change(setting: Setting, what: str, how: int) -> None:
    """Do to the model, or to the names around, what users do between two runs."""
    net, layer = setting.net, setting.net.layers[how % 3]
    if what == "input":
        setting.x = torch.randn(1 + how % 4, WIDTH).to(setting.x.dtype)
    elif what == "dtype":
        dtype = torch.float64 if setting.x.dtype == torch.float32 else torch.float32
        net.to(dtype)
        setting.x = setting.x.to(dtype)
    elif what == "weights":
        with torch.no_grad():
            for weight in net.parameters():
                weight.mul_(0.5 + how % 3)
    elif what == "module":
        net.layers[how % 3] = KINDS[how % len(KINDS)]().to(setting.x.dtype)
    elif what in {"hook", "pre-hook"}:
        toggle(setting, f"{what} {how % 3}", what, layer)
    elif what == "training":
        net.train(not net.training)
    elif what == "way":
        net.way = WAYS[how % len(WAYS)]
    elif what == "kind":
        layer.kind = ["tensor", "tuple", "list", "dict", "nested"][how % 5]
    elif what == "times":
        layer.times = how % 4
    elif what == "count":
        setting.count = how % 4
    elif what == "picked":
        setting.picked = ["layers.0", "layers.1", "layers.2", "head"][how % 4]
    else:
        change_whole(setting, what, how)


def change_whole(setting: Setting, what: str, how: int) -> None:
    if what == "edit":
        if setting.is_edited:
            setting.model.edits.clear()
        else:
            setting.model.edit(scaled_head, inplace=True)
        setting.is_edited = not setting.is_edited
    elif what == "copy":
        drop_hooks(setting)
        copied = copy.deepcopy if how % 2 or setting.is_edited else through_pickle
        setting.model = copied(setting.model)


def scaled_head(model: Any) -> None:
    model.head.output = model.head.output * 2


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def toggle(setting: Setting, name: str, what: str, layer: Any) -> None:
    if name in setting.handles:
        setting.handles.pop(name).remove()
    elif what == "hook":
        setting.handles[name] = layer.inner.register_forward_hook(lambda *args: args[-1] * 2)
    else:
        setting.handles[name] = layer.inner.register_forward_pre_hook(halved, with_kwargs=True)


def halved(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    if "x" in kwargs:
        kwargs["x"] = kwargs["x"] * 0.5
    return args, kwargs


def drop_hooks(setting: Setting) -> None:
    for handle in setting.handles.values():
        handle.remove()
    setting.handles.clear()


CHANGES = [
    *["same"] * 3,
    *["way", "kind", "times", "count", "picked"] * 2,
    *["input", "weights"] * 2,
    "input",
    "dtype",
    "weights",
    "module",
    "hook",
    "pre-hook",
    "training",
    "edit",
    "copy",
]


# -- what a block stores --------------------------------------------------------------------------


@dataclass
class Several(Statement):
    """Reads of the first layers; how many is a global."""

    form: int
    name: str
    FORMS = (
        "for layer in model.layers[:count]: kept.append(layer.output)",
        "{} = [layer.output for layer in model.layers[:count]]",
        "{} = {{at: layer.inner.output for at, layer in enumerate(model.layers[:count])}}",
        "for at in range(count): named[at] = model.layers[at].input",
        "{} = [each.output for each in (model.layers[0], model.head)[:count]]",
        "for each in model.layers: kept.append(each.hidden)",
        "if count > 1: kept.append(model.layers[count - 2].output)",
        "if count > 1: kept.append((model.layers[0].output, model.layers[1].output))",
    )

    def write(self, text: Text, depth: int) -> None:
        self.line = text.add(depth, self.FORMS[self.form].format(self.name))

    def run(self, meaning: Meaning) -> Program:
        count, kept = meaning.names["count"], meaning.names["kept"]
        layers = [f"layers.{at}" for at in range(3)]
        paths: list[list[str]] = [
            layers[:count],
            layers[:count],
            [f"{layer}.inner" for layer in layers[:count]],
            layers[:count],
            ["layers.0", "head"][:count],
            layers,
            [f"layers.{count - 2}"] if count > 1 else [],
            ["layers.0", "layers.1"] if count > 1 else [],
        ]
        slots = ["output", "output", "output", "input", "output", "hidden", "output", "output"]
        found: list[Any] = []
        for at, path in enumerate(paths[self.form]):
            spot = Spot(path, slots[self.form])
            pause = yield spot.at(0)
            value = spot.get(pause.value)
            if self.form == 3:
                meaning.names["named"][at] = value
            elif self.form in (0, 5, 6):
                kept.append(value)
            else:
                found.append(value)
        if self.form in (1, 4):
            meaning.names[self.name] = found
        elif self.form == 2:
            meaning.names[self.name] = dict(enumerate(found))
        elif self.form == 7 and count > 1:
            kept.append(tuple(found))


@dataclass
class Picked(Statement):
    """A read of whatever a global stands for."""

    slot: str

    def write(self, text: Text, depth: int) -> None:
        self.line = text.add(depth, f"kept.append(picked.{self.slot})")

    def run(self, meaning: Meaning) -> Program:
        spot = Spot(meaning.names["picked"], self.slot)
        pause = yield spot.at(0)
        meaning.names["kept"].append(spot.get(pause.value))


USES = ["{}", "{}", "{}", "save({})", "{}.detach()", "{}[0]", "{}[:, 0]", "{}[0][0]"]
USES_OF_INPUTS = ["{}", "{}", "save({})", "{}[0]", "{}[1]", "{}[0][0]"]
STORES = ["name", "list", "dict", "attribute", "pair", "twice", "annotated"]
PLACES = ["layers.0.inner", "layers.0", "layers.1.inner", "layers.1", "layers.2.inner"]
PLACES += ["layers.2", "head", ""]
SLOTS = ["output", "output", "hidden", "input", "inputs"]
raw = st.tuples(
    st.sampled_from(["read"] * 5 + ["several"] * 2 + ["picked"]),
    st.integers(0, len(PLACES) - 1),
    st.integers(0, 99),
    st.integers(0, 99),
)


def statements(raws: list[Any], is_sorted: bool) -> list[Statement]:
    """In the order of the model's usual way if `is_sorted`."""
    found: list[tuple[float, Statement]] = []
    for kind, at, form, how in raws:
        name, slot = f"v{len(found)}", SLOTS[how % len(SLOTS)]
        if kind == "several":
            found.append((-1, Several(form % len(Several.FORMS), name)))
        elif kind == "picked":
            found.append((rank("layers.1", slot), Picked(slot)))
        else:
            uses = USES_OF_INPUTS if slot == "inputs" else USES
            read = Read(Spot(PLACES[at], slot), uses[form % len(uses)], STORES[how % 7], name)
            found.append((rank(PLACES[at], slot), read))
    if not is_sorted:
        return [statement for _, statement in found]
    found.sort(key=lambda one: one[0])
    if found[0][0] == -1:  # it goes through all layers
        found = [found[0], *(one for one in found if one[0] > rank("layers.2", "output"))]
    return [statement for _, statement in found]


ORDER = ["", "layers.0", "layers.0.inner", "layers.1", "layers.1.inner", "layers.2"]
ORDER += ["layers.2.inner", "head"]


def rank(path: str, slot: str) -> float:
    """Where in the usual way of the model a value is."""
    if slot.startswith("input"):
        return ORDER.index(path)
    ends = [other for other in ORDER if other == path or other.startswith(f"{path}.") or not path]
    return ORDER.index(ends[-1]) + 0.9 - 0.1 * path.count(".") + 0.1 * (not path)


# -- running and comparing ------------------------------------------------------------------------


def by_hand(block: list[Statement], setting: Setting) -> tuple[Meaning, ByHand, Exception | None]:
    """The same by hooks; with it, what the model failed with."""
    names = {"kept": [], "named": {}, "steps": [], "box": SimpleNamespace(), "torch": torch}
    more = {"count": setting.count, "picked": setting.picked, "save": lambda value: value}
    meaning = Meaning({**names, **more, "net": setting.net})
    hands = ByHand(setting.net, meaning.program(block), lambda: stored(meaning.names))
    meaning.hands = hands
    try:
        hands.run(lambda: setting.net(setting.x.clone()))
    except Broken as error:
        return meaning, hands, error
    return meaning, hands, None


def check(block: list[Statement], setting: Setting, ran: Any, source: Source) -> None:
    meaning, hands, failure = by_hand(block, setting)
    if failure is None:
        compare(source, meaning, hands, ran)
        return
    bound, _ = ran
    assert isinstance(bound["failure"], Broken), repr(bound["failure"])
    got, wanted = stored(bound), stored(meaning.names)
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert same(got[name], value), name


def run_once(source: Source, setting: Setting, way: dict[str, bool]) -> Any:
    before = state_of(setting.net)
    with tracekit.settings.changed(**way):
        ran = source.run(**setting.names())
    assert state_of(setting.net) == before
    return ran


def check_edited(source: Source, setting: Setting, ran: Any) -> None:
    """Of a model with edits: each setting gives the same, on a model that has not run yet."""
    other = run_once(source, setting, {"lift_blocks": True, "defer_reads": False})
    one, two = ran[0]["failure"], other[0]["failure"]
    assert type(one) is type(two), (one, two)
    if one is not None:
        assert lines(one, ran[1])[-1:] == lines(two, other[1])[-1:]
    got, wanted = stored(ran[0]), stored(other[0])
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert same(got[name], value), name


def lines(error: BaseException, filename: str) -> list[int | None]:
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.lineno for frame in frames if frame.filename == filename]


round_ = st.tuples(
    st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 99)), max_size=2),
    st.sampled_from(["no_grad"] * 6 + ["grad", "inference"]),
    st.sampled_from(["deferred"] * 8 + ["live", "in place", "scan"]),
)
FIRST: Any = ([], "no_grad", "deferred")
SETTINGS = {
    "deferred": {"lift_blocks": True, "defer_reads": True},
    "scan": {"lift_blocks": True, "defer_reads": True},
    "live": {"lift_blocks": True, "defer_reads": False},
    "in place": {"lift_blocks": False, "defer_reads": True},
}


@examples(0.08)
@given(
    st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
    st.lists(raw, min_size=1, max_size=6),
    st.sampled_from([True] * 5 + [False]),
    st.sampled_from(["result", "nothing"] * 4 + ["stop", "cache"]),
    st.sampled_from(["function", "module"] * 4 + ["closure"]),
    st.lists(round_, min_size=2, max_size=5),
)
def test_each_run_of_a_block_is_as_if_it_were_the_first(
    kinds: list[type[Plain]],
    raws: list[Any],
    is_sorted: bool,
    ending: str,
    layout: str,
    rounds: list[Any],
) -> None:
    torch.manual_seed(0)
    setting = Setting(Model(Net(kinds)), torch.randn(3, WIDTH))
    block = statements(raws, is_sorted)
    block += {"result": [Result()], "stop": [Stop()]}.get(ending, [])
    block = [Record("model.head"), *block] if ending == "cache" else block
    source = Source(block, "model.trace(x.clone()) as tracer", layout)
    dry = Source(block, "model.scan(x.clone()) as tracer", layout)
    note(source.text)
    for changes, mode, way in [FIRST, FIRST, *rounds]:
        for what, how in changes:
            change(setting, what, how)
        with MODES[mode]():
            if way == "scan":
                run_once(dry, setting, SETTINGS[way])
            ran = run_once(source, setting, SETTINGS[way])
            if setting.is_edited:
                check_edited(source, setting, ran)
            else:
                check(block, setting, ran, source)
            ran[0].clear()


@examples(0.005)
@given(
    st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
    st.lists(raw, min_size=1, max_size=4),
)
def test_threads_that_run_one_block_at_once_get_each_their_own(
    kinds: list[type[Plain]], raws: list[Any]
) -> None:
    torch.manual_seed(0)
    model = Model(Net(kinds))
    settings = [Setting(model, torch.randn(1 + at, WIDTH)) for at in range(3)]
    block = statements(raws, is_sorted=True)
    source = Source(block, "model.trace(x.clone()) as tracer", "function")
    note(source.text)
    ran: dict[int, Any] = {}

    def work(at: int) -> None:
        for _ in range(2):
            ran[at] = source.run(**settings[at].names())

    with torch.no_grad():
        source.run(**settings[0].names())
    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, setting in enumerate(settings):
        check(block, setting, ran[at], source)


# -- several inputs -------------------------------------------------------------------------------

INVOKE_STORES = [
    "kept.append({})",
    "box.items.append({})",
    "v{key} = kept; v{key}.append({})",
    "named[{key}] = {}",
    "v{key} = {}",
]
read_of_rows = st.tuples(st.sampled_from(PLACES[:-1]), st.sampled_from(["output", "input"]))


@dataclass
class RowsRead:
    """A read in the block of one of several inputs."""

    block: int
    key: int
    path: str
    slot: str
    form: int

    @property
    def rank(self) -> tuple[float, int]:
        return rank(self.path, self.slot), self.block

    @property
    def lines(self) -> list[str]:
        text = INVOKE_STORES[self.form].format(Spot(self.path, self.slot), key=self.key)
        return [f"        {line.strip()}" for line in text.split(";")]

    def alone(self, net: nn.Module, inputs: list[Tensor]) -> Tensor:
        """By a plain hook: what its own input alone gives."""
        found: list[Tensor] = []

        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            found.append(output if self.slot == "output" else args[0])

        handle = net.get_submodule(self.path).register_forward_hook(hook)
        net(inputs[self.block])
        handle.remove()
        return found[0]


@examples(0.02)
@given(
    st.lists(st.lists(read_of_rows, max_size=3), min_size=2, max_size=4),
    st.lists(st.integers(0, len(INVOKE_STORES) - 1), min_size=12, max_size=12),
    st.booleans(),
)
def test_blocks_of_several_inputs_store_in_the_models_order(
    blocks: list[list[tuple[str, str]]], forms: list[int], is_one_place: bool
) -> None:
    torch.manual_seed(0)
    net = Net([Plain, Plain, Plain])
    inputs = [torch.randn(1 + at % 2, WIDTH) for at in range(len(blocks))]
    reads: list[RowsRead] = []
    for at, block in enumerate(blocks):
        own = [(path, "output") for path, _ in block[:1]] if is_one_place else block
        for path, slot in sorted(own, key=lambda one: rank(*one)):
            form = 0 if is_one_place else forms[len(reads)]
            reads.append(RowsRead(at, len(reads), path, slot, form))
    text = (text_of_one_place if is_one_place else text_of_places)(reads, len(blocks))
    note(text)
    model, code = Model(net), compiled(text)
    for _ in range(3):  # later runs of the same make no requests
        kept: list[Tensor] = []
        names: dict[str, Any] = {"model": model, "inputs": inputs, "named": {}, "kept": kept}
        with torch.no_grad():
            exec(code, {**names, "box": SimpleNamespace(items=kept)})
            in_turn = sorted(reads, key=lambda read: read.rank)
            wanted = [read.alone(net, inputs) for read in in_turn if read.form < 3]
            by_key = {read.key: read.alone(net, inputs) for read in in_turn if read.form == 3}
        assert len(kept) == len(wanted)
        assert list(names["named"]) == list(by_key)
        found = [*kept, *names["named"].values()]
        for one, other in zip(found, [*wanted, *by_key.values()], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        inputs = [-2 * x for x in inputs]


def text_of_places(reads: list[RowsRead], count: int) -> str:
    lines = ["with model.trace() as tracer:"]
    for at in range(count):
        own = [line for read in reads if read.block == at for line in read.lines]
        lines += [f"    with tracer.invoke(inputs[{at}]):", *own, "        nothing = 0"]
    return "\n".join(lines)


def text_of_one_place(reads: list[RowsRead], count: int) -> str:
    spots = ", ".join(f"({read.block}, {Spot(read.path, 'output').module})" for read in reads)
    return (
        f"spots = [{spots}]\n"
        "with model.trace() as tracer:\n"
        "    for x in inputs:\n"
        "        with tracer.invoke(x): pass\n"
        "    for at, envoy in spots:\n"
        "        with tracer.invoke(inputs[at]):\n"
        "            kept.append(envoy.output)\n"
    )


def compiled(text: str) -> CodeType:
    filename = "<blocks of several inputs>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    return compile(text, filename, "exec")

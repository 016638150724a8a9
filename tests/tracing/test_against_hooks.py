"""Random blocks on random models do exactly what hand-written hooks do, bit for bit.

`TRACEKIT_EXAMPLES=50000 pytest tests/tracing/test_against_hooks.py` draws that many.
"""

from __future__ import annotations

import os
import re
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tracekit
from tests import tiny_models
from tests.tracing.by_hand import ByHand, Visit, is_inside
from tests.tracing.plain import copied, is_same, state_of
from tests.tracing.random_models import WIDTH, build, parts, parts_with_rows
from tests.tracing.random_programs import (
    LAYOUTS,
    STORES,
    Apply,
    Compute,
    Edit,
    Gather,
    Guarded,
    Inner,
    Invoke,
    Meaning,
    Next,
    Read,
    Record,
    Result,
    Skip,
    Source,
    Spot,
    Statement,
    Steps,
    Stop,
    When,
    Write,
    by_hand,
    first_tensor,
    stored,
)
from tracekit import Model
from tracekit.errors import (
    NeverRanError,
    OverwrittenError,
    RowsError,
    ShortLoopWarning,
    SiteOrderError,
    TracekitError,
)

EXAMPLES = int(os.environ.get("TRACEKIT_EXAMPLES", "2000"))
X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "grad": nullcontext,
    "inference": torch.inference_mode,
}


def examples(share: float) -> Callable[[Any], Any]:
    """So much of all examples; without a limit of time if there are many."""

    def decorate(test: Any) -> Any:
        number = max(int(EXAMPLES * share), 1)
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        phases = set(Phase) - {Phase.explain}  # takes minutes
        limits = settings(
            max_examples=number, suppress_health_check=checks, phases=phases, deadline=None
        )
        test = limits(test)
        return pytest.mark.timeout(max(120, number))(test)

    return decorate


# -- what there is to ask for ---------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A visit of a plain run, and what is there."""

    visit: Visit
    shape: tuple[int, ...]  # of the hidden tensor
    dtype: torch.dtype
    is_tensor: bool  # the value as a whole


def places(net: nn.Module, call: Callable[[], Any]) -> list[Place]:
    """Every visit with a tensor of real numbers, in order."""
    found: list[Place] = []

    class Looking(ByHand):
        def _reach(self, visit: Visit, value: Any) -> Any:
            whole = value
            if visit.side == "input":
                args, kwargs = value
                whole = args[0] if args else next(iter(kwargs.values()), None)
                hidden = whole if isinstance(whole, Tensor) else None
            else:
                hidden = first_tensor(value)
            if hidden is not None and hidden.is_floating_point() and hidden.dim() > 1:
                shape = tuple(hidden.shape)
                found.append(Place(visit, shape, hidden.dtype, isinstance(whole, Tensor)))
            return value

    def nothing() -> Any:
        return
        yield

    with torch.no_grad():
        Looking(net, nothing()).run(call)
    return found


# -- drawing --------------------------------------------------------------------------------------

# One raw statement: where, what, and two numbers that choose among the forms of it.
raw = st.tuples(
    st.integers(0, 999),
    st.sampled_from(
        ["read"] * 6
        + [
            "gather",
            "gather",
            "write",
            "write",
            "edit",
            "skip",
            "apply",
            "when",
            "inner",
            "compute",
        ]
    ),
    st.integers(0, 99),
    st.integers(0, 99),
    st.booleans(),
)
USES = [
    "{}",
    "{}",
    "{}",
    "{}.clone()",
    "{}.save()",
    "{}.sum()",
    "{}[:, 0]",
    "{} * 2",
    "torch.tanh({})",
]
CHANGES = ["{}[:, 0] += 1.5", "{}[0] = 0", "{}.mul_(0.5)", "{} += 1", "{}[:, -1:].neg_()"]
VALUES = ["{} * 2", "{} + 1", "-{}", "torch.zeros_like({})", "torch.full({shape}, 0.25)"]


class Drawing:
    """Makes statements of raw ones; knows what names a block has bound so far."""

    def __init__(self, found: list[Place], applied: tuple[str, int]) -> None:
        self.places = found
        self.is_any_shape = False  # of a loop's body: steps differ in the number of positions
        self._applied = applied  # a module, and the width of what it takes
        self.uses, self.stores = USES, list(STORES)
        self._bound: list[tuple[str, Place]] = []  # whole hidden tensors, by name
        self.count = 0

    def statements(self, raws: list[Any], places: list[Place], is_sorted: bool) -> list[Statement]:
        """Statements at `places`, in the order of the model if `is_sorted`."""
        if not places:
            return []
        chosen = [(at % len(places), *rest) for at, *rest in raws]
        if is_sorted:
            chosen = self._without_skipped(sorted(chosen, key=lambda one: one[0]), places)
        return [self._statement(places, *one) for one in chosen]

    def _without_skipped(self, chosen: list[Any], places: list[Place]) -> list[Any]:
        """What is not inside of a module that is skipped before, and no skip of what has begun."""
        kept: list[Any] = []
        begun_until = -1
        skipping: Place | None = None
        for index, drawn, *rest in chosen:
            place, kind = places[index], drawn
            if skipping is not None and (
                is_inside(place.visit.path, skipping.visit.path)
                or place.visit == skipping.visit._replace(side="input")
            ):
                continue
            if kind == "skip":
                begin = self._begin_of(places, place.visit)
                if begin < begun_until or place.visit.path == "":
                    kind = "read"
                else:
                    skipping = place
            begun_until = index
            if kind == "skip":
                end = place.visit._replace(side="output")
                begun_until = next((at for at, p in enumerate(places) if p.visit == end), index)
            kept.append((index, kind, *rest))
        return kept

    @staticmethod
    def _begin_of(places: list[Place], visit: Visit) -> int:
        begin = visit._replace(side="input")
        return next((at for at, place in enumerate(places) if place.visit == begin), -1)

    def _statement(
        self, places: list[Place], index: int, kind: str, form: int, how: int, is_hidden: bool
    ) -> Statement:
        place = places[index]
        visit = place.visit
        is_whole = place.is_tensor and not is_hidden
        slot = "input" if visit.side == "input" else "output" if is_whole else "hidden"
        spot = Spot(visit.path, slot, visit.call)
        make = getattr(self, f"_{kind}")
        return make(place, spot, form, how)

    def _name(self, place: Place | None = None) -> str:
        self.count += 1
        name = f"v{self.count}"
        if place is not None:
            self._bound.append((name, place))
        return name

    def _earlier(self, place: Place, form: int) -> str | None:
        if self.is_any_shape:
            return None
        fits = [
            name
            for name, other in self._bound
            if (other.shape, other.dtype) == (place.shape, place.dtype)
        ]
        return fits[form % len(fits)] if fits else None

    def _read(self, place: Place, spot: Spot, form: int, how: int) -> Statement:
        use = self.uses[form % len(self.uses)]
        if self.uses is USES and spot.slot == "hidden" and form % 3 == 0:
            spot, use = replace(spot, slot="output"), "{}"  # the structure
            return Read(spot, use, list(STORES)[how % len(STORES)], self._name())
        store = self.stores[how % len(self.stores)]
        is_usable = store in {"name", "walrus", "pair", "twice", "annotated"}
        is_usable &= use in {"{}", "{}.clone()", "{}.save()", "{} * 2", "torch.tanh({})"}
        return Read(spot, use, store, self._name(place if is_usable else None))

    def _gather(self, place: Place, spot: Spot, form: int, how: int) -> Statement:
        if place.visit.call or place.visit.side == "input":
            return self._read(place, spot, form, how)
        spots = [replace(spot, slot="output")]
        start = self.places.index(place)
        for other in self.places[start + 1 :]:
            visit = other.visit
            is_next = visit.side == "output" and visit.step == place.visit.step
            if is_next and not visit.call and len(spots) <= how % 3:
                spots.append(Spot(visit.path, "output"))
        return Gather(spots, form)

    def _write(self, place: Place, spot: Spot, form: int, how: int) -> Statement:
        earlier = self._earlier(place, how)
        if earlier is not None and form % 2:
            choices = [earlier, f"{earlier} * 0.5", f"{{}} + {earlier}"]
            return Write(spot, choices[form // 2 % len(choices)])
        if form % 13 == 12:
            return Write(spot, "torch.zeros(2, 2, 2)")  # it never fits
        value = VALUES[form % len(VALUES)]
        value = value.replace("{shape}", str(place.shape))
        if place.dtype != torch.float32 or self.is_any_shape:
            value = "{} * 2"
        return Write(spot, value)

    def _edit(self, place: Place, spot: Spot, form: int, how: int) -> Statement:
        return Edit(spot, CHANGES[form % len(CHANGES)])

    def _skip(self, place: Place, spot: Spot, form: int, how: int) -> Statement:
        module = Spot(spot.path, "output", spot.call)
        outputs = [p for p in self.places if p.visit == place.visit._replace(side="output")]
        inputs = [p for p in self.places if p.visit == place.visit._replace(side="input")]
        if self.is_any_shape or not outputs or not outputs[0].is_tensor:
            return self._read(place, spot, form, how)
        earlier = self._earlier(outputs[0], how)
        if earlier is not None and form % 2:
            return Skip(module, earlier if form % 4 == 1 else f"{earlier} * 2")
        is_same_shape = bool(inputs) and inputs[0].shape == outputs[0].shape
        own = is_same_shape and place.visit.side == "input"
        return Skip(module, "{}" if own and form % 4 == 0 else f"torch.ones({outputs[0].shape})")

    def _apply(self, place: Place, spot: Spot, form: int, how: int) -> Statement:
        function, width = self._applied
        fits = [
            name
            for name, other in self._bound
            if other.shape[-1] == width and other.dtype == torch.float32
        ]
        if self.is_any_shape or not fits:
            return self._read(place, spot, form, how)
        return Apply(function, fits[form % len(fits)], self._name())

    def _compute(self, place: Place, spot: Spot, form: int, how: int) -> Statement:
        earlier = self._earlier(place, form)
        return Compute(f"{earlier} + 1" if earlier else "len(kept)", self._name())

    def _when(self, place: Place, spot: Spot, form: int, how: int) -> Statement:
        if spot.slot == "output" and not place.is_tensor:
            return self._read(place, spot, form, how)
        name = self._name(place)
        own = replace(spot, slot=spot.slot)
        return When(own, Read(own, "{}", "name", name), Read(own, "{} * 2", "name", name))

    def _inner(self, place: Place, spot: Spot, form: int, how: int) -> Statement:
        store = self.stores[how % len(self.stores)]
        return Inner(Read(spot, self.uses[form % len(self.uses)], store, self._name()))


# -- running and comparing ------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    """Whether two values that a program stored are the same, bit for bit."""
    if isinstance(other, Tensor):
        return is_same(one, copied(other))
    if isinstance(other, (list, tuple)):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(same(first, second) for first, second in pairs)
    if isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in other)
    if isinstance(other, str):  # an error's text, which ends with its kind
        return isinstance(one, str) and one.rpartition("[")[2] == other.rpartition("[")[2]
    if isinstance(other, (int, float, type(None))):
        return one == other
    return type(one) is type(other)


_IS_UNCOUNTED = re.compile("uncounted|if the model ran it at all")


def compare(source: Source, meaning: Meaning, hands: ByHand, ran: tuple[Any, str]) -> None:
    """Hold what a trace did against what hooks did."""
    bound, filename = ran
    expected, failure = hands.outcome, bound["failure"]
    if meaning.has_unknown_end:  # what follows may use a name that it binds only later
        assert failure is None or isinstance(failure, (TracekitError, NameError))
        return
    refusals = [str(failure), *(told for told in bound.values() if isinstance(told, str))]
    if any(_IS_UNCOUNTED.search(told) for told in refusals):
        return  # refused, where which call it is can't be known without a hook on everything
    if expected.failure is not None:
        allowed: Any = type(expected.failure)
        if allowed is NeverRanError:  # whether what is behind did run is not known
            allowed = (NeverRanError, SiteOrderError)
        assert isinstance(failure, allowed), repr(failure)
        frames = traceback.extract_tb(failure.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == filename]
        assert meaning.line in lines, (meaning.line, lines)
    else:
        changed = [seen for seen in expected.given if seen.was_written()]
        if any(seen.has_changed() for seen in expected.stored):
            assert isinstance(failure, OverwrittenError)
        elif failure is not None:
            assert changed and isinstance(failure, OverwrittenError), repr(failure)
    got, wanted = stored(bound), stored(meaning.names)
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert same(got[name], value), name
    if "cache" in bound and expected.failure is None and not expected.has_stopped:
        compare_cache(bound["cache"], hands, "include_inputs" in source.text)


def compare_cache(cache: Any, hands: ByHand, with_inputs: bool) -> None:
    for path in cache:
        relative = path.removeprefix("model").removeprefix(".")
        finals = hands.outcome.finals.get(relative, [])
        entries = list(cache[path])
        assert [entry.step for entry in entries] == [max(step, 0) for step, _ in finals]
        for entry, (_, final) in zip(entries, finals, strict=True):
            assert is_same(entry.output, final)
        inputs = hands.outcome.final_inputs.get(relative, []) if with_inputs else []
        for entry, (_, final) in zip(entries, inputs, strict=with_inputs):
            assert is_same(list(entry.inputs), final)


def ways() -> st.SearchStrategy[dict[str, bool]]:
    """Every way of running a block; the numbers and the errors are the same."""
    return st.fixed_dictionaries({"lift_blocks": st.booleans(), "defer_reads": st.booleans()})


def run_both(
    source: Source, net: nn.Module, call: Callable[[], Any], way: dict[str, bool], **names: Any
) -> None:
    """Run a program as a trace and by hooks, and compare; some as a second run on their model."""
    note(source.text)
    before = state_of(net)
    model = Model(net)
    is_second = len(source.text) % 2 == 0
    with warnings.catch_warnings(), tracekit.settings.changed(**way):
        warnings.simplefilter("ignore", ShortLoopWarning)
        if is_second and way["defer_reads"]:
            source.run(model=model, **names)
        ran = source.run(model=model, **names)
    assert state_of(net) == before
    try:
        meaning, hands = by_hand(source.statements, net, call)
    except RuntimeError as error:  # the model can't go on with what was drawn
        with pytest.raises(type(error), match=re.escape(str(error))):
            raise ran[0].pop("failure") from None
        return
    assert state_of(net) == before
    compare(source, meaning, hands, ran)
    ran[0].clear()


RECORDS = ["", "include_inputs=True", "model.body"]
endings = st.sampled_from(["result", "result", "result", "nothing", "stop"])
modes = st.sampled_from(["no_grad", "no_grad", "grad", "inference"])
layouts = st.sampled_from(list(LAYOUTS))


def ended(statements: list[Statement], ending: str, record: str | None = None) -> list[Statement]:
    head = [] if record is None else [Record(record)]
    tail = {"result": [Result()], "nothing": [], "stop": [Stop()]}[ending]
    return [*head, *statements, *tail]


@examples(0.35)
@given(
    parts,
    st.lists(raw, max_size=8),
    endings,
    st.none() | st.sampled_from(RECORDS),
    modes,
    layouts,
    ways(),
)
def test_a_block_in_the_models_order(
    part: Any,
    raws: list[Any],
    ending: str,
    record: str | None,
    mode: str,
    layout: str,
    way: dict[str, bool],
) -> None:
    net = build(part)
    note(repr(net))
    found = places(net, lambda: net(X.clone()))
    statements = Drawing(found, ("head", WIDTH)).statements(raws, found, is_sorted=True)
    source = Source(ended(statements, ending, record), "model.trace(X.clone()) as tracer", layout)
    with MODES[mode]():
        run_both(source, net, lambda: net(X.clone()), way, X=X)


@examples(0.2)
@given(parts, st.lists(raw, min_size=2, max_size=6), st.data(), modes, layouts, ways())
def test_a_block_in_a_wrong_order(
    part: Any, raws: list[Any], data: st.DataObject, mode: str, layout: str, way: dict[str, bool]
) -> None:
    net = build(part)
    note(repr(net))
    found = places(net, lambda: net(X.clone()))
    drawing = Drawing(found, ("head", WIDTH))
    statements = drawing.statements(sorted(raws, key=lambda one: one[0]), found, is_sorted=False)
    late = statements.pop(data.draw(st.integers(0, len(statements) - 1)))
    statements.append(late)
    for at in data.draw(st.sets(st.integers(0, len(statements) - 1), max_size=2)):
        if not any(f"call={call}" in repr(statements[at]) for call in range(1, 9)):
            statements[at] = Guarded(statements[at], f"v{90 + at}")
    if data.draw(st.booleans()):
        statements.insert(data.draw(st.integers(0, len(statements))), Result())
    source = Source(statements, "model.trace(X.clone()) as tracer", layout)
    with MODES[mode]():
        run_both(source, net, lambda: net(X.clone()), way, X=X)


# -- models of transformers -----------------------------------------------------------------------

TRACED = ["gpt2", "llama", "falcon", "gptj", "t5", "bert", "mixtral"]
GENERATING = {"gpt2": "lm_head", "llama": "lm_head", "falcon": "lm_head", "gptj": "lm_head"}
NEW_TOKENS = 3


@lru_cache
def made(name: str) -> tuple[nn.Module, dict[str, Any], list[Place]]:
    net, inputs = tiny_models.make(name)
    inputs = {**inputs, "use_cache": False} if name != "bert" else inputs
    return net, inputs, places(net, lambda: net(**inputs))


@examples(0.1)
@given(st.sampled_from(TRACED), st.lists(raw, max_size=6), endings, modes, layouts, ways())
def test_a_block_on_a_model_of_transformers(
    name: str, raws: list[Any], ending: str, mode: str, layout: str, way: dict[str, bool]
) -> None:
    net, inputs, found = made(name)
    statements = Drawing(found, ("", -1)).statements(raws, found, is_sorted=True)
    source = Source(ended(statements, ending), "model.trace(**inputs) as tracer", layout)
    with MODES[mode]():
        run_both(source, net, lambda: net(**inputs), way, inputs=inputs)


@lru_cache
def generating(name: str) -> tuple[nn.Module, dict[str, Any], list[Place]]:
    net, inputs = tiny_models.make(name)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    spec = tiny_models.SPECS[name]
    inputs = {**spec.gen_inputs(inputs), **options, **spec.generation}
    return net, inputs, places(net, lambda: net.generate(**inputs))  # pyright: ignore


KEYS = [
    None,
    slice(None),
    slice(0, 2),
    slice(1, 3),
    slice(1, None),
    slice(0, None, 2),
    slice(1, 5),
    [0, 2],
    [1],
    0,
    2,
    -1,
    [0, -1],
    slice(-2, None),
    slice(1, -1),
]


@st.composite
def generations(draw: Any) -> tuple[str, list[Statement], str]:
    name = draw(st.sampled_from(list(GENERATING)))
    _, _, found = generating(name)
    drawing = Drawing(found, ("", -1))
    short = st.lists(raw, max_size=3)

    def at_step(step: int) -> list[Place]:
        return [place for place in found if place.visit.step == step]

    before = drawing.statements(draw(short), at_step(0), is_sorted=True)
    if draw(st.integers(0, 4)) == 0:
        return name, [*before, Next(), *drawing.statements(draw(short), at_step(1), True)], ""
    if draw(st.booleans()):
        before = []
    drawing.is_any_shape = True
    every = drawing.statements(draw(short), at_step(1), is_sorted=True)
    drawing.is_any_shape = False
    step = draw(st.integers(0, NEW_TOKENS - 1))
    only = drawing.statements(draw(short), at_step(step), is_sorted=True)
    body = [(None, every), (step, only)]
    key = draw(st.sampled_from(KEYS))
    loop = Steps(key, body if draw(st.booleans()) else body[::-1], NEW_TOKENS)
    after = drawing.statements(draw(st.lists(raw, max_size=1)), at_step(2), is_sorted=True)
    return name, [*before, loop, *after], draw(endings)


@examples(0.15)
@given(generations(), layouts, ways())
def test_a_block_beside_a_generation(
    drawn: tuple[str, list[Statement], str], layout: str, way: dict[str, bool]
) -> None:
    name, statements, ending = drawn
    net, inputs, _ = generating(name)
    statements = ended(statements, ending or "result")
    source = Source(statements, "model.generate(**inputs) as tracer", layout)
    run_both(source, net, lambda: net.generate(**inputs), way, inputs=inputs)  # pyright: ignore


# -- several inputs, each with a block of its own -------------------------------------------------

raw_of_rows = st.tuples(
    st.integers(0, 999),
    st.sampled_from(["read"] * 4 + ["write", "write", "edit", "skip", "apply", "inner"]),
    st.integers(0, 11),  # so that every write fits
    st.integers(0, 99),
    st.booleans(),
)


@examples(0.1)
@given(parts_with_rows, st.lists(st.lists(raw_of_rows, max_size=4), min_size=2, max_size=4))
def test_each_block_of_several_inputs_is_as_if_it_were_alone(part: Any, raws: list[Any]) -> None:
    net = build(part)
    note(repr(net))
    inputs = [torch.roll(X, at, 1)[: 1 + at % 2] * (at + 1) for at in range(len(raws))]
    alone: list[tuple[list[Statement], Tensor, list[Place]]] = []
    blocks: list[Statement] = []
    for at, (one, x) in enumerate(zip(raws, inputs, strict=True)):
        found = places(net, lambda x=x: net(x.clone()))
        drawing = Drawing(found, ("head", WIDTH))
        drawing.uses = ["{}.clone()", "{} * 2", "{}[:, 0].clone()", "{}.sum()", "torch.tanh({})"]
        drawing.stores = ["name", "dict", "walrus", "attribute", "annotated"]
        drawing.count = at * 100  # names of its own
        statements = drawing.statements(one, found, is_sorted=True)
        statements.append(Read(Spot("", "output"), "{}.clone()", "name", f"v{at * 100 + 99}"))
        alone.append((statements, x, found))
        blocks.append(Invoke(f"inputs[{at}].clone()", statements))
    source = Source(blocks, "model.trace() as tracer", "function")
    note(source.text)
    before = state_of(net)
    with torch.no_grad():
        bound, _ = source.run(model=Model(net), inputs=inputs)
        assert state_of(net) == before
        wanted: dict[str, Any] = {}
        for statements, x, _ in alone:
            meaning, hands = by_hand(statements, net, lambda x=x: net(x.clone()))
            assume(hands.outcome.failure is None)
            values = stored(meaning.names)
            wanted |= {**values, **values["named"], **values["box"]}
    refused = bound["failure"]
    if isinstance(refused, SiteOrderError) and _IS_UNCOUNTED.search(str(refused)):
        return  # refused, where which call it is can't be known
    if isinstance(refused, RowsError) and "edited in place" in str(refused):
        return  # refused, where the edit alone would reach what it can't reach here
    if bound["failure"] is not None:
        raise bound["failure"]
    got = stored(bound)
    got |= {**got["named"], **got["box"]}
    for name, value in wanted.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)

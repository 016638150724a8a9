"""Random requests against random models, compared with a simulation that knows no requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.interleave.stage import Actor, Block, Module, Modules, Stage
from tracekit.core.site import Site, Slot, Visit
from tracekit.errors import NeverRanError, SiteOrderError, StepError

modules = st.recursive(
    st.just([]),
    lambda children: st.lists(children, min_size=1, max_size=3),
    max_leaves=8,
)


def tree(shape: list[Any], name: str = "model") -> Module:
    return Module(name, [tree(child, f"m{index}") for index, child in enumerate(shape)])


@dataclass
class Done:
    """A request of the block and what came of it."""

    kind: str
    visit: Visit
    value: object = None
    error: Exception | None = None


def simulate(
    root: Modules, steps: int, edits: dict[Visit, str], skips: dict[Visit, str]
) -> tuple[list[Visit], dict[Visit, str], str]:
    """Visits in order, their values before the edit there, and the result."""
    order: list[Visit] = []
    raw: dict[Visit, str] = {}

    def at(visit: Visit, value: str) -> str:
        order.append(visit)
        raw[visit] = value
        return edits.get(visit, value)

    def call(path: str, value: str, step: int) -> str:
        out = Visit(Site(path, Slot.OUTPUT), step)
        value = at(Visit(Site(path, Slot.INPUT), step), value)
        if out in skips:
            return at(out, skips[out])
        for child in root.called_children(path):
            value = call(child, value, step)
        return at(out, f"{value}>{path.rpartition('.')[2]}")

    result = ""
    for step in range(steps):
        result = call(root.name, f"x{step}", step)
    return order, raw, result


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_request_is_answered_as_a_plain_simulation_says(data: st.DataObject) -> None:
    stage = Stage(tree(data.draw(modules)))
    steps = data.draw(st.integers(1, 3))
    sites = [Site(path, slot) for path in stage.modules.paths for slot in (Slot.INPUT, Slot.OUTPUT)]
    script = data.draw(
        st.lists(
            st.tuples(st.sampled_from(["read", "write", "skip", "step"]), st.sampled_from(sites)),
            max_size=8,
        )
    )
    log: list[Done] = []

    def block(actor: Actor) -> Block:
        for number, (kind, asked) in enumerate(script):
            site = Site(asked.path, Slot.OUTPUT) if kind == "skip" else asked
            if kind == "step":
                step = actor.visit(site).step + 1
                if not (yield from actor.go_to_step(step)):
                    return
                continue
            done = Done(kind, actor.visit(site), f"w{number}")
            log.append(done)
            try:
                if kind == "read":
                    done.value = yield from actor.read(site)
                elif kind == "write":
                    yield from actor.write(site, done.value)
                else:
                    yield from actor.skip(site, done.value)
            except (SiteOrderError, NeverRanError, StepError) as error:
                done.error = error

    mediator = stage.add_block(block)
    stage.run(steps)
    assert mediator.error is None

    served = [done for done in log if done.error is None]
    edits = {done.visit: str(done.value) for done in served if done.kind == "write"}
    skips = {done.visit: str(done.value) for done in served if done.kind == "skip"}
    order, raw, result = simulate(stage.modules, steps, edits, skips)
    assert stage.result == result
    check_values(served, raw, edits)
    check_errors(log, order)


def check_values(served: list[Done], raw: dict[Visit, str], edits: dict[Visit, str]) -> None:
    written: dict[Visit, object] = {}
    for done in served:
        if done.kind == "write":
            written[done.visit] = done.value
        if done.kind == "read":
            assert done.value == written.get(done.visit, raw[done.visit])
    assert all(edits[visit] == value for visit, value in written.items())


def check_errors(log: list[Done], order: list[Visit]) -> None:
    """A request fails exactly if its visit is behind the block's place, or does not happen.

    After one that does not happen the run may have ended, and then all that follow fail.
    """
    place = -1
    may_have_ended = False
    for done in log:
        if done.visit not in order:
            assert done.error is not None
            may_have_ended = True
            continue
        index = order.index(done.visit)
        begins = order.index(Visit(Site(done.visit.site.path, Slot.INPUT), done.visit.step))
        is_behind = begins < place if done.kind == "skip" else index < place
        if done.error is None:
            assert not is_behind
            place = index
        else:
            assert is_behind or may_have_ended

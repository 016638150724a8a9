"""Names that blocks of one trace share mean what they would mean if the blocks ran in order."""

from __future__ import annotations

import linecache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tracekit import Model, Tracer
from tracekit.errors import LaterBlockError


class Twice(nn.Module):
    """Adds 1 twice; a value of its end comes later than one of its start."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()
        self.second = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x + 1) + 1)


INPUTS = [torch.tensor([[10.0]]), torch.tensor([[20.0]]), torch.tensor([[30.0]])]


@pytest.fixture
def model() -> Model:
    return Model(Twice())


def test_a_later_block_changes_no_name_of_an_earlier_one(model: Model) -> None:
    scale = 1
    with model.trace() as tracer:
        with tracer.invoke(INPUTS[0]):
            model.second.output
            seen = scale
        with tracer.invoke(INPUTS[1]):
            scale = 5
            model.second.output
    assert (seen, scale) == (1, 5)


def test_a_name_that_a_later_block_binds_is_refused_at_its_line(model: Model) -> None:
    with pytest.raises(LaterBlockError, match="'late' is bound by the block at line") as caught:
        with model.trace() as tracer:
            with tracer.invoke(INPUTS[0]):
                seen = late  # noqa: F821, F841
            with tracer.invoke(INPUTS[1]):
                late = model.first.output  # noqa: F841
    assert isinstance(caught.value, NameError)


def test_blocks_that_meet_see_each_others_names_also_the_second_time(model: Model) -> None:
    for shift in (0, 1):
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(INPUTS[0] + shift):
                one = model.first.output.clone()
                barrier()
                model.first.output = other  # noqa: F821
            with tracer.invoke(INPUTS[1] + shift):
                other = model.first.output.clone()  # noqa: F841
                barrier()
                model.first.output = one
            with tracer.invoke():
                swapped = model.second.output
        assert swapped.tolist() == [[22.0 + shift], [12.0 + shift]]


def test_a_total_is_kept_by_a_function_that_each_input_goes_through(model: Model) -> None:
    total: Any = 0

    def add(tracer: Tracer, x: Tensor) -> None:
        nonlocal total
        with tracer.invoke(x):
            total = total + model.second.output

    with model.trace() as tracer:
        for x in INPUTS:
            add(tracer, x)
    assert total.tolist() == [[66.0]]


_total: Any = 0
_late: Any = 0


def _add(tracer: Tracer, model: Model, x: Tensor) -> None:
    global _total, _late  # noqa: PLW0603
    with tracer.invoke(x):
        _total = _total + model.first.output
        _late = model.second.output


def test_globals_are_shared_by_the_blocks_of_several_functions(model: Model) -> None:
    with model.trace() as tracer:
        _add(tracer, model, INPUTS[0])
        _add(tracer, model, INPUTS[1])
        with tracer.invoke(INPUTS[2]):
            seen = _late + 0
    assert (_total.tolist(), seen.tolist()) == ([[32.0]], [[22.0]])


def test_a_function_that_a_block_calls_sees_the_block_before_it(model: Model) -> None:
    h: Any = None

    def read() -> Any:
        return h

    with model.trace() as tracer:
        with tracer.invoke(INPUTS[0]):
            h = model.first.output
        with tracer.invoke(INPUTS[1]):
            model.second.output
            seen = read()
        with tracer.invoke(INPUTS[2]):
            h = model.first.output
    assert seen.tolist() == [[11.0]]
    assert h.tolist() == [[31.0]]


def test_a_function_that_a_block_calls_too_early_finds_no_old_value(model: Model) -> None:
    h: Any = "old"

    def read() -> Any:
        return h

    with pytest.raises(NameError, match="'h'"):
        with model.trace() as tracer:
            with tracer.invoke(INPUTS[0]):
                h = model.second.output
            with tracer.invoke(INPUTS[1]):
                model.first.output = read()
    assert h == "old"


def test_a_model_that_reads_a_shared_name_finds_what_it_was(model: Model) -> None:
    shift: Any = 1

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + shift

    net = nn.Sequential(nn.Identity(), Shifted(), nn.Identity())
    shifted = Model(net)
    with shifted.trace() as tracer:
        with tracer.invoke(INPUTS[0]):
            shifted[2].output
            shift = 100
        with tracer.invoke(INPUTS[1]):
            shifted[0].output
            out = shifted[2].output
            seen = shift
    assert out.tolist() == [[21.0]]
    assert seen == 100


def test_every_way_to_read_a_name_waits_for_it(model: Model) -> None:
    h: Any = torch.zeros(1, 1)
    with model.trace() as tracer:
        with tracer.invoke(INPUTS[0]):
            match (1, model.second.output):
                case (_, h):
                    pass
        with tracer.invoke(INPUTS[1]):
            default = (lambda h=h: h)()  # noqa: PLC3002
        with tracer.invoke(INPUTS[1]):
            rows = [h + 0 for h in h]
        with tracer.invoke(INPUTS[1]):
            text = f"{h.item():.0f}"
        with tracer.invoke(INPUTS[1]):

            def same(value: Tensor = h) -> Tensor:
                return value

            given = same()
    assert [default.item(), rows[0].item(), text, given.item()] == [12.0, 12.0, "12", 12.0]


def test_a_block_deletes_what_a_block_before_it_bound(model: Model) -> None:
    with model.trace() as tracer:
        with tracer.invoke(INPUTS[0]):
            h = model.second.output
        with tracer.invoke(INPUTS[1]):
            kept = h + 0
            del h
    assert kept.tolist() == [[12.0]]
    assert "h" not in locals()


def test_blocks_in_a_class_share_its_names(model: Model) -> None:
    text = (
        "class Holder:\n"
        "    with model.trace() as tracer:\n"
        "        with tracer.invoke(inputs[0]):\n"
        "            late = model.second.output\n"
        "        with tracer.invoke(inputs[1]):\n"
        "            seen = late + 1\n"
    )
    filename = "names_in_a_class.py"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    names: dict[str, Any] = {"model": model, "inputs": INPUTS}
    exec(compile(text, filename, "exec"), names)
    assert names["Holder"].seen.tolist() == [[13.0]]


def test_each_call_of_a_function_that_calls_itself_has_its_own_names(model: Model) -> None:
    seen: dict[int, Tensor] = {}

    def descend(tracer: Tracer, depth: int) -> None:
        if depth == 3:
            return
        with tracer.invoke(INPUTS[depth]):
            value = model.first.output
            seen[depth] = value
        descend(tracer, depth + 1)

    with model.trace() as tracer:
        descend(tracer, 0)
    assert {depth: value.item() for depth, value in seen.items()} == {0: 11, 1: 21, 2: 31}

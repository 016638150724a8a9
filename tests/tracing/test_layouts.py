"""Where rows lie: each row that a layout cuts out is what the row alone gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import state_of
from tracekit import Model
from tracekit.core.nest import map_leaves, tensors
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.errors import RowsError
from tracekit.tracing.layouts import Layout, Layouts, layouts_of

FAMILIES = (
    *("gpt2", "llama", "bloom", "opt", "mixtral", "gpt_oss", "mamba", "xlstm", "recurrent_gemma"),
    *("t5", "bart", "bert", "albert", "deberta-v2", "vit", "swin", "clip", "whisper"),
)


def rows(inputs: dict[str, Any], which: list[int]) -> dict[str, Any]:
    return {name: value[which] for name, value in inputs.items()}


def learned(tree: Tree, inputs: dict[str, Any]) -> Layouts:
    def call_with(count: int) -> Callable[[Tree], object]:
        several = rows(inputs, [0] * count)
        return lambda other: other.root(**several)

    return layouts_of(tree, call_with)


def seen(model: nn.Module, inputs: dict[str, Any]) -> dict[Site, list[Any]]:
    """What every module takes and returns, by plain hooks."""
    found: dict[Site, list[Any]] = {}

    def keep(site: Site, value: Any) -> None:
        copied = map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, value)
        found.setdefault(site, []).append(copied)

    handles: list[Any] = []
    for name, module in model.named_modules():
        path = f"model.{name}" if name else "model"
        takes, returns = Site(path, Slot.INPUT), Site(path, Slot.OUTPUT)

        def before(_: Any, args: Any, kwargs: Any, site: Site = takes) -> None:
            keep(site, (args, kwargs))

        def after(_: Any, __: Any, out: Any, site: Site = returns) -> None:
            keep(site, out)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_that_a_layout_cuts_out_is_what_the_row_alone_gives(family: str) -> None:
    model, inputs = make(family)
    layouts = learned(Tree(model, "model"), inputs)
    both = seen(model, rows(inputs, [0, 1]))
    alone = [seen(model, rows(inputs, [row])) for row in (0, 1)]
    compared, refused = 0, 0
    for site, calls in both.items():
        for call, value in enumerate(calls):
            try:
                found = layouts.of(site, value, 2, call)
            except RowsError:
                refused += 1
                continue
            for row in (0, 1):
                expected = tensors(alone[row][site][call])
                for layout, whole, one in zip(found, tensors(value), expected, strict=True):
                    part = whole if layout is None else cut(whole, layout, row)
                    torch.testing.assert_close(part, one, rtol=1e-3, atol=1e-5)
                    compared += 1
    # What experts get is sorted by expert; CLIP compares every image with every text.
    assert refused == {"mixtral": 4, "clip": 1}.get(family, 0)
    assert compared > 50


def cut(whole: Tensor, layout: Layout, row: int) -> Tensor:
    return whole.narrow(layout.axis, row * layout.per_row, layout.per_row)


def of(model: nn.Module, x: Tensor, path: str, value: Tensor, batch: int) -> Layout | None:
    tree = Tree(model, "model")
    layouts = layouts_of(
        tree, lambda n: lambda other: other.root(x[:1].repeat(n, *[1] * (x.dim() - 1)))
    )
    return layouts.of(Site(path, Slot.OUTPUT), value, batch)[0]


class TimeFirst(nn.Module):
    """Works on (time, batch, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.flat = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.transpose(0, 1))
        return self.flat(y.flatten(0, 1)).view_as(y).transpose(0, 1)


def test_rows_of_time_first_values_lie_along_the_second_axis() -> None:
    x = torch.randn(2, 2, 4)  # as many positions as rows
    assert of(TimeFirst(), x, "model.inner", x, 2) == Layout(1, 1)
    assert of(TimeFirst(), x, "model", x, 2) == Layout(0, 1)


def test_rows_that_lie_between_each_other_are_refused() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(RowsError, match="not in the order of the rows"):
        of(TimeFirst(), x, "model.flat", torch.zeros(6, 4), 2)


class Flattens(nn.Module):
    """Works on (batch * positions, width), and on something that has no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(4, 4)
        self.flat = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        offset = self.table(torch.ones(x.shape[1], 4))
        return self.flat(x.flatten(0, 1)).view_as(x) + offset


def test_flattened_rows_lie_one_behind_the_other_however_long_they_are() -> None:
    x = torch.randn(2, 3, 4)
    assert of(Flattens(), x, "model.flat", torch.zeros(2 * 7, 4), 2) == Layout(0, 7)


def test_what_is_as_long_as_the_batch_and_has_no_rows_is_known() -> None:
    x = torch.randn(2, 2, 4)
    assert of(Flattens(), x, "model.table", torch.zeros(2, 4), 2) is None


class Branches(nn.Module):
    """Decides by value, counts its calls, and can't be run on fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.norm(self.inner(x))
        return y if y.sum() > 0 else -y


def test_a_model_that_decides_by_value_is_run_for_real_and_left_as_it_was() -> None:
    model = Branches().train()
    hooked: list[object] = []
    model.inner.register_forward_hook(lambda *_: hooked.append(1))
    before, random = state_of(model), torch.get_rng_state()
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 4)
    torch.set_rng_state(random)
    assert of(model, x, "model.inner", x, 2) == Layout(0, 1)
    assert torch.equal(torch.get_rng_state(), random)
    assert state_of(model) == before
    assert model.calls == 0
    assert not hooked
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name])


class Uncopyable(nn.Module):
    """Holds what can't be copied, so only sizes are left."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = (part for part in ())

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_without_any_run_sizes_must_leave_one_answer() -> None:
    x = torch.randn(2, 3, 5)
    assert of(Uncopyable(), x, "model", x, 2) == Layout(0, 1)
    assert of(Uncopyable(), x, "model", nn.Parameter(torch.zeros(4, 5)), 2) is None
    for unknown in (torch.zeros(2, 2, 5), torch.zeros(3, 5), torch.zeros(())):
        with pytest.raises(RowsError, match="leave it open"):
            of(Uncopyable(), x, "model", unknown, 2)


def test_layouts_are_learned_once_until_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    tree = Tree(model, "model")
    runs: list[int] = []

    def call_with(count: int) -> Callable[[Tree], object]:
        runs.append(count)
        return lambda other: other.root(torch.zeros(count, 4))

    assert layouts_of(tree, call_with) is layouts_of(tree, call_with)
    assert runs == [2, 3]
    model[1] = nn.Tanh()
    layouts_of(tree, call_with)
    assert runs == [2, 3, 2, 3]


def test_a_model_without_weights_shows_its_layouts() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    tree = Tree(model, "model")
    tree.load_first = lambda: pytest.fail("the weights were loaded")
    layouts = layouts_of(tree, lambda n: lambda other: other.root(torch.zeros(n, 3, 4)))
    assert layouts.of(Site("model.0", Slot.OUTPUT), torch.zeros(2, 3, 4), 2) == [Layout(0, 1)]


def test_layouts_of_weights_that_accelerate_brings() -> None:
    model = accelerate.cpu_offload(Flattens())
    assert of(model, torch.randn(2, 3, 4), "model.flat", torch.zeros(14, 4), 2) == Layout(0, 7)
    assert model.flat.weight.is_meta


class Average(nn.Module):
    """Returns what is each row's, a mean of all, and a table that follows from none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.table = nn.Embedding(5, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.inner(x) + self.table(torch.arange(5))
        return {"y": y, "mean": y.mean(0)}


def test_a_mean_of_all_rows_is_not_given_to_a_block_as_its_own() -> None:
    net = Average()
    model, inputs = Model(net), torch.randn(2, 5, 4)
    for ask in (lambda tracer: tracer.result, lambda _: model.output):
        with pytest.raises(RowsError, match="one for all rows, and made of all of them"):
            with model.trace() as tracer:
                with tracer.invoke(inputs[:1]):
                    ask(tracer)["mean"]
                with tracer.invoke(inputs[1:]):
                    model.inner.output
    with model.trace() as tracer:
        with tracer.invoke(inputs[:1]):
            inner, table = model.inner.output, model.table.output
        with tracer.invoke(inputs[1:]):
            model.inner.output[:] = 0
        with tracer.invoke():
            mean = model.output["mean"]
    torch.testing.assert_close(inner, net.inner(inputs[:1]))
    assert torch.equal(table, net.table(torch.arange(5)))
    torch.testing.assert_close(mean, inner[0] / 2 + table)

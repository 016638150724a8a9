"""Several inputs in one forward pass: each block sees its own rows, as if it were alone."""

from __future__ import annotations

import gc
import runpy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import state_of
from tracekit import LanguageModel, Model
from tracekit.core.nest import tensors
from tracekit.errors import (
    CaptureError,
    InputError,
    MisfitError,
    NeverCameError,
    NeverRanError,
    OutsideTraceError,
    RowsError,
    SiteOrderError,
)

X = torch.linspace(-1, 1, 8).reshape(2, 4)
PROMPTS = ["The Eiffel Tower is in the city of", "The Colosseum is in", "A movie"]


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


def alone(model: LanguageModel, prompt: Any, layer: int) -> tuple[Tensor, Tensor]:
    """A block's output and the logits by hooks, of one prompt."""
    seen: list[Tensor] = []
    handle = model.transformer.h[layer].module.register_forward_hook(
        lambda _m, _a, output: seen.append(output)
    )
    encoded = model.tokenizer(prompt, return_tensors="pt")
    logits = model.module(**encoded).logits
    handle.remove()
    return seen[0], logits


def close(rows: Tensor, plain: Tensor) -> bool:
    """Whether the last positions of a padded row are those of the plain run."""
    return torch.allclose(rows[:, -plain.shape[1] :], plain, atol=2e-5)


# -- rows -------------------------------------------------------------------------------------


def test_each_block_sees_what_its_input_gives_alone(tiny: LanguageModel) -> None:
    hidden: dict[int, Tensor] = {}
    logits: list[Tensor] = []
    with tiny.trace() as tracer:
        for i, prompt in enumerate(PROMPTS):
            with tracer.invoke(prompt):
                hidden[i] = tiny.transformer.h[1].output
                logits.append(tiny.lm_head.output)
    for i, prompt in enumerate(PROMPTS):
        plain_hidden, plain_logits = alone(tiny, prompt, 1)
        assert hidden[i].shape[0] == 1
        assert close(hidden[i], plain_hidden)
        assert close(logits[i], plain_logits)


@pytest.mark.parametrize("count", [1, 2, 64])
def test_any_number_of_inputs_run_in_one_pass(count: int) -> None:
    torch.manual_seed(0)
    model = Model(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    inputs = [torch.randn(1 + i % 3, 3) for i in range(count)]
    calls: list[int] = []
    handle = model.module.register_forward_hook(lambda *_: calls.append(1))
    outs: list[Tensor] = []
    with model.trace() as tracer:
        for x in inputs:
            with tracer.invoke(x) as invoke:
                outs.append(model[1].output)
            assert invoke.rows is not None and len(invoke.rows) == len(x)
    handle.remove()
    assert calls == [1]
    for x, out in zip(inputs, outs, strict=True):
        torch.testing.assert_close(out, torch.tanh(model[0](x)))


def test_an_edit_changes_the_rows_of_its_block_and_no_others(tiny: LanguageModel) -> None:
    h = tiny.transformer.h
    with tiny.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            first = tiny.lm_head.output
        with tracer.invoke(PROMPTS[1]):
            h[1].output[:] = 0
            second = tiny.lm_head.output
        with tracer.invoke(PROMPTS[2]):
            h[1].output = h[1].output * 2
            third = tiny.lm_head.output
    assert close(first, alone(tiny, PROMPTS[0], 0)[1])
    for rows, factor, prompt in ((second, 0, PROMPTS[1]), (third, 2, PROMPTS[2])):
        handle = h[1].module.register_forward_hook(lambda _m, _a, out, f=factor: out * f)
        plain = alone(tiny, prompt, 0)[1]
        handle.remove()
        assert close(rows, plain)


def test_a_block_without_input_sees_all_rows_as_the_blocks_before_it_left_them(
    tiny: LanguageModel,
) -> None:
    with tiny.trace() as tracer:
        with tracer.invoke():
            before = tiny.transformer.h[1].output
        with tracer.invoke(PROMPTS[0]):
            tiny.transformer.h[1].output[:] = 0
        with tracer.invoke(PROMPTS[1]):
            own = tiny.transformer.h[1].output
        with tracer.invoke():
            after = tiny.transformer.h[1].output
    assert before.shape[0] == after.shape[0] == 2
    assert bool(before[0].any())  # what it had seen is not changed by the later edit
    assert not after[0].any()
    assert torch.equal(after[1:], own) and torch.equal(before[1:], own)


def test_inputs_of_a_module_are_narrowed_and_widened_through_nests() -> None:
    class Inner(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], *, scale: dict[str, Tensor]) -> Any:
            return {"sum": pair[0] + pair[1] * scale["s"], "rest": [pair[0]]}

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x, x + 1), scale={"s": x * 2})["sum"]

    model = Model(Outer())
    x, y = torch.randn(1, 3), torch.randn(2, 3)
    with model.trace() as tracer:
        with tracer.invoke(x):
            (pair,), kwargs = model.inner.inputs
            model.inner.inputs = ((pair[0] * 0, pair[1]),), kwargs
            first = model.output
        with tracer.invoke(y):
            rest = model.inner.output["rest"][0]
            model.inner.output["sum"] = model.inner.output["sum"] + 1
            second = model.output
    torch.testing.assert_close(first, (x + 1) * x * 2)
    torch.testing.assert_close(rest, y)
    torch.testing.assert_close(second, y + (y + 1) * y * 2 + 1)


def test_rows_are_told_apart_where_the_batch_is_as_long_as_the_sequence() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Identity()
            self.flat = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            turned = self.turn(x.transpose(0, 1))
            return self.flat(turned.transpose(0, 1).reshape(-1, x.shape[-1])).view(x.shape)

    model = Model(TimeFirst())
    x = torch.randn(2, 2, 5)
    with model.trace() as tracer:
        with tracer.invoke(x[:1]):
            turned, flat, out = model.turn.output, model.flat.output, model.output
        with tracer.invoke(x[1:]):
            model.turn.output[:] = 7
            other = model.output
    torch.testing.assert_close(turned, x[:1].transpose(0, 1))
    torch.testing.assert_close(flat, x[0])
    torch.testing.assert_close(out, x[:1])
    assert bool((other == 7).all())


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "mamba", "bert", "t5", "vit"])
def test_every_value_of_a_block_is_that_of_its_input_alone(name: str) -> None:
    module, inputs = make(name)
    model = Model(module)
    given = {key: torch.cat([value, value.roll(1, -1)]) for key, value in inputs.items()}
    size = next(iter(given.values())).shape[0]
    rows = [
        {key: value[i : i + 1] for key, value in given.items()} for i in (0, size // 2, size - 1)
    ]
    with model.trace() as tracer:
        caches: list[Any] = []
        for row in rows:
            with tracer.invoke(**row):
                caches.append(tracer.cache(modules=_with_rows, include_inputs=True))
    for row, cache in zip(rows, caches, strict=True):
        with model.trace(**row) as tracer:
            plain = tracer.cache(modules=_with_rows, include_inputs=True)
        assert list(cache) == list(plain)
        for path in plain:
            for one, other in zip(cache[path], plain[path], strict=True):
                for mine, theirs in zip(_tensors(one), _tensors(other), strict=True):
                    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3, msg=path)


def _with_rows(path: str, module: nn.Module) -> bool:
    """Experts get tokens of all rows in an order of their own: these refuse to be divided."""
    return "experts" not in path


def _tensors(entry: Any) -> list[Tensor]:
    found = [entry.output, entry.inputs]
    return [each for each in tensors(found) if each.is_floating_point()]


class TimeFirst(nn.Module):
    """Returns its rows along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"states": self.rnn(x.transpose(0, 1))[0], "places": torch.arange(x.shape[1])}


def test_the_result_of_a_forward_is_divided_along_the_axis_of_its_rows() -> None:
    net = TimeFirst()
    inputs = [torch.randn(1, 4, 3) for _ in range(2)]  # the time divides by the size of the batch
    results = []
    with Model(net).trace() as tracer:
        for x in inputs:
            with tracer.invoke(x):
                results.append(tracer.result)
    for x, result in zip(inputs, results, strict=True):
        assert torch.allclose(result["states"], net(x)["states"], atol=1e-6)
        assert result["places"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("lengths", [[(6, 6), (6, 4)], [(4, 6), (6, 6)]])
def test_what_was_learned_of_a_padded_batch_is_not_held_against_another(
    name: str, lengths: list[tuple[int, int]]
) -> None:
    net, _ = make(name)
    model = LanguageModel(net)
    layer = (model.transformer.h if name == "gpt2" else model.model.layers)[1]
    for pair in lengths:
        prompts = [torch.randint(3, 50, (1, length)) for length in pair]
        found: list[Any] = []
        with torch.no_grad(), model.trace() as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    layer.input[:, -1] *= 2
                    found.append((layer.input, layer.inputs[1].get("position_ids"), layer.hidden))
        for prompt, (given, positions, hidden) in zip(prompts, found, strict=True):
            with torch.no_grad(), model.trace(prompt):
                layer.input[:, -1] *= 2
                plain, out = layer.input, layer.hidden
            assert close(given, plain)
            assert close(hidden, out)
            if positions is not None:
                assert positions[0, -1] == prompt.shape[1] - 1


def test_a_tensor_that_belongs_to_all_rows_is_not_changed_by_one_block() -> None:
    class Shared(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x, "positions": torch.arange(5)}

    model = Model(Shared())
    for change in (_edit_positions, _replace_positions):
        with pytest.raises(RowsError, match=r"belongs to all rows alike"):
            with model.trace() as tracer:
                with tracer.invoke(torch.ones(1, 2)):
                    change(model)
                with tracer.invoke(torch.ones(1, 2)):
                    model.output


def _edit_positions(model: Model) -> None:
    model.output["positions"][:] = 0


def _replace_positions(model: Model) -> None:
    model.output = {**model.output, "positions": torch.zeros(5, dtype=torch.long)}


class Named(nn.Module):
    """Returns two tensors of one shape, and a flag, by name."""

    def forward(self, x: Tensor, flag: bool = False) -> dict[str, Any]:
        return {"a": x, "b": -x, "flag": flag}


class Flagged(nn.Module):
    """Asks for the flag that its part returns."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Named()

    def forward(self, x: Tensor) -> Tensor:
        named = self.part(x, flag=False)
        return named["a"] + 10 * named["b"] + (1000 if named["flag"] else 0)


def test_rows_are_put_back_by_name_in_whatever_order_a_block_writes_them() -> None:
    model = Model(Flagged())
    with model.trace() as tracer:
        with tracer.invoke(X[:1]):
            named = model.part.output
            model.part.output = {"b": named["b"] * 2, "flag": False, "a": named["a"]}
            out = model.output
        with tracer.invoke(X[1:]):
            other = model.output
    assert torch.equal(out, X[:1] - 20 * X[:1])
    assert torch.equal(other, X[1:] - 10 * X[1:])


@pytest.mark.parametrize("way", ["in place", "assigned", "input"])
def test_what_is_no_tensor_is_not_changed_by_one_block(way: str) -> None:
    def change(model: Model) -> None:
        if way == "in place":
            model.part.output["flag"] = True
        elif way == "assigned":
            model.part.output = {**model.part.output, "flag": True}
        else:
            model.part.inputs[1]["flag"] = True

    model = Model(Flagged())
    with pytest.raises(RowsError, match=r"flag by the block .* is one for all rows.*line \d+"):
        with model.trace() as tracer:
            with tracer.invoke(X[:1]):
                change(model)
            with tracer.invoke(X[1:]):
                model.output.clone()
    with model.trace() as tracer:
        with tracer.invoke(X[:1]):
            first = model.output
        with tracer.invoke(X[1:]):
            second = model.output
        with tracer.invoke():
            change(model)
    assert torch.equal(torch.cat([first, second]), -9 * X + 1000)


def test_a_block_that_sees_all_rows_edits_what_was_recorded_before_without_changing_it() -> None:
    model = Model(nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)))
    for change in (0, 5):  # in the first run nothing is overwritten
        with torch.no_grad(), model.trace() as tracer:
            cache = tracer.cache()
            with tracer.invoke(X[:1]):
                model[2].output.clone()
            with tracer.invoke(X[1:]):
                model[2].output.clone()
            with tracer.invoke():
                hidden = model[1].output
                if change:
                    hidden += change
        plain = model[0](X)
        torch.testing.assert_close(cache["model.0"].output, plain)
        torch.testing.assert_close(cache["model.1"].output, plain + change)


def test_rows_that_share_memory_are_edited_one_by_one() -> None:
    class Expanded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bias(torch.zeros(1, 3).expand(x.shape[0], 3))

    model = Model(Expanded())
    with model.trace() as tracer:
        with tracer.invoke(torch.ones(1, 3)):
            model.bias.output[:] = 5
            edited = model.output
        with tracer.invoke(torch.ones(1, 3)):
            other = model.output
    assert edited.tolist() == [[6, 6, 6]]
    assert other.tolist() == [[1, 1, 1]]


def test_an_edit_in_place_reaches_what_it_reaches_alone_also_behind_a_write() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    model = Model(Residual())
    x = torch.randn(2, 2)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(x[:1].clone()):
            model.inner.input = model.inner.input * 2
            first = model.output.clone()
        with tracer.invoke(x[1:].clone()):
            model.inner.input[:, 0] += 1.5
            second = model.output.clone()
        with tracer.invoke():
            both = model.output
    changed = x[1:] + torch.tensor([[1.5, 0]])  # x itself, so the sum has it, too
    torch.testing.assert_close(first, x[:1] + model.inner(x[:1] * 2))
    torch.testing.assert_close(second, changed + model.inner(changed))
    torch.testing.assert_close(both, torch.cat([first, second]))


def test_a_written_value_must_fit_the_rows_of_its_block() -> None:
    model = Model(nn.Linear(2, 2))
    with pytest.raises(MisfitError, match=r"Tensor\[1, 2\].*Tensor\[2, 2\]"):
        with model.trace() as tracer:
            with tracer.invoke(torch.ones(1, 2)):
                model.output = torch.ones(2, 2)
            with tracer.invoke(torch.ones(1, 2)):
                model.output


def test_a_block_skips_a_module_for_its_own_rows() -> None:
    model = Model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    x = torch.randn(2, 2)
    with model.trace() as tracer:
        with tracer.invoke(x[:1]):
            model[1].skip(model[0].output)
            skipped = model.output
        with tracer.invoke(x[1:]):
            whole = model.output
    torch.testing.assert_close(skipped, model[0](x[:1]))
    torch.testing.assert_close(whole, model.module(x[1:]))


# -- names ------------------------------------------------------------------------------------


def test_blocks_that_use_one_name_have_each_their_own(tiny: LanguageModel) -> None:
    sums: list[Tensor] = []
    with tiny.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                h = tiny.transformer.h[0].output[:, -1]
                later = tiny.transformer.h[2].output[:, -1]
                sums.append(h + later)
    for prompt, total in zip(PROMPTS, sums, strict=True):
        plain = alone(tiny, prompt, 0)[0][:, -1] + alone(tiny, prompt, 2)[0][:, -1]
        torch.testing.assert_close(total, plain, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(h, alone(tiny, PROMPTS[-1], 0)[0][:, -1], atol=2e-5, rtol=1e-4)


def test_a_block_waits_for_a_name_that_a_block_before_it_binds(tiny: LanguageModel) -> None:
    clean = None  # not this one: as in a notebook that runs its cell again
    h = tiny.transformer.h
    with tiny.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            clean = h[3].output[:, -1]
        with tracer.invoke(PROMPTS[1]):
            early = h[0].output
            h[3].output[:, -1] = clean
            patched = tiny.lm_head.output[:, -1]
    assert early.shape[0] == 1
    torch.testing.assert_close(patched, alone(tiny, PROMPTS[0], 0)[1][:, -1], atol=2e-4, rtol=1e-3)


def test_what_passed_while_a_block_waited_for_another_is_an_error_that_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = Model(net)
    with pytest.raises(SiteOrderError, match=r"model\.0\.output .* had waited for 'clean', which"):
        with model.trace() as tracer:
            with tracer.invoke(X[:1]):
                clean = [layer.output.clone() for layer in model]
            with tracer.invoke(X[1:]):
                model[0].input[:] = 0
                model[0].output = clean[0]


def test_a_sum_over_blocks_is_the_sum() -> None:
    model = Model(nn.Linear(2, 2))
    xs = [torch.randn(1, 2) for _ in range(4)]
    total = 0
    count = 0
    with model.trace() as tracer:
        for x in xs:
            with tracer.invoke(x):
                total += model.output.sum()
                count = count + 1
    torch.testing.assert_close(total, model.module(torch.cat(xs)).sum())
    assert count == 4


def test_the_variables_of_a_loop_are_those_of_its_round() -> None:
    model = Model(nn.Identity())
    seen: dict[int, float] = {}
    pick: Callable[[], int] | None = None
    with model.trace() as tracer:
        for i in range(3):
            with tracer.invoke(torch.full((1, 1), float(i))):
                seen[i] = model.output.item()
                pick = lambda: i  # noqa: B023, E731
    assert seen == {0: 0.0, 1: 1.0, 2: 2.0}
    assert pick is not None and pick() == 2
    assert i == 2


def test_names_are_shared_at_the_level_of_a_module() -> None:
    text = (
        "with model.trace() as tracer:\n"
        "    for i in range(3):\n"
        "        with tracer.invoke(x + i):\n"
        "            h = model[0].output\n"
        "            if i == 1:\n"
        "                h = h + before\n"
        "            before = model[1].output\n"
        "            kept.append((i, h))\n"
    )
    model = Model(nn.Sequential(nn.Identity(), nn.Identity()))
    x = torch.zeros(1, 1)
    names: dict[str, Any] = {"model": model, "x": x, "kept": []}
    _run_as_file(text, names)
    assert [(i, h.item()) for i, h in names["kept"]] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert names["before"].item() == 2.0
    assert names["i"] == 2


def _run_as_file(text: str, names: dict[str, Any]) -> None:
    import linecache

    filename = "names_at_the_level_of_a_module.py"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec"), names)


def test_a_block_in_a_function_is_one_of_the_trace() -> None:
    model = Model(nn.Identity())
    outs: list[Tensor] = []

    def add(tracer: Any, x: Tensor, factor: int) -> None:
        with tracer.invoke(x):
            model.output = model.output * factor
            outs.append(model.output)

    with model.trace() as tracer:
        for factor in (1, 2, 3):
            add(tracer, torch.ones(1, 2), factor)
    assert [out.tolist() for out in outs] == [[[1, 1]], [[2, 2]], [[3, 3]]]


def test_a_name_that_nobody_binds_in_the_end_is_an_error_at_its_line() -> None:
    model = Model(nn.Identity())
    with pytest.raises(NameError, match="value"):
        with model.trace() as tracer:
            with tracer.invoke(torch.ones(1, 2)):
                if model.output.sum() < 0:
                    value = model.output
            with tracer.invoke(torch.ones(1, 2)):
                model.output = value


def test_a_barrier_lets_blocks_meet() -> None:
    model = Model(nn.Sequential(nn.Identity(), nn.Identity()))
    box: list[Tensor] = []
    with model.trace() as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke(torch.ones(1, 1)):
            meet()
            model[0].output = box[0]
            first = model.output
        with tracer.invoke(torch.full((1, 1), 3.0)):
            box.append(model[0].output)
            meet()
            second = model.output
    assert (first.item(), second.item()) == (3.0, 3.0)


def test_a_barrier_that_is_not_reached_is_an_error() -> None:
    model = Model(nn.Identity())
    with pytest.raises(NeverCameError, match="3 blocks to call a barrier"):
        with model.trace() as tracer:
            meet = tracer.barrier(3)
            for _ in range(2):
                with tracer.invoke(torch.ones(1, 1)):
                    meet()


# -- a run ------------------------------------------------------------------------------------


def test_a_generation_of_several_inputs_steps_for_all(tiny: LanguageModel) -> None:
    h = tiny.transformer.h
    steps: dict[str, list[Tensor]] = {"a": [], "b": []}
    with tiny.generate(max_new_tokens=3, do_sample=False) as tracer:
        with tracer.invoke(PROMPTS[0]):
            for _ in tracer.iter[:]:
                steps["a"].append(h[1].output[:, -1])
            first = tracer.result
        with tracer.invoke(PROMPTS[1]):
            for _ in tracer.iter[1:3]:
                h[1].output[:] = 0
            steps["b"].append(tracer.result)
        with tracer.invoke():
            both = tracer.result
    plain = tiny.generate(PROMPTS[0], max_new_tokens=3, do_sample=False)
    assert first[0, -3:].tolist() == plain[0, -3:].tolist()
    assert torch.equal(both, torch.cat([first, steps["b"][0]]))
    with tiny.generate(PROMPTS[0], max_new_tokens=3, do_sample=False) as tracer:
        cache = tracer.cache(modules=[h[1]])
    for one, entry in zip(steps["a"], cache["model.transformer.h.1"], strict=True):
        torch.testing.assert_close(one, entry.output[:, -1], atol=2e-5, rtol=1e-4)


def test_a_block_that_stops_leaves_the_others_their_run() -> None:
    model = Model(nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity()))
    calls: list[int] = []
    handle = model[2].module.register_forward_hook(lambda *_: calls.append(2))
    with model.trace() as tracer:
        with tracer.invoke(torch.ones(1, 1)):
            first = model[0].output
            tracer.stop()
        with tracer.invoke(torch.ones(1, 1)):
            second = model[1].output
    handle.remove()
    assert first.item() == second.item() == 1
    assert calls == []  # nobody needed it


def test_caches_hold_all_rows_or_those_of_the_block_they_are_made_in(tiny: LanguageModel) -> None:
    with tiny.trace() as tracer:
        whole = tracer.cache(modules=["transformer.h.1"])
        for prompt in PROMPTS[:2]:
            with tracer.invoke(prompt):
                own = tracer.cache(modules=["transformer.h.1"], include_inputs=True)
    rows = whole["transformer.h.1"].output
    assert rows.shape[0] == 2
    assert torch.equal(own["transformer.h.1"].output, rows[1:])
    assert own["transformer.h.1"].input.shape[0] == 1


def test_gradients_of_a_block_are_those_of_its_rows() -> None:
    torch.manual_seed(0)
    model = Model(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
    x = torch.randn(3, 2)
    with model.trace() as tracer:
        with tracer.invoke(x[:1]):
            model.output
        with tracer.invoke(x[1:]):
            cache = tracer.cache(modules=["1"], include_grads=True)
            hidden = model[0].output
            with model.output.square().sum().backward():
                grad = hidden.grad
    plain = model.module[0](x[1:]).detach().requires_grad_()
    tanh = torch.tanh(plain)
    tanh.retain_grad()
    model.module[2](tanh).square().sum().backward()
    torch.testing.assert_close(grad, plain.grad)
    torch.testing.assert_close(cache["model.1"].grad, tanh.grad)


def test_an_error_in_one_block_ends_all_and_shows_its_line() -> None:
    model = Model(nn.Sequential(nn.Identity(), nn.Identity()))
    before = state_of(model.module)
    with pytest.raises(SiteOrderError, match=r"model\.0\.output"):
        with model.trace() as tracer:
            with tracer.invoke(torch.ones(1, 1)):
                model[1].output
                model[0].output
            with tracer.invoke(torch.ones(1, 1)):
                kept = model[0].output
    assert kept.item() == 1  # what was bound before the error is bound
    assert state_of(model.module) == before


def test_nothing_of_a_batch_stays_alive() -> None:
    model = Model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    seen: list[Any] = []

    def run() -> None:
        with model.trace() as tracer:
            for i in range(3):
                with tracer.invoke(torch.ones(1, 2)):
                    h = model[0].output
                    keep = lambda: (h, i)  # noqa: B023, E731, F841
                    seen.append(weakref.ref(h))

    run()
    gc.disable()
    try:
        run()
        assert [ref() for ref in seen[3:]] == [None, None, None]
    finally:
        gc.enable()


# -- what is refused --------------------------------------------------------------------------


def test_an_invoke_belongs_into_a_trace_without_input() -> None:
    model = Model(nn.Identity())
    with pytest.raises(OutsideTraceError, match="has its input already"):
        with model.trace(torch.ones(1, 1)) as tracer:
            with tracer.invoke(torch.ones(1, 1)):
                model.output


def test_an_invoke_does_not_belong_into_another() -> None:
    model = Model(nn.Identity())
    with pytest.raises(OutsideTraceError, match="not into the block of another invoke"):
        with model.trace() as tracer:
            with tracer.invoke(torch.ones(1, 1)):
                with tracer.invoke(torch.ones(1, 1)):
                    model.output


def test_inputs_that_make_no_batch_are_refused() -> None:
    model = Model(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"shapes \(1, 2\), \(1, 3\), which make no batch"):
        with model.trace() as tracer:
            for size in (2, 3):
                with tracer.invoke(torch.ones(1, size)):
                    model.output


def test_an_input_that_is_none_is_refused_at_its_line(tiny: LanguageModel) -> None:
    with pytest.raises(InputError, match="not float"):
        with tiny.trace() as tracer:
            with tracer.invoke(3.5):
                tiny.output


def test_a_block_that_cannot_be_lifted_is_refused_with_the_way_out() -> None:
    model = Model(nn.Identity())

    def returns() -> Any:
        with model.trace() as tracer:
            with tracer.invoke(torch.ones(1, 1)):
                return model.output

    with pytest.raises(CaptureError, match="several invokes run together"):
        returns()


AT_MODULE_LEVEL = """
with model.trace() as tracer:
    with tracer.invoke(one):
        borrowed = model.transformer.h[0].output[:, -1]
    with tracer.invoke(other):
        model.transformer.h[0].output[:, -1] = borrowed
        patched = model.transformer.h[0].output
"""


def test_blocks_of_a_script_share_names_that_nobody_had_bound_before(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(AT_MODULE_LEVEL)
    model = LanguageModel(make("gpt2")[0])
    given = {"model": model, "one": torch.tensor([[11, 3, 7]]), "other": torch.tensor([[5, 9, 2]])}
    found = runpy.run_path(str(script), given)
    assert torch.equal(found["patched"][:, -1], found["borrowed"])


def behind_a_skip(net: nn.Module, rows: int, ask: Any) -> Any:
    """What `ask` reads in a block of one row that skips the second module; among `rows`."""
    model = Model(net)
    with model.trace() as tracer:
        with tracer.invoke(X[:1]):
            model[1].skip(torch.ones(1, 4))
            value = ask(model)
        for _ in range(rows - 1):
            with tracer.invoke(X[1:2]):
                model[1].output
    return value


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_calls_behind_a_skip_are_never_counted_as_if_the_skipped_module_had_run(call: int) -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.Sequential(shared), shared, shared)
    with pytest.raises(SiteOrderError, match=r"skipped model\.1, which calls it too.*uncounted"):
        behind_a_skip(net, 2, lambda model: model[0].calls[call].output)


def test_what_is_inside_of_a_skipped_module_did_not_run_for_the_block() -> None:
    net = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(NeverRanError, match=r"model\.1, which contains it, was skipped"):
        behind_a_skip(net, 2, lambda model: model[1][0].output)
    behind = behind_a_skip(net, 2, lambda model: model[2].output)
    torch.testing.assert_close(behind, net[2](torch.ones(1, 4)))


class WithTable(nn.Module):
    """Calls one module on its rows, and then on a table that is the same for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.linspace(0, 1, 16).reshape(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) + self.shared(self.table * 1).sum(0)


def test_each_call_of_a_module_has_its_own_rows_or_none() -> None:
    net = WithTable()
    model = Model(net)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            first = model.shared.output
            table = model.shared.calls[1].output
        with tracer.invoke(X[1:]):
            model.output
    torch.testing.assert_close(first, net.shared(X[:1]))
    torch.testing.assert_close(table, net.shared(net.table))


def test_an_edit_in_place_of_what_another_block_made_anew_is_refused() -> None:
    model = Model(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)))
    x = torch.randn(2, 2)
    with pytest.raises(RowsError, match=r"edited in place.*as in model\.0\.0\.input"):
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(x[:1]):
                model[0][0].input[:] += 1
            with tracer.invoke(x[1:]):
                model[0].input = model[0].input * 2
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(x[:1]):
            model[0][0].input = model[0][0].input + 1
            first = model.output
        with tracer.invoke(x[1:]):
            model[0].input = model[0].input * 2
            model[0][0].input[:] += 1  # its own rows it may edit
            second = model.output
    torch.testing.assert_close(first, model.module(x[:1] + 1))
    torch.testing.assert_close(second, model.module(x[1:] * 2 + 1))


def test_a_block_that_sees_all_rows_edits_them_where_the_model_has_them() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    model = Model(Residual())
    x = torch.randn(2, 2)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke():
            model.inner.input[:] += 1
            kept = model.inner.output
        with tracer.invoke(x[:1].clone()):
            model.inner.output[:] = 0
            first = model.output
        with tracer.invoke(x[1:].clone()):
            second = model.output
    torch.testing.assert_close(kept, model.inner(x + 1))
    torch.testing.assert_close(first, x[:1] + 1)
    torch.testing.assert_close(second, x[1:] + 1 + model.inner(x[1:] + 1))


def test_inputs_that_the_model_overwrites_are_held_by_nobody_else() -> None:
    model = Model(nn.Sequential(nn.Identity(), nn.ReLU()))
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            first = model.input[:, 0].clone()
            model[1].input[:, 0] += 1.5
            result = model.output.clone()
        with tracer.invoke(X[1:]):
            second = model.output.clone()
    torch.testing.assert_close(first, X[:1, 0])
    torch.testing.assert_close(result[:, 0], (X[:1, 0] + 1.5).relu())
    torch.testing.assert_close(second, X[1:].relu())

"""Edits in a file: saved, loaded elsewhere, bit for bit the same; or refused, by name."""

from __future__ import annotations

import math
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tracing.plain import X, small
from tracekit import LanguageModel, Model
from tracekit.errors import LoadingError, UnknownPathError, UnsupportedError

PROMPT = "The Eiffel Tower is in the city of"
ELSEWHERE = """
import sys, torch
from tracekit import LanguageModel
model = LanguageModel("tracekit/tiny")
model.edits.load(sys.argv[1])
with torch.no_grad():
    torch.save(
        [model(sys.argv[3]).logits, model.generate(sys.argv[3], max_new_tokens=4)], sys.argv[2]
    )
"""


def test_edits_loaded_in_another_process_give_the_same_bits(tmp_path: Path) -> None:
    model = LanguageModel("tracekit/tiny")
    generator = torch.Generator().manual_seed(0)
    steering = torch.randn(model.config.n_embd, generator=generator)
    turn = torch.randn(model.config.n_embd, model.config.n_embd, generator=generator).T
    strengths, layers = (
        {"low": 0.1, "high": 1 / 3},
        [model.transformer.h[index] for index in (0, 2)],
    )
    with model.edit() as edited:
        for layer in layers:
            layer.output[:] += strengths["high"] * steering  # of each
    with edited.edit() as edited:
        value = edited.transformer.h[3].mlp.output
        edited.transformer.h[3].mlp.output = torch.tanh(value @ turn) * math.sqrt(2)
    file, result = tmp_path / "edits.safetensors", tmp_path / "result.pt"
    edited.edits.save(file)
    subprocess.run([sys.executable, "-c", ELSEWHERE, file, result, PROMPT], check=True)
    logits, tokens = torch.load(result)
    with torch.no_grad():
        assert torch.equal(logits, edited(PROMPT).logits)
    assert torch.equal(tokens, edited.generate(PROMPT, max_new_tokens=4))
    assert not torch.equal(logits, model(PROMPT).logits)


def reloaded(edited: Model, path: Path, net: nn.Module | None = None) -> Model:
    edited.edits.save(path)
    fresh = Model(net if net is not None else edited.module)
    fresh.edits.load(path)
    return fresh


def test_every_kind_of_value_that_can_be_saved_comes_back_as_it_was(tmp_path: Path) -> None:
    model = Model(small())
    model.extra = nn.Linear(4, 4)
    weight, raw, call = model[0].weight, model[2].module, model[0].calls[1]
    flag, none, text, number = True, None, "text", float("inf")
    nested = {"a": [(1, 2.5), {3}], 2: frozenset({"b"})}
    cut, counts, dtype, device = slice(None, 2), range(1, 9, 3), torch.float16, torch.device("cpu")
    strided, trained = torch.arange(12.0).reshape(3, 4)[:, ::2], torch.ones(2, requires_grad=True)
    sizes, rest = torch.Size([2, 3]), ...
    relu, square = torch.relu, math.sqrt
    with model.edit() as edited:
        model[0].output[:] *= 1
        kept = [model, weight, raw, call, flag, none, text, number, nested, cut, counts, dtype]
        kept += [device, strided, trained, relu, square, nn, rest]
    names = reloaded(edited, tmp_path / "e.safetensors").edits[0].names
    assert names is not None
    assert names["model"].module is model.module
    assert names["weight"] is model.module[0].weight
    assert names["raw"] is model.module[2]
    assert (names["call"].path, names["call"]._call) == ("model.0", 1)
    values = {"flag": flag, "none": none, "text": text, "number": number, "nested": nested}
    values |= {"cut": cut, "counts": counts, "dtype": dtype, "device": device, "rest": rest}
    values |= {"relu": relu, "square": square, "nn": nn}
    assert {name: names[name] for name in values} == values
    assert torch.equal(names["strided"], strided)
    assert names["trained"].requires_grad and torch.equal(names["trained"], trained)
    assert sizes == torch.Size([2, 3])


def test_tensors_keep_their_order_in_memory(tmp_path: Path) -> None:
    model = Model(small())
    turned = torch.randn(2, 3, 4).permute(2, 0, 1)
    with model.edit() as edited:
        model[0].output[:] *= turned.sum()
    names = reloaded(edited, tmp_path / "e.safetensors").edits[0].names
    assert names is not None
    assert torch.equal(names["turned"], turned)
    assert names["turned"].stride() == turned.stride()


def test_what_the_block_itself_binds_is_not_saved(tmp_path: Path) -> None:
    model = Model(small())
    value = object()
    with model.edit() as edited:
        value = model[0].output
        for index, layer in enumerate([model[1], model[2]]):
            layer.output = layer.output + value.mean() + index
    assert set(edited.edits[0].names or ()) == {"model"}
    again = reloaded(edited, tmp_path / "e.safetensors")
    assert torch.equal(again(X), edited(X))
    assert value is not None


def test_edits_of_some_steps_and_those_of_functions_in_the_block_survive(tmp_path: Path) -> None:
    model = LanguageModel("tracekit/tiny")
    with model.edit() as (tracer, edited):

        def half(value: Tensor) -> Tensor:
            return value / 2

        for _ in tracer.iter[1:3]:
            layer = model.transformer.h[2].save()
            layer.output = half(layer.output)
    edited.edits.save(tmp_path / "e.safetensors")
    model.edits.load(tmp_path / "e.safetensors")
    options: dict[str, Any] = {"max_new_tokens": 4, "output_logits": True}
    options["return_dict_in_generate"] = True
    found = model.generate(PROMPT, **options).logits
    assert torch.equal(torch.stack(found), torch.stack(edited.generate(PROMPT, **options).logits))


def test_an_error_in_a_loaded_edit_shows_its_line(tmp_path: Path) -> None:
    model = Model(small())
    with model.edit() as edited:
        # what follows fails
        model[0].output = torch.zeros(1)
    again = reloaded(edited, tmp_path / "e.safetensors")
    with pytest.raises(Exception, match="cannot be replaced") as caught:
        again(X)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert [frame.line for frame in frames] == ["again(X)", "model[0].output = torch.zeros(1)"]
    assert frames[1].filename.startswith("<edit of e.safetensors, from test_edit_files.py:")


# -- refusals -------------------------------------------------------------------------------------


def _helper(value: Tensor) -> Tensor:
    return value


class Mine:
    """A class of the user's."""


def test_what_cannot_be_saved_is_refused_with_its_name_and_the_way_out(tmp_path: Path) -> None:
    model = Model(small())
    sae, mine = nn.Linear(4, 4), Mine()
    with model.edit() as uses_a_function:
        model[0].output = _helper(model[0].output)
    with model.edit() as uses_a_module:
        model[0].output = sae(model[0].output)
    with model.edit() as uses_an_object:
        model[0].output[:] = mine.value
    cases = (
        (uses_a_function, "uses '_helper', a function, .* define it there"),
        (uses_a_module, "uses 'sae', a Linear, .* `model.sae = sae`"),
        (uses_an_object, "uses 'mine', a Mine, .* before the block"),
        (model.edit(_helper), "is a function"),
        (model, "no edits to save"),
    )
    for edited, text in cases:
        with pytest.raises(UnsupportedError, match=text):
            edited.edits.save(tmp_path / "e.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_block_that_means_something_only_where_it_stands_is_refused(tmp_path: Path) -> None:
    model = Model(small())
    count = 0
    with model.edit() as edited:

        def more() -> None:
            nonlocal count
            count += 1

        more()
        model[0].output[:] = count
    assert count == 0
    with pytest.raises(UnsupportedError, match="only where it stands"):
        edited.edits.save(tmp_path / "e.safetensors")


def test_a_module_that_was_made_a_part_of_the_model_is_saved_by_its_path(tmp_path: Path) -> None:
    model = Model(small())
    sae = nn.Linear(4, 4)
    model.sae = sae
    with model.edit() as edited:
        model[0].output = sae(model[0].output)
    again = reloaded(edited, tmp_path / "e.safetensors")
    assert torch.equal(again(X), edited(X))
    with pytest.raises(UnknownPathError, match="'sae', which this model does not have"):
        reloaded(edited, tmp_path / "e.safetensors", small())


def test_a_module_that_this_model_does_not_have_is_named(tmp_path: Path) -> None:
    model = Model(nn.ModuleDict({"first": nn.Linear(4, 4)}))
    layer = model.first
    with model.edit() as edited:
        layer.output[:] = 0
    edited.edits.save(tmp_path / "e.safetensors")
    other = Model(nn.ModuleDict({"frist": nn.Linear(4, 4)}))
    with pytest.raises(UnknownPathError, match=r"'first'.*did you mean 'frist'"):
        other.edits.load(tmp_path / "e.safetensors")
    assert not other.edits


def test_a_file_that_holds_no_edits_or_those_of_another_version_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = Model(small())
    text, plain, newer = (tmp_path / name for name in ("text", "plain", "newer"))
    text.write_text("no tensors")
    save_file({"x": X}, plain)
    save_file({"x": X}, newer, metadata={"tracekit.edits": '{"version": 99, "edits": []}'})
    for file, message in (
        (tmp_path / "none", "can't be read"),
        (text, "can't be read"),
        (plain, "holds no edits"),
        (newer, "version 99"),
    ):
        with pytest.raises(LoadingError, match=message):
            model.edits.load(file)

"""`tracekit tree`: the modules that there are, each weight once, and names that are true."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cli.conftest import PROMPT, Tell
from tracekit import LanguageModel


def branches(whole: dict[str, Any]) -> list[dict[str, Any]]:
    return [whole, *(each for branch in whole["branches"] for each in branches(branch))]


@pytest.fixture
def found(tell: Tell) -> list[dict[str, Any]]:
    return branches(tell("tree", "--json", "--input", PROMPT).json)


def test_every_module_is_in_the_tree_once(found: list[dict[str, Any]], tiny: LanguageModel) -> None:
    paths = [path for branch in found for path in branch["paths"]]
    modules = {f"model.{path}".rstrip("."): each for path, each in tiny.module.named_modules()}
    assert sorted(paths) == sorted(modules)
    for branch in found:
        for path in branch["paths"]:
            assert type(modules[path]).__name__ == branch["kind"]
            assert branch["parameters"] == sum(each.numel() for each in modules[path].parameters())
            own = dict(modules[path].named_parameters(recurse=False))
            assert branch["weights"] == {name: [*each.shape] for name, each in own.items()}


def test_layers_that_are_alike_are_one_branch(found: list[dict[str, Any]], tell: Tell) -> None:
    (layers,) = (branch for branch in found if branch["kind"] == "GPT2Block")
    assert layers["name"] == "0-3" and layers["names"] == ["layers[0-3]"]
    each = branches(tell("tree", "--full", "--json").json)
    assert [branch["name"] for branch in each if branch["kind"] == "GPT2Block"] == [*"0123"]


def test_a_weight_that_two_modules_share_is_named(found: list[dict[str, Any]], tell: Tell) -> None:
    (head,) = (branch for branch in found if branch["name"] == "lm_head")
    assert head["same_as"] == "model.transformer.wte.weight"
    assert "= model.transformer.wte.weight" in tell("tree").out


def test_what_modules_gave_is_what_hooks_see(
    found: list[dict[str, Any]], tiny: LanguageModel
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        return lambda _m, _a, out: seen.update({path: out[0] if isinstance(out, tuple) else out})

    handles = [
        module.register_forward_hook(keep(f"model.{path}"))
        for path, module in tiny.module.transformer.named_modules(prefix="transformer")
        if path != "transformer"
    ]
    with torch.no_grad():
        tiny.module(tiny.tokenizer(PROMPT, return_tensors="pt")["input_ids"])
    for handle in handles:
        handle.remove()
    gave = {path: each for branch in found for path, each in branch["gave"].items()}
    assert len(seen) > 40 and set(seen) <= set(gave)
    for path, tensor in seen.items():
        assert gave[path]["shape"] == [*tensor.shape]
        assert gave[path]["rms"] == pytest.approx(tensor.norm().item() / tensor.numel() ** 0.5)
        assert gave[path]["largest"] == pytest.approx(tensor.abs().max().item())
        assert gave[path]["mean"] == pytest.approx(tensor.mean().item(), abs=1e-6)


def test_depth_cuts_and_says_how_much(tell: Tell, tiny: LanguageModel) -> None:
    count = len(list(tiny.module.transformer.modules())) - 1
    lines = tell("tree", "--depth", "1").out.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["transformer", "lm_head"]
    assert f"GPT2Model + {count} inside" in lines[2]
    assert tell("tree", "--depth", "0", "--json").json["branches"] == []


def test_it_needs_neither_weights_nor_a_tokenizer(tell: Tell, tmp_path: Any, tiny: Any) -> None:
    tiny.module.config.save_pretrained(tmp_path)  # only that: no weights, no tokenizer
    assert tell("tree", str(tmp_path)).out == tell("tree").out
    assert tell("tree", str(tmp_path), "--input", "a").status == 2


def test_names_are_where_the_list_says(tell: Tell, tiny: LanguageModel) -> None:
    names = tell("tree", "--names", "--json").json["names"]
    places = {(each["owner"], each["name"]): each for each in names}
    assert places["model.layers[0-3]", "resid_post"]["place"] == "model.transformer.h.*.output"
    assert places["model.layers[0-3]", "attn.o"]["place"] == "model.transformer.h.*.attn.c_proj"
    plain = [each for each in names if each["shape"] and not each["is_view"]]
    layer = tiny.layers[1]
    for each in plain:
        if any(word in each["place"] for word in (".attention.", ".norm_", ".head_result")):
            continue  # values inside modules have no module of the model's own
        path, _, slot = each["place"].replace("*", "1").rpartition(".")
        owner = tiny if each["owner"] == "model" else layer
        with torch.no_grad(), tiny.trace(PROMPT):
            value = getattr(owner, each["name"]).clone()
        with torch.no_grad(), tiny.trace(PROMPT):
            at = tiny.get(path.removeprefix("model").lstrip("."))
            same = (at.hidden if slot == "output" else at.input).clone()
        assert torch.equal(value, same), each
    assert len(plain) > 15


def test_every_name_that_is_listed_can_be_asked_for(tell: Tell, tiny: LanguageModel) -> None:
    names = tell("tree", "--names", "--json").json["names"]
    of_layer = [each["name"] for each in names if each["owner"] == "model.layers[0-3]"]
    assert {name for name in of_layer if "." not in name} == {*tiny.layers[0]._words()}


def test_names_are_told_in_a_table(tell: Tell) -> None:
    told = tell("tree", "--names").out
    assert "model.layers[0-3].\n" in told
    assert "  z                 view of model.transformer.h.*.attn.c_proj.input" in told

"""`tracekit doctor`: all holds here, and each experiment finds the fault that it is there for."""

from __future__ import annotations

import copy
import importlib.metadata
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.cli.conftest import Tell
from tracekit import Cache, LanguageModel
from tracekit.capture import tracebacks
from tracekit.capture.block import Body
from tracekit.cli import guards, versions
from tracekit.cli.guards import answers, beside, experiment, numbers, traceless, wrongness
from tracekit.cli.guards.experiment import Experiment, Finding
from tracekit.models import padding

Plant = Callable[[pytest.MonkeyPatch, LanguageModel], Any]
BY_CLAIM = {each.claim: each for each in guards.EXPERIMENTS}


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    model = LanguageModel("tracekit/tiny")
    return {each.claim: guards.found_by(each, model) for each in guards.EXPERIMENTS}


@pytest.mark.parametrize("claim", BY_CLAIM)
def test_each_claim_holds(claim: str, findings: dict[str, Finding]) -> None:
    assert findings[claim].holds, findings[claim].seen


def test_there_is_an_experiment_for_each_guarantee() -> None:
    assert {each.guard for each in guards.EXPERIMENTS} - {""} == {f"G{n}" for n in range(1, 9)}


# -- planted faults ---------------------------------------------------------------------------


def a_block_runs_twice(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    second = model.transformer.h[1].module

    def again(_module: Any, args: Any, _output: Any) -> None:
        second(*args)

    model.transformer.h[0].module.register_forward_hook(again)


def writes_get_lost(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    patch.setattr(beside, "_grow_and_double", lambda _m, _a, output: None)


def the_cache_is_early(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    found = Cache.__getitem__
    early = types.SimpleNamespace(hidden=torch.zeros(1))
    patch.setattr(Cache, "__getitem__", lambda self, key: found(self, key) and early)


def a_hook_stays(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    stay = model.transformer.h[1].module.register_forward_hook
    patch.setattr(traceless, "_traced", named("_traced", lambda _: stay(lambda *_: None)))


def a_weight_changes(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    weight = model.transformer.wpe.module.weight
    patch.setattr(traceless, "_failing_block", named("_failing_block", lambda _: weight.mul_(2)))


def a_list_keeps_what_it_saw(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    kept, traced = list[Any](), traceless._traced
    patch.setattr(traceless, "_traced", lambda model: kept.extend(traced(model)) or kept)


def names_are_not_handed_back(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    patch.setattr(Body, "hand_back", lambda self: None)


def tracebacks_are_whole(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    patch.setattr(tracebacks, "is_own_file", lambda filename: False)


def nothing_is_refused(patch: pytest.MonkeyPatch, model: LanguageModel) -> Any:
    """A model whose values can be read and written, to no effect."""

    def block() -> Any:
        return types.SimpleNamespace(
            hidden=torch.zeros(1), calls=[types.SimpleNamespace() for _ in range(2)]
        )

    inside = types.SimpleNamespace(h=[block() for _ in range(4)])
    return types.SimpleNamespace(trace=lambda _: nullcontext(), transformer=inside)


def padding_is_counted(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    columns = lambda _, mask: torch.ones_like(mask).cumsum(-1) - 1  # noqa: E731
    patch.setattr(padding, "positions_of", columns)


def nothing_is_watched(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    class Bare:
        """Hands out the tensors themselves, whatever becomes of them."""

        def __init__(self, net: torch.nn.Sequential) -> None:
            self.net, self.found = net, dict[str, Any]()

        def trace(self, given: torch.Tensor) -> Any:
            first = self.net[0](given)
            self.found["model.0"] = types.SimpleNamespace(output=first)
            self.net[1](first)
            return nullcontext(types.SimpleNamespace(cache=lambda: self.found))

    patch.setattr(wrongness, "Model", Bare)


def gradients_look_on(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    patch.setattr(beside.torch, "is_grad_enabled", lambda: True)


def a_cache_is_off_by_a_bit(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    patch.setattr(numbers, "first_of", lambda value: experiment.first_of(value) * (1 + 1e-7))


def attention_is_sharper(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    model.transformer.h[0].attn.c_attn.module.weight.data.mul_(1.01)


def names_are_swapped(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    layers = model._tree.names.layers  # type: ignore[union-attr]
    modules = layers["transformer.h.1"].modules
    modules["norm1"], modules["norm2"] = modules["norm2"], modules["norm1"]


def one_pass_computes_others(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    patch.setattr(Cache, "verify", lambda self: False)


def tokens_are_others(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    patch.setattr(numbers, "tokens_of", lambda model: experiment.tokens_of(model, "Paris is"))


def a_norm_is_left_out(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    patch.setattr(answers, "first_of", lambda value: experiment.first_of(value).flip(-1))


def a_patch_is_one_position_off(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    real = answers.patch_sweep
    patch.setattr(
        answers,
        "patch_sweep",
        lambda *given, **named: real(*given, **{**named, "positions": range(8)}),
    )


def edits_get_lost(patch: pytest.MonkeyPatch, model: LanguageModel) -> None:
    real = LanguageModel.verify
    patch.setattr(
        LanguageModel,
        "verify",
        lambda self, edit, *given, **named: real(self, (edit[0], torch.clone), *given, **named),
    )


def named(name: str, function: Any) -> Any:
    function.__name__ = name
    return function


@pytest.mark.parametrize(
    ("claim", "plant", "seen"),
    [
        ("model and block take turns", a_block_runs_twice, "the order was"),
        ("a read sees the writes", writes_get_lost, "did not go on with what was written"),
        ("a read sees the writes", the_cache_is_early, "the cache has not the final value"),
        ("after a trace", a_hook_stays, "something stayed on a module (traced)"),
        ("after a trace", a_weight_changes, "logits have changed (failing block)"),
        ("nothing of a run stays alive", a_list_keeps_what_it_saw, "tensors are alive"),
        ("what a block binds", names_are_not_handed_back, "Error"),
        ("an error in a block", tracebacks_are_whole, "are in the traceback"),
        ("an edit that never fires", nothing_is_refused, "silently ignored"),
        ("what is asked for too late", nothing_is_refused, "it gave [1] and [1]"),
        ("a row of a padded batch", padding_is_counted, "logits differ by"),
        ("what the model overwrites", nothing_is_watched, "the cache has the new value"),
        ("a block sees gradient mode", gradients_look_on, "gradients, autocast: "),
        ("a cache holds", a_cache_is_off_by_a_bit, "they differ at model.transformer.wte"),
        ("standard names are", names_are_swapped, "WRONG: resid_pre + attn_out"),
        ("generation", one_pass_computes_others, "computes other values"),
        ("generation", tokens_are_others, "the tokens are others"),
        ("the logit lens", a_norm_is_left_out, "probabilities differ by"),
        ("a sweep of patches", a_patch_is_one_position_off, "a patch differs by"),
        ("a verified edit", edits_get_lost, "changed-nothing"),
        ("patterns read beside SDPA", attention_is_sharper, "patterns differ by"),
    ],
)
def test_a_planted_fault_is_found(
    claim: str, plant: Plant, seen: str, tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tried,) = (each for whole, each in BY_CLAIM.items() if whole.startswith(claim))
    model = LanguageModel(copy.deepcopy(tiny.module), tokenizer=tiny.tokenizer)
    found = guards.found_by(tried, plant(monkeypatch, model) or model)
    assert not found.holds
    assert seen in found.seen


# -- the command ------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "EXPERIMENTS", guards.EXPERIMENTS[1:3])


@pytest.mark.usefixtures("few")
def test_all_is_told_and_the_status_is_0(tell: Tell) -> None:
    told = tell("doctor")
    assert (told.status, told.err) == (0, "")
    lines = [line.split() for line in told.out.splitlines()]
    assert ["ok", "torch", torch.__version__, ">=2.6"] in lines
    assert "kept from running in place by " in told.out
    assert "  ok      G2  a read sees the writes before it" in told.out
    assert "2 of 2 experiments hold." in told.out


@pytest.mark.usefixtures("few")
def test_json_says_the_same_and_nothing_else(tell: Tell) -> None:
    told = tell("doctor", "--json").json
    assert told["is_fine"] and [each["guard"] for each in told["experiments"]] == ["G2", "G3"]
    installed = {each["name"]: each["installed"] for each in told["versions"]}
    for name in ("torch", "transformers", "accelerate", "numpy"):
        assert installed[name] == importlib.metadata.version(name)
    assert len(installed) == len(told["versions"])  # each once, also what is optional elsewhere
    assert told["machine"]["capture"]["skips_by"]


def test_a_fault_is_status_1_and_comes_with_advice(
    tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Experiment("G3", "water is dry", lambda _: experiment.check(False, "it was wet") or "")
    monkeypatch.setattr(guards, "EXPERIMENTS", (wrong,))
    told = tell("doctor")
    assert told.status == 1
    assert "  FAILED  G3  water is dry  it was wet\n" in told.out
    assert "0 of 1 experiments hold." in told.out and "constraints.txt" in told.out
    assert tell("doctor", "--json").json["is_fine"] is False


@pytest.mark.usefixtures("few")
def test_a_version_that_does_not_do_is_marked_with_its_cure(
    tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = versions.metadata.version
    monkeypatch.setattr(
        versions.metadata, "version", lambda name: "2.0" if name == "torch" else real(name)
    )
    told = tell("doctor")
    assert told.status == 1
    assert "FAILED  torch         2.0" in told.out and 'pip install "torch>=2.6"' in told.out
    assert "versions to look at: torch" in told.out


def test_without_torch_it_still_says_what_is_missing(
    tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = versions.metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(versions.metadata, "version", version)
    told = tell("doctor")
    assert told.status == 1
    assert "no experiments: torch missing" in told.out


def test_what_is_declared_is_what_pyproject_says(monkeypatch: pytest.MonkeyPatch) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads(versions._PYPROJECT.read_text("utf-8"))["project"]
    assert versions._declared() == (project["dependencies"], project["requires-python"])

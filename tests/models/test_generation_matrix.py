"""Every architecture that generates, in six ways: sequences and verify() against plain hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.one_forward import (
    added_where,
    arguments,
    blocks_of,
    composed,
    is_double,
    run_plainly,
)
from tests.tiny_models import IS_TRANSFORMERS_5, NAMES, SPECS, make
from tracekit import Cache, Model
from tracekit.errors import PaddingError
from tracekit.models.padding import fit_padding

GENERATING = [name for name in NAMES if SPECS[name].generate]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "no kv_cache": {"use_cache": False},
    "static kv_cache": {"cache_implementation": "static"},
    "padded": {},
}
NEW = 4
V = torch.randn(256, generator=torch.Generator().manual_seed(3))
EDITS = ("generated", "prompt", "loop")  # one of them for each architecture
# What transformers refuses, in these words: a state for each row that it can't re-order.
REFUSED = {
    ("rwkv", "beams"): "cannot use beam search with a cache",
    ("xlstm", "beams"): "cannot use beam search with a cache",
}
# Where the steps of transformers are not what one forward computes; shown of transformers alone
# by test_what_is_wrong_upstream_is_wrong_without_tracekit.
WRONG_UPSTREAM = {
    ("gpt_neo", "static kv_cache"): "its keys are scored under the mask of the empty places, too",
    ("recurrent_gemma", "beams"): "its recurrent state stays with the row when beams change places",
}
if not IS_TRANSFORMERS_5:
    GENERATING.remove("recurrent_gemma")  # its state stays in the module, from run to run
    REFUSED = {
        ("olmoe", "static kv_cache"): "max_batch_size|missing 1 required positional argument",
        ("lfm2", "beams"): "index out of range",  # when it re-orders the layer without keys
        # a step adds its rows to all rows
        ("rwkv", "beams"): "no axis of 8 positions|rows and positions in one axis",
    }
    del WRONG_UPSTREAM["recurrent_gemma", "beams"]
    WRONG_UPSTREAM |= {
        (name, "beams"): "its state stays with the row when beams change places"
        for name in ("mamba", "mamba2")
    } | {
        ("t5gemma", way): "its steps with a kv_cache are not those without"
        for way in WAYS
        if way != "no kv_cache"
    }
# LanguageModel refuses to pad: whatever the mask says, they go over the padding. Over the same
# padding, one forward computes what the steps did.
READ_PADDING = {"rwkv", "xlstm"}
NOTHING_TO_PAD = {"whisper": "its sounds have one length, and no mask"}


@dataclass
class Subject:
    """A model, and the paths of what is recorded of it."""

    name: str
    module: Any
    model: Model
    inputs: dict[str, Any]
    paths: list[str]


@dataclass
class Run:
    """What a traced generation was given, and what came of it."""

    given: dict[str, Any]
    cache: Cache
    tokens: Tensor  # with the prompt


@pytest.fixture(scope="module", params=GENERATING)
def subject(request: pytest.FixtureRequest) -> Subject:
    """One model for all tests of it."""
    name = request.param
    module, inputs = make(name)
    blocks = f"{blocks_of(name)}."
    below = [path for path, _ in module.named_modules() if path.startswith(blocks)]
    paths = [path for path in below if path.removeprefix(blocks).count(".") < 2]
    return Subject(name, module, Model(module), inputs, paths)


def generated(subject: Subject, way: str, edit: str) -> Run:
    """A traced generation, with V added to what the first block gives."""
    given = arguments(subject.name, subject.inputs, way == "padded")
    options = {**given, **WAYS[way], "max_new_tokens": NEW}
    first = subject.model.get(f"{blocks_of(subject.name)}.0")
    torch.manual_seed(0)
    with torch.no_grad(), subject.model.generate(**options) as tracer:
        cache = tracer.cache(subject.paths)
        if edit in ("generated", "prompt"):
            first.output.at(edit).edit(lambda hidden: hidden + V[: hidden.shape[-1]])
        if edit == "loop":
            for _ in tracer.iter[:]:
                hidden = first.hidden
                hidden[:, -1] += V[: hidden.shape[-1]]
        tokens = tracer.result
    return Run(given, cache, with_start(subject.name, tokens))


def with_start(name: str, tokens: Tensor) -> Tensor:
    """Without beams, Whisper returns tokens without the one that its decoder begins with."""
    if name != "whisper" or tokens.shape[1] > NEW:
        return tokens
    return torch.cat([torch.full_like(tokens[:, :1], 3), tokens], 1)


def edit_of(name: str, way: str, is_edited: bool) -> str:
    """Which edit is made; empty for none."""
    if not is_edited:
        return ""
    edit = EDITS[GENERATING.index(name) % len(EDITS)]
    # without keys and values, the last position of each step is no position of one forward
    return "generated" if edit == "loop" and way == "no kv_cache" else edit


def is_real(name: str, given: dict[str, Any], tokens: Tensor) -> Tensor:
    """`[rows, columns]`: which of what ran are tokens of their row; nothing ends early here."""
    real = torch.ones_like(tokens[:, :-1], dtype=torch.bool)
    if not is_double(name):
        real[:, : given["input_ids"].shape[1]] = given["attention_mask"].bool()
    return real


def edited_columns(edit: str, prompt: int, real: Tensor) -> Tensor:
    """`[rows, columns]`: where V is added."""
    spans = {"": (0, 0), "generated": (prompt, None), "prompt": (0, prompt)}
    first, stop = spans.get(edit, (prompt - 1, None))
    columns = torch.zeros_like(real)
    columns[:, first:stop] = True
    return columns & real


@pytest.mark.parametrize("is_edited", [False, True], ids=["plain", "edited"])
@pytest.mark.parametrize("way", WAYS)
def test_a_sequence_is_what_one_forward_gives_and_verify_agrees(
    subject: Subject, way: str, is_edited: bool
) -> None:
    name, edit = subject.name, edit_of(subject.name, way, is_edited)
    if way == "padded" and name in NOTHING_TO_PAD:
        pytest.skip(NOTHING_TO_PAD[name])
    if (name, way) in REFUSED:
        with pytest.raises(Exception, match=REFUSED[name, way]):
            generated(subject, way, edit).cache.sequence(f"model.{blocks_of(name)}.0")
        return
    run = generated(subject, way, edit)
    real = is_real(name, run.given, run.tokens)
    prompt = 1 if is_double(name) else run.given["input_ids"].shape[1]
    columns = edited_columns(edit, prompt, real)
    inputs = composed(name, subject.module, run.given, run.tokens[:, :-1])
    blocks = [f"{blocks_of(name)}.{number}" for number in (0, 1)]
    change = added_where(columns, V)
    expected = run_plainly(subject.module, inputs, blocks, blocks[0], change)
    is_right = all(agrees(run.cache, path, run.tokens, real, expected[path]) for path in blocks)
    found = run.cache.verify()
    assert is_right == bool(found), found
    if (name, way) not in WRONG_UPSTREAM:
        assert found, found
    elif not is_edited:  # edited, its beams may happen to stay in their places
        assert not found, found
    compared = {check.site for check in found if check.deviation is not None}
    assert {f"model.{path}.output" for path in blocks} < compared and len(compared) >= 6
    assert len(found) - len(compared) <= len(compared) // 3, found
    if is_edited:
        without = run_plainly(subject.module, inputs, blocks)
        assert not torch.allclose(without[blocks[0]][real], expected[blocks[0]][real], atol=1e-2)


def agrees(cache: Cache, path: str, tokens: Tensor, real: Tensor, expected: Tensor) -> bool:
    """Whether the sequence at `path` has these values; its labels must be right in any case."""
    sequence = cache.sequence(f"model.{path}")
    assert sequence.shape == expected.shape
    assert torch.equal(sequence.tokens, tokens[:, :-1])
    assert torch.equal(sequence.valid, real)
    own = (real.long().cumsum(1) - 1).masked_fill(~real, -1)
    assert torch.equal(sequence.positions, own)
    return torch.allclose(sequence[real], expected[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", GENERATING)
def test_padding_is_refused_for_what_reads_it(name: str) -> None:
    if name in NOTHING_TO_PAD:
        return
    module, inputs = make(name)
    given = arguments(name, inputs, is_padded=True)
    assert not bool(given["attention_mask"].all())
    if name not in READ_PADDING:
        assert fit_padding(given, module, for_generate=True) is given
        return
    with pytest.raises(PaddingError, match=f"{name} reads its padding"):
        fit_padding(given, module, for_generate=True)


# What a way alone does not show: a prompt that is put together elsewhere, patches without rows,
# positions that begin at 1, a model that is passed by.
COMBINED: list[tuple[str, bool, dict[str, Any]]] = [
    ("blip_2", True, {"cache_implementation": "static"}),
    ("blip_2", True, {"num_beams": 3}),
    ("qwen2_5_vl", False, {"do_sample": True, "num_return_sequences": 2}),
    ("qwen2_5_vl", True, {"num_beams": 2, "num_return_sequences": 2}),
    ("paligemma", True, {"use_cache": False}),
    ("opt", True, {"num_beams": 2, "num_return_sequences": 2}),
    ("opt", False, {"prefill_chunk_size": 3}),
    ("llama", False, {"prefill_chunk_size": 3, "cache_implementation": "static"}),
    ("t5", True, {"num_beams": 3, "use_cache": False}),
    ("bart", True, {"num_return_sequences": 2, "do_sample": True}),
    ("whisper", False, {"num_beams": 2, "cache_implementation": "static"}),
]


@pytest.mark.parametrize(
    ("name", "is_padded", "options"), COMBINED, ids=[f"{n} {o}" for n, _, o in COMBINED]
)
def test_ways_and_models_combined_are_verified_with_all_their_modules(
    name: str, is_padded: bool, options: dict[str, Any]
) -> None:
    if name not in SPECS:
        pytest.skip("not before transformers 5")
    module, inputs = make(name)
    model = Model(module)
    given = arguments(name, inputs, is_padded)
    first = model.get(f"{blocks_of(name)}.0")
    torch.manual_seed(0)
    with torch.no_grad(), model.generate(**{**given, "max_new_tokens": NEW, **options}) as tracer:
        cache = tracer.cache(include_inputs=True)
        first.output.at("generated").edit(lambda hidden: hidden + V[: hidden.shape[-1]])
    found = cache.verify()
    assert found, found
    assert len([check for check in found if check.is_right]) > 40
    valid = cache.sequence(f"model.{blocks_of(name)}.1").valid
    assert bool(valid.all()) == (not is_padded or is_double(name))


# -- transformers held against itself -------------------------------------------------------------


def test_what_is_wrong_upstream_is_wrong_without_tracekit() -> None:
    static = {"cache_implementation": "static"}
    assert depends_on_kv_cache("gpt_neo", static) and not depends_on_kv_cache("gpt2", static)
    stay = [name for name, way in WRONG_UPSTREAM if way == "beams" and name != "t5gemma"]
    assert stay and all(scores_are_off(name) for name in stay)
    assert not scores_are_off("gemma")
    assert depends_on_kv_cache("t5gemma", {}) != IS_TRANSFORMERS_5


def depends_on_kv_cache(name: str, options: dict[str, Any]) -> bool:
    """Whether the logits of two steps are others than without keys and values."""
    module, inputs = make(name)
    report = {"output_logits": True, "return_dict_in_generate": True}
    given = {**arguments(name, inputs), "max_new_tokens": 2, **report}
    without = module.generate(**given, use_cache=False).logits
    found = module.generate(**given, **options).logits
    return not torch.allclose(torch.stack(without), torch.stack(found), atol=1e-4)


def scores_are_off(name: str) -> bool:
    """Whether beams were scored by other numbers than one forward over their tokens gives."""
    module, inputs = make(name)
    given = arguments(name, inputs)
    options = {"num_beams": 3, "max_new_tokens": NEW, "length_penalty": 0.0}
    out = module.generate(**given, **options, return_dict_in_generate=True, output_scores=True)
    with torch.no_grad():
        logits = module(**composed(name, module, given, out.sequences[:, :-1])).logits
    chosen = logits.log_softmax(-1).gather(2, out.sequences[:, 1:, None]).squeeze(-1)
    return not torch.allclose(chosen[:, -NEW:].sum(1), out.sequences_scores, atol=1e-4)

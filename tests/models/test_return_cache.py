"""generate(return_cache=True): the output, and the cache of one clean forward pass over it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LogitsProcessor, MaxLengthCriteria, StoppingCriteria

from tests.models.test_generation import of_characters
from tests.tiny_models import IS_TRANSFORMERS_5, NAMES, SPECS, make
from tests.tracing.plain import plain_hooks, state_of
from tracekit import Cache, LanguageModel
from tracekit.core.nest import first_tensor, tensors
from tracekit.errors import InputError, UnknownPathError, UnsupportedError

TEXT = "The Eiffel Tower is in the city of"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}


pytestmark = pytest.mark.usefixtures("without_gradients")


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def assert_same(cache: Cache, seen: dict[str, list[Any]]) -> None:
    """A cache of every module holds what plain hooks have seen, bit for bit."""
    assert set(cache) == set(seen)
    for path, values in seen.items():
        assert len(cache[path]) == len(values)
        for entry, value in zip(cache[path], values, strict=True):
            assert all(map(torch.equal, tensors(entry.output), tensors(value)))


# -- one sequence ---------------------------------------------------------------------------------


def test_the_cache_is_that_of_a_pass_over_the_output(tiny: LanguageModel) -> None:
    before = state_of(tiny.module)
    tokens, cache = tiny.generate(TEXT, return_cache=True, **GREEDY)
    assert torch.equal(tokens, tiny.generate(TEXT, **GREEDY))
    with plain_hooks(tiny.module) as seen:
        tiny.module(tokens, use_cache=False)
    assert_same(cache, seen)
    with tiny.trace(tokens) as tracer:
        own = tracer.cache()
    assert set(own) == set(cache)
    assert cache["transformer.h.1"].hidden.shape[1] == tokens.shape[1]
    assert state_of(tiny.module) == before


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("lm_head", {"lm_head"}),
        ("model.transformer.h.1", {"transformer.h.1"}),
        ("transformer.h.*.mlp", {"transformer.h.0.mlp", "transformer.h.1.mlp"}),
        (["lm_head", "transformer.h.0"], {"lm_head", "transformer.h.0"}),
        (lambda name: name.endswith("h.1.attn"), {"transformer.h.1.attn"}),
        (lambda path, part: "wp" in path and isinstance(part, nn.Embedding), {"transformer.wpe"}),
        ([lambda name: "ln_f" in name, "lm_head"], {"transformer.ln_f", "lm_head"}),
    ],
)  # fmt: skip
def test_names_are_filtered(names: Any, expected: set[str]) -> None:
    model = LanguageModel(make("gpt2")[0])
    _, cache = model.generate([11, 12], return_cache=True, names_filter=names, **GREEDY)
    assert set(cache) == {f"model.{name}" for name in expected}


def test_modules_of_the_model_are_names_too(tiny: LanguageModel) -> None:
    for names in (tiny.lm_head, [tiny.lm_head]):
        _, cache = tiny.generate(TEXT, return_cache=True, names_filter=names, **GREEDY)
        assert set(cache) == {"model.lm_head"}


def test_an_unknown_name_is_told_before_anything_is_generated(tiny: LanguageModel) -> None:
    with plain_hooks(tiny.module) as seen, pytest.raises(UnknownPathError, match="lm_head"):
        tiny.generate(TEXT, return_cache=True, names_filter="lm_haed", **GREEDY)
    assert not seen


def test_what_is_handed_back_is_in_order(tiny: LanguageModel) -> None:
    text, cache, prompt = tiny.generate(
        TEXT, return_cache=True, return_input_tokens=True, return_type="str", **GREEDY
    )
    ids = tiny.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    tokens = tiny.generate(TEXT, **GREEDY)
    assert text == tiny.tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert cache["lm_head"].output.shape[1] == tokens.shape[1]
    assert torch.equal(prompt, ids)


def test_a_dictionary_is_handed_back_with_its_cache(tiny: LanguageModel) -> None:
    output, cache = tiny.generate(TEXT, return_cache=True, output_logits=True, **GREEDY)
    logits = torch.stack(output.logits, 1)
    assert_close(cache["lm_head"].output[:, -6:-1].float(), logits)


def test_lasting_edits_are_made_in_the_pass_as_in_any_run(tiny: LanguageModel) -> None:
    with tiny.edit() as edited:
        edited.transformer.h[0].hidden[:, -1] *= 1.5
    tokens, cache = edited.generate(TEXT, return_cache=True, **GREEDY)
    assert torch.equal(tokens, edited.generate(TEXT, **GREEDY))
    with edited.trace(tokens) as tracer:
        own = tracer.cache()
    for path in own:
        assert all(map(torch.equal, tensors(cache[path][0].output), tensors(own[path][0].output)))
    _, clean = tiny.generate(TEXT, return_cache=True, **GREEDY)
    assert not torch.equal(cache["lm_head"].output, clean["lm_head"].output)


@pytest.mark.parametrize("chosen", ["prompt", "generated", -1, slice(-2, None), [1, 9]])
def test_lasting_edits_of_tokens_are_of_the_same_tokens_in_the_pass(
    chosen: Any, tiny: LanguageModel
) -> None:
    with tiny.edit() as edited:
        edited.transformer.h[1].output.at(chosen)[:] *= 3
    texts = [TEXT, "The movie"]
    _, cache = edited.generate(texts, return_cache=True, **GREEDY)
    with edited.generate(texts, **GREEDY) as tracer:
        steps = tracer.cache("transformer.h.*")
    for path in steps:
        sequence = steps.sequence(path)
        value, valid = first_tensor(cache[path].output), sequence.valid
        assert value is not None
        value = value[:, sequence.columns]
        torch.testing.assert_close(value[valid], sequence.as_subclass(Tensor)[valid])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 5},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 2, "eos_token_id": 127},
        {"num_beams": 3},
        {"freq_penalty": 0.5},
        {"stop_at_eos": False},
        {"stopping_criteria": MaxLengthCriteria(12)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_however_it_is_generated_the_cache_is_of_the_output(options: dict[str, Any]) -> None:
    module, _ = make("gpt2")
    model = LanguageModel(module)
    options = {**GREEDY, **options}
    ids = [11, 12, 13, 14, 11, 12, 13, 14, 11, 12]
    torch.manual_seed(1)
    tokens, cache = model.generate(ids, return_cache=True, **options)
    torch.manual_seed(1)
    assert torch.equal(tokens, model.generate(ids, **options))
    with plain_hooks(module) as seen:
        module(tokens, use_cache=False)
    assert_same(cache, seen)


def test_no_gradients_are_prepared(tiny: LanguageModel) -> None:
    with torch.enable_grad():
        _, cache = tiny.generate(TEXT, return_cache=True, **GREEDY)
    assert not cache["lm_head"].output.requires_grad


# -- where it is kept -----------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes that the tensors made on one device had while they lived."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.now = self.most = 0
        self.known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tensors(result):
            self.note(tensor)
        return result

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.device.type != self.device or storage in self.known:
            return
        size = storage.nbytes()
        self.known[storage] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.gone, size)

    def gone(self, size: int) -> None:
        self.now -= size


def peak_of(model: LanguageModel, device: str | None) -> tuple[int, Cache]:
    """The peak of a pass over 60 tokens, beyond what there was before, in bytes on the CPU."""
    gc.collect()
    options = {"max_new_tokens": 2, "do_sample": False, "names_filter": "transformer.h.*"}
    with Peak("cpu") as peak:
        _, cache = model.generate([*range(10, 68)], return_cache=True, device=device, **options)
    return peak.most, cache


def test_what_is_offloaded_is_not_all_on_the_models_device_at_once() -> None:
    module, _ = make("gpt2", n_layer=8)
    model = LanguageModel(module)
    for device in (None, "meta"):
        peak_of(model, device)  # what the model overwrites is learned in the first run
    kept, whole = peak_of(model, None)
    moved, away = peak_of(model, "meta")
    kinds = {value.device.type for path in away for value in tensors(away[path][0].output)}
    assert kinds == {"meta"}
    values = [value for path in whole for value in tensors(whole[path][0].output)]
    size = sum({s.data_ptr(): s.nbytes() for s in map(Tensor.untyped_storage, values)}.values())
    assert kept > size, "what stays there is there all at once"
    assert moved < size / 2
    assert kept - moved > size / 2


def test_the_model_is_never_moved(tiny: LanguageModel) -> None:
    before = [(weight.device, weight.data_ptr()) for weight in tiny.module.parameters()]
    tiny.generate(TEXT, return_cache=True, device="meta", **GREEDY)
    assert [(weight.device, weight.data_ptr()) for weight in tiny.module.parameters()] == before


def test_nothing_of_it_stays_alive(tiny: LanguageModel) -> None:
    gc.collect()
    gc.disable()
    try:
        _, cache = tiny.generate(TEXT, return_cache=True, **GREEDY)
        value = weakref.ref(cache["transformer.h.0"].hidden)
        del cache
        assert value() is None
    finally:
        gc.enable()


# -- rows -----------------------------------------------------------------------------------------


GENERATING = [name for name in NAMES if SPECS[name].generate]
if not IS_TRANSFORMERS_5:  # its steps are not what a pass computes
    GENERATING.remove("recurrent_gemma")
READ_PADDING = {"rwkv", "xlstm"}


def given_to(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a greedy generation, the last row padded where the family allows it."""
    given = {**SPECS[name].gen_inputs(inputs), **GREEDY, **SPECS[name].generation}
    mask = given.get("attention_mask")
    if mask is not None and len(mask) > 1 and name not in READ_PADDING:
        mask = mask.clone()
        mask[-1, slice(-3, None) if SPECS[name].family == "encdec" else slice(3)] = 0
        given["attention_mask"] = mask
        given["input_ids"] = given["input_ids"] * mask
    if SPECS[name].family == "vlm":
        given["suppress_tokens"] = [5]  # the model might put an image into its answer
    if name == "t5gemma" and not IS_TRANSFORMERS_5:
        given["use_cache"] = False  # its steps with a kv_cache are not those without
    return given


@pytest.mark.parametrize("name", GENERATING)
def test_the_cache_of_any_model_is_of_what_its_steps_computed(name: str) -> None:
    module, inputs = make(name)
    model = LanguageModel(module)
    given = given_to(name, inputs)
    output, cache = model.generate(
        **given, return_cache=True, names_filter=model, output_logits=True
    )
    found = cache["model"].output["logits"]
    steps = len(output.logits)
    assert_close(found[:, -steps - 1 : -1], torch.stack(output.logits, 1))


@pytest.mark.parametrize("name", ["t5", "whisper", "llava", "qwen2_audio"])
def test_encoders_and_towers_are_in_the_cache(name: str) -> None:
    if name not in SPECS:
        pytest.skip("not before transformers 5")
    module, inputs = make(name)
    model = LanguageModel(module)
    tokens, cache = model.generate(**given_to(name, inputs), return_cache=True)
    assert torch.equal(tokens, module.generate(**given_to(name, inputs)))
    for layers in SPECS[name].layers:
        assert any(path.startswith(f"model.{layers}") for path in cache)


def ended(model: LanguageModel, rows: list[list[int]], **options: Any) -> tuple[Any, Any, int]:
    """A padded batch whose second row ends first: output, cache, and how many tokens are new."""
    free = model.generate([rows[1]], do_sample=False, max_new_tokens=2, pad_token_id=0)
    end = int(free[0, -1])
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": end, **options}
    tokens, cache = model.generate(rows, return_cache=True, **options)
    return tokens, cache, int((tokens[1, max(map(len, rows)) :] == end).nonzero()[0]) + 1


@pytest.mark.parametrize("pad_is_end", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba2", "bamba", "gemma3_text"])
def test_each_row_is_what_the_row_alone_gives(name: str, pad_is_end: bool) -> None:
    module, _ = make(name)
    model = LanguageModel(module)
    rows = [[21, 22, 23, 24, 25, 26], [31, 32, 33]]
    free = model.generate([rows[1]], do_sample=False, max_new_tokens=2, pad_token_id=0)
    pad = int(free[0, -1]) if pad_is_end else 0
    tokens, cache, count = ended(model, rows, pad_token_id=pad)
    assert tokens.shape[1] > 6 + count, "the second row ends first"
    layer = f"{SPECS[name].layers[0]}.1"
    for row, own in ((0, slice(None)), (1, slice(3, 6 + count))):
        with plain_hooks(module) as seen:
            module(tokens[row : row + 1, own], use_cache=False)
        expected = next(tensors(seen[f"model.{layer}"][0]))
        assert_close(cache[layer].hidden[row : row + 1, own], expected)


class Row(StoppingCriteria):
    """Stops one row at a length."""

    def __init__(self, row: int, length: int) -> None:
        self.row, self.length = row, length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stopped = torch.zeros(len(input_ids), dtype=torch.bool)
        stopped[self.row] = input_ids.shape[1] >= self.length
        return stopped


def masks_of(model: LanguageModel, *args: Any, **options: Any) -> tuple[Tensor, list[list[int]]]:
    """The tokens, and the mask of the pass over them."""
    seen: list[Tensor] = []
    handle = model.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    try:
        tokens, _ = model.generate(*args, return_cache=True, **options)
    finally:
        handle.remove()
    return tokens, seen[-1].tolist()


@pytest.mark.parametrize("pad", [0, 9])
def test_a_row_that_a_criterion_has_stopped_ends_there(pad: int) -> None:
    model = LanguageModel(make("gpt2")[0])
    rows = [[11, 12, 13], [21, 22, 23]]
    options = {**GREEDY, "eos_token_id": 9, "pad_token_id": pad}
    tokens, mask = masks_of(model, rows, stopping_criteria=Row(1, 5), **options)
    assert tokens[1, 5:].tolist() == [pad] * 3
    assert mask == [[1] * 8, [1] * 5 + [0] * 3]
    options["eos_token_id"] = None  # then nobody pads: a row goes on until all have stopped
    tokens, mask = masks_of(model, rows, stopping_criteria=Row(1, 5), **options)
    assert mask == [[1] * 8] * 2


class Forced(LogitsProcessor):
    """Makes each row go on with given tokens."""

    def __init__(self, rows: list[list[int]], prompt: int) -> None:
        self.rows, self.prompt = rows, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = torch.full_like(scores, -100.0)
        each = len(scores) // len(self.rows)
        for row in range(len(scores)):
            scores[row, self.rows[row // each][input_ids.shape[1] - self.prompt]] = 0
        return scores


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("pad", [7, 90])
def test_a_row_that_a_string_has_stopped_ends_there(pad: int, beams: int) -> None:
    module, _ = make("gpt2")
    model = LanguageModel(module, tokenizer=of_characters(module))
    texts = ["abcdef", "ghijkl"]
    forced = Forced([model.tokenizer(text)["input_ids"] for text in ("mnopq", "rstuv")], 6)
    options = {**GREEDY, "eos_token_id": 90, "pad_token_id": pad, "stop_strings": ["st"]}
    options |= {"logits_processor": [forced], "num_beams": beams}
    tokens, mask = masks_of(model, texts, **options)
    assert model.tokenizer.decode(tokens[1, :9]) == "ghijklrst"
    assert tokens[1, 9:].tolist() == [pad] * 2
    is_told = beams == 1 or pad != 90  # else the first token of padding passes for the end
    assert mask == [[1] * 11, [1] * 9 + ([0] * 2 if is_told else [1, 0])]


def test_beams_that_ended_are_masked() -> None:
    model = LanguageModel(make("gpt2")[0])
    rows = [[11, 12, 13], [21, 22, 23]]
    forced = Forced([[31, 32, 33, 34, 35], [41, 9, 0, 0, 0]], 3)
    options = {**GREEDY, "num_beams": 3, "pad_token_id": 7, "eos_token_id": 9}
    tokens, mask = masks_of(model, rows, logits_processor=[forced], **options)
    assert tokens[1].tolist() == [21, 22, 23, 41, 9, 7, 7, 7]
    assert mask == [[1] * 8, [1] * 5 + [0] * 3]


@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper", "llava", "mamba"])
@pytest.mark.parametrize("beams", [1, 3])
def test_each_of_several_sequences_has_its_row(name: str, beams: int) -> None:
    if name not in SPECS:
        pytest.skip("not before transformers 5")
    module, inputs = make(name)
    model = LanguageModel(module)
    given = {**given_to(name, inputs), "do_sample": beams == 1, "num_beams": beams}
    torch.manual_seed(4)
    tokens, cache = model.generate(
        **given, num_return_sequences=3, return_cache=True, names_filter=model
    )
    torch.manual_seed(4)
    assert torch.equal(tokens, module.generate(**given, num_return_sequences=3))
    rows = len(next(iter(given.values())))
    assert len(cache["model"].output["logits"]) == 3 * rows


# -- what is given in other ways ------------------------------------------------------------------


def test_embeddings_have_a_cache(tiny: LanguageModel) -> None:
    ids = tiny.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    embedded = tiny.transformer.wte(ids)
    new, cache = tiny.generate(inputs_embeds=embedded, return_cache=True, **GREEDY)
    tokens, by_ids = tiny.generate(ids, return_cache=True, **GREEDY)
    assert torch.equal(new, tokens[:, -5:])
    assert_close(cache["transformer.h.1"].hidden, by_ids["transformer.h.1"].hidden)


def test_long_audio_is_not_one_pass() -> None:
    module, _ = make("whisper")
    config: Any = module.generation_config
    config.no_timestamps_token_id, config.max_initial_timestamp_index = 100, None
    model = LanguageModel(module)
    features = torch.randn(1, 8, 80, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedError, match="generated in several runs"):
        model.generate(
            input_features=features, attention_mask=torch.ones(1, 80), return_timestamps=True,
            return_cache=True, max_new_tokens=3, do_sample=False,
        )  # fmt: skip


def test_a_cache_has_no_device_that_torch_does_not_know(tiny: LanguageModel) -> None:
    with pytest.raises((RuntimeError, InputError)):
        tiny.generate(TEXT, return_cache=True, device="nowhere", **GREEDY)

"""Options of generate beside Hugging Face's own: the same as its own, or as a loop by hand."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)
from transformers.utils import logging as their_logging

from tests.models.test_generation import of_characters
from tests.tiny_models import make
from tracekit import LanguageModel, Model, TracekitWarning
from tracekit.errors import InputError, PaddingError, TracekitError, UnsupportedError

TEXT = "The Eiffel Tower is in the city of"
TEXTS = [TEXT, "The Eiffel"]
LENGTH = 6
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": LENGTH}


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    """Its tokenizer puts a <bos> in front, and its generation has no end."""
    return LanguageModel("tracekit/tiny")


def encoded(model: LanguageModel, text: Any = TEXT) -> dict[str, Tensor]:
    several = isinstance(text, list)
    options = {"padding_side": "left", "padding": True} if several else {}
    return dict(model.tokenizer(text, return_tensors="pt", **options))


def theirs(model: LanguageModel, text: Any = TEXT, seed: int = 0, **options: Any) -> Any:
    """What transformers generates with the module itself."""
    torch.manual_seed(seed)
    return model.module.generate(**encoded(model, text), **{**GREEDY, **options})


def mine(model: LanguageModel, text: Any = TEXT, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(text, **{**GREEDY, **options})


def traced(model: LanguageModel, text: Any = TEXT, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    with model.generate(text, **{**GREEDY, **options}) as tracer:
        result = tracer.result
    return result


both = pytest.mark.parametrize("way", [mine, traced], ids=["plain", "traced"])


# -- sampling -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_p": 0.6},
        {"temperature": 3.0},
        {"repetition_penalty": 1.7},
        {"top_k": 9, "top_p": 0.9, "temperature": 1.5, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_options_of_sampling_are_those_of_transformers(
    options: dict[str, Any], way: Any, tiny: LanguageModel
) -> None:
    options = {"do_sample": True, "max_new_tokens": 12, **options}
    assert torch.equal(way(tiny, seed=5, **options), theirs(tiny, seed=5, **options))


@both
def test_a_temperature_of_zero_is_greedy(way: Any, tiny: LanguageModel) -> None:
    assert torch.equal(way(tiny, do_sample=True, temperature=0.0), theirs(tiny))


def by_hand(module: Any, ids: Tensor, penalty: float, steps: int, **more: Any) -> Tensor:
    """Greedy decoding of one row, each logit less by how often its token has come."""
    key = "decoder_input_ids" if module.config.is_encoder_decoder else "input_ids"
    for _ in range(steps):
        logits = module(**{key: ids}, **more).logits[:, -1].float()
        logits -= penalty * torch.bincount(ids[0], minlength=logits.shape[1])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@both
@pytest.mark.parametrize("penalty", [0.1, 0.5, 2.0, -0.5])
def test_a_frequency_penalty_is_taken_off_for_each_time_that_a_token_has_come(
    penalty: float, way: Any
) -> None:
    module, _ = make("gpt2")
    model = LanguageModel(module)
    ids = torch.tensor([[11, 12, 11, 13, 14, 11, 12]])
    expected = by_hand(module, ids, penalty, 12)
    plain = module.generate(ids, do_sample=False, max_new_tokens=12)
    assert penalty == 0.1 or not torch.equal(plain, expected)
    assert torch.equal(way(model, ids, max_new_tokens=12, freq_penalty=penalty), expected)


def test_a_frequency_penalty_of_zero_changes_nothing(tiny: LanguageModel) -> None:
    assert torch.equal(mine(tiny, freq_penalty=0.0), theirs(tiny))


def test_padding_has_no_frequency() -> None:
    module, _ = make("llama")
    model = LanguageModel(module)
    rows = [[21, 22, 23, 24, 21, 22, 23, 24], [31, 32, 33]]
    tokens = model.generate(rows, pad_token_id=0, freq_penalty=0.3, **GREEDY)
    for row, found in zip(rows, tokens, strict=True):
        alone = by_hand(module, torch.tensor([row]), 0.3, LENGTH)
        assert torch.equal(found[-len(alone[0]) :], alone[0])
    # the token of padding itself: if it had a frequency, it would be the best, or never come
    for penalty in (3.0, -3.0):
        batch = model.generate(rows, pad_token_id=0, freq_penalty=penalty, **GREEDY)
        alone = by_hand(module, torch.tensor(rows[1:]), penalty, LENGTH)
        assert torch.equal(batch[1, 5:], alone[0])


def test_the_tokens_of_a_decoder_have_a_frequency() -> None:
    module, inputs = make("t5")
    ids = inputs["input_ids"][:1]
    expected = by_hand(module, torch.tensor([[0]]), 0.4, LENGTH, input_ids=ids)
    found = LanguageModel(module).generate(ids, freq_penalty=0.4, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3}], ids=str)
def test_a_frequency_penalty_goes_with_several_sequences(options: dict[str, Any]) -> None:
    module, _ = make("gpt2")
    model = LanguageModel(module)
    rows = [[11, 12, 13, 14], [21, 22]]
    options = {**options, "do_sample": "num_beams" not in options, "max_new_tokens": 5}
    torch.manual_seed(2)
    found = model.generate(rows, freq_penalty=0.7, **options)
    torch.manual_seed(2)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    penalty = LogitsProcessorList([Frequency(0.7, mask)])
    ids = torch.tensor([[11, 12, 13, 14], [0, 0, 21, 22]])
    expected = module.generate(ids, attention_mask=mask, logits_processor=penalty, **options)
    assert torch.equal(found, expected)


class Frequency(LogitsProcessor):
    """The penalty, written out."""

    def __init__(self, penalty: float, mask: Tensor) -> None:
        self.penalty, self.mask = penalty, mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            mask = self.mask[row // (len(input_ids) // len(self.mask))]
            for column, token in enumerate(ids.tolist()):
                if column >= len(mask) or mask[column]:
                    scores[row, token] -= self.penalty
        return scores


class Only(LogitsProcessor):
    """Leaves some tokens possible, and notes the scores that it is given."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores.clone())
        kept = torch.full_like(scores, float("-inf"))
        kept[:, self.tokens] = scores[:, self.tokens]
        return kept


@pytest.mark.parametrize("kind", [list, LogitsProcessorList])
def test_the_users_own_processors_come_before_the_penalty(kind: Any) -> None:
    module, _ = make("gpt2")
    model = LanguageModel(module)
    own = Only([60, 61, 62])
    processors_given = kind([own])
    ids = torch.tensor([[11, 12, 13]])
    tokens = model.generate(
        ids, logits_processor=processors_given, freq_penalty=100.0, do_sample=False,
        max_new_tokens=6,
    )  # fmt: skip
    counts = torch.bincount(tokens[0, 3:], minlength=63)
    assert counts[60:63].tolist() == [2, 2, 2], "each is taken again when all have come"
    assert len(processors_given) == 1, "the user's own list is as it was"
    first = module(ids).logits[:, -1]
    torch.testing.assert_close(own.seen[0], first)


# -- where a generation ends ----------------------------------------------------------------------


def with_an_end(model_type: str = "gpt2") -> tuple[LanguageModel, Tensor, Tensor, int]:
    """A model with an end, a prompt, what it generates without an end, and where that is."""
    module, inputs = make(model_type)
    ids = inputs["input_ids"][:1]
    free = module.generate(ids, **GREEDY)
    config: Any = module.generation_config
    config.eos_token_id = int(free[0, -LENGTH + 2])
    end = free[0, -LENGTH:].tolist().index(config.eos_token_id) + 1
    return LanguageModel(module), ids, free, end


@both
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
def test_a_generation_that_does_not_stop_at_its_end(model_type: str, way: Any) -> None:
    model, ids, free, end = with_an_end(model_type)
    before = model.module.generation_config.to_dict()
    stopped = way(model, ids)
    assert stopped.shape[1] == free.shape[1] - LENGTH + end < free.shape[1]
    assert torch.equal(way(model, ids, stop_at_eos=True), stopped)
    assert torch.equal(way(model, ids, stop_at_eos=False), free)
    assert model.module.generation_config.to_dict() == before


def test_a_generation_without_an_end_is_not_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids, free, _ = with_an_end()
    config = GenerationConfig(pad_token_id=0, eos_token_id=7, do_sample=False)
    config.max_new_tokens = LENGTH
    before = config.to_dict()
    level = their_logging.get_verbosity()
    their_logging.set_verbosity(logging.WARNING)
    their_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            plain = model.generate(ids, stop_at_eos=False, **GREEDY)
            configured = model.generate(ids, stop_at_eos=False, generation_config=config)
    finally:
        their_logging.disable_propagation()
        their_logging.set_verbosity(level)
    assert torch.equal(plain, free)
    assert torch.equal(configured, free)
    assert config.to_dict() == before
    assert caplog.messages == []


def test_a_language_model_within_a_model_does_not_stop_either() -> None:
    module, inputs = make("blip_2")
    model = LanguageModel(module)
    free = module.generate(**inputs, **GREEDY)
    module.language_model.generation_config.eos_token_id = int(free[0, -1])
    assert model.generate(**inputs, **GREEDY).shape[1] < free.shape[1]
    assert torch.equal(model.generate(**inputs, stop_at_eos=False, **GREEDY), free)


def test_whisper_stops_at_its_end() -> None:
    module, inputs = make("whisper")
    model = LanguageModel(module)
    with pytest.raises(UnsupportedError, match="give min_new_tokens="):
        model.generate(input_features=inputs["input_features"], stop_at_eos=False, **GREEDY)


def test_steps_are_counted_from_the_end_where_there_is_none() -> None:
    model, ids, _, _ = with_an_end()
    with model.generate(ids, stop_at_eos=False, **GREEDY) as tracer:
        for step in tracer.iter[-1]:
            last = step
    assert last == LENGTH - 1


@both
def test_the_end_may_be_given(way: Any, tiny: LanguageModel) -> None:
    end = int(theirs(tiny)[0, -3])
    expected = theirs(tiny, eos_token_id=end)
    assert expected.shape[1] < theirs(tiny).shape[1]
    assert torch.equal(way(tiny, eos_token_id=end), expected)
    assert torch.equal(way(tiny, eos_token_id=[end, 3]), expected)


class Until(StoppingCriteria):
    """Stops at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@both
@pytest.mark.parametrize("kind", [lambda one: one, lambda one: [one], lambda one: (one,)])
def test_stopping_criteria_may_be_a_single_one(kind: Any, way: Any, tiny: LanguageModel) -> None:
    length = encoded(tiny)["input_ids"].shape[1] + 3
    found = way(tiny, stopping_criteria=kind(Until(length)))
    assert torch.equal(found, theirs(tiny)[:, :length])


def test_any_model_takes_a_single_criterion_with_a_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, inputs = make("gpt2")
    tokens = Model(module).generate(
        inputs["input_ids"], stopping_criteria=Until(10), progress=True, **GREEDY
    )
    assert tokens.shape[1] == 10
    assert "2/6" in capsys.readouterr().err


@both
def test_stop_strings_find_the_tokenizer(way: Any) -> None:
    module, _ = make("gpt2")
    model = LanguageModel(module, tokenizer=of_characters(module))
    free = theirs(model, "abcdef")
    word = model.tokenizer.decode(free[0, -5:-3])
    expected = theirs(model, "abcdef", stop_strings=[word], tokenizer=model.tokenizer)
    assert expected.shape[1] < free.shape[1]
    assert torch.equal(way(model, "abcdef", stop_strings=word), expected)
    config = GenerationConfig(stop_strings=[word], max_new_tokens=LENGTH, do_sample=False)
    config.pad_token_id = 0
    assert torch.equal(model.generate("abcdef", generation_config=config), expected)


# -- how text becomes tokens ----------------------------------------------------------------------


def without_bos(model: LanguageModel) -> LanguageModel:
    """The same model, with a tokenizer that puts nothing in front."""
    found = PreTrainedTokenizerFast(
        tokenizer_object=type(model.tokenizer._tokenizer).from_str(
            model.tokenizer._tokenizer.to_str()
        ),
        bos_token="<bos>",
        pad_token="<pad>",
    )
    found._tokenizer.post_processor = processors.ByteLevel()  # pyright: ignore
    return LanguageModel(model.module, tokenizer=found)


def tokens_of(model: LanguageModel, text: Any, **options: Any) -> list[list[int]]:
    """What the model's forward gets, without padding."""
    with model.trace(text, **options):
        given = dict(model.inputs[1])
    rows = zip(given["input_ids"], given["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


@pytest.mark.parametrize("text", [TEXT, TEXTS, ["The Eiffel Tower", "a", TEXT]], ids=repr)
def test_a_beginning_of_sequence_is_in_front_or_is_not(text: Any, tiny: LanguageModel) -> None:
    texts = text if isinstance(text, list) else [text]
    bare = [tiny.tokenizer(each, add_special_tokens=False)["input_ids"] for each in texts]
    with_it = [[0, *row] for row in bare]
    plain = without_bos(tiny)
    for puts_it, model in ((True, tiny), (False, plain)):
        assert tokens_of(model, text) == (with_it if puts_it else bare)
        assert tokens_of(model, text, prepend_bos=None) == (with_it if puts_it else bare)
        assert tokens_of(model, text, prepend_bos=True) == with_it
        assert tokens_of(model, text, prepend_bos=False) == bare


def test_what_the_text_itself_begins_with_stays(tiny: LanguageModel) -> None:
    text = "<bos>" + TEXT
    bare = tiny.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with pytest.warns(TracekitWarning, match="the tokenizer puts one more in front"):
        assert tokens_of(tiny, text) == [[0, 0, *bare]]
    with pytest.warns(TracekitWarning, match="the tokenizer puts one more in front"):
        assert tokens_of(tiny, text, prepend_bos=True) == [[0, 0, *bare]]
    assert tokens_of(tiny, text, prepend_bos=False) == [[0, *bare]]
    plain = without_bos(tiny)
    assert tokens_of(plain, text, prepend_bos=True) == [[0, *bare]]
    assert tokens_of(plain, text, prepend_bos=False) == [[0, *bare]]


def test_tokens_are_taken_as_they_are(tiny: LanguageModel) -> None:
    for given in ([11, 12], torch.tensor([[11, 12]])):
        assert tokens_of(tiny, given, prepend_bos=True) == [[11, 12]]


def test_a_tokenizer_without_a_beginning_has_none_to_put_in_front(tiny: LanguageModel) -> None:
    plain = without_bos(tiny)
    plain.tokenizer.bos_token = None
    assert tokens_of(plain, TEXT, prepend_bos=False) == tokens_of(plain, TEXT)
    with pytest.raises(InputError, match="prepend_bos=True needs a tokenizer with a bos_token"):
        plain.generate(TEXT, prepend_bos=True, **GREEDY)


@pytest.mark.parametrize("has_bos", [True, False])
def test_a_generation_begins_as_it_is_told(has_bos: bool, tiny: LanguageModel) -> None:
    ids = tiny.tokenizer(TEXT, add_special_tokens=has_bos, return_tensors="pt")["input_ids"]
    expected = tiny.module.generate(ids, **GREEDY)
    assert torch.equal(tiny.generate(TEXT, prepend_bos=has_bos, **GREEDY), expected)
    with tiny.generate(TEXT, prepend_bos=has_bos, **GREEDY) as tracer:
        tokens = tracer.result
    assert torch.equal(tokens, expected)
    with tiny.generate(prepend_bos=has_bos, **GREEDY) as tracer:
        with tracer.invoke(TEXT):
            tokens = tracer.result
    assert torch.equal(tokens, expected)


def test_every_run_is_told_how_text_becomes_tokens(tiny: LanguageModel) -> None:
    length = len(tiny.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    with tiny.trace(prepend_bos=False) as tracer:
        with tracer.invoke(TEXT):
            invoked = tiny.lm_head.output
    with tiny.trace() as tracer:
        with tracer.invoke(TEXT, prepend_bos=False):
            alone = tiny.lm_head.output
    with tiny.scan(TEXT, prepend_bos=False):
        scanned = tiny.lm_head.output
    called = tiny(TEXT, prepend_bos=False).logits
    for logits in (invoked, alone, scanned, called):
        assert logits.shape[1] == length


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_on_the_side_given_for_one_call(side: str, tiny: LanguageModel) -> None:
    with tiny.trace(TEXTS, padding_side=side):
        mask = tiny.inputs[1]["attention_mask"]
        logits = tiny.lm_head.output
    with tiny.trace(padding_side=side) as tracer:
        with tracer.invoke(TEXTS[0]):
            tiny.lm_head.output
        with tracer.invoke(TEXTS[1]):
            invoked = tiny.lm_head.output
    assert mask[1, 0] == (side == "right")
    own = mask[1].bool()
    alone = tiny.module(**encoded(tiny, TEXTS[1])).logits
    torch.testing.assert_close(logits[1:, own], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(invoked[:, own], alone, atol=1e-5, rtol=1e-4)


def test_a_decoder_is_not_padded_on_the_right(tiny: LanguageModel) -> None:
    expected = theirs(tiny, TEXTS)
    assert torch.equal(tiny.generate(TEXTS, padding_side="left", **GREEDY), expected)
    with pytest.raises(PaddingError, match="on the right"):
        tiny.generate(TEXTS, padding_side="right", **GREEDY)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"padding_side": "middle"}, "'left' or 'right', not 'middle'"),
        ({"prepend_bos": "yes"}, "True, False or None"),
        ({"return_type": "logits"}, "'tokens', 'str' or 'input', not 'logits'"),
        ({"use_past_kv_cache": True, "use_cache": False}, "two names of one option"),
        ({"stop_at_eos": False, "eos_token_id": 3}, "give one of them"),
        ({"return_type": "str", "output_logits": True}, "leave one out"),
        ({"device": "cpu"}, "give return_cache=True"),
        ({"names_filter": "lm_head"}, "give return_cache=True"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(
    option: dict[str, Any], says: str, tiny: LanguageModel
) -> None:
    with pytest.raises(InputError, match=says):
        tiny.generate(TEXT, **option, **GREEDY)


# -- what is handed back --------------------------------------------------------------------------


def test_text_is_handed_back_for_text(tiny: LanguageModel) -> None:
    one = tiny.tokenizer.decode(theirs(tiny)[0], skip_special_tokens=True)
    rows = theirs(tiny, TEXTS)
    many = [tiny.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert one.startswith(TEXT)
    for kind in ("str", "input"):
        assert tiny.generate(TEXT, return_type=kind, **GREEDY) == one
        assert tiny.generate([TEXT], return_type=kind, **GREEDY) == [one]
        assert tiny.generate(TEXTS, return_type=kind, **GREEDY) == many
    ids = encoded(tiny)["input_ids"]
    assert torch.equal(tiny.generate(ids, return_type="input", **GREEDY), theirs(tiny))
    assert torch.equal(tiny.generate(TEXT, return_type="tokens", **GREEDY), theirs(tiny))
    assert tiny.generate(ids, return_type="str", **GREEDY) == [one]
    several = tiny.generate(TEXT, return_type="str", num_beams=2, num_return_sequences=2, **GREEDY)
    assert len(several) == 2


def test_text_needs_a_tokenizer() -> None:
    model = LanguageModel(make("gpt2")[0])
    with pytest.raises(InputError, match="return_type='str' needs a tokenizer"):
        model.generate([11, 12], return_type="str", **GREEDY)


@both
def test_logits_come_in_a_dictionary(way: Any, tiny: LanguageModel) -> None:
    expected = theirs(tiny, output_logits=True, return_dict_in_generate=True)
    found = way(tiny, output_logits=True)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.logits, expected.logits))
    bare = way(tiny, output_logits=True, return_dict_in_generate=False)
    assert torch.equal(bare, expected.sequences)


@pytest.mark.parametrize("value", [True, False])
def test_use_past_kv_cache_is_use_cache(value: bool, tiny: LanguageModel) -> None:
    with tiny.generate(TEXT, use_past_kv_cache=value, **GREEDY) as tracer:
        widths = [tiny.transformer.h[0].hidden.shape[1] for _ in tracer.iter[1:]]
        tokens = tracer.result
    assert (set(widths) == {1}) is value
    assert torch.equal(tokens, theirs(tiny))
    same = tiny.generate(TEXT, use_past_kv_cache=value, use_cache=value, **GREEDY)
    assert torch.equal(tokens, same)


def test_verbose_shows_a_bar(tiny: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.generate(TEXT, verbose=False, **GREEDY)
    assert capsys.readouterr().err == ""
    assert torch.equal(tiny.generate(TEXT, verbose=True, **GREEDY), theirs(tiny))
    assert f"{LENGTH}/{LENGTH}" in capsys.readouterr().err


def test_the_tokens_of_the_prompt_are_handed_back(tiny: LanguageModel) -> None:
    tokens, prompt = tiny.generate(TEXTS, return_input_tokens=True, **GREEDY)
    assert torch.equal(prompt, encoded(tiny, TEXTS)["input_ids"])
    assert torch.equal(tokens, theirs(tiny, TEXTS))
    text, prompt = tiny.generate(
        TEXT, return_input_tokens=True, prepend_bos=False, return_type="str", **GREEDY
    )
    assert text.startswith(TEXT)
    assert prompt[0, 0] != tiny.tokenizer.bos_token_id
    embedded = tiny.transformer.wte(torch.tensor([[11, 12]]))
    with pytest.raises(InputError, match="no tokens were given"):
        tiny.generate(inputs_embeds=embedded, return_input_tokens=True, **GREEDY)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"return_type": "str"}, r"read tracer\.result, and decode it"),
        ({"return_cache": True}, r"cache = tracer\.cache\(\)"),
        ({"return_input_tokens": True}, r"read `model\.inputs` in the block"),
        ({"names_filter": "lm_head"}, r"tracer\.cache\(modules\)"),
        ({"device": "cpu"}, r"tracer\.cache\(device="),
    ],
    ids=str,
)
def test_a_tracer_is_not_told_what_to_hand_back(
    option: dict[str, Any], says: str, tiny: LanguageModel
) -> None:
    with pytest.raises(InputError, match=says):
        with tiny.generate(TEXT, **option, **GREEDY):
            pass
    with pytest.raises(InputError, match=says):
        tiny.generation(TEXT, **option, **GREEDY)


# -- what is unknown ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("misspelled", "near"),
    [
        ("max_new_token", "max_new_tokens"),
        ("frequency_penalty", "freq_penalty"),
        ("stop_at_eso", "stop_at_eos"),
        ("top_ks", "top_k"),
        ("attention_masks", "attention_mask"),
    ],
)
def test_a_misspelled_option_is_told(
    misspelled: str, near: str, way: Any, tiny: LanguageModel
) -> None:
    with pytest.raises(InputError, match=f"knows no {misspelled}=; did you mean {near}=") as found:
        way(tiny, **{misspelled: 3})
    assert isinstance(found.value, ValueError)


def test_any_other_unknown_option_is_transformers_to_refuse(tiny: LanguageModel) -> None:
    with pytest.raises(ValueError, match="not used by the model") as found:
        tiny.generate(TEXT, whatever=3, **GREEDY)
    assert not isinstance(found.value, TracekitError)


@pytest.mark.parametrize(
    ("option", "cure"),
    [
        ("freq_penalty", r"`with model\.generate\(input, freq_penalty=\.\.\.\) as tracer:`"),
        ("stop_at_eos", r"`with model\.generate"),
        ("verbose", r"`with model\.generate"),
        ("return_cache", r"`cache = tracer\.cache\(\)`"),
        ("device", r"tracer\.cache\(device="),
    ],
)
def test_a_trace_has_no_options_of_generate(option: str, cure: str, tiny: LanguageModel) -> None:
    with pytest.raises(InputError, match=f"{option}= is an option of generate.*{cure}"):
        with tiny.trace(TEXT, **{option: True}):
            pass


def test_invokes_share_the_options_of_their_generation(tiny: LanguageModel) -> None:
    module, _ = make("gpt2")
    model = LanguageModel(module)
    rows = [[11, 12, 13, 14], [21, 22]]
    config: Any = module.generation_config
    config.eos_token_id = int(module.generate(torch.tensor(rows[:1]), **GREEDY)[0, 5])
    found: list[Tensor] = []
    with model.generate(freq_penalty=0.5, stop_at_eos=False, **GREEDY) as tracer:
        for row in rows:
            with tracer.invoke(row):
                found.append(tracer.result)
    for row, tokens in zip(rows, found, strict=True):
        alone = by_hand(module, torch.tensor([row]), 0.5, LENGTH)
        assert torch.equal(tokens[0, -len(alone[0]) :], alone[0])

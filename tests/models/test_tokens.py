"""Text to tokens and back: what a trace feeds, to the token; and no beginning twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.small_tokenizers import BEGIN, END, bpe, sentencepiece
from tests.tiny_models import make
from tracekit import LanguageModel, TracekitWarning
from tracekit.errors import InputError, TokenError

pytestmark = pytest.mark.usefixtures("without_gradients")

TEXT = "The cat sat on the mat"
TEXTS = ["the cat", "Paris is in France; the Eiffel Tower", "dog"]
CHAT = [{"role": "user", "content": "the cat"}]
LONGER = [*CHAT, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "the dog"}]
KINDS = ["plain", "begin", "end", "both", "sentencepiece"]
VOCABULARY = 340


def tokenizer_of(kind: str) -> Any:
    if kind == "sentencepiece":
        return sentencepiece()
    return bpe(begin=kind in ("begin", "both"), end=kind in ("end", "both"), chat=True)


def model_of(kind: str, family: str = "llama") -> LanguageModel:
    return LanguageModel(make(family, vocab_size=VOCABULARY)[0], tokenizer=tokenizer_of(kind))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return model_of(request.param)


@pytest.fixture
def chatty() -> LanguageModel:
    return model_of("both")


def fed(model: LanguageModel, given: Any, **options: Any) -> Tensor:
    with model.trace(given, **options):
        ids = model.inputs[1]["input_ids"]
    return ids


# -- to_tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [None, True, False])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_the_tokens_are_those_that_a_trace_feeds(
    model: LanguageModel, side: str | None, bos: bool | None, eos: bool | None
) -> None:
    options = {"padding_side": side, "prepend_bos": bos, "append_eos": eos}
    for given in (TEXT, TEXTS, [[5, 6, 7], [8]], [5, 6]):
        assert torch.equal(model.to_tokens(given, **options), fed(model, given, **options))


def test_the_tokens_are_those_that_an_invoke_a_call_and_a_generation_begin_with(
    chatty: LanguageModel,
) -> None:
    options = {"prepend_bos": True, "append_eos": False}
    tokens = chatty.to_tokens(TEXTS, **options)
    with chatty.trace(**options) as tracer:
        with tracer.invoke(TEXTS):
            invoked = chatty.inputs[1]["input_ids"]
    assert torch.equal(invoked, tokens)
    generated = chatty.generate(TEXTS, max_new_tokens=1, do_sample=False, **options)
    assert torch.equal(generated[:, :-1], tokens)
    assert torch.equal(chatty.prefill(TEXT, **options).tokens, chatty.to_tokens(TEXT, **options))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_the_ends_are_there_or_not_whatever_the_tokenizer_does(
    model: LanguageModel, bos: bool, eos: bool
) -> None:
    tokenizer = model.tokenizer
    own = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = [tokenizer.bos_token_id] * bos + own + [tokenizer.eos_token_id] * eos
    assert model.to_tokens(TEXT, prepend_bos=bos, append_eos=eos).tolist() == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_tokenizer_puts_at_the_ends_is_told(kind: str) -> None:
    model = model_of(kind)
    assert model.tokenizer_prepends_bos is (kind in ("begin", "both", "sentencepiece"))
    assert model.tokenizer_appends_eos is (kind in ("end", "both"))


def test_left_alone_the_ends_are_the_tokenizers(model: LanguageModel) -> None:
    assert model.to_tokens(TEXT).tolist() == [model.tokenizer(TEXT)["input_ids"]]


@pytest.mark.parametrize("text", [f"{TEXT}{END}", f"{TEXT}{END}{END}", END])
def test_an_end_that_the_text_itself_has_stays(text: str, model: LanguageModel) -> None:
    own = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    once_more = [model.tokenizer.eos_token_id] * model.tokenizer_appends_eos
    assert model.to_tokens(text, prepend_bos=False, append_eos=False).tolist() == [own]
    found = model.to_tokens(text, prepend_bos=False, append_eos=True)
    assert found.tolist() == [own + once_more]  # as it is with prepend_bos=


def test_rows_are_padded_as_hugging_face_pads_them(model: LanguageModel) -> None:
    for side in ("left", "right"):
        expected = model.tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
        assert torch.equal(model.to_tokens(TEXTS, padding_side=side), expected["input_ids"])
    assert torch.equal(
        model.to_tokens(TEXTS), model.to_tokens(TEXTS, padding_side="left")
    )  # a decoder


def test_a_tokenizer_without_an_end_has_none_to_put_behind(tiny: LanguageModel) -> None:
    with pytest.raises(InputError, match="append_eos=True needs a tokenizer with an eos_token"):
        tiny.to_tokens(TEXT, append_eos=True)
    assert torch.equal(tiny.to_tokens(TEXT, append_eos=False), tiny.to_tokens(TEXT))


def test_asking_for_tokens_loads_no_weights() -> None:
    model = LanguageModel("tracekit/tiny", dispatch=False)
    assert model.to_tokens(TEXT).device.type == "cpu"
    assert all(weight.is_meta for weight in model.module.parameters())


def test_inputs_say_what_is_padding_and_tokens_alone_are_warned_of(chatty: LanguageModel) -> None:
    with chatty.trace(TEXTS) as tracer:
        expected = tracer.result.logits
    with chatty.trace(chatty.to_inputs(TEXTS)) as tracer:
        found = tracer.result.logits
    assert torch.equal(found, expected)
    tokens = chatty.to_tokens(TEXTS)
    with pytest.warns(TracekitWarning, match=r"begin with the token of padding .*to_inputs"):
        with chatty.trace(tokens) as tracer:
            wrong = tracer.result.logits
    assert not torch.allclose(wrong[0], expected[0], atol=1e-3)  # what is warned of
    with chatty.trace(tokens, attention_mask=chatty.to_inputs(TEXTS)["attention_mask"]) as tracer:
        assert torch.equal(tracer.result.logits, expected)


def test_a_beginning_that_is_padding_too_is_not_warned_of() -> None:
    model = model_of("plain")
    model.tokenizer.pad_token = BEGIN
    bos = model.tokenizer.bos_token_id
    assert fed(model, torch.tensor([[bos, 5, 6]])).shape == (1, 3)
    with pytest.warns(TracekitWarning, match="token of padding"):
        fed(model, torch.tensor([[bos, bos, 6]]))


# -- too long -------------------------------------------------------------------------------------


def test_what_the_model_has_no_positions_for_is_left_out_with_a_warning(
    model: LanguageModel,
) -> None:
    text = "the cat " * 100
    whole = model.to_tokens(text, truncate=False)
    assert whole.shape[1] > 128
    assert whole.tolist() == [model.tokenizer(text)["input_ids"]]
    with pytest.warns(TracekitWarning, match=f"for 128 tokens, and the input has {whole.shape[1]}"):
        tokens = model.to_tokens(text)
    expected = model.tokenizer(text, truncation=True, max_length=128)["input_ids"]
    assert tokens.tolist() == [expected]


def test_a_shortened_text_keeps_what_was_asked_for_at_its_ends() -> None:
    model, text = model_of("plain"), "the cat " * 100
    with pytest.warns(TracekitWarning, match="left out"):
        tokens = model.to_tokens([text, "cat"], prepend_bos=True, append_eos=True)
    assert tokens.shape == (2, 128)
    assert tokens[0, 0] == model.tokenizer.bos_token_id
    assert tokens[0, -1] == model.tokenizer.eos_token_id
    assert tokens[1, -3] == model.tokenizer.bos_token_id


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "roberta", "bart", "albert", "distilbert"])
def test_as_many_tokens_are_left_as_the_model_runs(name: str) -> None:
    model = LanguageModel(make(name)[0], tokenizer=bpe())
    with pytest.warns(TracekitWarning, match="left out"):
        length = model.to_tokens("the cat " * 100).shape[1]
    ids = torch.full((1, length), 5)
    more = {"decoder_input_ids": ids[:, :2]} if name == "bart" else {}
    model.module(ids, **more)
    with pytest.raises((IndexError, RuntimeError)):
        model.module(torch.full((1, length + 1), 5), **more)


def test_a_model_without_a_bound_shortens_nothing() -> None:
    model = LanguageModel(make("bloom", vocab_size=VOCABULARY)[0], tokenizer=bpe())
    assert model.to_tokens("the cat " * 200).shape[1] > 300


# -- no beginning twice ---------------------------------------------------------------------------


def invoked(model: LanguageModel, text: str) -> None:
    with model.trace() as tracer, tracer.invoke(text):
        model.lm_head.output


RUNS: list[Callable[[LanguageModel, str], object]] = [
    fed,
    invoked,
    lambda model, text: model.generate(text, max_new_tokens=1, do_sample=False),
    lambda model, text: model.to_tokens([TEXT, text]),
    lambda model, text: model(text),
]


@pytest.mark.parametrize("run", RUNS)
def test_a_text_that_brings_its_beginning_is_noticed(
    run: Callable[[LanguageModel, str], object],
) -> None:
    model = model_of("begin")
    text = model.tokenizer.apply_chat_template(CHAT, tokenize=False)
    with pytest.warns(TracekitWarning, match="prepend_bos=False leaves it at the one"):
        run(model, text)
    expected = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert model.to_tokens(text, prepend_bos=False).tolist() == [expected]


def test_where_nothing_is_put_in_front_a_text_may_bring_its_beginning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = model_of("plain")
    assert model.to_tokens(BEGIN + TEXT)[0].tolist().count(model.tokenizer.bos_token_id) == 1
    assert not recwarn.list


def test_text_that_is_gone_on_from_behind_its_end_is_noticed() -> None:
    model = model_of("end")
    options = {"max_new_tokens": 1, "do_sample": False}
    with pytest.warns(TracekitWarning, match="append_eos=False leaves it out"):
        ended = model.generate(TEXT, **options)
    assert ended[0, -2] == model.tokenizer.eos_token_id  # as transformers does
    with pytest.warns(TracekitWarning, match="append_eos=False"):
        model.prefill(TEXT)
    with pytest.warns(TracekitWarning, match="append_eos=False"):
        with model.generate(**options) as tracer, tracer.invoke(TEXT):
            model.lm_head.output
    own = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert model.generate(TEXT, append_eos=False, **options)[0, :-1].tolist() == own
    assert model.generate(TEXT, append_eos=True, **options).shape == ended.shape
    assert fed(model, TEXT).tolist() == [[*own, model.tokenizer.eos_token_id]]  # nothing goes on


# -- conversations --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "begin", "both"])
@pytest.mark.parametrize("messages", [CHAT, LONGER, LONGER[:2]], ids=len)
def test_a_conversation_is_what_its_template_says(kind: str, messages: Any) -> None:
    model = model_of(kind)
    is_open = messages[-1]["role"] != "assistant"
    text = model.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=is_open
    )
    expected = [model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert expected[0].count(model.tokenizer.bos_token_id) == 1
    assert model.to_chat_tokens(messages).tolist() == expected
    assert model.to_tokens(messages).tolist() == expected
    assert fed(model, messages).tolist() == expected
    generated = model.generate(messages, max_new_tokens=1, do_sample=False)
    assert generated[:, :-1].tolist() == expected
    with model.trace() as tracer, tracer.invoke(messages):
        invoked = model.inputs[1]["input_ids"]
    assert invoked.tolist() == expected


def test_options_go_to_the_template(chatty: LanguageModel) -> None:
    closed = chatty.to_chat_tokens(CHAT, add_generation_prompt=False)
    assert chatty.to_string(closed) == [f"{BEGIN}<user>the cat"]
    assert chatty.to_string(chatty.to_chat_tokens(CHAT)) == [f"{BEGIN}<user>the cat<assistant>"]


def test_several_conversations_are_rows_of_their_own(chatty: LanguageModel) -> None:
    chats = [CHAT, LONGER]
    inputs = chatty.to_inputs(chats)
    assert torch.equal(chatty.to_chat_tokens(chats), inputs["input_ids"])
    with chatty.trace(chats) as tracer:
        logits = tracer.result.logits
    for row, chat in enumerate(chats):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        assert torch.equal(ids, chatty.to_chat_tokens(chat)[0])
        alone = chatty.module(ids[None]).logits[0]
        assert torch.allclose(logits[row, -len(ids) :], alone, atol=1e-5)


def test_a_conversation_that_cannot_be_told_is_refused(chatty: LanguageModel) -> None:
    with pytest.raises(InputError, match="a chat_template, and the model has a"):
        LanguageModel(chatty.module, tokenizer=bpe()).to_tokens(CHAT)
    with pytest.raises(InputError, match="the model has no tokenizer"):
        LanguageModel(chatty.module).to_tokens(CHAT)
    with pytest.raises(InputError, match="messages are a list of mappings"):
        chatty.to_chat_tokens([TEXT])
    with pytest.raises(InputError, match="a message is a mapping"):
        chatty.to_tokens([CHAT[0], "and so on"])
    prefix = chatty.prefill("the", append_eos=False)
    with pytest.raises(InputError, match="a beginning of its own"):
        chatty(CHAT, prefix=prefix)


# -- back to text ---------------------------------------------------------------------------------


def test_the_text_of_tokens_is_the_text(model: LanguageModel) -> None:
    tokens = model.to_tokens(TEXT, prepend_bos=False, append_eos=False)
    for given in (tokens[0], tokens[0].tolist(), tokens[0].numpy(), tuple(tokens[0])):
        assert model.to_string(given) == TEXT
    for given in (tokens, tokens.tolist(), tokens.numpy(), [tokens[0]]):
        assert model.to_string(given) == [TEXT]
    assert model.to_string([tokens[0], tokens[0, :1]])[0] == TEXT  # rows of different lengths
    assert model.to_string(model.to_tokens(TEXT, append_eos=True)[0]).endswith(END)
    assert model.to_string(model.tokenizer.eos_token_id) == END
    assert model.to_string(torch.tensor(model.tokenizer.eos_token_id)) == END


def test_the_tokens_as_text_make_up_the_text(model: LanguageModel) -> None:
    strings = model.to_str_tokens(TEXT, prepend_bos=False, append_eos=False)
    assert "".join(strings).lstrip(" ") == TEXT
    assert " cat" in strings and " on" in strings
    with_ends = model.to_str_tokens(TEXT, prepend_bos=True, append_eos=True)
    assert with_ends == [BEGIN, *strings, END]


def test_tokens_as_text_of_each_kind_of_input(model: LanguageModel) -> None:
    expected = model.to_str_tokens(TEXT)
    tokens = model.to_tokens(TEXT)
    given: list[Any] = [tokens, tokens[0], tokens.numpy(), tokens[0].numpy(), tokens[0].tolist()]
    given += [list(tokens[0]), tuple(tokens[0].tolist())]
    for each in given:
        assert model.to_str_tokens(each) == expected
    several = model.to_str_tokens([TEXT, "dog"])
    assert several == [expected, model.to_str_tokens("dog")]  # and no padding
    assert model.to_str_tokens(tokens.repeat(2, 1)) == [expected, expected]
    assert model.to_str_tokens([tokens[0], [5]]) == [expected, model.to_str_tokens([5])]
    assert model.to_str_tokens(torch.tensor(5)) == model.to_str_tokens([5])
    assert model.to_str_tokens(CHAT_LIKE) == [model.to_str_tokens(each) for each in CHAT_LIKE]


CHAT_LIKE = ["the cat", "sat", ""]


def test_a_token_that_only_the_model_has_is_an_empty_text() -> None:
    model = model_of("plain")
    assert len(model.tokenizer) < VOCABULARY - 1
    assert model.to_str_tokens([VOCABULARY - 1]) == [""]
    for token in (VOCABULARY, -1):
        with pytest.raises(TokenError, match=f"{token} is no token: there are {VOCABULARY}"):
            model.to_string([5, token])


@pytest.mark.parametrize(
    "given",
    [1.5, [1.5], torch.tensor([1.5]), "text", None, torch.zeros(1, 2, 3).long(), [True], {1: 2}],
    ids=repr,
)
def test_what_is_no_token_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="tokens are integers"):
        model_of("plain").to_string(given)


# -- one token ------------------------------------------------------------------------------------


def test_every_token_with_a_text_of_its_own_is_found_by_it() -> None:
    model = model_of("both")
    found = 0
    for token in range(len(model.tokenizer)):
        text = model.to_single_str_token(token)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            assert model.to_single_token(text) == token
            found += 1
    assert found > 100


def test_a_text_that_is_not_one_token_says_which_it_is() -> None:
    model = model_of("both")
    with pytest.raises(TokenError, match=r"'the cat' is 2 tokens \('the', ' cat'\), not one\."):
        model.to_single_token("the cat")
    with pytest.raises(TokenError, match=r"'Eiffel' is \d tokens .*; ' Eiffel' is one"):
        model.to_single_token("Eiffel")
    with pytest.raises(TokenError, match="'' is no token at all"):
        model.to_single_token("")
    with pytest.raises(TokenError, match=r"' cat' is 2 tokens .*; 'cat' is one"):
        model_of("sentencepiece").to_single_token(" cat")
    for wrong in (5, ["cat"], None):
        with pytest.raises(InputError, match="by its text, not"):
            model.to_single_token(wrong)  # pyright: ignore[reportArgumentType] - as users may


def test_a_word_that_the_model_reads_as_unknown_is_no_token() -> None:
    model = LanguageModel("tracekit/tiny")
    with pytest.raises(TokenError, match=r"'Atlantis' is not among the tokens .* read '<unk>'"):
        model.to_single_token("Atlantis")
    assert model.to_single_token("<unk>") == model.tokenizer.unk_token_id


def test_the_text_of_one_token_is_of_one() -> None:
    model = model_of("plain")
    token = model.to_single_token(" cat")
    for given in (token, torch.tensor(token), torch.tensor([token]), np.int64(token)):
        assert model.to_single_str_token(given) == " cat"  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="one token is wanted here, and 2 were given"):
        model.to_single_str_token([5, 6])  # pyright: ignore[reportArgumentType]


# -- where a token stands -------------------------------------------------------------------------


def test_a_token_is_found_where_it_stands(model: LanguageModel) -> None:
    text = "the cat sat on the cat"
    name = " cat" if model.tokenizer.unk_token is None else "cat"  # SentencePiece: it has a space
    strings = model.to_str_tokens(text)
    places = [index for index, string in enumerate(strings) if string == " cat"]
    token = model.to_single_token(name)
    tokens = model.to_tokens(text)
    for given in (text, tokens, tokens[0], tokens[0].tolist(), tokens.numpy()):
        for single in (name, token, torch.tensor(token)):
            assert model.get_token_position(single, given) == places[0]
            assert model.get_token_position(single, given, mode="last") == places[-1]
    before = model.get_token_position(name, text, prepend_bos=False)
    assert model.get_token_position(name, text, prepend_bos=True) == before + 1


def test_what_is_not_found_is_said() -> None:
    model = model_of("plain")
    with pytest.raises(TokenError, match=r"' dog' \(token \d+\) is not among the 2 tokens"):
        model.get_token_position(" dog", "the cat")
    with pytest.raises(InputError, match="'first' or 'last', not 'middle'"):
        model.get_token_position(" cat", "the cat", mode="middle")
    with pytest.raises(InputError, match="one row of tokens is wanted here, and 2 were given"):
        model.get_token_position(" cat", model.to_tokens(["the cat", "the dog"]))
    with pytest.raises(TokenError, match="not one"):
        model.get_token_position("the cat", "the cat")


NEED_A_TOKENIZER: list[Callable[[LanguageModel], object]] = [
    lambda model: model.to_tokens(TEXT),
    lambda model: model.to_string([1]),
    lambda model: model.to_str_tokens([1]),
    lambda model: model.to_single_token("a"),
    lambda model: model.to_single_str_token(1),
    lambda model: model.get_token_position("a", [1, 2]),
    lambda model: model.tokenizer_prepends_bos,
]


@pytest.mark.parametrize("ask", NEED_A_TOKENIZER)
def test_without_a_tokenizer_it_is_said_how_to_give_one(
    ask: Callable[[LanguageModel], object],
) -> None:
    model = LanguageModel(make("gpt2")[0])
    with pytest.raises(InputError, match=r"LanguageModel\(module, tokenizer=…\)"):
        ask(model)
    assert model.to_tokens([5, 6]).tolist() == [[5, 6]]
    assert model.get_token_position(6, [5, 6]) == 1


def test_the_packaged_model_reads_as_it_writes(tiny: LanguageModel) -> None:
    prompt = "The Eiffel Tower is in the city of"
    assert tiny.tokenizer_prepends_bos and not tiny.tokenizer_appends_eos
    assert tiny.to_str_tokens(prompt)[:3] == ["<bos>", "The", "Eiffel"]
    logits = tiny(prompt).logits[0, -1]
    assert tiny.to_single_str_token(int(logits.argmax())).strip() == "Paris"
    assert tiny.get_token_position("Tower", prompt) == 3


def test_what_an_encoder_reads_may_have_its_end() -> None:
    source = LanguageModel(make("t5", vocab_size=VOCABULARY)[0], tokenizer=bpe(end=True))
    assert source.tokenizer_appends_eos
    tokens = source.generate(TEXT, max_new_tokens=2, do_sample=False)  # and no warning
    assert tokens.shape[0] == 1

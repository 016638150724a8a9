"""A stream gives what `generate` gives, step by step, with a cache that can be read meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from tests.tiny_models import SPECS, generate, make
from tests.tracing.plain import changing, is_same, plain_hooks, state_of
from tracekit import LanguageModel, Model
from tracekit.core.nest import first_tensor, tensors
from tracekit.errors import (
    CacheError,
    InputError,
    NeverRanError,
    OverwrittenError,
    StreamError,
    UnknownPathError,
)

REPEATING = torch.tensor([[11, 12, 13, 14, 11, 12, 13, 14, 11, 12]])
PROMPT = "The Eiffel Tower is in the city of"
PROMPTS = [PROMPT, "Paris"]
H0 = "model.transformer.h.0"


pytestmark = pytest.mark.usefixtures("without_gradients")


def ways() -> dict[str, dict[str, Any]]:
    """Options of generate, made anew for each use: some of them are changed by it."""
    return {
        "greedy": {"do_sample": False},
        "no kv_cache": {"do_sample": False, "use_cache": False},
        "sampling": {"do_sample": True, "top_k": 20, "temperature": 2.0},
        "several of each": {"do_sample": True, "num_return_sequences": 3},
        "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
        "guidance": {"do_sample": False, "guidance_scale": 1.5},
        "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2, "eos_token_id": 126},
        "assisted": {
            "do_sample": False,
            "assistant_model": make("gpt2", seed=1)[0],
            "eos_token_id": 126,
        },
        "static kv_cache": {"do_sample": False, "cache_implementation": "static"},
    }


def greedily(model: Any, ids: Tensor = REPEATING, new: int = 5, **options: Any) -> Any:
    return model.generate_stream(input_ids=ids, max_new_tokens=new, do_sample=False, **options)


def joined(items: list[Tensor]) -> Tensor:
    return torch.cat(items, dim=1)


# -- the items ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ways())
def test_the_tokens_of_a_stream_are_those_of_generate(way: str, net: Any, model: Model) -> None:
    torch.manual_seed(3)
    expected = net.generate(input_ids=REPEATING, max_new_tokens=5, **ways()[way])
    before = state_of(net)
    torch.manual_seed(3)
    stream = model.generate_stream(input_ids=REPEATING, max_new_tokens=5, **ways()[way])
    items = list(stream)
    assert all(item.shape[0] == len(expected) for item in items)
    assert torch.equal(joined(items), expected[:, REPEATING.shape[1] :])
    assert torch.equal(stream.result, expected)
    assert state_of(net) == before


def test_ids_may_be_given_by_position(net: Any, model: Model) -> None:
    stream = model.generate_stream(REPEATING, max_new_tokens=5, do_sample=False)
    expected = net.generate(input_ids=REPEATING, max_new_tokens=5, do_sample=False)
    assert torch.equal(joined(list(stream)), expected[:, REPEATING.shape[1] :])


def test_prompt_lookup_brings_several_tokens_in_one_step(model: Model) -> None:
    ids = REPEATING.repeat(1, 3)
    items = list(greedily(model, ids, 12, prompt_lookup_num_tokens=3, eos_token_id=126))
    assert {item.shape[0] for item in items} == {1}
    assert sum(item.shape[1] for item in items) == 12 > len(items)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.generate])
def test_every_architecture_streams_what_it_generates(name: str) -> None:
    net, inputs = make(name)
    expected, before = generate(name, net, inputs), state_of(net)
    options = options_of(name, inputs)
    with plain_hooks(net) as seen:
        stream = Model(net).generate_stream(**options, capture=None)
        items = []
        for item in stream:
            items.append(item)
            for path, values in seen.items():
                assert is_same(stream.cache[path][-1].output, values[-1])
    assert torch.equal(stream.result, expected)
    assert torch.equal(joined(items), expected[:, -joined(items).shape[1] :])
    for _ in Model(net).generate_stream(**options, capture=None):
        break
    assert state_of(net) == before


def options_of(name: str, inputs: Any) -> dict[str, Any]:
    spec = SPECS[name]
    defaults = {"max_new_tokens": 3, "do_sample": False}
    return {**defaults, **spec.gen_inputs(inputs), **spec.generation}


def test_ids_are_copies(model: Model) -> None:
    expected = joined(list(greedily(model)))
    items = []
    for item in greedily(model):
        items.append(item.clone())
        item.zero_()
    assert torch.equal(joined(items), expected)


def test_text_joined_is_the_text_of_the_tokens(tiny: LanguageModel) -> None:
    stream = tiny.generate_stream(PROMPT, max_new_tokens=6, do_sample=False)
    texts = list(stream)
    new = stream.result[0, len(tiny.tokenizer(PROMPT).input_ids) :]
    assert len(texts) == 6
    assert "".join(texts) == tiny.tokenizer.decode(new, skip_special_tokens=True)


def test_text_is_that_of_transformers_own_streamer(tiny: LanguageModel) -> None:
    own = TextIteratorStreamer(tiny.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[no-untyped-call]
    encoded = tiny.tokenizer(PROMPT, return_tensors="pt")
    options = dict(**encoded, streamer=own, max_new_tokens=9, do_sample=False)
    thread = Thread(target=lambda: tiny.module.generate(**options))
    thread.start()
    theirs = "".join(own)
    thread.join()
    assert "".join(tiny.generate_stream(PROMPT, max_new_tokens=9, do_sample=False)) == theirs


def test_several_prompts_give_a_list_for_each_step(tiny: LanguageModel) -> None:
    stream = tiny.generate_stream(PROMPTS, max_new_tokens=4, do_sample=False)
    steps = list(stream)
    assert all(isinstance(step, list) and len(step) == 2 for step in steps)
    alone = ["".join(tiny.generate_stream(p, max_new_tokens=4, do_sample=False)) for p in PROMPTS]
    assert ["".join(row) for row in zip(*steps, strict=True)] == alone
    assert next(iter(tiny.generate_stream(PROMPTS[:1], max_new_tokens=1))) == [steps[0][0]]


def test_a_row_that_has_ended_adds_no_text(tiny: LanguageModel) -> None:
    first = tiny.generate(PROMPT, max_new_tokens=2, do_sample=False)[0, -2:].tolist()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": first[0]}
    stream = tiny.generate_stream(PROMPTS, **options)
    steps = list(stream)
    rows = ["".join(row) for row in zip(*steps, strict=True)]
    width = stream.result.shape[1] - len(steps)
    decoded = [
        tiny.tokenizer.decode(row, skip_special_tokens=True) for row in stream.result[:, width:]
    ]
    assert rows == decoded
    assert rows[0] == tiny.tokenizer.decode(first[:1]) and len(rows[1].split()) > 1


def test_special_tokens_show_on_request(tiny: LanguageModel) -> None:
    eos = tiny.tokenizer.bos_token_id
    with changing(tiny.module.lm_head, _saying(iter([eos] * 4))):  # type: ignore[arg-type]
        options = {"max_new_tokens": 2, "do_sample": False}
        assert list(tiny.generate_stream(PROMPT, **options)) == ["", ""]
        shown = list(tiny.generate_stream(PROMPT, skip_special_tokens=False, **options))
    assert "".join(shown) == tiny.tokenizer.decode([eos, eos])


def test_a_tokenizer_of_bytes_gives_no_half_characters() -> None:
    tokenizer = _of_bytes()
    text = "a€ß\N{GRINNING FACE}!"
    texts = _told(tokenizer, list(text.encode()))
    assert "".join(texts) == text
    assert texts == ["a", "", "", "€", "", "ß", "", "", "", "\N{GRINNING FACE}", "!"]


def test_bytes_that_are_no_text_come_at_the_end() -> None:
    tokenizer = _of_bytes()
    tokens = [*b"ab", 0xE2, 0x82]
    texts = _told(tokenizer, tokens)
    assert texts[:4] == ["a", "b", "", ""]
    assert "".join(texts) == tokenizer.decode(tokens)


def test_a_fallback_to_bytes_is_told_when_no_byte_can_change_it() -> None:
    tokenizer = _with_fallback()
    ids = tokenizer.convert_tokens_to_ids
    tokens = [ids("\u2581hi"), *(ids(f"<0x{byte:02X}>") for byte in "€ß".encode()), ids("\u2581hi")]
    texts = _told(tokenizer, tokens)
    assert texts == ["hi", "", "", "", "", "", "€ß hi"]
    assert "".join(texts) == tokenizer.decode(tokens)


def _told(tokenizer: Any, tokens: list[int]) -> list[str]:
    """What a stream tells of a model that says `tokens`."""
    with _model_that_says(tokens, tokenizer) as model:
        return list(model.generate_stream([97], max_new_tokens=len(tokens), do_sample=False))


@contextmanager
def _model_that_says(tokens: list[int], tokenizer: Any) -> Iterator[LanguageModel]:
    net = make("gpt2", vocab_size=max(300, len(tokenizer)))[0]
    with changing(net.lm_head, _saying(iter(tokens))):  # type: ignore[arg-type]
        yield LanguageModel(net, tokenizer=tokenizer)


def _saying(tokens: Iterator[int]) -> Callable[[Tensor], Tensor]:
    """What puts logits in place of others, by which these tokens come next."""
    return lambda logits: torch.zeros_like(logits).index_fill(-1, torch.tensor([next(tokens)]), 9.0)


def _of_bytes() -> Any:
    vocabulary = {chr(0x100 + byte): byte for byte in range(256)}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable}
    vocabulary |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    assert sorted(vocabulary) == letters
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=chr(0x100))


def _with_fallback() -> Any:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581hi": 256, "<pad>": 257}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")


def test_ids_come_where_they_are_asked_for(tiny: LanguageModel) -> None:
    items = list(tiny.generate_stream(PROMPT, max_new_tokens=3, return_type="tokens"))
    assert [tuple(item.shape) for item in items] == [(1, 1)] * 3


def test_stop_strings_end_a_stream() -> None:
    tokenizer = _of_bytes()
    options = {"max_new_tokens": 7, "do_sample": False, "tokenizer": tokenizer}
    with _model_that_says(list(b"ab.c.de"), tokenizer) as model:
        assert "".join(model.generate_stream([97], stop_strings=["c."], **options)) == "ab.c."


def test_a_streamer_of_the_users_is_given_all_tokens_too(
    tiny: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    own = TextStreamer(tiny.tokenizer, skip_prompt=True)  # type: ignore[no-untyped-call]
    text = "".join(tiny.generate_stream(PROMPT, max_new_tokens=5, do_sample=False, streamer=own))
    assert capsys.readouterr().out == text + "\n"


def test_a_progress_bar_goes_with_the_steps(
    tiny: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    list(tiny.generate_stream(PROMPT, max_new_tokens=3, do_sample=False, progress=True))
    assert "3/3" in capsys.readouterr().err


# -- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "falcon", "llama", "mamba", "jamba", "t5"])
def test_the_cache_has_what_plain_hooks_saw_so_far(name: str) -> None:
    net, inputs = make(name)
    model, spec = Model(net), SPECS[name]
    options = {
        **spec.gen_inputs(inputs),
        **spec.generation,
        "max_new_tokens": 4,
        "do_sample": False,
    }
    for _ in range(2):  # the second time it is known what the model overwrites
        with plain_hooks(net) as seen:
            stream = model.generate_stream(**options, capture=None)
            kept: dict[str, list[Any]] = {}
            for step, _ in enumerate(stream):
                cache = stream.cache
                assert set(cache) == set(seen)
                for path in seen:
                    outputs = cache[path].outputs
                    assert len(outputs) == len(seen[path])
                    assert is_same(outputs[-1], seen[path][-1])
                    assert cache[path][-1].step <= step
                    kept[path] = outputs
        for path in seen:
            assert all(map(is_same, stream.cache[path].outputs, seen[path]))
            assert all(map(is_same, kept[path], seen[path]))  # what was read is still right


def test_the_cache_is_one_object_and_what_was_read_of_it_stands_still(model: Model) -> None:
    stream = greedily(model, capture=H0)
    entries = []
    for _ in stream:
        assert stream.cache is stream.cache
        entries.append(stream.cache[H0])
    assert [len(each) for each in entries] == [1, 2, 3, 4, 5]
    assert len(stream.cache[H0]) == 5
    assert stream.cache[H0][0] is entries[0][0]


def test_a_cache_that_nobody_reads_is_complete_at_the_end(net: Any, model: Model) -> None:
    with plain_hooks(net) as seen:
        stream = greedily(model, capture="transformer.h.*")
        list(stream)
    assert all(map(is_same, stream.cache[H0].outputs, seen[H0]))


def test_after_a_stop_the_cache_has_what_was_recorded(net: Any, model: Model) -> None:
    with plain_hooks(net) as seen:
        stream = greedily(model, capture="transformer.h.*")
        for step, _ in enumerate(stream):
            if step == 2:
                break
    assert len(stream.cache[H0]) == 3
    assert all(map(is_same, stream.cache[H0].outputs, seen[H0]))


def test_changing_what_was_read_changes_nothing_else(net: Any, model: Model) -> None:
    list(greedily(model, capture=None))  # the habits are known from here on
    expected = net.generate(input_ids=REPEATING, max_new_tokens=5, do_sample=False)
    stream = greedily(model, capture=None)
    for _ in stream:
        for entries in stream.cache.values():
            for leaf in tensors(entries[-1].output):
                leaf.fill_(7)
    assert torch.equal(stream.result, expected)
    assert bool((stream.cache[H0][0].hidden == 7).all())


def test_a_function_may_edit_in_place_what_the_loop_reads_and_changes(model: Model) -> None:
    def follow(tracer: Any) -> None:
        for _ in tracer.iter[:]:
            hidden = model.transformer.h[0].mlp.hidden
            hidden.mul_(1.5)

    expected = joined(list(greedily(model, run=follow)))
    stream, items = greedily(model, run=follow, capture=None), []
    for item in stream:
        items.append(item)
        for leaf in tensors([entries[-1].output for entries in stream.cache.values()]):
            leaf.fill_(7)
    assert torch.equal(joined(items), expected)


class Constant(nn.Module):
    """Returns its own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(32))

    def forward(self) -> Any:
        return self.value


class Shifts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = Constant()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by()


def test_what_was_read_is_not_the_memory_of_the_model() -> None:
    net: Any = make("gpt2")[0]
    net.lm_head = nn.Sequential(Shifts(), net.lm_head)
    model = Model(net)
    list(greedily(model, capture="lm_head.0.by"))  # it is known to be left alone
    stream = greedily(model, capture="lm_head.0.by")
    for _ in stream:
        stream.cache["lm_head.0.by"][-1].output.fill_(7)
    assert not net.lm_head[0].by.value.any()
    assert all(bool((each == 7).all()) for each in stream.cache["lm_head.0.by"].outputs)


def test_options_of_the_cache_are_those_of_tracer_cache(model: Model) -> None:
    options = {"dtype": torch.float16, "include_inputs": True, "include_output": False}
    stream = greedily(model, capture=model.lm_head, cache_options=options)
    for _ in stream:
        assert stream.cache["lm_head"][-1].input.dtype == torch.float16
        with pytest.raises(CacheError):
            stream.cache["lm_head"][-1].output


def test_a_module_that_was_not_called_so_far_is_said_to_be_so(model: Model) -> None:
    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    net: Any = make("gpt2")[0]
    net.late = Late()
    count = [0]

    def at_step_two(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        count[0] += 1
        return net.late(output) if count[0] == 2 else output

    net.lm_head.register_forward_hook(at_step_two)
    stream = greedily(Model(net), capture=["late", "lm_head"])
    for step, _ in enumerate(stream):
        if step == 0:
            with pytest.raises(UnknownPathError, match="has not been called so far"):
                stream.cache["late"]
    assert len(stream.cache["late"]) == 1


class Changes(nn.Module):
    """Writes into its input in place, once it is told to."""

    in_place = False

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1) if self.in_place else x + 1


def test_what_the_model_overwrote_against_its_habits_is_not_handed_out() -> None:
    net: Any = make("gpt2")[0]
    net.lm_head = nn.Sequential(nn.Linear(32, 32, bias=False), Changes(), net.lm_head)
    net._tied_weights_keys = {}
    model = Model(net)
    list(greedily(model, capture="lm_head.0"))
    net.lm_head[1].in_place = True
    stream = greedily(model, capture="lm_head.0")
    with pytest.raises(OverwrittenError):
        for _ in stream:
            stream.cache["lm_head.0"]
    net.lm_head[1].in_place = True
    list(greedily(model, capture="lm_head.0"))  # it is copied from now on
    assert "lm_head.0" not in stream.cache


def test_a_left_stream_tells_of_what_was_overwritten_when_it_is_closed() -> None:
    net: Any = make("gpt2")[0]
    net.lm_head = nn.Sequential(nn.Linear(32, 32, bias=False), Changes(), net.lm_head)
    model = Model(net)
    list(greedily(model, capture="lm_head.0"))
    net.lm_head[1].in_place = True
    stream = greedily(model, capture="lm_head.0")
    items = iter(stream)
    next(items)
    with pytest.raises(OverwrittenError):
        stream.close()


# -- interventions --------------------------------------------------------------------------------


def _louder(hidden: Any) -> Tensor:
    return hidden.flip(-1) * 1.7


def _louder_output(output: Any) -> Any:
    return _louder(output) if isinstance(output, Tensor) else (_louder(output[0]), *output[1:])


@pytest.fixture
def loud(net: Any) -> Tensor:
    """The tokens of a model that plain hooks edit."""
    with changing(net.transformer.h[0], _louder_output):
        tokens = net.generate(input_ids=REPEATING, max_new_tokens=5, do_sample=False)
    plain = net.generate(input_ids=REPEATING, max_new_tokens=5, do_sample=False)
    assert not torch.equal(tokens, plain)
    return tokens


def test_declared_edits_are_made_in_each_step(net: Any, model: Model, loud: Tensor) -> None:
    stream = greedily(model, edits=[("transformer.h.0", _louder)], capture=H0)
    items = list(stream)
    assert torch.equal(joined(items), loud[:, REPEATING.shape[1] :])
    with plain_hooks(net) as seen:
        net.generate(input_ids=REPEATING, max_new_tokens=1)
    assert torch.equal(stream.cache[H0][0].hidden, _louder(first_tensor(seen[H0][0])))


def test_lasting_edits_are_made_and_those_of_the_stream_after_them(
    net: Any, model: Model, loud: Tensor
) -> None:
    with model.edit() as steered:
        steered.transformer.h[0].hidden = _louder(steered.transformer.h[0].hidden)
    assert torch.equal(joined(list(greedily(steered))), loud[:, REPEATING.shape[1] :])
    stream = greedily(steered, edits=[(model.transformer.h[0], lambda h: h + 1)], capture=H0)
    with plain_hooks(net) as seen:
        net.generate(input_ids=REPEATING, max_new_tokens=1)
    next(iter(stream))
    assert torch.equal(stream.cache[H0][0].hidden, _louder(first_tensor(seen[H0][0])) + 1)


def test_a_function_runs_beside_all_steps(model: Model, loud: Tensor) -> None:
    told = []

    def follow(tracer: Any) -> str:
        for step in tracer.iter[:]:
            model.transformer.h[0].hidden = _louder(model.transformer.h[0].hidden)
            told.append(step)
        return "done"

    stream = greedily(model, run=follow)
    items = []
    for count, item in enumerate(stream):
        assert told == list(range(count + 1))
        items.append(item)
    assert torch.equal(joined(items), loud[:, REPEATING.shape[1] :])
    assert stream.value == "done"


def test_a_function_may_make_caches_and_take_the_result(model: Model) -> None:
    def both(tracer: Any) -> Any:
        return tracer.cache(), tracer.result

    stream = greedily(model, run=both)
    list(stream)
    cache, result = stream.value
    assert len(cache[H0]) == 5
    assert torch.equal(result, stream.result)


def test_a_function_that_stops_the_run_ends_the_stream(model: Model) -> None:
    def stop(tracer: Any) -> None:
        tracer.next(2)
        model.transformer.h[0].hidden.sum()
        tracer.stop()

    stream = greedily(model, run=stop, capture=H0)
    assert len(list(stream)) == 2
    assert len(stream.cache[H0]) == 3
    with pytest.raises(StreamError):
        stream.result


def test_an_edit_that_is_never_made_is_an_error_at_the_end(model: Model) -> None:
    model.module.spare = nn.Identity()  # type: ignore[union-attr]
    try:
        with pytest.raises(NeverRanError):
            list(greedily(model, edits=[("spare", 0)]))
        for _ in greedily(model, edits=[("spare", 0)]):
            break
    finally:
        del model.module.spare


# -- what is refused ------------------------------------------------------------------------------


def test_beams_are_refused_when_the_stream_is_made(model: Model) -> None:
    with pytest.raises(InputError, match="no beams"):
        greedily(model, num_beams=2)


def test_unknown_modules_are_refused_when_the_stream_is_made(model: Model) -> None:
    with pytest.raises(UnknownPathError):
        greedily(model, capture="transformer.g.0")
    with pytest.raises(UnknownPathError):
        greedily(model, edits=[("transformer.g.0", 0)])
    with pytest.raises(InputError):
        greedily(model, run=3)


def test_a_model_with_its_own_generate_is_refused() -> None:
    class Own(nn.Module):
        def generate(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(InputError, match="transformers"):
        Model(Own()).generate_stream(torch.ones(1))


def test_text_without_a_tokenizer_is_refused(model: Model, tiny: LanguageModel) -> None:
    with pytest.raises(InputError, match="tokenizer"):
        greedily(model, return_type="str")
    with pytest.raises(InputError, match="return_type"):
        tiny.generate_stream(PROMPT, return_type="texts")


@pytest.mark.parametrize("name", ["result", "value"])
def test_what_comes_at_the_end_is_refused_before(name: str, model: Model) -> None:
    stream = greedily(model)
    items = iter(stream)
    next(items)
    with pytest.raises(StreamError, match="has not yet"):
        getattr(stream, name)
    stream.close()
    with pytest.raises(StreamError, match="was left before"):
        getattr(stream, name)


def test_a_stream_is_gone_through_once(model: Model) -> None:
    stream = greedily(model)
    list(stream)
    with pytest.raises(StreamError, match="once"):
        iter(stream)


def test_the_cache_of_a_stream_that_has_not_begun_is_refused(model: Model) -> None:
    with pytest.raises(StreamError, match="first item"):
        greedily(model, capture=H0).cache
    assert len(greedily(model).cache) == 0


def test_no_other_thread_reads_the_cache_while_the_model_runs(model: Model) -> None:
    caught: list[Callable[[], object] | BaseException] = []
    streams: list[Any] = []

    def read(tracer: Any) -> None:
        for _ in tracer.iter[1:3]:
            model.transformer.h[1].hidden.sum()
            try:
                streams[0].cache[H0]
            except CacheError as error:
                caught.append(error)

    streams.append(greedily(model, run=read, capture=H0))
    list(streams[0])
    assert len(caught) == 2

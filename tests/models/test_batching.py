"""Invokes of different lengths make one batch in which each row is what it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import NAMES, SPECS, make
from tracekit import LanguageModel
from tracekit.core.nest import tensors
from tracekit.errors import InputError, PaddingError
from tracekit.models.batching import join_inputs

LENGTHS = (9, 4, 6)
TEXT = [name for name in NAMES if SPECS[name].family not in {"vision", "vlm", "audio"}]
READ_PADDING = {("rwkv", "left"), ("rwkv", "right"), ("xlstm", "left"), ("xlstm", "right")}
COUNT_COLUMNS = {("bart", "left"), ("marian", "left"), ("distilbert", "left")}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT)
def test_each_row_of_a_padded_batch_is_what_it_is_alone(name: str, side: str) -> None:
    module, _ = make(name)
    model = LanguageModel(module, padding_side=side)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(10, 60, (1, length), generator=generator) for length in LENGTHS]
    of_decoder = module.config.is_encoder_decoder
    kwargs = [{"decoder_input_ids": ids[:, :4]} if of_decoder else {} for ids in rows]
    outs: list[Tensor] = []
    try:
        with model.trace() as tracer:
            for ids, more in zip(rows, kwargs, strict=True):
                with tracer.invoke(ids, **more):
                    outs.append(_main(model.output))
    except PaddingError:
        assert (name, side) in READ_PADDING | COUNT_COLUMNS
        return
    for ids, more, out in zip(rows, kwargs, outs, strict=True):
        plain = _main(module(input_ids=ids, **more))
        is_behind = side == "left" and not of_decoder
        own = out[:, -plain.shape[1] :] if is_behind else out[:, : plain.shape[1]]
        torch.testing.assert_close(own, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5", "bart"])
def test_a_generation_of_several_invokes_gives_each_what_it_gives_alone(name: str) -> None:
    module, _ = make(name)
    model = LanguageModel(module)
    rows = [torch.tensor([[11, 12, 13, 14]]), torch.tensor([[21, 22, 23, 24]])]
    exactly: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    last = [envoy for path, envoy in model.named_modules() if path.endswith("lm_head")][-1]
    tokens: list[Tensor] = []
    logits: list[list[Tensor]] = []
    with model.generate(**exactly) as tracer:
        for ids in rows:
            with tracer.invoke(ids):
                logits.append([last.output for _ in tracer.iter[:]])
                tokens.append(tracer.result)
    for ids, seen, found in zip(rows, logits, tokens, strict=True):
        alone = module.generate(ids, output_logits=True, return_dict_in_generate=True, **exactly)
        assert torch.equal(found, alone.sequences)
        for step, plain in zip(seen, alone.logits, strict=True):
            torch.testing.assert_close(step[:, -1], plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 3},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_blocks_have_their_own_steps_and_rows_however_the_batch_is_generated(
    name: str, options: dict[str, Any]
) -> None:
    module, _ = make(name)
    model = LanguageModel(module)
    last_chunk = 1 if "prefill_chunk_size" in options else 0
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    rows = [torch.tensor([[11, 12, 13, 14]]), torch.tensor([[21, 22, 23, 24]])]
    one, other = (
        module.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
        for ids in rows
    )
    with model.generate(**options) as tracer:
        with tracer.invoke(rows[0]):
            cache = tracer.cache([model.lm_head])
            odd = [(step, model.lm_head.output[:, -1]) for step in tracer.iter[1::2]]
            tokens = tracer.result
        with tracer.invoke(rows[1]):
            ends = []
            for step in tracer.iter[:]:
                if step in (0, 3):
                    call = 0 if step else last_chunk
                    ends.append((step, model.lm_head.calls[call].output[:, -1]))
            others = tracer.result
    assert torch.equal(tokens, one.sequences)
    assert torch.equal(others, other.sequences)
    assert [step for step, _ in odd] == [1, 3] and [step for step, _ in ends] == [0, 3]
    for step, logits in odd:
        torch.testing.assert_close(logits, one.logits[step], atol=1e-5, rtol=1e-4)
    for step, logits in ends:
        torch.testing.assert_close(logits, other.logits[step], atol=1e-5, rtol=1e-4)
    for entry in cache["model.lm_head"]:
        if entry.call == (0 if entry.step else last_chunk):
            plain = one.logits[entry.step]
            torch.testing.assert_close(entry.output[:, -1], plain, atol=1e-5, rtol=1e-4)


def test_an_encoder_is_divided_into_rows_while_a_decoder_generates() -> None:
    module, _ = make("t5")
    model = LanguageModel(module)
    rows = [torch.tensor([[11, 12, 13, 14]]), torch.tensor([[21, 22, 23, 24]])]
    encoded: list[Tensor] = []
    with model.generate(max_new_tokens=2) as tracer:
        for ids in rows:
            with tracer.invoke(ids):
                encoded.append(model.encoder.output.last_hidden_state)
    for ids, found in zip(rows, encoded, strict=True):
        plain = module.encoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_positions_are_divided_into_rows_while_a_model_generates(name: str) -> None:
    module, _ = make(name)
    model = LanguageModel(module)
    places = model.transformer.wpe if name == "gpt2" else model.model.rotary_emb
    seen: list[Any] = []
    with model.generate(max_new_tokens=2) as tracer:
        for ids in (torch.tensor([[11, 12, 13, 14]]), torch.tensor([[21, 22]])):
            with tracer.invoke(ids):
                seen.append(places.output)
    for output in seen:
        for tensor in tensors(output):
            assert tensor.shape[:2] == (1, 4)
    firsts = [next(tensors(output)) for output in seen]
    assert torch.equal(firsts[0][:, :2], firsts[1][:, 2:])  # the second is padded on the left


def _main(output: Any) -> Tensor:
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def test_ids_masks_and_labels_are_padded_each_with_its_own() -> None:
    def row(length: int) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        ones = torch.ones(1, length, dtype=torch.long)
        embeds = torch.ones(1, length, 2)
        kwargs = {"input_ids": ones, "attention_mask": ones, "labels": ones}
        return (), {**kwargs, "inputs_embeds": embeds, "decoder_input_ids": ones}

    _, joined = join_inputs([row(3), row(1)], pad=7, side="left")
    assert joined["input_ids"].tolist() == [[1, 1, 1], [7, 7, 1]]
    assert joined["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert joined["labels"].tolist() == [[1, 1, 1], [-100, -100, 1]]
    assert joined["inputs_embeds"][1].tolist() == [[0, 0], [0, 0], [1, 1]]
    assert joined["decoder_input_ids"].tolist() == [[1, 1, 1], [1, 7, 7]]


def test_what_is_no_tensor_is_the_same_for_all() -> None:
    x = torch.ones(1, 2)
    _, joined = join_inputs([((), {"x": (x, 1)}), ((), {"x": (x * 2, 1)})])
    assert joined["x"][0].tolist() == [[1, 1], [2, 2]] and joined["x"][1] == 1
    with pytest.raises(InputError, match="flag is True for one invoke and False for another"):
        join_inputs([((x,), {"flag": True}), ((x,), {"flag": False})])


def test_invokes_take_the_same_arguments() -> None:
    model = LanguageModel("tracekit/tiny")
    ids = torch.full((1, 2), 5)
    with pytest.raises(InputError, match="take the same arguments"):
        with model.trace() as tracer:
            with tracer.invoke(ids):
                model.output
            with tracer.invoke(ids, labels=ids):
                model.output


def test_what_the_trace_is_given_goes_to_the_whole_batch() -> None:
    model = LanguageModel("tracekit/tiny")
    with model.trace(output_hidden_states=True) as tracer:
        with tracer.invoke("The Eiffel Tower"):
            hidden = tracer.result.hidden_states
        with tracer.invoke(["A", "movie was"]):
            two = tracer.result.logits
    assert len(hidden) == 5 and hidden[0].shape[0] == 1
    assert two.shape[0] == 2

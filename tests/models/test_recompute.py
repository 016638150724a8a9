"""One forward pass over the final tokens computes what generation computed in its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from tests.matrix.spec import IMAGE_TOKEN
from tests.tiny_models import IS_TRANSFORMERS_5, NAMES, SPECS, make
from tracekit.errors import UnsupportedError
from tracekit.models.recompute import forward_inputs, prompt_length, valid_tokens

GENERATING = [name for name in NAMES if SPECS[name].generate]
if not IS_TRANSFORMERS_5:  # its state stays in the module, and steps are not what a pass computes
    GENERATING.remove("recurrent_gemma")
READ_PADDING = {"rwkv", "xlstm"}  # whatever the mask says: their rows can't be padded
STEPS = {"max_new_tokens": 4, "do_sample": False}
# Each with the reason for which it is generated in another way than the others.
OTHERWISE: dict[str, dict[str, Any]] = {}
if not IS_TRANSFORMERS_5:
    OTHERWISE["t5gemma"] = {"use_cache": False}  # its steps with a kv_cache are not those without
REPORT = {"output_logits": True, "return_dict_in_generate": True}


pytestmark = pytest.mark.usefixtures("without_gradients")


def padded(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a generation, the last row with padding where the family allows it."""
    mask = inputs.get("attention_mask")
    if mask is None or len(mask) == 1 or name in READ_PADDING:
        return inputs
    mask = mask.clone()
    side = slice(-3, None) if SPECS[name].family == "encdec" else slice(3)
    mask[-1, side] = 0
    ids = inputs["input_ids"].masked_fill(mask == 0, 0)
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def given_to(name: str, inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The arguments of a greedy generation of four steps."""
    given = {**padded(name, SPECS[name].gen_inputs(inputs)), **STEPS, **SPECS[name].generation}
    if SPECS[name].family == "vlm":
        given["suppress_tokens"] = [IMAGE_TOKEN]
    return {**given, **OTHERWISE.get(name, {}), **options}


def logits_of_steps(module: Any, given: dict[str, Any], out: Any, **more: Any) -> Tensor:
    """The logits by which each new token was chosen, in one pass: rows, steps, words."""
    logits = module(**forward_inputs(module, given, out.sequences, **more)).logits
    if more.get("include_last", True):
        logits = logits[:, :-1]
    return logits[:, -len(out.logits) :]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("include_last", [True, False])
@pytest.mark.parametrize("name", GENERATING)
def test_one_pass_has_the_logits_of_every_step(name: str, include_last: bool) -> None:
    module, inputs = make(name)
    given = given_to(name, inputs)
    out = module.generate(**given, **REPORT)
    found = logits_of_steps(module, given, out, include_last=include_last)
    assert_close(found, torch.stack(out.logits, 1))


# -- rows, and where they end ---------------------------------------------------------------------


def test_what_is_behind_the_end_of_a_row_is_masked_though_padding_is_the_end() -> None:
    module, _ = make("gpt2")
    ids = torch.tensor([[0, 0, 11, 12], [21, 22, 23, 24]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    given = {"input_ids": ids, "attention_mask": mask, "eos_token_id": 9, "pad_token_id": 9}
    sequences = torch.cat([ids, torch.tensor([[5, 9, 9, 9], [5, 6, 7, 9]])], 1)
    inputs = forward_inputs(module, given, sequences)
    expected = [[0, 0, 1, 1, 1, 1, 0, 0], [1] * 8]
    assert inputs["attention_mask"].tolist() == expected
    assert inputs["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3, 3, 3], [*range(8)]]
    assert valid_tokens(module, given, sequences).long().tolist() == expected
    told = forward_inputs(module, given, sequences, new_tokens=torch.tensor([1, 4]))
    assert told["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


OF_SEVERAL_ROWS = [
    name
    for name in GENERATING
    if SPECS[name].family not in {"vlm", "audio"} and name != "rwkv"  # of one row
]


class EndOfFirst(LogitsProcessor):
    """Lets the first row end with its second new token, and no other row end at all."""

    def __init__(self, end: int) -> None:
        self.end, self.step = end, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.end] = -torch.inf
        if self.step == 1:
            scores[0] = -torch.inf
            scores[0, self.end] = 0.0
        self.step += 1
        return scores


@pytest.mark.parametrize("name", OF_SEVERAL_ROWS)
def test_rows_that_end_early_have_the_logits_of_their_steps(name: str) -> None:
    module, inputs = make(name)
    given = given_to(name, inputs, eos_token_id=9, pad_token_id=9)
    out = module.generate(**given, **REPORT, logits_processor=[EndOfFirst(9)])
    found = logits_of_steps(module, given, out)
    new = valid_tokens(module, given, out.sequences)[:, -4:]
    assert new.tolist() == [[True, True, False, False], [True] * 4]
    assert_close(found[new], torch.stack(out.logits, 1)[new])


REPEATING: dict[str, dict[str, Any]] = {
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", REPEATING)
@pytest.mark.parametrize("name", ["gpt2", "mamba", "t5", "whisper", "llava", "qwen2_5_vl"])
def test_each_sequence_is_computed_from_the_inputs_of_its_row(name: str, way: str) -> None:
    if name not in SPECS:
        pytest.skip("not before transformers 5")
    module, inputs = make(name)
    given = given_to(name, inputs, **REPEATING[way])
    torch.manual_seed(1)
    sequences = module.generate(**given, return_dict_in_generate=True).sequences
    logits = module(**forward_inputs(module, given, sequences)).logits
    rows = len(given.get("input_ids", given.get("input_features")))
    each = len(sequences) // rows
    assert each > 1 or way == "beams"
    for index in range(len(sequences)):
        own = {key: of_row(value, index // each, rows) for key, value in given.items()}
        alone = forward_inputs(module, own, sequences[index : index + 1])
        assert_close(logits[index : index + 1], module(**alone).logits)


def of_row(value: Any, row: int, rows: int) -> Any:
    """The part of an input that belongs to one row."""
    is_divided = isinstance(value, Tensor) and len(value) == rows > 1
    return value[row : row + 1] if is_divided else value


def two_rows(inputs: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A row with one image behind padding, and one with the images of `more` besides."""
    own, other = inputs["input_ids"], torch.cat([inputs["input_ids"], more["input_ids"]], 1)
    padding = torch.zeros(1, other.shape[1] - own.shape[1], dtype=torch.long)
    ids = torch.cat([torch.cat([padding, own], 1), other])
    mask = torch.ones_like(ids)
    mask[0, : padding.shape[1]] = 0
    of_images = ("pixel_values", "image_grid_thw")
    found = {
        name: torch.cat([inputs[name], inputs[name], more[name]])
        for name in of_images
        if name in more
    }
    if "mm_token_type_ids" in inputs:
        found["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return {"input_ids": ids, "attention_mask": mask, **found}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_each_of_several_sequences_has_the_images_of_its_row(name: str) -> None:
    if not IS_TRANSFORMERS_5:
        pytest.skip("not before transformers 5")
    module, inputs = make(name)
    more = {**inputs, "pixel_values": inputs["pixel_values"] * -0.7}
    given = {**two_rows(inputs, more), **STEPS, "suppress_tokens": [IMAGE_TOKEN]}
    once = module.generate(**given, **REPORT)
    assert_close(logits_of_steps(module, given, once), torch.stack(once.logits, 1))
    several = {**given, "num_return_sequences": 2, "num_beams": 2}
    twice = once.sequences.repeat_interleave(2, 0)
    found = module(**forward_inputs(module, several, twice)).logits
    expected = module(**forward_inputs(module, given, once.sequences)).logits
    assert_close(found, expected.repeat_interleave(2, 0))


def test_images_that_no_ids_place_are_nobodys() -> None:
    module, inputs = make("llava" if IS_TRANSFORMERS_5 else "blip_2")
    ids = inputs["input_ids"].repeat(2, 1)
    given = {"input_ids": ids, "pixel_values": inputs["pixel_values"].repeat(3, 1, 1, 1)}
    for broken in (given, {**given, "pixel_values_videos": ids}):
        with pytest.raises(UnsupportedError, match="from one row at a time"):
            forward_inputs(module, broken, ids.repeat_interleave(2, 0))


# -- what is given in other ways ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "gemma3_text", "opt"])
@pytest.mark.parametrize("has_ids", [False, True])
def test_new_tokens_are_embedded_behind_embeddings(name: str, has_ids: bool) -> None:
    module, inputs = make(name)
    given = given_to(name, inputs)
    ids = given["input_ids"] if has_ids else given.pop("input_ids")
    given["inputs_embeds"] = module.get_input_embeddings()(ids) * 1.1
    out = module.generate(**given, **REPORT)
    assert out.sequences.shape[1] == (12 if has_ids else 4)
    assert "input_ids" not in forward_inputs(module, given, out.sequences)
    assert_close(logits_of_steps(module, given, out), torch.stack(out.logits, 1))
    shorter = logits_of_steps(module, given, out, include_last=False)
    assert_close(shorter, torch.stack(out.logits, 1))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_may_be_given_embeddings_or_what_it_put_out(name: str) -> None:
    module, inputs = make(name)
    given = {**STEPS, "inputs_embeds": module.get_input_embeddings()(inputs["input_ids"])}
    out = module.generate(**given, **REPORT)
    assert_close(logits_of_steps(module, given, out), torch.stack(out.logits, 1))
    encoded = module.get_encoder()(input_ids=inputs["input_ids"])
    given = {**STEPS, "encoder_outputs": encoded}
    out = module.generate(**given, **REPORT)
    assert_close(logits_of_steps(module, given, out), torch.stack(out.logits, 1))


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("has_start", [False, True])
def test_a_decoder_may_be_given_tokens_with_or_without_the_start(
    name: str, has_start: bool
) -> None:
    module, inputs = make(name)
    ids = inputs["decoder_input_ids"].clone()
    if has_start:
        ids[:, 0] = module.generation_config.decoder_start_token_id
    given = given_to(name, inputs, decoder_input_ids=ids, decoder_attention_mask=ids * 0 + 1)
    out = module.generate(**given, **REPORT)
    assert prompt_length(module, given, out.sequences) == (4 if has_start else 5)
    assert_close(logits_of_steps(module, given, out), torch.stack(out.logits, 1))


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "t5"])
def test_a_mask_that_is_not_given_is_the_one_that_generate_infers(name: str) -> None:
    module, inputs = make(name)
    given = given_to(name, inputs, pad_token_id=0)
    del given["attention_mask"]
    out = module.generate(**given, **REPORT)
    assert_close(logits_of_steps(module, given, out), torch.stack(out.logits, 1))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_positions_that_are_given_go_on(name: str) -> None:
    if not IS_TRANSFORMERS_5:
        pytest.skip("positions that are given do not go on before transformers 5")
    module, inputs = make(name)
    positions = torch.arange(8).repeat(2, 1) * 2
    given = {**SPECS[name].gen_inputs(inputs), **STEPS, "position_ids": positions}
    out = module.generate(**given, **REPORT)
    assert_close(logits_of_steps(module, given, out), torch.stack(out.logits, 1))


def test_the_type_of_the_last_token_goes_on() -> None:
    module, inputs = make("gpt2")
    types = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 3, 4]])
    given = {**SPECS["gpt2"].gen_inputs(inputs), **STEPS, "token_type_ids": types}
    out = module.generate(**given, **REPORT)
    assert_close(logits_of_steps(module, given, out), torch.stack(out.logits, 1))


def test_the_first_argument_of_generate_may_have_its_name() -> None:
    module, inputs = make("gpt2")
    given = {**STEPS, "inputs": inputs["input_ids"], "use_cache": True, "output_attentions": False}
    out = module.generate(**given, **REPORT)
    assert set(forward_inputs(module, given, out.sequences)) == {
        "input_ids",
        "attention_mask",
        "use_cache",
    }
    assert_close(logits_of_steps(module, given, out), torch.stack(out.logits, 1))


def test_the_rest_of_a_prompt_is_not_made_up() -> None:
    module, inputs = make("gpt2")
    ids = inputs["input_ids"]
    kv_cache = module(ids[:, :5], use_cache=True).past_key_values
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **STEPS}
    given = {**whole, "past_key_values": kv_cache}
    out = module.generate(**given, **REPORT)
    assert_close(logits_of_steps(module, given, out), torch.stack(out.logits, 1))
    part = {**given, "input_ids": ids[:, 5:]}
    with pytest.raises(UnsupportedError, match="5 tokens of the prompt are in past_key_values"):
        forward_inputs(module, part, out.sequences[:, 5:])


def test_a_new_token_that_stands_for_an_image_is_refused() -> None:
    module, inputs = make("llava" if IS_TRANSFORMERS_5 else "blip_2")
    image = torch.tensor([[9, IMAGE_TOKEN]])
    sequences = torch.cat([inputs["input_ids"], image], 1)
    with pytest.raises(UnsupportedError, match=r"suppress_tokens=\[5\]"):
        forward_inputs(module, inputs, sequences)
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}
    assert "input_ids" in forward_inputs(module, without, sequences)

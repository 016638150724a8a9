"""Text, lists of text, ids and encodings become a batch whose every row is what it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from tests.tiny_models import SPECS, make
from tracekit import LanguageModel, Model
from tracekit.errors import InputError, LoadingError, PaddingError
from tracekit.models.tiny import WEIGHTS

LONG, SHORT = [11, 12, 13, 14, 15, 16, 17], [21, 22, 23]
PROMPTS = ["The Eiffel Tower is in the city of", "The Colosseum"]
TEXT_FAMILIES = ("decoder", "moe", "ssm", "hybrid", "encoder", "encdec")
OF_TEXT = [name for name, spec in SPECS.items() if spec.family in TEXT_FAMILIES]
GENERATING = [n for n in OF_TEXT if SPECS[n].generate and SPECS[n].family != "encdec"]
OF_IMAGES = [name for name, spec in SPECS.items() if spec.family == "vlm"]
TOLERANCE = 1e-5


pytestmark = pytest.mark.usefixtures("without_gradients")


def result_of(model: LanguageModel, given: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The first value that the model returns (logits, hidden states), and the mask it got."""
    with model.trace(given, **kwargs) as tracer:
        mask = model.inputs[1]["attention_mask"]
        result = tracer.result
    return result[0], mask.bool()


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("name", OF_TEXT)
def test_a_row_of_a_padded_batch_is_what_it_is_alone_or_the_batch_is_refused(
    name: str, side: str | None
) -> None:
    module, inputs = make(name)
    model = LanguageModel(module, padding_side=side)
    rows: dict[str, Tensor] = {}
    if "decoder_input_ids" in inputs:
        rows["decoder_input_ids"] = torch.tensor([[30, 31, 32]] * 2)
    try:
        together, mask = result_of(model, [LONG, SHORT], **rows)
    except PaddingError:
        return
    one = {key: value[:1] for key, value in rows.items()}
    for index, row in enumerate((LONG, SHORT)):
        alone = result_of(model, [row], **one)[0][0]
        mine = together[index] if rows else together[index][mask[index]]
        assert torch.allclose(mine, alone, atol=TOLERANCE), (mine - alone).abs().max()


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("name", GENERATING)
def test_a_row_of_a_padded_batch_generates_what_it_does_alone_or_the_batch_is_refused(
    name: str, side: str | None
) -> None:
    module, _ = make(name)
    model = LanguageModel(module, padding_side=side)
    options = dict(max_new_tokens=3, do_sample=False, output_logits=True)
    try:
        together = model.generate([LONG, SHORT], return_dict_in_generate=True, **options)
    except PaddingError:
        return
    alone = model.generate([SHORT], return_dict_in_generate=True, **options)
    for step in range(3):
        mine, own = together.logits[step][1], alone.logits[step][0]
        assert torch.allclose(mine, own, atol=TOLERANCE), (step, (mine - own).abs().max())


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_padded_row_with_an_image_is_what_it_is_without_the_padding(name: str) -> None:
    module, inputs = make(name)
    model = LanguageModel(module)
    per_token = [key for key, v in inputs.items() if v.shape == inputs["input_ids"].shape]
    padding = torch.zeros(1, 3, dtype=torch.long)
    padded = {**inputs, **{key: torch.cat([padding, inputs[key]], 1) for key in per_token}}
    expected = module(**inputs).logits
    with model.trace(padded) as tracer:
        got = tracer.result.logits[:, 3:]
    assert torch.allclose(got, expected, atol=TOLERANCE), (got - expected).abs().max()


def test_every_kind_of_input_means_the_same(tiny: LanguageModel) -> None:
    encoding = tiny.tokenizer(PROMPTS[0], return_tensors="pt")
    ids = encoding["input_ids"]
    expected = tiny.module(**encoding).logits
    for given in (PROMPTS[0], [PROMPTS[0]], ids, ids[0], ids.tolist(), ids[0].tolist(), encoding):
        with tiny.trace(given) as tracer:
            logits = tracer.result.logits
        assert torch.allclose(logits, expected, atol=TOLERANCE)
    with tiny.trace(**encoding) as tracer:
        logits = tracer.result.logits
    assert torch.allclose(logits, expected, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_of_different_lengths_are_each_what_they_are_alone(side: str) -> None:
    model = LanguageModel("tracekit/tiny", padding_side=side)
    last = {}
    with model.trace(PROMPTS):
        hidden = model.transformer.h[2].hidden
    for index, prompt in enumerate(PROMPTS):
        with model.trace(prompt):
            last[index] = model.transformer.h[2].hidden[0]
        length = len(last[index])
        mine = hidden[index, :length] if side == "right" else hidden[index, -length:]
        assert torch.allclose(mine, last[index], atol=TOLERANCE)


def test_a_trace_keeps_no_keys_and_values_unless_they_are_asked_for(tiny: LanguageModel) -> None:
    with tiny.trace(PROMPTS[0]) as tracer:
        plain = tracer.result
    with tiny.trace(PROMPTS[0], use_cache=True) as tracer:
        asked = tracer.result
    assert plain.past_key_values is None
    assert asked.past_key_values is not None


def test_the_page_prompt_ends_in_paris(tiny: LanguageModel) -> None:
    with tiny.trace(PROMPTS[0]):
        token = tiny.lm_head.output[0, -1].argmax()
    assert tiny.tokenizer.decode(token).strip() == "Paris"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((), "has no input"),
        (("one", "two"), "a list makes a batch"),
        (([],), "empty list"),
        ((3.5,), "not float"),
        ((torch.zeros(2, 3),), "integers"),
        ((["text", [1, 2]],), "strings alone"),
    ],
)
def test_an_input_that_means_nothing_is_refused(
    given: tuple[Any, ...], says: str, tiny: LanguageModel
) -> None:
    with pytest.raises(InputError, match=says):
        with tiny.trace(*given):
            pass


def test_text_for_a_model_without_a_tokenizer_is_refused() -> None:
    model = LanguageModel(make("gpt2")[0])
    with pytest.raises(InputError, match="tokenizer"):
        with model.trace("text"):
            pass


def test_what_is_no_module_is_refused_where_a_model_is_made() -> None:
    with pytest.raises(InputError, match=r"torch\.nn\.Module, not str; LanguageModel loads"):
        Model("gpt2")  # type: ignore[arg-type]


def test_an_option_that_no_loader_knows_is_named() -> None:
    with pytest.raises(LoadingError, match="'divice'; options go to from_pretrained"):
        LanguageModel("tracekit/tiny", divice="cpu")


def test_a_live_model_takes_no_loading_options() -> None:
    with pytest.raises(LoadingError, match="dtype"):
        LanguageModel(make("gpt2")[0], dtype=torch.float16)


def test_the_users_tokenizer_is_not_changed() -> None:
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    tokenizer.pad_token = None
    LanguageModel(make("gpt2")[0], tokenizer=tokenizer)
    assert tokenizer.pad_token is None


def test_a_module_without_arguments_can_be_traced() -> None:
    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = torch.nn.Parameter(torch.ones(3))

        def forward(self) -> Tensor:
            return self.values * 2

    model = Model(Constant())
    with model.trace():
        value = model.output
    assert torch.equal(value, torch.full((3,), 2.0))

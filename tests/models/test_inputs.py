"""From what people have to the tensors of a forward: each kind, and what is refused."""

from __future__ import annotations

import functools
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BatchEncoding

from tests.tiny_models import make
from tests.tracing.plain import is_same, plain_hooks
from tracekit import LanguageModel, Model
from tracekit.errors import InputError
from tracekit.models.tiny import WEIGHTS

TEXT = "The Eiffel Tower is in the city of"
ROW = [11, 12, 13]


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    return LanguageModel(make("gpt2")[0])


@functools.cache
def packaged() -> Any:
    return LanguageModel("tracekit/tiny").module


def encode(given: Any, tokenizer: Any, side: str) -> dict[str, Any]:
    """What the model's forward gets for `given`, positions aside."""
    model = LanguageModel(packaged(), tokenizer=tokenizer, padding_side=side)
    with model.trace(given):
        inputs = dict(model.inputs[1])
    return {key: inputs[key] for key in inputs if key not in ("position_ids", "use_cache")}


# -- what is given becomes ids and a mask ---------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        ROW,
        tuple(ROW),
        range(11, 14),
        [ROW],
        (tuple(ROW),),
        torch.tensor(ROW),
        torch.tensor([ROW]),
        [torch.tensor(ROW)],
        torch.tensor(ROW, dtype=torch.int32).long(),
    ],
    ids=repr,
)
def test_ids_of_one_row(given: Any) -> None:
    encoded = encode(given, None, "left")
    assert encoded["input_ids"].tolist() == [ROW]
    assert encoded["attention_mask"].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("left", [[1, 2, 3], [0, 0, 4]], [[1, 1, 1], [0, 0, 1]]),
        ("right", [[1, 2, 3], [4, 0, 0]], [[1, 1, 1], [1, 0, 0]]),
    ],
)
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_rows_of_different_lengths_are_padded(
    kind: Any, side: str, ids: list[list[int]], mask: list[list[int]]
) -> None:
    encoded = encode([kind([1, 2, 3]), kind([4])], None, side)
    assert encoded["input_ids"].tolist() == ids
    assert encoded["attention_mask"].tolist() == mask


def test_rows_are_padded_with_the_tokenizers_padding(tokenizer: Any) -> None:
    encoded = encode([[5, 6, 7], [8]], tokenizer, "left")
    assert encoded["input_ids"][1].tolist() == [tokenizer.pad_token_id] * 2 + [8]


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_tokenized_and_padded_on_the_side_asked_for(side: str, tokenizer: Any) -> None:
    encoded = encode([TEXT, "The Eiffel"], tokenizer, side)
    own = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    assert torch.equal(encoded["input_ids"][0], own)
    short = encoded["attention_mask"][1].bool()
    assert bool(short[-1]) is (side == "left")
    assert bool(short[0]) is (side == "right")
    assert tokenizer.padding_side == AutoTokenizer.from_pretrained(WEIGHTS).padding_side


def test_a_text_is_what_the_tokenizer_makes_of_it(tokenizer: Any) -> None:
    encoded = encode(TEXT, tokenizer, "left")
    assert is_same(encoded, dict(tokenizer(TEXT, return_tensors="pt")))
    assert is_same(encode([TEXT], tokenizer, "left"), encoded)


@pytest.mark.parametrize("kind", [dict, BatchEncoding, UserDict])
def test_an_encoding_is_taken_as_it_is(kind: Any) -> None:
    given = {"input_ids": torch.tensor([ROW]), "token_type_ids": torch.tensor([[0, 0, 1]])}
    assert is_same(encode(kind(given), None, "left"), given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "not an empty list"),
        (None, "not NoneType"),
        (3, "not int"),
        (3.5, "not float"),
        pytest.param(object(), "not object", id="object"),
        ([[]], "empty|no token"),
        ([[1, 2], []], "empty|no token"),
        (torch.zeros(2, 3), "float32 of shape"),
        (torch.zeros(2, 3, 4, dtype=torch.long), r"shape \(2, 3, 4\)"),
        (torch.tensor(3), r"shape \(\)"),
        (torch.zeros(1, 0, dtype=torch.long), "empty|no token|shape"),
        (["text", 3], "strings alone or rows of token ids alone"),
        (["text", [1, 2]], "strings alone or rows"),
        ([1, [2]], "strings alone or rows"),
        ([1.5, 2.5], "float"),
        ([[1.5]], "this one holds"),
        ([torch.tensor([11.7, 12.2])], "integers|this one holds|float"),
        ({1, 2}, "not set"),
    ],
    ids=repr,
)
def test_what_means_nothing_is_refused_in_words(given: Any, says: str, tiny: LanguageModel) -> None:
    with pytest.raises(InputError, match=says):
        with tiny.trace(given):
            tiny.lm_head.output


def test_text_without_a_tokenizer_is_refused_with_the_way_out(gpt2: LanguageModel) -> None:
    for given in (TEXT, [TEXT]):
        with pytest.raises(InputError, match=r"LanguageModel\(module, tokenizer=…\), or give ids"):
            with gpt2.trace(given):
                pass


# -- what the model gets --------------------------------------------------------------------------


def test_keyword_tensors_reach_the_forward(gpt2: LanguageModel) -> None:
    embedded = gpt2.transformer.wte(torch.tensor([ROW]))
    with gpt2.trace(torch.tensor([ROW])) as tracer:
        by_ids = tracer.result.logits
    with gpt2.trace(inputs_embeds=embedded) as tracer:
        by_embeddings = tracer.result.logits
    with gpt2.trace(ROW, labels=torch.tensor([ROW])) as tracer:
        loss = tracer.result.loss
    assert torch.equal(by_embeddings, by_ids)
    assert torch.equal(loss, gpt2.module(torch.tensor([ROW]), labels=torch.tensor([ROW])).loss)


def test_a_keyword_wins_over_what_the_input_stands_for(gpt2: LanguageModel) -> None:
    mask = torch.tensor([[0, 1, 1]])
    with gpt2.trace(ROW, attention_mask=mask):
        got = gpt2.inputs[1]["attention_mask"]
    assert torch.equal(got, mask)


def test_the_users_encoding_stays_as_it_was(gpt2: LanguageModel) -> None:
    encoding = {"input_ids": torch.tensor([ROW]), "attention_mask": torch.tensor([[0, 1, 1]])}
    with gpt2.trace(encoding):
        gpt2.lm_head.output
    gpt2.generate(encoding, max_new_tokens=1, do_sample=False)
    assert list(encoding) == ["input_ids", "attention_mask"]
    assert encoding["attention_mask"].tolist() == [[0, 1, 1]]


def test_a_batch_of_texts_has_a_row_for_each(tiny: LanguageModel) -> None:
    with tiny.trace([TEXT, "The Eiffel Tower", "The"]):
        hidden = tiny.transformer.h[0].output
    assert hidden.shape[0] == 3


@pytest.mark.parametrize("name", ["bert", "t5", "llama", "vit", "whisper", "llava"])
def test_a_model_takes_what_its_forward_takes(name: str) -> None:
    net, inputs = make(name)
    with plain_hooks(net) as seen:
        net(**inputs)
    for traced in (Model(net), LanguageModel(net)):
        with traced.trace(**inputs) as tracer:
            cache = tracer.cache()
        assert set(cache) == set(seen)
        last = list(seen)[-2]
        assert is_same(cache[last][0].output, seen[last][0])


class Odd(nn.Module):
    """Takes positional, keyword-only and structured arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, pair: tuple[Tensor, Tensor], *more: Tensor, scale: float, **rest: Any) -> Any:
        total = self.inner(pair[0] + pair[1]) * scale
        return {"total": total + sum(more), "names": sorted(rest)}


def test_any_arguments_of_any_module() -> None:
    net = Odd()
    one, two = torch.ones(1, 2), torch.full((1, 2), 3.0)
    model = Model(net)
    with model.trace((one, two), one, two, scale=2.0, a=1, b=None) as tracer:
        args, kwargs = model.inputs
        first = model.input
        result = tracer.result
    expected = net((one, two), one, two, scale=2.0, a=1, b=None)
    assert torch.equal(result["total"], expected["total"])
    assert result["names"] == ["a", "b"]
    assert len(args) == 3 and list(kwargs) == ["scale", "a", "b"]
    assert first is args[0]


@pytest.mark.parametrize(
    ("option", "cure"),
    [
        ("stop_at_layer", "run_with_cache"),
        ("remove_batch_dim", "run_with_cache"),
        ("fwd_hooks", "run_with_hooks"),
    ],
)
def test_an_option_of_another_call_is_refused_where_a_forward_would_ignore_it(
    option: str, cure: str
) -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    for run in (model.trace, model.forward):
        with pytest.raises(InputError, match=f"{option}= would be ignored here: .*{cure}"):
            run(**inputs, **{option: 1})

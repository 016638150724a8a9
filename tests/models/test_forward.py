"""forward(): logits, and the loss of every row as it is alone; beside Hugging Face's own loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from tests.matrix.spec import IMAGE_TOKEN
from tests.models.small_tokenizers import bpe
from tests.tiny_models import SPECS, make
from tracekit import LanguageModel
from tracekit.errors import InputError, UnsupportedError

pytestmark = pytest.mark.usefixtures("without_gradients")

TEXTS = ["the cat sat", "Paris is in France; the Eiffel Tower", "the dog sat on"]
VOCABULARY = 340
# Rows of padded batches are what each is alone; the others refuse padding, or have no text.
DECODERS = [
    name
    for name, spec in SPECS.items()
    if spec.family in ("decoder", "moe") or name in ("mamba", "mamba2", "falcon_h1", "lfm2")
]
ROWS = [[11, 12, 13, 14, 15, 16], [21, 22, 23], [31, 32, 33, 34]]


def model_of(name: str = "llama", **ends: bool) -> LanguageModel:
    net, _ = make(name, vocab_size=VOCABULARY)
    return LanguageModel(net, tokenizer=bpe(**ends))


def by_hand(net: Any, row: list[int]) -> Tensor:
    """The loss of each token of one row, alone: `[pos - 1]`."""
    ids = torch.tensor([row])
    chances = log_softmax(net(ids).logits[0, :-1], -1)
    return -chances[torch.arange(len(row) - 1), ids[0, 1:]]


def real(mask: Tensor) -> Tensor:
    """Which losses of a padded batch are of tokens behind tokens."""
    return mask[:, 1:].bool() & mask[:, :-1].bool()


# -- the loss of decoders -------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_of_a_padded_batch_is_that_of_each_row_alone(name: str, side: str) -> None:
    net, _ = make(name)
    model = LanguageModel(net, padding_side=side)
    alone = [by_hand(net, row) for row in ROWS]
    losses = model.forward(ROWS, return_type="loss", loss_per_token=True)
    mask = model.to_inputs(ROWS)["attention_mask"]
    assert losses.shape == (3, 5)
    for row, expected in enumerate(alone):
        there = real(mask)[row]
        torch.testing.assert_close(losses[row, there], expected, atol=1e-5, rtol=1e-5)
        assert not losses[row, ~there].any()
    loss = model.forward(ROWS, return_type="loss")
    torch.testing.assert_close(loss, torch.cat(alone).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ends", [{}, {"begin": True}, {"begin": True, "end": True}], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_hugging_faces_with_labels(side: str, ends: dict[str, bool]) -> None:
    model = model_of(**ends)
    inputs = model.to_inputs(TEXTS, padding_side=side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    first = inputs["attention_mask"].argmax(-1)
    labels[torch.arange(3), first] = -100  # on the left it would be foretold from padding
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    theirs = model.module(**inputs, position_ids=positions, labels=labels)
    loss = model.forward(TEXTS, return_type="loss", padding_side=side)
    torch.testing.assert_close(loss, theirs.loss)
    both = model.forward(TEXTS, return_type="both", padding_side=side)
    assert torch.equal(both.loss, loss)
    assert both[0] is both.logits
    torch.testing.assert_close(both.logits, theirs.logits)
    own = model.forward(TEXTS, return_type="loss", padding_side=side, labels=labels)
    torch.testing.assert_close(own, theirs.loss)
    each = model.forward(
        TEXTS, return_type="loss", padding_side=side, labels=labels, loss_per_token=True
    )
    torch.testing.assert_close(each.sum() / (labels[:, 1:] != -100).sum(), theirs.loss)


def test_a_beginning_counts_as_what_is_behind_it_is_foretold_from_it() -> None:
    model = model_of(begin=True)
    text = "the cat sat"
    losses = model.forward(text, return_type="loss", loss_per_token=True)
    tokens = model.to_tokens(text)
    assert losses.shape == (1, tokens.shape[1] - 1)
    torch.testing.assert_close(losses[0], by_hand(model.module, tokens[0].tolist()))
    bare = model.forward(text, return_type="loss", loss_per_token=True, prepend_bos=False)
    assert bare.shape == (1, tokens.shape[1] - 2)


def test_a_hole_in_a_mask_is_no_target_and_foretells_nothing() -> None:
    model = model_of()
    mask = torch.tensor([[0, 1, 1, 0, 1, 1]])
    losses = model.forward(
        [[5, 6, 7, 8, 9, 10]], attention_mask=mask, return_type="loss", loss_per_token=True
    )
    assert (losses != 0).tolist() == [[False, True, False, False, True]]


def test_the_logits_are_those_of_a_trace(tiny: LanguageModel) -> None:
    for given, options in ((TEXTS, {}), ("The Eiffel", {"prepend_bos": False}), ([5, 6], {})):
        with tiny.trace(given, **options) as tracer:
            expected = tracer.result.logits
        assert torch.equal(tiny.forward(given, **options), expected)
        assert torch.equal(tiny(given, return_type="logits", **options), expected)
    assert tiny.forward(TEXTS, return_type=None) is None
    assert hasattr(tiny(TEXTS), "logits")  # without return_type a call is Hugging Face's


def test_lasting_edits_are_in_the_loss(tiny: LanguageModel) -> None:
    with tiny.edit() as edited:
        edited.transformer.h[1].hidden[:] = 0
    handle = tiny.module.transformer.h[1].register_forward_hook(
        lambda _module, _args, output: (
            torch.zeros_like(output)
            if isinstance(output, Tensor)
            else (torch.zeros_like(output[0]), *output[1:])
        )
    )
    row = tiny.to_tokens("The Eiffel Tower is in the city of")[0].tolist()
    expected = by_hand(tiny.module, row).mean()
    handle.remove()
    text = "The Eiffel Tower is in the city of"
    torch.testing.assert_close(edited.forward(text, return_type="loss"), expected)
    assert not torch.allclose(tiny.forward(text, return_type="loss"), expected, atol=1e-3)


def test_the_loss_behind_a_prefix_is_of_what_follows_it() -> None:
    model = model_of()
    whole, text = "the cat sat on the mat", " on the mat"
    prefix = model.prefill("the cat sat")
    rest = model.to_tokens(text, prepend_bos=False).shape[1]
    losses = model.forward(text, prefix=prefix, return_type="loss", loss_per_token=True)
    expected = by_hand(model.module, model.to_tokens(whole)[0].tolist())[-(rest - 1) :]
    torch.testing.assert_close(losses[0], expected, atol=1e-5, rtol=1e-5)


def test_a_loss_has_gradients() -> None:
    model = model_of()
    with torch.enable_grad():
        loss = model.forward(TEXTS, return_type="loss")
        loss.backward()
    found = model.module.lm_head.weight.grad.clone()
    model.module.zero_grad()
    with torch.enable_grad():
        rows = [model.to_tokens(text)[0].tolist() for text in TEXTS]
        torch.cat([by_hand(model.module, row) for row in rows]).mean().backward()
    torch.testing.assert_close(found, model.module.lm_head.weight.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_loss_of_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    model = model_of()
    model.module.to(dtype)
    loss = model.forward(TEXTS, return_type="loss")
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    inputs = model.to_inputs("the cat sat")
    theirs = model.module(**inputs, labels=inputs["input_ids"]).loss
    assert torch.allclose(model.forward("the cat sat", return_type="loss"), theirs.to(loss.dtype))


@pytest.mark.parametrize(
    "name", [name for name in ("llava", "idefics3", "qwen3_vl", "blip_2") if name in SPECS]
)
def test_placeholders_of_images_are_no_targets(name: str) -> None:
    net, inputs = make(name)
    losses = LanguageModel(net).forward(**inputs, return_type="loss", loss_per_token=True)
    is_image = inputs["input_ids"][:, 1:] == IMAGE_TOKEN
    assert is_image.any() and not is_image.all()
    assert (losses != 0)[~is_image].all()
    expected = cross_entropy(
        net(**inputs).logits[:, :-1].flatten(0, 1),
        inputs["input_ids"][:, 1:].flatten(),
        reduction="none",
    ).view(losses.shape)
    torch.testing.assert_close(losses, expected * ~is_image, atol=1e-5, rtol=1e-5)


# -- what is told what to say ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_the_loss_of_an_encoder_decoder_is_that_of_its_labels(name: str) -> None:
    model = model_of(name, end=True)
    said = ["the dog", "Paris is in the Eiffel Tower"]
    loss = model.forward(TEXTS[:2], labels=said, return_type="loss")
    each = model.forward(TEXTS[:2], labels=said, return_type="loss", loss_per_token=True)
    rows = [model.tokenizer(text)["input_ids"] for text in said]
    alone: list[Tensor] = []
    for text, row in zip(TEXTS, rows, strict=False):
        ids = torch.tensor([row])
        theirs = model.module(**model.to_inputs(text), labels=ids)
        alone.append(cross_entropy(theirs.logits[0], ids[0], reduction="none"))
        torch.testing.assert_close(alone[-1].mean(), theirs.loss)
    torch.testing.assert_close(loss, torch.cat(alone).mean(), atol=1e-5, rtol=1e-5)
    assert each.shape == (2, max(map(len, rows)))
    for row, expected in enumerate(alone):
        own = each[row, : len(expected)]
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
        assert not each[row, len(expected) :].any()
    ids = torch.tensor([rows[0]])
    assert torch.allclose(
        model.forward(TEXTS[0], labels=ids, return_type="loss"), alone[0].mean(), atol=1e-5
    )


def test_the_loss_of_a_masked_model_is_that_of_its_labels() -> None:
    net, _ = make("bert")
    model = LanguageModel(net)
    ids, labels = torch.tensor([[11, 3, 13, 3]]), torch.tensor([[-100, 12, -100, 14]])
    theirs = net(ids, labels=labels)
    options = {"labels": labels, "return_type": "loss"}
    assert torch.equal(model.forward(ids, **options), theirs.loss)
    each = model.forward(ids, **options, loss_per_token=True)
    assert each.shape == (1, 4)
    assert (each != 0).tolist() == [[False, True, False, True]]
    torch.testing.assert_close(each.sum() / 2, theirs.loss)


# -- predictions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_predictions_are_what_comes_next_in_each_row(side: str, tiny: LanguageModel) -> None:
    texts = ["The Eiffel Tower is in the city of", "The Eiffel"]
    found = tiny.forward(texts, return_type="predictions", padding_side=side)
    expected = [
        tiny.tokenizer.decode([int(tiny.module(tiny.to_tokens(text)).logits[0, -1].argmax())])
        for text in texts
    ]
    assert found == expected
    assert found[0] == "Paris"


def test_predictions_of_a_masked_model_are_for_its_masks() -> None:
    net, _ = make("bert", vocab_size=VOCABULARY)
    tokenizer = bpe()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    model = LanguageModel(net, tokenizer=tokenizer)
    texts = ["the <mask> sat on the <mask>", "the cat"]
    found = model.forward(texts, return_type="predictions")
    inputs = model.to_inputs(texts[0])
    logits = net(**inputs).logits[0]
    places = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().flatten()
    expected = [tokenizer.decode([int(logits[place].argmax())]) for place in places]
    assert found == [expected, []]
    assert len(expected) == 2


# -- loss_fn --------------------------------------------------------------------------------------


def test_the_loss_of_logits_read_in_a_trace_is_that_of_forward(tiny: LanguageModel) -> None:
    inputs = tiny.to_inputs(TEXTS)
    with tiny.trace(inputs):
        logits = tiny.lm_head.output
        within = tiny.loss_fn(logits, inputs["input_ids"], inputs["attention_mask"])
    expected = tiny.forward(TEXTS, return_type="loss")
    assert torch.equal(within, expected)
    each = tiny.loss_fn(logits, inputs["input_ids"], inputs["attention_mask"], per_token=True)
    assert torch.equal(each, tiny.forward(TEXTS, return_type="loss", loss_per_token=True))
    alone = tiny.loss_fn(logits[1, -4:], inputs["input_ids"][1, -4:])
    assert torch.allclose(alone, each[1, -3:].mean())
    with tiny.scan(inputs):
        shape = tiny.loss_fn(tiny.lm_head.output, inputs["input_ids"], per_token=True).shape
    assert shape == each.shape


def test_logits_of_other_tokens_are_refused(tiny: LanguageModel) -> None:
    logits = torch.zeros(2, 3, 10)
    with pytest.raises(InputError, match=r"given are logits \(2, 3, 10\), tokens \(2, 4\)"):
        tiny.loss_fn(logits, torch.zeros(2, 4).long())
    with pytest.raises(InputError, match=r"and attention_mask \(1, 3\)"):
        tiny.loss_fn(logits, torch.zeros(2, 3).long(), torch.ones(1, 3))


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        ("the", {"return_type": "loss"}, "no row has two tokens"),
        ("the cat", {"return_type": "losses"}, "'predictions' or None, not 'losses'"),
        ("the cat", {"loss_per_token": True}, "give return_type='loss' or 'both'"),
        ("the cat", {"labels": torch.tensor([[1, 2]])}, "give return_type='loss' or 'both'"),
        ("the cat", {"return_type": "loss", "labels": "the"}, "labels= as text are what an enc"),
        ("the cat", {"return_type": "loss", "labels": [[1]]}, "not list"),
        ("the cat", {"return_type": "loss", "logits_to_keep": 1}, "leave logits_to_keep= out"),
        ("the cat", {"max_new_tokens": 1}, "an option of generate"),
        ("the cat", {"return_dict": False}, "tuple, which has no logits"),
    ],
    ids=str,
)
def test_what_has_no_answer_is_refused(given: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        model_of().forward(given, **options)


def test_embeddings_have_no_tokens_to_be_the_loss_of() -> None:
    model = model_of()
    embeds = model.module.get_input_embeddings()(torch.tensor([[5, 6]]))
    assert model.forward(inputs_embeds=embeds).shape == (1, 2, VOCABULARY)
    with pytest.raises(InputError, match="no input_ids were given: give labels="):
        model.forward(inputs_embeds=embeds, return_type="loss")
    labels = torch.tensor([[5, 6]])
    loss = model.forward(inputs_embeds=embeds, return_type="loss", labels=labels)
    torch.testing.assert_close(loss, model.forward(labels, return_type="loss"))


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "paligemma"])
def test_what_sees_the_token_that_it_foretells_has_no_loss_without_labels(name: str) -> None:
    if name not in SPECS:
        pytest.skip("needs transformers 5")
    model = LanguageModel(make(name)[0])
    with pytest.raises(UnsupportedError, match=r"reads the tokens behind, too.*give labels="):
        model.forward([5, 6, 7], return_type="loss")


def test_an_encoder_with_the_head_of_a_decoder_has_none_either() -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BertConfig(**sizes, intermediate_size=8, vocab_size=50)
    with pytest.raises(UnsupportedError, match="reads the tokens behind"):
        LanguageModel(BertLMHeadModel(config).eval()).forward([5, 6], return_type="loss")
    config.is_decoder = True
    decoder = BertLMHeadModel(config).eval()
    loss = LanguageModel(decoder).forward([5, 6, 7], return_type="loss")
    torch.testing.assert_close(loss, by_hand(decoder, [5, 6, 7]).mean())


def test_an_encoder_decoder_without_labels_has_none() -> None:
    model = LanguageModel(make("t5")[0])
    with pytest.raises(InputError, match="what its decoder is to say: give labels="):
        model.forward([5, 6], decoder_input_ids=torch.tensor([[0, 7]]), return_type="loss")


def test_a_model_that_has_no_logits_says_what_it_has() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net.transformer)
    with pytest.raises(InputError, match=r"has no logits: model\(input\) returns all"):
        model.forward([5, 6])
    assert model.forward([5, 6], return_type=None) is None


class Aside(nn.Module):
    """A decoder whose loss is more than that of its tokens."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
        outputs = self.inner(input_ids, attention_mask=attention_mask, labels=labels)
        outputs.loss = outputs.loss + 1
        return outputs


def test_a_loss_that_is_more_than_its_tokens_is_not_taken_apart() -> None:
    model = LanguageModel(Aside(make("gpt2")[0]))
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(UnsupportedError, match="is not the mean of those of its tokens"):
        model.forward(ids, labels=ids, return_type="loss", loss_per_token=True)
    assert model.forward(ids, labels=ids, return_type="loss") > 0

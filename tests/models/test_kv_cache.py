"""Keys and values as data: entries that grow or stay, in the model's own numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import make
from tracekit import KeyValueCache, KeyValueEntry, LanguageModel
from tracekit.errors import InputError, UnsupportedError


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 60, (rows, length), generator=generator)


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(make("gpt2")[0])


def logits(model: LanguageModel, rest: Any, prefix: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad(), model.trace(rest, prefix=prefix, **kwargs):
        out = model.lm_head.output
    return out


def plain(model: LanguageModel, text: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(text, use_cache=False).logits


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def entry() -> KeyValueEntry:
    return KeyValueEntry(torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 6))


def test_an_entry_keeps_what_is_appended() -> None:
    own = entry()
    keys, values = own.append(torch.ones(2, 1, 4, 5), torch.ones(2, 1, 4, 6))
    assert keys.shape == (2, 4, 4, 5)
    assert values.shape == (2, 4, 4, 6)
    assert own.past_keys is keys
    assert own.past_values is values
    assert torch.equal(keys[:, 3], torch.ones(2, 4, 5))
    assert len(own) == 4
    assert repr(own) == "KeyValueEntry(keys (2, 4, 4, 5), values (2, 4, 4, 6))"


def test_a_frozen_entry_returns_the_joined_and_stays() -> None:
    own = entry()
    own.frozen = True
    keys, _ = own.append(torch.ones(2, 1, 4, 5), torch.ones(2, 1, 4, 6))
    assert keys.shape[1] == 4
    assert len(own) == 3


def test_a_cache_freezes_and_unfreezes_all_of_its_entries() -> None:
    kv_cache = KeyValueCache([entry(), entry()], torch.ones(2, 3))
    kv_cache.freeze()
    assert kv_cache.frozen
    assert all(each.frozen for each in kv_cache)
    assert kv_cache.append_attention_mask(torch.ones(2, 2)).shape == (2, 5)
    assert kv_cache.previous_attention_mask.shape == (2, 3)
    kv_cache.unfreeze()
    assert not any(each.frozen for each in kv_cache.entries)
    kv_cache.append_attention_mask(torch.ones(2, 2))
    assert kv_cache.previous_attention_mask.shape == (2, 5)
    assert kv_cache[1] is kv_cache.entries[1]
    assert len(kv_cache) == 2
    assert kv_cache.batch_size == 2


@pytest.mark.parametrize("name", ["gpt2", "llama", "deepseek_v3"])
def test_an_empty_one_grows_by_each_run(name: str) -> None:
    model = LanguageModel(make(name)[0])
    kv_cache = KeyValueCache.init(model, batch_size=2)
    assert kv_cache.previous_attention_mask.shape == (2, 0)
    assert {len(each) for each in kv_cache} == {0}
    text = ids(2, 9)
    outs = [logits(model, text[:, a:b], kv_cache) for a, b in [(0, 4), (4, 5), (5, 9)]]
    close(torch.cat(outs, 1), plain(model, text))
    assert {len(each) for each in kv_cache} == {9}
    assert kv_cache.previous_attention_mask.shape == (2, 9)
    assert torch.equal(kv_cache.tokens, text)


def test_the_entries_are_those_that_the_model_computes(model: LanguageModel) -> None:
    text = ids(2, 6)
    kv_cache = KeyValueCache.init(model, 2)
    logits(model, text, kv_cache)
    own = model.module(text, use_cache=True).past_key_values
    for layer, each in zip(own.layers, kv_cache, strict=True):
        close(each.past_keys, layer.keys.transpose(1, 2).detach())
        close(each.past_values, layer.values.transpose(1, 2).detach())


def test_a_frozen_one_never_changes(model: LanguageModel) -> None:
    text = ids(1, 9)
    kv_cache = model.prefill(text[:, :5]).kv_cache
    assert kv_cache.frozen
    before = [(each.past_keys.clone(), each.past_values.clone()) for each in kv_cache]
    for rows in (1, 3):
        out = logits(model, text[:, 5:].expand(rows, -1), kv_cache)
        close(out, plain(model, text)[:, 5:].expand(rows, -1, -1))
    model.generate(text[:, 5:], prefix=kv_cache, max_new_tokens=3)
    for each, (keys, values) in zip(kv_cache, before, strict=True):
        assert torch.equal(each.past_keys, keys)
        assert torch.equal(each.past_values, values)


def test_a_prefix_that_was_unfrozen_grows_and_the_prefix_stays(model: LanguageModel) -> None:
    text = ids(1, 9)
    prefix = model.prefill(text[:, :5])
    kv_cache = prefix.kv_cache
    kv_cache.unfreeze()
    logits(model, text[:, 5:7], kv_cache)
    assert {len(each) for each in kv_cache} == {7}
    close(logits(model, text[:, 7:], kv_cache), plain(model, text)[:, 7:])
    close(logits(model, text[:, 5:], prefix), plain(model, text)[:, 5:])


def test_its_padding_is_masked_in_every_later_run(model: LanguageModel) -> None:
    rows = [ids(1, 3, 1), ids(1, 5, 2)]
    kv_cache = KeyValueCache.init(model, 2)
    logits(model, [row[0].tolist() for row in rows], kv_cache)
    assert kv_cache.previous_attention_mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    rest = ids(2, 2, 3)
    out = logits(model, rest, kv_cache)
    for index, row in enumerate(rows):
        text = torch.cat([row, rest[index : index + 1]], 1)
        close(out[index : index + 1], plain(model, text)[:, -2:])


def test_a_generation_grows_it_by_all_that_was_fed(model: LanguageModel) -> None:
    text = ids(1, 6)
    kv_cache = KeyValueCache.init(model)
    tokens = model.generate(text, prefix=kv_cache, max_new_tokens=4, do_sample=False)
    plainly = model.module.generate(text, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, plainly)
    assert {len(each) for each in kv_cache} == {6 + 3}  # the last token was never fed
    assert kv_cache.previous_attention_mask.shape == (1, 9)
    close(logits(model, tokens[:, -1:], kv_cache), plain(model, tokens)[:, -1:])


def test_beams_do_not_grow_it(model: LanguageModel) -> None:
    kv_cache = KeyValueCache.init(model)
    with pytest.raises(InputError, match="grows by its own rows"):
        model.generate(ids(1, 3), prefix=kv_cache, num_beams=2)
    kv_cache.freeze()
    text = ids(1, 6)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    tokens = model.generate(text, prefix=kv_cache, **options)
    assert torch.equal(tokens, model.module.generate(text, **options))


def test_text_begins_in_an_empty_one_and_goes_on_in_a_filled_one() -> None:
    model = LanguageModel("tracekit/tiny")  # its tokenizer begins a text with a token of its own
    kv_cache = KeyValueCache.init(model)
    parts = [logits(model, text, kv_cache) for text in ("The Eiffel Tower", " is in the city of")]
    with torch.no_grad(), model.trace("The Eiffel Tower is in the city of"):
        whole = model.lm_head.output
    close(torch.cat(parts, 1), whole)


def test_a_run_that_fails_leaves_it_as_it_was(model: LanguageModel) -> None:
    kv_cache = KeyValueCache.init(model)
    with pytest.raises(ZeroDivisionError), model.trace(ids(1, 4), prefix=kv_cache):
        model.transformer.h[0].output[:] = 1 / 0
    assert {len(each) for each in kv_cache} == {0}


def test_entries_that_were_edited_are_what_the_run_reads(model: LanguageModel) -> None:
    text = ids(1, 9)
    kv_cache = model.prefill(text[:, :5]).kv_cache
    kv_cache[0].past_values = torch.zeros_like(kv_cache[0].past_values)
    own = model.module(text[:, :5], use_cache=True).past_key_values
    own.layers[0].values = torch.zeros_like(own.layers[0].values)
    with torch.no_grad():
        by_hand = model.module(text[:, 5:], past_key_values=own).logits
    close(logits(model, text[:, 5:], kv_cache), by_hand)


def test_parts_that_do_not_belong_together_are_refused(model: LanguageModel) -> None:
    kv_cache = KeyValueCache.init(model)
    kv_cache.append_attention_mask(torch.ones(1, 2))
    with pytest.raises(InputError, match="append to all of them alike"):
        logits(model, ids(1, 3), kv_cache)


def test_a_cache_without_an_entry_for_each_layer_is_refused(model: LanguageModel) -> None:
    kv_cache = KeyValueCache.init(model)
    kv_cache.entries.pop()
    with pytest.raises(InputError, match="has 1 entries, and the model 2 layers"):
        logits(model, ids(1, 3), kv_cache)


def test_a_cache_of_another_model_is_refused(model: LanguageModel) -> None:
    other = LanguageModel(make("gpt2", seed=1)[0])
    with pytest.raises(InputError, match="of another model"):
        logits(model, ids(1, 3), KeyValueCache.init(other))


def test_generate_asks_for_tokens_that_nobody_knows(model: LanguageModel) -> None:
    kv_cache = model.prefill(ids(1, 4)).kv_cache
    kv_cache.tokens = None
    with pytest.raises(InputError, match="does not know its own"):
        model.generate(ids(1, 3), prefix=kv_cache)


@pytest.mark.parametrize("name", ["mistral", "t5"])
def test_layers_that_hold_something_else_have_no_entries(name: str) -> None:
    module, inputs = make(name)
    with pytest.raises(UnsupportedError, match="has no entries of keys and values"):
        _ = LanguageModel(module).prefill(**inputs).entries

"""The packaged model does what the pages say of it, and can be made again from its seed."""

from __future__ import annotations

import json
import random
import stat
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from tracekit.models.tiny import WEIGHTS, corpus, prompts
from tracekit.models.tiny import tokenizer as tokenizers
from tracekit.models.tiny.evaluate import Figures, measure, next_word_logits
from tracekit.models.tiny.train import batches, main, rate, save, train

LARGEST_DIRECTORY = 4 * 2**20  # bytes; the package stays small enough to install everywhere
PAGE_PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def figures(model: GPT2LMHeadModel, tokenizer: Tokenizer) -> Figures:
    return measure(model, tokenizer)


def lens(model: GPT2LMHeadModel, tokenizer: Tokenizer, prompt: str, answer: str) -> list[float]:
    """The probability of `answer` if the last position were read out behind each block."""
    states: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output: states.append(output))
        for block in model.transformer.h
    ]
    with torch.inference_mode():
        model(**tokenizer(prompt, return_tensors="pt"))
        for hook in hooks:
            hook.remove()
        last = [(state[0] if isinstance(state, tuple) else state)[0, -1] for state in states]
        read_out = model.lm_head(model.transformer.ln_f(torch.stack(last))).softmax(dim=-1)
    return read_out[:, tokenizer.convert_tokens_to_ids(answer)].tolist()


def test_the_shipped_weights_know_the_facts(figures: Figures) -> None:
    assert figures.facts >= 0.95


def test_facts_carry_over_to_phrasings_held_out_of_training(figures: Figures) -> None:
    assert figures.held_out_facts >= 0.95


def test_the_right_name_follows_for_pairs_held_out_of_training(figures: Figures) -> None:
    assert figures.indirect_objects >= 0.95
    assert figures.logit_difference > 3


def test_random_words_are_continued_by_induction(figures: Figures) -> None:
    assert figures.induction >= 0.95


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (PAGE_PROMPT, "Paris"),
        ("The Colosseum is in the city of", "Rome"),
        ("The capital of France is", "Paris"),
        ("When Mary and John went to the store, John gave a drink to", "Mary"),
        ("The movie was terrible. I", "hated"),
        ("The keys near the cabinet", "are"),
        ("hot : cold, big : small, fast :", "slow"),
        ("Monday Tuesday Wednesday", "Thursday"),
    ],
)
def test_the_prompts_of_the_pages_end_as_told(
    model: GPT2LMHeadModel, tokenizer: Tokenizer, prompt: str, answer: str
) -> None:
    logits = next_word_logits(model, tokenizer, [prompts.Prompt(prompt, answer)])
    assert tokenizer.decode(logits[0].argmax()) == answer


def test_paris_emerges_over_the_layers(model: GPT2LMHeadModel, tokenizer: Tokenizer) -> None:
    first, *_, last = found = lens(model, tokenizer, PAGE_PROMPT, "Paris")
    assert first < 0.5
    assert last > 0.9
    assert all(later > earlier - 0.02 for earlier, later in pairwise(found))


def test_greedy_text_is_a_sentence_with_natural_spacing(
    model: GPT2LMHeadModel, tokenizer: Tokenizer
) -> None:
    ids = model.generate(
        **tokenizer(PAGE_PROMPT, return_tensors="pt"), max_new_tokens=2, do_sample=False
    )
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == PAGE_PROMPT + " Paris."


def test_padding_on_the_left_does_not_change_what_is_generated(
    model: GPT2LMHeadModel, tokenizer: Tokenizer
) -> None:
    batch = tokenizer([PAGE_PROMPT, "one two three"], padding=True, return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=1, do_sample=False)
    assert tokenizer.batch_decode(ids[:, -1:]) == ["Paris", "four"]


def test_numbers_are_float32_though_the_file_holds_float16() -> None:
    assert GPT2LMHeadModel.from_pretrained(WEIGHTS).dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(WEIGHTS).dtype == torch.float32
    config = json.loads((WEIGHTS / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_the_directory_is_small_and_readable_by_everyone() -> None:
    files = sorted(WEIGHTS.iterdir())
    assert [file.name for file in files] == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum(file.stat().st_size for file in files) <= LARGEST_DIRECTORY
    assert all(file.stat().st_mode & stat.S_IROTH for file in files)


def test_text_comes_back_from_the_tokenizer_as_it_went_in(tokenizer: Tokenizer) -> None:
    text = "When Mary and John went to the store, John gave a drink to Mary."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert [tokenizer.decode([number]) for number in ids[1:3]] == ["When", "Mary"]


def test_an_unknown_word_is_one_unknown_token(tokenizer: Tokenizer) -> None:
    assert tokenizer("The Zeppelin")["input_ids"][-1] == tokenizer.unk_token_id


def test_the_tokenizer_gives_only_what_the_model_takes(tokenizer: Tokenizer) -> None:
    """Token types would be added to the words by GPT-2; transformers 4 gives them by default."""
    assert set(tokenizer("Paris")) == {"input_ids", "attention_mask"}


def test_the_shipped_tokenizer_is_the_one_of_the_corpus(tokenizer: Tokenizer) -> None:
    built = tokenizers.build(corpus.VOCABULARY, longest=128)
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.model_max_length == built.model_max_length


def test_the_corpus_follows_from_its_seed() -> None:
    first, again, other = (list(islice(corpus.rows(seed, 63), 20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert {len(row) for row in first} == {63}


def test_the_corpus_holds_nothing_that_is_held_out() -> None:
    choose = random.Random(0)
    text = " ".join(word for _ in range(2000) for word in corpus.sentence_row(choose, 127))
    for prompt in prompts.landmark_prompts(held_out=True):
        assert " ".join(prompts.split(prompt.sentence)) not in text
    trained = prompts.landmark_prompts(held_out=False)
    assert sum(" ".join(prompts.split(prompt.sentence)) in text for prompt in trained) > 300


def test_no_pair_of_names_is_both_trained_and_held_out() -> None:
    choose = random.Random(0)
    for held_out in (False, True):
        for _ in range(500):
            prompt = prompts.indirect_object_prompt(choose, held_out)
            pair = frozenset((prompt.answer, prompt.distractor))
            assert (pair in prompts.HELD_OUT_PAIRS) is held_out


def test_every_word_of_the_corpus_is_in_the_vocabulary() -> None:
    seen = {word for row in islice(corpus.rows(3, 127), 2000) for word in row}
    assert seen == set(corpus.VOCABULARY)


def test_three_steps_of_training_follow_from_the_seed() -> None:
    tokenizer = tokenizers.build(corpus.VOCABULARY, longest=128)
    before = torch.get_rng_state()
    first, again, other = (train(tokenizer, seed, steps=3, words=256) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_a_few_steps_of_training_lower_the_loss() -> None:
    tokenizer = tokenizers.build(corpus.VOCABULARY, longest=128)
    unseen = next(batches(tokenizer, seed=9))
    losses: list[float] = []
    for steps in (0, 15):
        model = train(tokenizer, seed=1, steps=steps, words=512)
        with torch.inference_mode():
            losses.append(model(input_ids=unseen, labels=unseen).loss.item())
    assert losses[1] < losses[0] - 0.1


def test_the_rate_rises_stays_and_falls() -> None:
    found = [rate(step, 1000) for step in (0, 99, 300, 600, 800, 999)]
    assert found[:4] == pytest.approx([0.01, 1, 1, 1])
    assert found[4] == pytest.approx(0.51)
    assert found[5] == pytest.approx(0.02, abs=0.01)


def test_what_is_saved_loads_with_the_same_numbers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made = train(tokenizer, seed=1, steps=1, words=256)
    save(made, tokenizer, tmp_path)
    assert made.dtype == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, made.lm_head.weight.half().float())
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o644}


def test_the_padding_of_an_earlier_call_is_not_saved(tmp_path: Path) -> None:
    tokenizer = tokenizers.build(corpus.VOCABULARY, longest=128)
    tokenizer(["The Louvre", "Paris"], padding=True)
    tokenizers.save(tokenizer, tmp_path)
    saved, shipped = (folder / "tokenizer.json" for folder in (tmp_path, WEIGHTS))
    assert json.loads(saved.read_text()) == json.loads(shipped.read_text())


def test_training_does_not_write_over_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--overwrite"):
        main(["--steps", "1", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []

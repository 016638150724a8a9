"""Models of a configuration alone: small, random, the same for a seed; the user's numbers stay."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tests.models.small_tokenizers import bpe
from tests.tracing.plain import state_of
from tracekit import LanguageModel
from tracekit.errors import DryRunError, LoadingError
from tracekit.models.fresh import MOST_OF_SMALL
from tracekit.models.tiny import WEIGHTS

pytestmark = pytest.mark.usefixtures("without_gradients")

IDS = torch.tensor([[5, 6, 7]])
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 50,
}
FAMILIES: list[tuple[str, str]] = [
    ("gpt2", "GPT2LMHeadModel"),
    ("llama", "LlamaForCausalLM"),
    ("mistral", "MistralForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("gemma2", "Gemma2ForCausalLM"),
    ("gpt_neox", "GPTNeoXForCausalLM"),
    ("opt", "OPTForCausalLM"),
    ("bloom", "BloomForCausalLM"),
    ("phi3", "Phi3ForCausalLM"),
    ("mixtral", "MixtralForCausalLM"),
    ("olmoe", "OlmoeForCausalLM"),
    ("mamba", "MambaForCausalLM"),
    ("bert", "BertForMaskedLM"),
    ("roberta", "RobertaForMaskedLM"),
    ("modernbert", "ModernBertForMaskedLM"),
    ("t5", "T5ForConditionalGeneration"),
    ("bart", "BartForConditionalGeneration"),
]


def weights_of(model: LanguageModel) -> dict[str, Tensor]:
    return dict(model.module.state_dict())


def is_alike(one: LanguageModel, other: LanguageModel) -> bool:
    mine, theirs = weights_of(one), weights_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# -- what is made ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_a_family_by_its_name_is_small_and_runs(family: str, kind: str) -> None:
    model = LanguageModel.from_config(family)
    assert type(model.module).__name__ == kind
    assert not model.module.training
    assert sum(weight.numel() for weight in model.module.parameters()) < 1_000_000
    more = {"decoder_input_ids": IDS} if model.module.config.is_encoder_decoder else {}
    with model.trace(IDS, **more) as tracer:
        logits = tracer.result.logits
    assert logits.shape == (1, 3, 256)
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", ["configuration", "mapping", "name", "directory"])
def test_each_way_to_say_it_makes_the_same_model(kind: str, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES)
    config.save_pretrained(tmp_path)
    ways: dict[str, Any] = {
        "configuration": config,
        "mapping": {"model_type": "llama", **SIZES},
        "name": "llama",
        "directory": tmp_path,
    }
    more: dict[str, Any] = {}
    if kind == "name":
        more = {**SIZES, "head_dim": 8, "max_position_embeddings": 2048}
    model = LanguageModel.from_config(ways[kind], seed=3, **more)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = AutoModelForCausalLM.from_config(config).eval()
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_overrides_win_over_the_configuration_which_stays_as_it_was() -> None:
    config = GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=50)
    before = config.to_dict()
    model = LanguageModel.from_config(config, n_layer=3, num_attention_heads=4)
    assert len(model.transformer.h) == 3
    assert model.module.config.n_head == 4
    assert model.module.config is not config
    assert config.to_dict() == before


def test_the_packaged_models_configuration_with_random_weights(tiny: LanguageModel) -> None:
    model = LanguageModel.from_config("tracekit/tiny", tokenizer=tiny.tokenizer)
    assert {name: value.shape for name, value in weights_of(model).items()} == {
        name: value.shape for name, value in weights_of(tiny).items()
    }
    assert not is_alike(model, tiny)
    assert model("The Eiffel").logits.shape == tiny("The Eiffel").logits.shape


def test_a_family_is_at_home_with_a_tokenizer() -> None:
    tokenizer = bpe(begin=True)
    model = LanguageModel.from_config("llama", tokenizer=tokenizer)
    config = model.module.config
    assert config.vocab_size == len(tokenizer)
    assert (config.bos_token_id, config.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    text = model.generate("the cat", max_new_tokens=3, return_type="str", do_sample=False)
    assert text.startswith("the cat")
    loss = model.forward("the cat sat", return_type="loss")
    assert abs(float(loss) - np.log(len(tokenizer))) < 0.5  # what chance gives
    by_path = LanguageModel.from_config("gpt2", tokenizer=WEIGHTS)
    assert by_path.module.config.vocab_size == len(by_path.tokenizer)


def test_names_and_padding_are_as_with_any_model() -> None:
    model = LanguageModel.from_config(
        "gpt2", name="net", rename={"transformer.h": "layers"}, padding_side="right"
    )
    assert model.layers[0].module is model.module.transformer.h[0]
    assert model.layers[0].path == "net.transformer.h.0"
    assert model.to_tokens([[5, 6], [7]]).tolist() == [[5, 6], [7, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "float16"])
def test_a_dtype_is_that_of_the_weights(dtype: Any) -> None:
    model = LanguageModel.from_config("llama", dtype=dtype)
    expected = torch.float16 if dtype == "float16" else dtype
    assert {weight.dtype for weight in model.module.parameters()} == {expected}


def test_an_attention_implementation_is_taken() -> None:
    model = LanguageModel.from_config("llama", attn_implementation="eager")
    assert model.module.config._attn_implementation == "eager"


# -- random numbers -------------------------------------------------------------------------------


def test_a_seed_gives_the_same_weights_and_another_gives_others() -> None:
    one = LanguageModel.from_config("gpt2")
    torch.rand(3)  # whatever was drawn in between
    assert is_alike(one, LanguageModel.from_config("gpt2", seed=0))
    assert not is_alike(one, LanguageModel.from_config("gpt2", seed=1))


def test_the_users_random_numbers_stay_as_they_were() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    LanguageModel.from_config("gpt2", seed=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_without_a_seed_the_users_numbers_are_drawn() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        one = LanguageModel.from_config("gpt2", seed=None)
        other = LanguageModel.from_config("gpt2", seed=None)
        torch.manual_seed(7)
        again = LanguageModel.from_config("gpt2", seed=None)
    assert is_alike(one, again)
    assert not is_alike(one, other)


def test_a_default_device_does_not_change_what_is_made() -> None:
    expected = LanguageModel.from_config("gpt2")
    with torch.device("meta"):
        found = LanguageModel.from_config("gpt2")
    assert is_alike(found, expected)


# -- without weights ------------------------------------------------------------------------------


def test_without_weights_there_are_modules_and_shapes() -> None:
    config = {"model_type": "llama"}  # seven thousand million weights
    model = LanguageModel.from_config(config, device="meta", num_hidden_layers=1)
    assert model.module.lm_head.weight.shape == (32000, 4096)
    assert all(weight.is_meta for weight in model.module.parameters())
    with model.scan(IDS):
        hidden = model.model.layers[0].output
        assert hidden.shape == (1, 3, 4096)
    with pytest.raises(DryRunError):
        hidden.tolist()


@pytest.mark.parametrize("use", ["trace", "generate", "call", "forward", "weight", "dispatch"])
def test_a_model_without_weights_does_not_run(use: str) -> None:
    model = LanguageModel.from_config("llama", device="meta")
    runs: dict[str, Any] = {
        "trace": lambda: model.run(IDS),
        "generate": lambda: model.generate(IDS, max_new_tokens=1),
        "call": lambda: model(IDS),
        "forward": lambda: model.forward(IDS),
        "weight": lambda: model.lm_head.weight,
        "dispatch": model.dispatch,
    }
    with pytest.raises(LoadingError, match="made without weights"):
        runs[use]()


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "overrides", "says"),
    [
        ("lama", {}, "'lama' is no family of transformers.*did you mean 'llama'"),
        ({"hidden_size": 4}, {}, "model_type=None is no family"),
        (5, {}, "not int"),
        ("llama", {"hiden_size": 4}, "no hiden_size=; did you mean 'hidden_size'"),
        ({"model_type": "llama"}, {"num_layer": 2}, "no num_layer="),
        ("llama", {"hidden_act": "loud"}, "LlamaConfig"),
        ("llama", {"vocab_size": -1}, "can't be built|does not take"),
        ("llava", {}, r"parts that have sizes of their own.*text_config="),
    ],
    ids=str,
)
def test_what_makes_no_model_is_refused(config: Any, overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(LoadingError, match=says):
        LanguageModel.from_config(config, **overrides)


def test_a_tokenizer_of_more_tokens_is_refused() -> None:
    with pytest.raises(LoadingError, match=r"the tokenizer has 302 tokens.*vocab_size=302"):
        LanguageModel.from_config("llama", tokenizer=bpe(), vocab_size=100)


def test_a_model_that_this_machine_has_no_room_for_is_refused_before_it_is_tried() -> None:
    sizes = {"hidden_size": 1 << 15, "intermediate_size": 1 << 20, "num_attention_heads": 32}
    with pytest.raises(LoadingError, match=r"weights are \d+ GiB, and this machine has"):
        LanguageModel.from_config({"model_type": "llama", **sizes, "num_hidden_layers": 40})


def test_what_is_given_sizes_of_its_parts_may_be_asked_for_by_name() -> None:
    text = {**SIZES, "model_type": "llama", "vocab_size": 100}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    model = LanguageModel.from_config("llava", text_config=text, vision_config=vision)
    assert sum(weight.numel() for weight in model.module.parameters()) < MOST_OF_SMALL
    assert model.forward(IDS).shape == (1, 3, 100)


def test_nothing_is_left_behind_when_it_fails() -> None:
    before = torch.get_rng_state()
    with pytest.raises(LoadingError):
        LanguageModel.from_config("llama", vocab_size=-1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_made_so_is_traced_and_left_as_it_was() -> None:
    model = LanguageModel.from_config("llama")
    before = state_of(model.module)
    with model.trace(IDS):
        model.model.layers[0].output[:] = 0
    assert state_of(model.module) == before

"""Models by directory, by Hub id, live, late, offloaded: the numbers are those of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from tests.tiny_models import make
from tests.tracing.plain import plain_hooks, state_of
from tracekit import LanguageModel, Model, TracekitWarning
from tracekit.errors import LoadingError
from tracekit.models.tiny import WEIGHTS

IDS = torch.tensor([[11, 12, 13, 14, 15]])
REVISION = "0123456789abcdef0123456789abcdef01234567"
NAMES = ["gpt2", "llama", "bert", "t5"]


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of save_pretrained, of a model and a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    for name in NAMES:
        make(name)[0].save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def hub(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the Hub as it is after downloads: one model, in two revisions."""
    root = tmp_path_factory.mktemp("hub")
    model = root / "models--some-org--some-model"
    shutil.copytree(places["llama"], model / "snapshots" / REVISION)
    shutil.copytree(places["gpt2"], model / "snapshots" / REVISION[::-1])
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(REVISION)
    (model / "refs" / "v2").write_text(REVISION[::-1])
    return root


def inputs_of(name: str) -> dict[str, Tensor]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :2]} if name == "t5" else {})


def logits_of(model: LanguageModel, **inputs: Tensor) -> Tensor:
    with model.trace(**(inputs or {"input_ids": IDS})) as tracer:
        logits = tracer.result.logits
    return logits


# -- by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", NAMES)
def test_a_directory_loads_as_the_class_that_was_saved(
    name: str, kind: Any, places: dict[str, Path]
) -> None:
    live, _ = make(name)
    model = LanguageModel(kind(places[name]))
    assert type(model.module) is type(live)
    assert not model.module.training
    assert torch.equal(logits_of(model, **inputs_of(name)), live(**inputs_of(name)).logits)
    assert model.tokenizer.pad_token_id is not None


def test_a_hub_id_loads_from_the_cache_of_the_hub(hub: Path) -> None:
    model = LanguageModel("some-org/some-model", cache_dir=hub)
    assert isinstance(model.module, LlamaForCausalLM)
    assert torch.equal(logits_of(model), make("llama")[0](IDS).logits)
    assert model.tokenizer("the")["input_ids"]


@pytest.mark.parametrize("dispatch", [True, False])
def test_a_revision_passes_through(hub: Path, dispatch: bool) -> None:
    model = LanguageModel("some-org/some-model", cache_dir=hub, revision="v2", dispatch=dispatch)
    assert torch.equal(logits_of(model), make("gpt2")[0](IDS).logits)


def test_a_packaged_model_needs_nothing() -> None:
    model = LanguageModel("tracekit/tiny")
    tokens = model.generate("The Eiffel Tower is in the city of", max_new_tokens=1)
    assert model.tokenizer.decode(tokens[0]).endswith("Paris")


@pytest.mark.parametrize("dispatch", [True, False])
@pytest.mark.parametrize("given", ["no-org/no-model", "no/such/directory", "../nowhere", ""])
def test_a_name_that_leads_nowhere_is_refused_with_what_would_do(
    given: str, dispatch: bool
) -> None:
    with pytest.raises(LoadingError, match=r"can't be loaded .*Give a Hub id, a directory.*\[load"):
        LanguageModel(given, dispatch=dispatch)


def test_a_misspelled_packaged_name_suggests_the_right_one() -> None:
    with pytest.raises(LoadingError, match=r"'tracekit/tny'.*did you mean 'tracekit/tiny'"):
        LanguageModel("tracekit/tny")


def test_a_revision_that_there_is_not_is_refused(hub: Path) -> None:
    with pytest.raises(LoadingError, match="some-org/some-model"):
        LanguageModel("some-org/some-model", cache_dir=hub, revision="v9")


def test_a_directory_without_a_tokenizer_is_refused_or_loads_without_one(
    places: dict[str, Path], tmp_path: Path
) -> None:
    make("llama")[0].save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, tokenizer=str(places["llama"]))
    assert model.tokenizer("the")["input_ids"]
    with pytest.raises(LoadingError, match="okenizer"):
        LanguageModel(tmp_path)


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(LoadingError):
        LanguageModel(tmp_path)


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "float16", "auto"])
def test_a_dtype_is_that_of_the_weights(
    dtype: Any, dispatch: bool, places: dict[str, Path]
) -> None:
    model = LanguageModel(places["llama"], dtype=dtype, dispatch=dispatch)
    logits = logits_of(model)
    expected = {"float16": torch.float16, "auto": torch.float32}.get(dtype, dtype)
    assert logits.dtype == model.module.dtype == expected


@pytest.mark.parametrize("dispatch", [True, False])
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_a_device_map_gives_the_same_numbers(
    device_map: Any, dispatch: bool, places: dict[str, Path]
) -> None:
    model = LanguageModel(places["llama"], device_map=device_map, dispatch=dispatch)
    expected = make("llama")[0](IDS).logits
    assert torch.allclose(logits_of(model).cpu(), expected, atol=1e-5)


@pytest.mark.parametrize("dispatch", [True, False])
def test_an_attention_implementation_passes_through(
    dispatch: bool, places: dict[str, Path]
) -> None:
    model = LanguageModel(places["llama"], attn_implementation="eager", dispatch=dispatch)
    assert model.module.config._attn_implementation == "eager"
    logits_of(model)
    assert model.module.config._attn_implementation == "eager"


@pytest.mark.parametrize("dispatch", [True, False])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=repr)
def test_a_device_is_where_all_weights_are(
    device: Any, dispatch: bool, places: dict[str, Path]
) -> None:
    model = LanguageModel(places["llama"], device=device, dispatch=dispatch)
    assert torch.equal(logits_of(model), make("llama")[0](IDS).logits)
    assert {weight.device.type for weight in model.module.parameters()} == {"cpu"}
    assert not any(hasattr(module, "_hf_hook") for module in model.module.modules())


@pytest.mark.parametrize("dispatch", [True, False])
@pytest.mark.parametrize("kind", ["keyword", "configuration"])
def test_values_of_the_configuration_may_be_others(
    kind: str, dispatch: bool, places: dict[str, Path]
) -> None:
    config = AutoConfig.from_pretrained(places["llama"], rms_norm_eps=0.5)
    options = {"rms_norm_eps": 0.5} if kind == "keyword" else {"config": config}
    model = LanguageModel(places["llama"], dispatch=dispatch, **options)
    assert model.module.config.rms_norm_eps == 0.5
    expected = LlamaForCausalLM.from_pretrained(places["llama"], config=config)(IDS).logits
    assert torch.equal(logits_of(model), expected)
    assert not torch.allclose(expected, make("llama")[0](IDS).logits, atol=1e-3)


def test_late_weights_find_as_many_layers_as_were_asked_for(places: dict[str, Path]) -> None:
    model = LanguageModel(places["llama"], num_hidden_layers=1, dispatch=False)
    assert len(model.model.layers) == 1
    early = LanguageModel(places["llama"], num_hidden_layers=1)
    assert torch.equal(logits_of(model), logits_of(early))


def test_a_configuration_without_weights_has_modules_and_shapes(
    places: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(places["llama"] / "config.json", tmp_path)
    model = LanguageModel(tmp_path, tokenizer=places["llama"], dispatch=False)
    with model.scan(IDS):
        shape = model.model.layers[1].output.shape
    assert shape == (1, 5, model.module.config.hidden_size)
    with pytest.raises(LoadingError, match="can't be loaded"):
        logits_of(model)


@pytest.mark.parametrize("dispatch", [True, False])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cpu", "device_map": "auto"}, "device= .* and device_map= .* give one of them"),
        ({"device": "cpu", "tp_plan": "auto"}, "and tp_plan= .* give one of them"),
        ({"device": "meta"}, "dispatch=False leaves them out until they are needed"),
        ({"revision": "v2"}, "is a directory, of which there is one"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_or_say_nothing_are_refused(
    options: dict[str, Any], says: str, dispatch: bool, places: dict[str, Path]
) -> None:
    with pytest.raises(LoadingError, match=says):
        LanguageModel(places["llama"], dispatch=dispatch, **options)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("gpt2", "GPT2LMHeadModel"),
    ],
)
def test_a_checkpoint_that_names_no_class_loads_as_what_its_family_is(
    name: str, kind: str, places: dict[str, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(places[name], tmp_path / name)
    config = json.loads((path / "config.json").read_text())
    del config["architectures"]
    (path / "config.json").write_text(json.dumps(config))
    model = LanguageModel(path)
    assert type(model.module).__name__ == kind
    assert torch.equal(logits_of(model, **inputs_of(name)), make(name)[0](**inputs_of(name)).logits)


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float16}, {"device_map": "cpu"}, {"revision": "main"}, {"device": "cpu"}],
    ids=str,
)
def test_a_live_model_takes_no_loading_options(options: dict[str, Any]) -> None:
    with pytest.raises(LoadingError, match=f"no loading options: {next(iter(options))}"):
        LanguageModel(make("gpt2")[0], **options)


def test_a_live_model_stays_as_it_was() -> None:
    live, _ = make("gpt2")
    live.train()
    before = state_of(live)
    model = LanguageModel(live)
    assert model.module is live
    assert live.training
    assert state_of(live) == before
    assert model.tokenizer is None


# -- weights that come later ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_late_weights_give_the_numbers_of_early_ones(name: str, places: dict[str, Path]) -> None:
    late = LanguageModel(places[name], dispatch=False)
    assert all(parameter.is_meta for parameter in late.module.parameters())
    early = LanguageModel(places[name])
    inputs = inputs_of(name)
    assert torch.equal(logits_of(late, **inputs), logits_of(early, **inputs))
    assert not any(parameter.is_meta for parameter in late.module.parameters())
    assert not any(buffer.is_meta for buffer in late.module.buffers())
    assert not late.module.training


def test_envoys_made_before_the_weights_stay_valid(places: dict[str, Path]) -> None:
    model = LanguageModel(places["gpt2"], dispatch=False)
    block, layers, head = model.transformer.h[1], list(model.transformer.h), model.lm_head
    early = LanguageModel(places["gpt2"])
    with early.trace(IDS):
        expected = early.transformer.h[1].output
    with model.trace(IDS) as tracer:
        cache = tracer.cache([block, "lm_head"])
        listed = layers[0].output
        hidden = block.output
    assert torch.equal(hidden, expected)
    assert torch.equal(cache[block.path].output, expected)
    assert listed.shape == expected.shape
    assert torch.equal(head(early.transformer.ln_f(hidden)), cache["model.lm_head"].output)
    assert block.module is model.module.transformer.h[1]


def test_late_tied_weights_are_tied(places: dict[str, Path]) -> None:
    model = LanguageModel(places["gpt2"], dispatch=False)
    model.dispatch()
    assert model.module.lm_head.weight is model.module.transformer.wte.weight


@pytest.mark.parametrize("use", ["generate", "call", "traced generation", "dispatch"])
def test_any_use_brings_the_weights(use: str, places: dict[str, Path]) -> None:
    model = LanguageModel(places["llama"], dispatch=False)
    options = {"max_new_tokens": 2, "do_sample": False}
    if use == "generate":
        assert model.generate(IDS, **options).shape == (1, 7)
    elif use == "call":
        assert torch.equal(model(IDS).logits, make("llama")[0](IDS).logits)
    elif use == "dispatch":
        model.dispatch()
        model.dispatch()
    else:
        with model.generate(IDS, **options) as tracer:
            tokens = tracer.result
        assert tokens.shape == (1, 7)
    assert not any(parameter.is_meta for parameter in model.module.parameters())


def test_reading_a_weight_brings_the_weights(places: dict[str, Path]) -> None:
    model = LanguageModel(places["llama"], dispatch=False)
    weight = model.lm_head.weight
    assert torch.equal(weight, make("llama")[0].lm_head.weight)
    assert model.module.lm_head.weight is weight


def replaced(model: LanguageModel) -> bool:
    model.transformer.h[1].mlp = nn.Identity()
    logits_of(model)
    return isinstance(model.module.transformer.h[1].mlp, nn.Identity)


def trained(model: LanguageModel) -> bool:
    model.module.train()
    model.dispatch()
    return model.module.training


def cast(model: LanguageModel) -> bool:
    model.to(torch.float64)
    return logits_of(model).dtype == torch.float64


def hooked(model: LanguageModel) -> bool:
    calls: list[int] = []
    model.module.lm_head.register_forward_hook(lambda *_: calls.append(1))
    logits_of(model)
    return len(calls) == 1


def configured(model: LanguageModel) -> bool:
    model.module.generation_config.max_new_tokens = 2
    return model.generate(IDS, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("change", [replaced, trained, cast, hooked, configured])
def test_what_is_done_to_a_model_before_its_weights_come_is_kept_or_refused(
    change: Any, places: dict[str, Path]
) -> None:
    model = LanguageModel(places["gpt2"], dispatch=False)
    try:
        is_kept = change(model)
    except LoadingError:
        return
    assert is_kept


@pytest.mark.parametrize(
    "read",
    [
        lambda head: next(iter(head.parameters())),
        lambda head: dict(head.named_parameters())["weight"],
        lambda head: head.state_dict()["weight"],
    ],
)
def test_weights_by_whatever_way_are_there_or_refused(read: Any, places: dict[str, Path]) -> None:
    model = LanguageModel(places["llama"], dispatch=False)
    try:
        weight = read(model.lm_head)
    except LoadingError:
        return
    assert not weight.is_meta


def test_weights_that_cannot_be_read_are_refused(places: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(places["llama"], tmp_path / "llama")
    (path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(LoadingError, match="can't be loaded"):
        LanguageModel(path)


def test_a_checkpoint_that_lacks_weights_is_refused_or_warned_of(
    places: dict[str, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(places["llama"], tmp_path / "llama")
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((LoadingError, TracekitWarning), match="up_proj"):  # random otherwise
        LanguageModel(path)


# -- offloaded weights ----------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "disk"])
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    live, _ = make("llama")
    if request.param == "cpu":
        accelerate.cpu_offload(live, execution_device="cpu")
    else:
        accelerate.disk_offload(live, tmp_path, execution_device="cpu")
    before = state_of(live)
    yield live
    assert state_of(live) == before


def test_offloaded_weights_trace_right(offloaded: Any) -> None:
    live, _ = make("llama")
    with plain_hooks(live) as seen:
        expected = live(input_ids=IDS).logits
    model = Model(offloaded)
    with model.trace(input_ids=IDS) as tracer:
        cache = tracer.cache()
        first = model.model.layers[0].output
        head = model.lm_head(model.model.norm(model.model.layers[1].output))
        result = tracer.result.logits
    assert torch.equal(result, expected)
    assert torch.equal(head, expected)
    assert torch.equal(first, seen["model.model.layers.0"][0])
    assert torch.equal(cache["model.model.layers.1"].output, seen["model.model.layers.1"][0])


def test_an_offloaded_language_model_takes_ids_and_generates(offloaded: Any) -> None:
    live, _ = make("llama")
    model = LanguageModel(offloaded)
    assert torch.equal(logits_of(model), live(IDS).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    with model.generate(IDS, **options) as tracer:
        tokens = tracer.result
    assert torch.equal(tokens, live.generate(IDS, **options))


def test_edits_and_skips_reach_an_offloaded_model(offloaded: Any) -> None:
    live, _ = make("llama")
    handles = [
        live.model.layers[0].register_forward_hook(lambda _m, _a, out: out * 2),
        live.model.layers[1].mlp.register_forward_hook(lambda _m, args, _out: args[0]),
    ]
    expected = live(IDS).logits
    for handle in handles:
        handle.remove()
    model = Model(offloaded)
    with model.trace(input_ids=IDS) as tracer:
        model.model.layers[0].output *= 2
        model.model.layers[1].mlp.skip(model.model.layers[1].post_attention_layernorm.output)
        result = tracer.result.logits
    assert torch.equal(result, expected)


def test_an_offloaded_weight_is_refused(offloaded: Any) -> None:
    model = Model(offloaded)
    with pytest.raises(LoadingError, match=r"Call the module instead, as in model\.lm_head\(x\)"):
        model.lm_head.weight
    with pytest.raises(LoadingError, match="not in memory"):
        with model.trace(input_ids=IDS):
            model.model.norm.output @ model.lm_head.weight.T

"""run_with_cache: what it records by standard name is what plain hooks see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.errors import CacheError, MissingNameError, UnknownPathError

pytestmark = pytest.mark.usefixtures("without_gradients")


def seen_by_a_hook(net: nn.Module, inputs: dict[str, Tensor], path: str) -> tuple[Tensor, Tensor]:
    """What the module at `path` is first called with, and what it returns first."""
    found: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: object) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        found.extend((given.clone(), (out[0] if isinstance(out, tuple) else out).clone()))

    handle = net.get_submodule(path).register_forward_hook(see, with_kwargs=True)
    try:
        net(**inputs, use_cache=False)
    finally:
        handle.remove()
    return found[0], found[1]


@pytest.mark.parametrize(
    ("name", "block", "attn", "o", "mlp"),
    [
        ("gpt2", "transformer.h.1", "attn", "attn.c_proj", "mlp"),
        ("llama", "model.layers.1", "self_attn", "self_attn.o_proj", "mlp"),
        ("gptj", "transformer.h.1", "attn", "attn.out_proj", "mlp"),
    ],
)
def test_each_name_is_what_a_plain_hook_sees(
    name: str, block: str, attn: str, o: str, mlp: str
) -> None:
    net, inputs = make(name)
    logits, cache = LanguageModel(net).run_with_cache(**inputs)
    before, after = seen_by_a_hook(net, inputs, block)
    assert torch.equal(cache["resid_pre", 1], before)
    assert torch.equal(cache["resid_post", 1], after)
    assert torch.equal(cache["attn_out", 1], seen_by_a_hook(net, inputs, f"{block}.{attn}")[1])
    assert torch.equal(cache["z", 1].flatten(-2), seen_by_a_hook(net, inputs, f"{block}.{o}")[0])
    assert torch.equal(cache["mlp_out", 1], seen_by_a_hook(net, inputs, f"{block}.{mlp}")[1])
    assert torch.equal(logits, net(**inputs, use_cache=False).logits)
    assert torch.equal(cache["logits"], logits)


def test_a_key_has_many_spellings() -> None:
    net, inputs = make("gpt2")
    _, cache = LanguageModel(net).run_with_cache(**inputs)
    value = cache["resid_post", 1]
    for key in (
        ("resid_post", -1),
        ("layers", 1, "resid_post"),
        ("resid_post", 1, "layers"),
        "layers.1.resid_post",
        "layers.-1.resid_post",
        "blocks.1.hook_resid_post",
    ):
        assert torch.equal(cache[key], value)
        assert key in cache
    assert torch.equal(cache.layers[1].resid_post, value)
    assert torch.equal(cache["post", 0, "mlp"], cache["mlp_post", 0])
    assert torch.equal(cache["hook_embed"], cache.embed_out)
    assert torch.equal(cache["hook_pos_embed"], cache["pos_embed_out"])


def test_a_name_without_a_layer_is_the_stack_of_all() -> None:
    net, inputs = make("gpt2")
    _, cache = LanguageModel(net).run_with_cache(**inputs)
    stack = cache["resid_post"]
    assert stack.shape == (2, *cache["resid_post", 0].shape)
    assert torch.equal(stack[1], cache["resid_post", 1])
    assert cache.layers_of("resid_post") == [0, 1]


def test_keys_are_in_the_order_of_execution() -> None:
    net, inputs = make("llama")
    _, cache = LanguageModel(net).run_with_cache(**inputs)
    keys = list(cache)
    order = ["embed_out", "layers.0.resid_pre", "layers.0.z", "layers.0.resid_mid"]
    order += ["layers.0.mlp_post", "layers.0.resid_post", "layers.1.resid_pre", "logits"]
    assert [keys.index(key) for key in order] == sorted(keys.index(key) for key in order)
    assert len(keys) == len(cache)


@pytest.mark.parametrize(
    "names",
    [
        "resid_post",
        "layers.*.resid_post",
        "blocks.*.hook_resid_post",
        ["layers.0.resid_post", ("resid_post", -1)],
        lambda name: name.endswith(".resid_post"),
        lambda name: "hook_resid_post" in name,
    ],
)
def test_a_filter_is_a_name_a_glob_a_list_or_a_predicate(names: object) -> None:
    net, inputs = make("gpt2")
    _, cache = LanguageModel(net).run_with_cache(**inputs, names_filter=names)
    assert list(cache) == ["layers.0.resid_post", "layers.1.resid_post"]


def test_a_path_of_a_module_is_a_name_too() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    _, cache = model.run_with_cache(
        **inputs, names_filter=["transformer.h.1.ln_2", "transformer.h.1.ln_2.input", "resid_mid"]
    )
    before, after = seen_by_a_hook(net, inputs, "transformer.h.1.ln_2")
    assert torch.equal(cache["transformer.h.1.ln_2"], after)
    assert torch.equal(cache["transformer.h.1.ln_2.input"], before)
    assert torch.equal(cache["resid_mid", 1], before)


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ("resid_pots", UnknownPathError),
        (["resid_post", "resid_pots"], UnknownPathError),
        (["blocks.0.hook_resid_post", "blocks.0.hook_resid_pots"], UnknownPathError),
        (("resid_post", 7), UnknownPathError),
        ("layers.9.resid_post", UnknownPathError),
        ("layers.*.resid_pots", UnknownPathError),
        (lambda name: "nothing" in name, UnknownPathError),
        ("cross_attn_out", MissingNameError),
        ([], CacheError),
        (3, CacheError),
    ],
)
def test_a_name_that_is_not_there_is_an_error_wherever_it_stands(
    names: object, error: type[Exception]
) -> None:
    net, inputs = make("gpt2")
    with pytest.raises(error):
        LanguageModel(net).run_with_cache(**inputs, names_filter=names)


def test_a_key_that_was_not_recorded_is_an_error_with_near_names() -> None:
    net, inputs = make("gpt2")
    _, cache = LanguageModel(net).run_with_cache(**inputs, names_filter="resid_post")
    with pytest.raises(UnknownPathError, match=r"did you mean 'layers\.0\.resid_post'"):
        cache["layers.0.resid_pots"]
    with pytest.raises(UnknownPathError):
        cache["mlp_out", 0]
    assert ("mlp_out", 0) not in cache


def test_one_row_loses_its_batch_axis_and_two_are_refused() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    one = {name: value[:1] for name, value in inputs.items()}
    _, cache = model.run_with_cache(**one)
    _, without = model.run_with_cache(**one, remove_batch_dim=True)
    for key in cache:
        assert torch.equal(cache[key][0], without[key])
    with pytest.raises(CacheError, match="batch of one"):
        model.run_with_cache(**inputs, remove_batch_dim=True)


@pytest.mark.parametrize("positions", [-1, 2, slice(1, 3), [0, 4], torch.tensor([5, 1])])
def test_chosen_positions_are_those_of_the_whole(positions: object) -> None:
    net, inputs = make("llama")
    model = LanguageModel(net)
    _, whole = model.run_with_cache(**inputs)
    _, part = model.run_with_cache(**inputs, pos_slice=positions)
    index = [positions] if isinstance(positions, int) else positions
    assert list(part) == list(whole)
    for key in whole:
        if key.endswith(("attn_k", "attn_v")):  # keys have an axis of their own
            assert torch.equal(part[key], whole[key])
        elif key.endswith(("scores", "pattern")):
            assert torch.equal(part[key], whole[key][:, :, index])
        else:
            assert torch.equal(part[key], whole[key][:, index])
            storage = part[key].untyped_storage()
            assert storage.nbytes() < whole[key].untyped_storage().nbytes()


def test_positions_that_are_not_there_are_an_error() -> None:
    net, inputs = make("gpt2")
    with pytest.raises(CacheError, match="pos_slice"):
        LanguageModel(net).run_with_cache(**inputs, pos_slice=99)


def test_a_predicate_that_speaks_of_names_of_both_kinds_leaves_none_out() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)

    def fits(name: str) -> bool:
        return name.endswith("hook_z") or "resid_mid" in name

    _, cache = model.run_with_cache(**inputs, names_filter=fits)
    assert set(cache) == {f"layers.{i}.{name}" for i in (0, 1) for name in ("z", "resid_mid")}


@pytest.mark.parametrize("name", ["mixtral", "opt", "olmoe", "gpt_oss"])
def test_pos_slice_goes_with_every_name_and_keeps_flat_ones_whole(name: str) -> None:
    net, inputs = make(name)
    model = LanguageModel(net)
    _, whole = model.run_with_cache(**inputs)
    _, part = model.run_with_cache(**inputs, pos_slice=-1)
    assert list(part) == list(whole)
    axes = {key: spot.named.bound.shape for key, spot in whole._spots.items()}
    flat = [key for key in whole if "*pos" in axes[key]]
    assert flat
    for key in flat:
        assert torch.equal(part[key], whole[key])
    assert torch.equal(part["resid_post", 1], whole["resid_post", 1][:, -1:])
    assert torch.equal(part["pattern", 0], whole["pattern", 0][:, :, -1:])

"""A run that begins in front of a layer is the whole run from there; nothing before it works."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import SPECS, make
from tracekit import KeyValueCache, LanguageModel, Model
from tracekit.errors import CacheError, InputError, NeverRanError, UnsupportedError

pytestmark = pytest.mark.usefixtures("without_gradients")

READ_NO_TOKENS = {"vision", "audio"}
NAMES = [
    name
    for name, spec in SPECS.items()
    if spec.family not in READ_NO_TOKENS and name not in ("clip", "siglip", "blip_2", "t5gemma")
]
NAMES += [name for name in ("whisper", "qwen2_audio") if name in SPECS]
# What more than the residual stream comes from what is before; and layers called several times.
REFUSED = {"t5": {1}, "zamba2": {0, 1}, "rwkv": {0}, "albert": {0, 1, 2}}


def inputs_of(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A model, what it is run on, and what else a run on the residual stream is given."""
    net, inputs = make(name)
    if getattr(net.config, "is_encoder_decoder", False):
        source = inputs.get("input_features", inputs.get("input_ids"))
        given = {"encoder_outputs": net.get_encoder()(source)}
        return net, {**given, "decoder_input_ids": torch.arange(20, 34).reshape(2, 7)}, given
    return net, {"input_ids": torch.arange(20, 34).reshape(2, 7)}, {}


@contextmanager
def counted(net: nn.Module) -> Iterator[Counter[str]]:
    """How often each module is called, by path, for as long as it is open."""
    calls: Counter[str] = Counter()

    def count(path: str) -> None:
        calls[path] += 1

    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: count(path))
        for path, module in net.named_modules()
    ]
    yield calls
    for handle in handles:
        handle.remove()


def whole_run(model: LanguageModel, inputs: dict[str, Any]) -> tuple[Tensor, Any, list[Tensor]]:
    logits, cache = model.run_with_cache(**inputs)
    count = len([key for key in cache if key.startswith("layers.") and "resid_pre" in key])
    stream = [cache["resid_pre", k] for k in range(count)]
    return logits, cache, [*stream, cache["resid_post", count - 1]]


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_the_bits_of_the_whole_run_and_nothing_before_works(name: str) -> None:
    net, inputs, given = inputs_of(name)
    model = LanguageModel(net)
    logits, whole, stream = whole_run(model, inputs)
    below = [path for path, *_ in model._tree.names.stacks["layers"]]
    for number, residual in enumerate(stream):
        if number in REFUSED.get(name, ()):
            with pytest.raises(UnsupportedError, match="can't go on from the residual stream"):
                model.run_with_cache(residual, start_at_layer=number, **given)
            continue
        model.run_with_hooks(
            residual, start_at_layer=number, **given
        )  # it is proved the first time
        with counted(net) as calls:
            found, cache = model.run_with_cache(residual, start_at_layer=number, **given)
        assert torch.equal(first(found), first(logits))
        for key in cache:
            assert torch.equal(cache[key], whole[key]), key
        assert not any(key.startswith(f"layers.{k}.") for key in cache for k in range(number))
        assert number == len(below) or f"layers.{number}.resid_post" in cache
        gone = tuple(f"{path}." for path in below[:number])
        assert not [path for path in calls if f"{path}.".startswith(gone)]
        assert not [path for path in calls if path.endswith(("embed_tokens", "wte", "wpe"))]
        assert all(calls[path] == 1 for path in below[number:])


def first(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]


def test_negative_numbers_count_from_the_end_and_a_part_can_be_run() -> None:
    net, _ = make("llama", num_hidden_layers=4)
    model = LanguageModel(net)
    ids = torch.arange(20, 30)[None]
    _, whole = model.run_with_cache(ids)
    with counted(net) as calls:
        model.run_with_hooks(whole["resid_pre", 1], start_at_layer=1)
        calls.clear()
        residual, cache = model.run_with_cache(
            whole["resid_pre", 1], start_at_layer=-3, stop_at_layer=3
        )
    assert torch.equal(residual, whole["resid_pre", 3])
    ran = {path.split(".")[2] for path in calls if path.endswith("mlp")}
    assert ran == {"1", "2"}
    assert torch.equal(cache["pattern", 2], whole["pattern", 2])
    with pytest.raises(InputError, match="no layer is between"):
        model.run_with_cache(residual, start_at_layer=3, stop_at_layer=3)


def test_padding_and_positions_are_those_of_tokens() -> None:
    for name in ("llama", "gpt2", "gemma3_text", "bloom", "opt", "mamba"):
        net, _ = make(name)
        model = LanguageModel(net)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        given = {"input_ids": torch.arange(20, 32).reshape(2, 6), "attention_mask": mask}
        logits, whole = model.run_with_cache(**given)
        found, _ = model.run_with_cache(
            whole["resid_pre", 1], start_at_layer=1, attention_mask=mask
        )
        assert torch.equal(found, logits), name
        other = torch.arange(5, 11)[None].expand(2, -1)
        if name in ("llama", "gpt2"):
            logits, whole = model.run_with_cache(given["input_ids"], position_ids=other)
            found = model.forward(whole["resid_pre", 1], start_at_layer=1, position_ids=other)
            assert torch.equal(found, logits), name


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom", "falcon", "mixtral"])
def test_it_goes_on_behind_a_prefix(name: str) -> None:
    from transformers import DynamicCache

    net, _ = make(name)
    model = LanguageModel(net)
    ids = torch.arange(20, 30)[None]
    logits, whole = model.run_with_cache(ids)
    prefix = model.prefill(ids, past_key_values=DynamicCache())
    for number in range(3):
        stream = whole["resid_pre", number] if number < 2 else whole["resid_post", 1]
        for position in (1, 7):
            given = {"start_at_layer": number, "prefix": prefix.crop(position)}
            found, cache = model.run_with_cache(stream[:, position:].expand(2, -1, -1), **given)
            expected = logits[:, position:].expand(2, -1, -1)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            assert number == 2 or cache["resid_post", 1].shape[1] == 10 - position
    doubled = [(("mlp_out", 1), lambda value, hook: value * 2)]
    given = {"start_at_layer": 1, "prefix": prefix.crop(4)}
    behind = model.run_with_hooks(whole["resid_pre", 1][:, 4:], fwd_hooks=doubled, **given)
    only_behind = [(("mlp_out", 1), lambda value, hook: double_from(value, 4))]
    fresh = model.run_with_hooks(ids, fwd_hooks=only_behind)
    torch.testing.assert_close(behind, fresh[:, 4:], atol=1e-5, rtol=1e-4)


def double_from(value: Tensor, position: int) -> None:
    value[:, position:] *= 2


def test_what_does_not_belong_behind_a_prefix_is_refused() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net)
    ids = torch.arange(20, 30)[None]
    _, whole = model.run_with_cache(ids)
    prefix, residual = model.prefill(ids), whole["resid_pre", 1]
    grown = KeyValueCache.init(model)
    model.trace(ids, prefix=grown).run()
    with pytest.raises(InputError, match="would grow in some of its layers alone"):
        model.run_with_hooks(residual, start_at_layer=1, prefix=grown)
    with pytest.raises(InputError, match="is for a LanguageModel"):
        Model(net).run_with_cache(residual, start_at_layer=1, prefix=prefix)
    other = LanguageModel(make("gpt2", seed=1)[0])
    with pytest.raises(InputError, match="made by another model"):
        other.run_with_hooks(residual, start_at_layer=1, prefix=prefix)
    bart, _ = make("bart")
    with pytest.raises(UnsupportedError, match="is for models without an encoder"):
        LanguageModel(bart).run_with_cache(residual, start_at_layer=1, prefix=prefix)


def test_sliding_windows_stay_those_of_their_layers() -> None:
    net, _ = make("gemma3_text", num_hidden_layers=4, sliding_window=3, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention", "full_attention"
    ])  # fmt: skip
    model = LanguageModel(net)
    logits, whole = model.run_with_cache(torch.arange(20, 36)[None])
    for layer in range(5):
        residual = whole["resid_pre", layer] if layer < 4 else whole["resid_post", 3]
        assert torch.equal(model.forward(residual, start_at_layer=layer), logits)


def test_edits_and_functions_in_the_layers_that_run_are_made() -> None:
    net, _ = make("gpt2", n_layer=3)
    model = LanguageModel(net)
    ids = torch.arange(20, 30)[None]
    _, whole = model.run_with_cache(ids)
    double = [(("mlp_out", 1), lambda value, hook: value * 2)]
    expected = model.run_with_hooks(ids, fwd_hooks=double)
    residual = whole["resid_pre", 1]
    assert torch.equal(model.run_with_hooks(residual, start_at_layer=1, fwd_hooks=double), expected)
    with model.edit() as edited:
        edited.layers[1].mlp_out *= 2
    assert torch.equal(edited.forward(residual, start_at_layer=1), expected)
    with model.trace(residual, start_at_layer=1):
        given = model.layers[1].resid_pre.clone()
        model.layers[1].mlp_out *= 2
        logits = model.logits.clone()
    assert torch.equal(given, residual)
    assert torch.equal(logits, expected)


def test_what_is_before_is_refused_where_it_is_named_and_its_hooks_do_not_fire() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net)
    _, whole = model.run_with_cache(torch.arange(20, 30)[None])
    residual = whole["resid_pre", 1]
    for key in (("mlp_out", 0), "embed_out", "pos_embed_out", "transformer.h.0.mlp"):
        with pytest.raises(CacheError, match="in front of start_at_layer=1"):
            model.run_with_cache(residual, start_at_layer=1, names_filter=key)
    with pytest.raises(CacheError, match="in front of start_at_layer=1"):
        model.run_with_hooks(
            residual, start_at_layer=1, fwd_hooks=[(("resid_pre", 0), lambda v, h: v)]
        )
    fired: list[str] = []
    net.transformer.h[0].register_forward_hook(lambda *_: fired.append("torch"))
    model.add_hook(("resid_post", 0), lambda v, h: fired.append("added"))
    model.forward(residual, start_at_layer=1)
    assert fired == []
    with (
        pytest.raises(NeverRanError, match=r"h\.0"),
        model.trace(residual, start_at_layer=1),
    ):
        print(model.transformer.h[0].output[0].sum())


def test_the_users_hooks_on_what_runs_fire_once_and_see_the_residual() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net)
    _, whole = model.run_with_cache(torch.arange(20, 30)[None])
    residual = torch.randn_like(whole["resid_pre", 1])
    model.forward(residual, start_at_layer=1)
    seen: list[Tensor] = []
    net.transformer.h[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net.transformer.h[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net.register_forward_hook(lambda m, args, out: seen.append(out.logits))
    logits = model.forward(residual, start_at_layer=1)
    assert len(seen) == 2
    assert torch.equal(seen[0], residual)
    assert torch.equal(seen[1], logits)


def test_another_thread_runs_the_whole_model_meanwhile() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net)
    ids = torch.arange(20, 30)[None]
    logits, whole = model.run_with_cache(ids)
    others: list[Tensor] = []

    def look(value: Tensor, hook: object) -> None:
        thread = threading.Thread(target=lambda: others.append(net(ids, use_cache=False).logits))
        thread.start()
        thread.join()

    residual = torch.randn_like(whole["resid_pre", 1])
    model.run_with_hooks(residual, start_at_layer=1, fwd_hooks=[(("mlp_out", 1), look)])
    assert torch.equal(others[0], logits)
    assert torch.equal(net(ids, use_cache=False).logits, logits)


def test_gradients_come_to_the_residual_stream() -> None:
    net, _ = make("llama")
    model = LanguageModel(net)
    ids = torch.arange(20, 30)[None]
    with torch.enable_grad():
        _, whole = model.run_with_cache(ids, detach=False)
        stream = whole["resid_pre", 1]
        (expected,) = torch.autograd.grad(whole["logits"].square().sum(), stream)
        residual = stream.detach().requires_grad_()
        logits = model.forward(residual, start_at_layer=1)
        (found,) = torch.autograd.grad(logits.square().sum(), residual)
    torch.testing.assert_close(found, expected)


def test_the_loss_is_that_of_the_tokens() -> None:
    net, _ = make("llama")
    model = LanguageModel(net)
    ids = torch.arange(20, 30)[None]
    _, whole = model.run_with_cache(ids)
    given = (whole["resid_pre", 1],)
    loss = model.forward(ids, return_type="loss")
    assert torch.equal(
        model.forward(*given, start_at_layer=1, tokens=ids, return_type="loss"), loss
    )
    with pytest.raises(InputError, match="or tokens= beside start_at_layer="):
        model.forward(*given, start_at_layer=1, return_type="loss")
    with pytest.raises(InputError, match="tokens= goes with start_at_layer="):
        model.forward(ids, tokens=ids)


def test_a_model_that_is_no_language_model_can_too() -> None:
    net, _ = make("gpt2")
    model = Model(net)
    ids = torch.arange(20, 30)[None]
    logits, whole = model.run_with_cache(ids)
    found, _ = model.run_with_cache(whole["resid_pre", 1], start_at_layer=1)
    assert torch.equal(found, logits)


def test_what_is_no_residual_stream_is_refused() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net)
    residual = torch.randn(1, 4, 32)
    for given in ((torch.arange(4)[None],), (residual[0],), (), (residual, residual)):
        with pytest.raises(InputError, match="goes on from a residual stream"):
            model.run_with_cache(*given, start_at_layer=1)
    with pytest.raises(InputError, match="there are 2 layers"):
        model.run_with_cache(residual, start_at_layer=3)
    with pytest.raises(InputError, match="input_ids= and start_at_layer="):
        model.run_with_cache(residual, start_at_layer=1, input_ids=torch.arange(4)[None])
    with pytest.raises(InputError, match="not known"):
        Model(nn.Sequential(nn.Linear(2, 2))).run_with_cache(residual, start_at_layer=0)
    bart, _ = make("bart")
    with pytest.raises(InputError, match="give encoder_outputs="):
        LanguageModel(bart).run_with_cache(residual, start_at_layer=1)


def test_a_forward_that_something_was_put_around_is_refused() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net)
    own = net.transformer.forward
    net.transformer.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(UnsupportedError, match="put around the forward of model"):
        model.forward(torch.randn(1, 4, 32), start_at_layer=1)
    del net.transformer.forward
    assert model.forward(torch.randn(1, 4, 32), start_at_layer=1).shape == (1, 4, 128)

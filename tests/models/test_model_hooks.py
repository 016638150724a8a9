"""Functions at activations: run_with_hooks, hooks(), add_hook, reset_hooks."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.errors import (
    GradientError,
    InputError,
    MisfitError,
    NeverRanError,
    UnknownPathError,
)


def hooks_on(net: torch.nn.Module) -> int:
    """How many hooks there are on the modules of a model."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()
    )


def with_a_plain_hook(net: Any, inputs: dict[str, Tensor], path: str, change: Any) -> Tensor:
    """The logits, with what the module at `path` gives changed by a plain hook."""

    def see(_: object, args: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = net.get_submodule(path).register_forward_hook(see)
    try:
        return net(**inputs, use_cache=False).logits
    finally:
        handle.remove()


def doubled_in_place(value: Tensor, hook: object) -> None:
    value.mul_(2)


@pytest.mark.parametrize(
    ("name", "path", "key"),
    [
        ("gpt2", "transformer.h.1", ("resid_post", 1)),
        ("gpt2", "transformer.h.0.mlp", "layers.0.mlp_out"),
        ("gpt2", "transformer.h.0.attn", "blocks.0.hook_attn_out"),
        ("llama", "model.layers.0", ("resid_post", 0)),
        ("llama", "model.layers.0.mlp", "model.layers.0.mlp"),
    ],
)
def test_a_function_changes_what_the_model_goes_on_with(name: str, path: str, key: Any) -> None:
    net, inputs = make(name)
    model = LanguageModel(net)
    expected = with_a_plain_hook(net, inputs, path, lambda value: value * 2)
    returned = model.run_with_hooks(**inputs, fwd_hooks=[(key, lambda value, hook: value * 2)])
    with torch.no_grad():
        in_place = model.run_with_hooks(**inputs, fwd_hooks=[(key, doubled_in_place)])
    assert torch.equal(returned, expected)
    assert torch.equal(in_place, expected)
    assert hooks_on(net) == 0


def test_a_part_of_a_value_is_changed_for_itself() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)

    def no_second_head(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, 1] = 0
        return z

    def by_hand(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].clone()
        z[..., 8:16] = 0
        return (z,)

    handle = net.transformer.h[0].attn.c_proj.register_forward_pre_hook(by_hand)
    expected = net(**inputs, use_cache=False).logits
    handle.remove()
    found = model.run_with_hooks(**inputs, fwd_hooks=[(("z", 0), no_second_head)])
    assert torch.equal(found, expected)


def test_a_pattern_is_changed_too() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    uniform: list[Tensor] = []

    def first_token_alone(pattern: Tensor, hook: Any) -> Tensor:
        new = torch.zeros_like(pattern)
        new[..., 0] = 1
        uniform.append(new)
        return new

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", first_token_alone)]):
        _, cache = model.run_with_cache(**inputs)
    assert torch.equal(cache["pattern", 0], uniform[0])
    z, v = cache["z", 0], cache["v", 0]
    torch.testing.assert_close(z, v[:, :1].expand_as(z))


def test_a_function_is_told_where_it_is_called() -> None:
    net, inputs = make("gpt2")
    seen: list[tuple[str, int | None, str]] = []

    def note(value: Tensor, hook: Any) -> None:
        seen.append((hook.name, hook.layer(), hook.key))

    hooks = [("blocks.1.hook_mlp_out", note), ("resid_pre", note), ("hook_embed", note)]
    LanguageModel(net).run_with_hooks(**inputs, fwd_hooks=hooks)
    assert seen == [
        ("hook_embed", None, "embed_out"),
        ("layers.0.resid_pre", 0, "layers.0.resid_pre"),
        ("layers.1.resid_pre", 1, "layers.1.resid_pre"),
        ("blocks.1.hook_mlp_out", 1, "layers.1.mlp_out"),
    ]


def test_functions_of_one_place_are_called_in_their_order() -> None:
    net, inputs = make("gpt2")
    hooks = [
        (("resid_post", 0), lambda value, hook: value + 1),
        (("resid_post", 0), lambda value, hook: value * 3),
    ]
    expected = with_a_plain_hook(net, inputs, "transformer.h.0", lambda value: (value + 1) * 3)
    assert torch.equal(LanguageModel(net).run_with_hooks(**inputs, fwd_hooks=hooks), expected)


def test_functions_meet_traces_generations_calls_and_edits_and_leave_no_trace() -> None:
    net, inputs = make("gpt2")
    ids = inputs["input_ids"]
    model = LanguageModel(net)
    plain = model(ids).logits
    with model.hooks(fwd_hooks=[(("mlp_out", 0), lambda value, hook: value * 0)]):
        assert hooks_on(net) == 0
        called = model(ids).logits
        with model.trace(ids):
            seen = model.layers[0].mlp_out
            traced = model.unembed.output
        tokens = model.generate(ids, max_new_tokens=2, do_sample=False)
        bare = net(ids).logits
    handle = net.transformer.h[0].mlp.register_forward_hook(lambda m, a, out: out * 0)
    expected = net(ids).logits
    expected_tokens = net.generate(ids, max_new_tokens=2, do_sample=False)
    handle.remove()
    assert torch.equal(called, expected)
    assert torch.equal(traced, expected)
    assert torch.equal(tokens, expected_tokens)
    assert not seen.any()
    assert torch.equal(bare, plain)
    assert torch.equal(model(ids).logits, plain)


def test_a_function_is_called_in_each_forward_of_a_generation() -> None:
    net, inputs = make("gpt2")
    lengths: list[int] = []
    hooks = [(("resid_post", 0), lambda value, hook: lengths.append(value.shape[1]))]
    model = LanguageModel(net)
    with model.hooks(fwd_hooks=hooks):
        model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    assert lengths == [8, 1, 1]


def test_hooks_nest_and_each_takes_its_own_away() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    calls: list[str] = []

    def noting(name: str) -> Any:
        return lambda value, hook: calls.append(name)

    stays = model.add_hook(("resid_post", 0), noting("added"))
    with model.hooks(fwd_hooks=[(("resid_post", 0), noting("outer"))]):
        with model.hooks(fwd_hooks=[(("resid_post", 0), noting("inner"))]):
            model(**inputs)
        model.run_with_hooks(**inputs, fwd_hooks=[(("resid_post", 0), noting("run"))])
        model.reset_hooks()
        model(**inputs)
    model(**inputs)
    assert calls == ["added", "outer", "inner", "added", "outer", "run", "outer"]
    assert not stays.is_on


def test_reset_hooks_leaves_permanent_ones_and_those_of_pytorch() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    calls: list[str] = []
    own = net.transformer.h[0].register_forward_hook(lambda *_: calls.append("torch"))
    model.add_hook(("resid_post", 0), lambda v, h: calls.append("stays"), is_permanent=True)
    handle = model.add_hook(("resid_post", 0), lambda v, h: calls.append("goes"))
    model.reset_hooks()
    model(**inputs)
    assert calls == ["stays", "torch"]
    model.reset_hooks(including_permanent=True)
    model(**inputs)
    assert calls == ["stays", "torch", "torch"]
    handle.remove()
    own.remove()


def test_an_exception_leaves_nothing_behind() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)

    def fail(value: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        model.hooks(fwd_hooks=[(("resid_post", 0), fail)]),
    ):
        model(**inputs)
    assert hooks_on(net) == 0
    model(**inputs)


@pytest.mark.parametrize(
    "names",
    ["resid_pots", ["resid_post", "resid_pots"], "layers.*.resid_pots", lambda name: False],
)
def test_a_misspelled_name_is_an_error_in_each_form(names: Any) -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)

    def look(value: Tensor, hook: Any) -> None: ...

    with pytest.raises(UnknownPathError):
        model.run_with_hooks(**inputs, fwd_hooks=[(names, look)])
    with pytest.raises(UnknownPathError):
        model.run_with_hooks(**inputs, bwd_hooks=[(names, look)])
    with pytest.raises(UnknownPathError):
        model.hooks(fwd_hooks=[("resid_post", look), (names, look)])
    with pytest.raises(UnknownPathError):
        model.add_hook(names, look)
    assert not hooks_on(net)


def test_what_is_no_pair_or_no_function_is_an_error() -> None:
    net, inputs = make("gpt2")
    model: Any = LanguageModel(net)
    with pytest.raises(InputError, match="pairs of names"):
        model.run_with_hooks(**inputs, fwd_hooks=["resid_post"])
    with pytest.raises(InputError, match="pairs of names"):
        model.run_with_hooks(**inputs, fwd_hooks=[("resid_post", 3)])
    with pytest.raises(InputError, match="dir="):
        model.add_hook("resid_post", print, "both")


def test_a_function_that_was_never_called_is_an_error() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    with pytest.raises(NeverRanError, match="did not run"):
        with model.hooks(fwd_hooks=[("resid_post", lambda v, h: None)]):
            net(**inputs)
    hooks = [("transformer.h.0.mlp.c_fc", lambda v, h: None)]
    model.run_with_hooks(**inputs, fwd_hooks=hooks)
    net.transformer.h[0].mlp.forward = lambda x: x
    with pytest.raises(NeverRanError, match="never called"):
        model.run_with_hooks(**inputs, fwd_hooks=hooks)


def test_a_value_of_another_shape_is_refused() -> None:
    net, inputs = make("gpt2")
    hooks = [(("resid_post", 0), lambda value, hook: value[:, :2])]
    with pytest.raises(MisfitError, match="resid_post"):
        LanguageModel(net).run_with_hooks(**inputs, fwd_hooks=hooks)


def zeroed_in_place(value: Tensor, hook: object) -> None:
    value.zero_()


def test_what_a_function_changes_in_place_is_not_seen_in_what_was_recorded_before() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    with torch.no_grad():
        _, clean = model.run_with_cache(**inputs)
        for _ in range(2):
            with model.hooks(fwd_hooks=[(("resid_pre", 1), zeroed_in_place)]):
                _, cache = model.run_with_cache(**inputs)
            assert torch.equal(cache["resid_post", 0], clean["resid_post", 0])
            assert not cache["resid_pre", 1].any()


def test_a_function_may_run_the_model_itself() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    other = {"input_ids": inputs["input_ids"].flip(1)}
    found: list[Tensor] = []

    def from_another_run(value: Tensor, hook: Any) -> Tensor:
        with torch.no_grad():
            _, cache = model.run_with_cache(**other, names_filter=("mlp_out", 0))
        found.append(cache["mlp_out", 0])
        return found[0]

    with torch.no_grad():
        logits = model.run_with_hooks(**inputs, fwd_hooks=[(("mlp_out", 0), from_another_run)])
        expected = with_a_plain_hook(net, inputs, "transformer.h.0.mlp", lambda _: found[0])
    assert len(found) == 1
    assert torch.equal(logits, expected)


# -- gradients ------------------------------------------------------------------------------------


def test_a_backward_function_sees_and_changes_the_gradient() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    seen: list[Tensor] = []

    def double(gradient: Tensor, hook: Any) -> Tensor:
        seen.append(gradient.clone())
        return gradient * 2

    hooks = [(("resid_post", 0), double)]
    model.run_with_hooks(**inputs, bwd_hooks=hooks).sum().backward()
    doubled = net.transformer.wpe.weight.grad.clone()
    net.zero_grad()
    kept: list[Tensor] = []
    handle = net.transformer.h[0].register_forward_hook(
        lambda m, a, out: kept.append(out if isinstance(out, Tensor) else out[0])
    )
    logits = net(**inputs, use_cache=False).logits
    kept[0].retain_grad()
    logits.sum().backward()
    handle.remove()
    assert torch.allclose(seen[0], kept[0].grad)
    torch.testing.assert_close(doubled, 2 * net.transformer.wpe.weight.grad)


def test_a_gradient_that_can_not_come_is_refused() -> None:
    net, inputs = make("gpt2")
    hooks = [(("resid_post", 0), lambda gradient, hook: None)]
    with torch.no_grad(), pytest.raises(GradientError, match="without gradients"):
        LanguageModel(net).run_with_hooks(**inputs, bwd_hooks=hooks)


def test_gradients_are_recorded_by_the_same_keys() -> None:
    net, inputs = make("llama")
    model = LanguageModel(net)
    kept: dict[str, Tensor] = {}

    def keep(key: str) -> Any:
        def see(_: object, args: Any, out: Any) -> None:
            kept[key] = out if isinstance(out, Tensor) else out[0]
            kept[key].retain_grad()

        return see

    handles = [
        net.model.layers[1].register_forward_hook(keep("layers.1.resid_post")),
        net.model.layers[0].self_attn.q_proj.register_forward_hook(keep("layers.0.q")),
    ]
    net(**inputs, use_cache=False).logits[0, -1, 7].backward()
    for handle in handles:
        handle.remove()
    _, cache = model.run_with_cache(
        **inputs, incl_bwd=lambda out: out.logits[0, -1, 7], names_filter=["resid_post", "q", "z"]
    )
    torch.testing.assert_close(cache.grad["resid_post", 1], kept["layers.1.resid_post"].grad)
    torch.testing.assert_close(cache.grad["q", 0].flatten(-2), kept["layers.0.q"].grad)
    assert cache.grad["z"].shape == cache["z"].shape
    assert not cache["resid_post", 1].requires_grad


def test_a_loss_is_run_backward_from_and_logits_are_refused() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    _, cache = model.run_with_cache(**inputs, labels=inputs["input_ids"], incl_bwd=True)
    assert cache.grad["resid_post", 0].abs().sum() > 0
    with pytest.raises(GradientError, match="scalar"):
        model.run_with_cache(**inputs, incl_bwd=True)


# -- memory ---------------------------------------------------------------------------------------


def test_a_cache_and_hooks_hold_no_model() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), model.hooks(fwd_hooks=[("resid_post", lambda v, h: None)]):
            _, cache = model.run_with_cache(**inputs)
        gone = weakref.ref(cache)
        alive = weakref.ref(cache["resid_post", 0])
        del cache
        assert gone() is None
        assert alive() is None
        _, cache = model.run_with_cache(**inputs)
        held = weakref.ref(net.transformer.h[0])
        del net, model
        gc.enable()
        gc.collect()
        assert held() is None
        assert cache["resid_post"].shape[0] == 2
    finally:
        gc.enable()

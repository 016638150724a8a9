"""A dry run shows what a run would show, but for its numbers, and leaves the model as it was."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from typing import Any
from weakref import ref

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.tiny_models import make
from tests.tracing.plain import X, changing, plain_hooks, small, state_of
from tracekit import LanguageModel, Model, errors, settings

FAMILIES = (
    *("gpt2", "llama", "gemma2", "falcon", "bloom", "mixtral", "gpt_oss", "mamba", "zamba2"),
    *("t5", "bart", "bert", "albert", "vit", "swin", "convnext", "llava", "whisper"),
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


def shapes(value: Any) -> Any:
    """What a dry run knows of a value."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return [shapes(item) for item in value]
    if hasattr(value, "items"):
        return {key: shapes(item) for key, item in value.items()}
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_dtypes_and_devices_are_those_of_a_real_run(family: str) -> None:
    module, inputs = make(family)
    model = Model(module)
    with torch.no_grad(), plain_hooks(module) as real:
        module(**inputs)
    before = values_of(module)
    with torch.no_grad(), model.scan(**inputs) as tracer:
        cache = tracer.cache()
    assert list(cache) == [path for path in real if real[path]]
    for path, outputs in real.items():
        assert shapes(cache[path].outputs) == shapes(outputs), path
    assert same(values_of(module), before)


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# -- what it leaves alone --------------------------------------------------------------------------


class Stateful(nn.Module):
    """Writes on itself in every way that a forward may."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(4))
        self.calls = 0
        self.seen: list[Tensor] = []
        self.register_buffer("total", torch.zeros(4))
        self.scratch = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(x)) * self.weight
        self.calls += 1
        self.seen.append(x)
        self.total += x.detach().sum(0)
        self.scratch.add_(1)
        self.last = x
        return x + torch.rand(4)


def test_the_model_its_gradients_and_random_numbers_stay_as_they_were() -> None:
    module = Stateful().train()
    before, values, random = state_of(module), values_of(module), torch.get_rng_state()
    versions = [tensor._version for tensor in module.state_dict().values()]
    model = Model(module)
    with model.scan(X):
        y = model.output
        y.sum().backward()
        model.module.weight.data.mul_(2)
        model.weight = nn.Parameter(torch.zeros(4))
    assert y.shape == X.shape
    assert torch.equal(torch.get_rng_state(), random)
    assert state_of(module) == before
    assert same(values_of(module), values)
    assert [tensor._version for tensor in module.state_dict().values()] == versions
    assert (module.calls, module.seen, module.scratch.sum()) == (0, [], 0)
    assert module.weight.grad is None


def test_nothing_is_fake_after_an_error() -> None:
    model = Model(small())
    with pytest.raises(ZeroDivisionError), model.scan(X):
        model[0].output
        1 / 0
    with pytest.raises(errors.SiteOrderError), model.scan(X):
        model[1].output
        model[0].output
    assert type(torch.zeros(1)) is Tensor
    with model.trace(X):
        real = model[0].output
    assert type(real) is Tensor


def test_weights_that_were_left_out_are_not_loaded() -> None:
    model = LanguageModel("tracekit/tiny", dispatch=False)
    with model.scan(["The Eiffel Tower is in", "Hi"]):
        h = model.transformer.h[1].output
        lens = model.lm_head(model.transformer.ln_f(h))
        weight = model.lm_head.weight
        logits = model.output.logits
    assert model.module.lm_head.weight.is_meta
    assert h.device == weight.device == torch.device("cpu")
    assert lens.shape == logits.shape == (2, h.shape[1], weight.shape[0])
    with model.trace("Hi"):  # and then they are
        real = model.transformer.h[1].output
    assert type(real) is Tensor


def test_a_kv_cache_that_is_handed_in_is_not_filled() -> None:
    module, inputs = make("llama")
    past = module(**inputs).past_key_values
    length = past.get_seq_length()
    model = Model(module)
    with model.scan(inputs["input_ids"][:, :2], past_key_values=past, use_cache=True):
        k = model.model.layers[0].self_attn.k_proj.output
    assert k.shape[1] == 2
    assert past.get_seq_length() == length
    assert type(past.layers[0].keys) is Tensor


def test_nothing_stays_alive() -> None:
    model = Model(small())
    gc.collect()
    gc.disable()
    try:
        with model.scan(X) as tracer:
            cache = tracer.cache()
            y = model[0].output
        watched = ref(y)
        del y, cache, tracer
        assert watched() is None
    finally:
        gc.enable()


# -- the block -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_lifted", [True, False])
def test_what_the_block_makes_is_fake_as_well(is_lifted: bool) -> None:
    model = Model(small())
    with settings.changed(lift_blocks=is_lifted), model.scan(X):
        noise = torch.randn(3, 4)
        model[0].output = model[0].output + noise
        y = model.output
    assert isinstance(noise, FakeTensor)
    assert isinstance(y, FakeTensor)
    assert type(torch.zeros(1)) is Tensor


def test_a_cache_in_a_scan_has_every_entry_with_inputs(lm: LanguageModel) -> None:
    with lm.scan("Hi") as tracer:
        cache = tracer.cache("transformer.h.*.mlp", include_inputs=True, clone=True)
        lm.transformer.h[0].output = lm.transformer.h[0].output[..., :64].repeat(1, 1, 2)
    mlp = cache["model.transformer.h.1.mlp"]
    assert mlp.output.shape == mlp.input.shape
    with pytest.raises(errors.DryRunError):
        float(mlp.output.sum())


@pytest.mark.parametrize("dispatch", [True, False])
@pytest.mark.parametrize("names", ["resid_post", "blocks.1.ln1.hook_scale", None])
def test_a_scan_has_the_shapes_of_a_cache_by_names(dispatch: bool, names: str | None) -> None:
    wanted = (lambda _: True) if names is None else names
    model = LanguageModel("tracekit/tiny", dispatch=dispatch)
    with model.scan("Hello there") as tracer:
        scanned = tracer.cache(names=wanted)
    with LanguageModel("tracekit/tiny").trace("Hello there") as tracer:
        real = tracer.cache(names=wanted)
    assert {name: scanned[name].shape for name in scanned} == {
        name: real[name].shape for name in real
    }
    assert len(real) > 0 and not model._tree.norm_kinds


def test_lasting_edits_and_hooks_are_part_of_the_run() -> None:
    module = small()
    edited = Model(module).edit(lambda m: m[0].output.add_(torch.zeros(4)))
    with changing(module[2], lambda y: y[..., :2]), edited.scan(X):
        y = edited.output
    assert y.shape == (3, 2)


def test_a_backward_pass_has_shapes(lm: LanguageModel) -> None:
    with lm.scan("Hi there"):
        h = lm.transformer.h[1].output
        loss = lm.output.logits.sum()
        with loss.backward():
            gradient = h.grad
    assert gradient.shape == h.shape


def test_integers_that_follow_from_the_input_are_known(lm: LanguageModel) -> None:
    ids = torch.tensor([[5, 9, 7]])
    with lm.scan(ids):
        given = lm.transformer.wte.input
        last = given.max().item()
        chosen = lm.transformer.h[0].output[given > 6]
    assert last == 9
    assert chosen.shape[0] == 2


def test_a_mask_from_outside_chooses(lm: LanguageModel) -> None:
    mask = torch.tensor([[True, False, True]])
    with lm.scan(torch.tensor([[5, 9, 7]])):
        chosen = lm.transformer.h[0].output[mask]
        chosen[0] = 0
    assert chosen.shape[0] == 2


def test_a_scan_in_the_block_of_a_trace_of_the_same_model() -> None:
    model = Model(small())
    with model.trace(X):
        real = model[0].output
        with model.scan(torch.zeros(7, 4)):
            shape = model[2].output.shape
        end = model.output
    assert shape == (7, 4)
    assert type(real) is type(end) is Tensor
    assert torch.equal(end, model.module(X))


def test_weights_that_accelerate_brings_are_left_where_they_are() -> None:
    module = small()
    expected = module(X)
    model = Model(accelerate.cpu_offload(module))
    with model.scan(X):
        shapes = [model[0].output.shape, model.output.shape]
        weight = model[0].weight
    assert shapes == [(3, 4), (3, 4)]
    assert weight.shape == (4, 4)
    assert model.module[0].weight.is_meta
    assert torch.equal(model.module(X), expected)


@pytest.mark.filterwarnings("ignore:.*was compiled by torch")
@pytest.mark.parametrize("wrap", [torch.compile, weight_norm, spectral_norm])
def test_modules_that_are_wrapped_are_copied(wrap: Callable[[nn.Module], Any]) -> None:
    module = small()
    module[0] = wrap(module[0])
    before = values_of(module)
    model = Model(module.train())
    with model.scan(X):
        y = model.output
    assert y.shape == (3, 4)
    assert same(values_of(module), before)


def test_a_value_of_a_dry_run_is_refused_by_a_real_one() -> None:
    model = Model(small())
    with model.scan(X):
        fake = model[0].output
    with pytest.raises(errors.MisfitError, match="without numbers"), model.trace(X):
        model[0].output = fake


def test_a_generator_that_is_suspended_in_a_scan_leaves_others_alone() -> None:
    model = Model(small())

    def steps() -> Any:
        with model.scan(X):
            yield model[0].output
            yield model[2].output

    scan = steps()
    assert isinstance(next(scan), FakeTensor)
    assert type(torch.zeros(1)) is Tensor
    assert [value.shape for value in scan] == [(3, 4)]


# -- errors ----------------------------------------------------------------------------------------


def order(lm: LanguageModel) -> None:
    with lm.scan("Hi"):
        lm.transformer.h[1].output
        lm.transformer.h[0].output


def unknown(lm: LanguageModel) -> None:
    with lm.scan("Hi"):
        lm.transformer.h[1].attention.output


def misfit(lm: LanguageModel) -> None:
    with lm.scan("Hi"):
        lm.transformer.h[1].output = torch.zeros(1, 2)


def other_device(lm: LanguageModel) -> None:
    with lm.scan("Hi"):
        h = lm.transformer.h[1].output
        lm.transformer.h[1].output = torch.empty_like(h, device="meta")


def branch(lm: LanguageModel) -> None:
    with lm.scan("Hi"):
        if lm.transformer.h[1].output.sum() > 0:
            pass


def item(lm: LanguageModel) -> None:
    with lm.scan("Hi"):
        lm.transformer.h[1].output.mean().item()


def mask(lm: LanguageModel) -> None:
    with lm.scan("Hi"):
        h = lm.transformer.h[1].output
        h[h > 0]


def product(lm: LanguageModel) -> None:
    with lm.scan("Hi"):
        lm.transformer.h[1].output @ torch.zeros(3, 3)


def joined(lm: LanguageModel) -> None:
    with lm.scan("Hi there"):
        h = lm.transformer.h[1].output
        torch.cat([h, h[:, :1]])


@pytest.mark.parametrize(
    ("block", "error", "line"),
    [
        (order, errors.SiteOrderError, 3),
        (unknown, errors.UnknownModuleError, 2),
        (misfit, errors.MisfitError, 2),
        (other_device, errors.MisfitError, 3),
        (branch, errors.DryRunError, 2),
        (item, errors.DryRunError, 2),
        (mask, errors.DryRunError, 3),
        (product, RuntimeError, 2),
        (joined, RuntimeError, 3),
    ],
)
@pytest.mark.parametrize("is_lifted", [True, False])
def test_errors_come_at_the_users_line_with_those_lines_alone(
    lm: LanguageModel,
    block: Callable[[LanguageModel], None],
    error: type[Exception],
    line: int,
    is_lifted: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with settings.changed(lift_blocks=is_lifted), pytest.raises(error) as caught:
        block(lm)
    frames = traceback.extract_tb(caught.value.__traceback__)[1:]
    assert {frame.filename for frame in frames} == {__file__}
    assert frames[-1].lineno == block.__code__.co_firstlineno + line
    assert not capfd.readouterr().err  # torch logs what it raises


def test_a_model_that_decides_by_numbers_is_named_with_its_line() -> None:
    module, inputs = make("mixtral")
    module.config._experts_implementation = "eager"
    model = Model(module)
    with pytest.raises(errors.DryRunError, match=r"Mixtral.*modeling_mixtral.py:\d+.*trace\(\)"):
        with model.scan(**inputs):
            model.model.layers[1].output


def test_a_model_that_cannot_be_copied_is_named() -> None:
    module = small()
    module.stream = (part for part in ())
    with pytest.raises(errors.DryRunError, match="can't be copied"), Model(module).scan(X):
        pass


def test_no_input_is_an_error(lm: LanguageModel) -> None:
    for model in (lm, Model(small())):
        with pytest.raises(errors.InputError, match="no input"), model.scan():
            pass


def test_invokes_have_the_shapes_of_their_rows(lm: LanguageModel) -> None:
    with lm.scan() as tracer:
        with tracer.invoke(["The Eiffel Tower is in", "Hi"]):
            two = lm.transformer.h[1].output
        with tracer.invoke("The Colosseum"):
            one = lm.transformer.h[1].output
            lm.transformer.h[1].output = one * 2
        with tracer.invoke():
            all_rows = lm.transformer.h[2].output
    assert isinstance(one, FakeTensor)
    assert (two.shape[0], one.shape[0], all_rows.shape[0]) == (2, 1, 3)
    assert two.shape[1:] == one.shape[1:] == all_rows.shape[1:]


def test_invokes_of_a_model_without_weights() -> None:
    model = LanguageModel("tracekit/tiny", dispatch=False)
    with model.scan() as tracer:
        with tracer.invoke("The Eiffel Tower is in"):
            one = model.transformer.h[1].output
        with tracer.invoke("Hi"):
            other = model.transformer.h[1].output
    assert one.shape == other.shape
    assert one.shape[0] == 1
    assert model.module.lm_head.weight.is_meta

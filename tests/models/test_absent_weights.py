"""No number that comes of weights which are not in memory reaches anybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.away import empty_memory_is_nan, put_away, whereabouts
from tests.tiny_models import make
from tracekit import LanguageModel, Model
from tracekit.errors import (
    InputError,
    MisfitError,
    OffloadedError,
    UnknownPathError,
    UnsupportedError,
)

IDS = torch.tensor([[11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26]])


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    net = put_away(make("gpt2")[0], "disk", tmp_path_factory.mktemp("weights"))
    net(IDS)  # accelerate parts tied weights in the first call
    return LanguageModel(net)


@pytest.fixture
def away(kept: LanguageModel) -> Iterator[LanguageModel]:
    before = whereabouts(kept.module)
    with empty_memory_is_nan():
        yield kept
    assert whereabouts(kept.module) == before


def plain() -> Any:
    return make("gpt2")[0]


def raw(model: LanguageModel) -> Tensor:
    """A weight that is got at past tracekit."""
    return model.module.transformer.h[0].attn.c_proj.weight


def test_torch_itself_gives_what_was_never_written(away: LanguageModel) -> None:
    found = torch.ones(2, 32) @ raw(away)  # once it is an error, the guard has less to do
    assert found.isnan().all()


# -- computing with a weight that is elsewhere ----------------------------------------------------


def in_a_block(model: LanguageModel) -> Any:
    with model.trace(IDS):
        found = model.transformer.h[0].output @ raw(model)
    return found


def in_a_block_that_stays_in_place(model: LanguageModel) -> Any:
    with model.trace(IDS):
        return F.linear(model.transformer.h[0].output, raw(model))


def in_place(model: LanguageModel) -> Any:
    with model.trace(IDS):
        hidden = model.transformer.h[0].output
        hidden.add_(raw(model)[0])  # torch leaves it as it was
    return hidden


def in_one_of_several_blocks(model: LanguageModel) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(IDS[:1]):
            found = model.transformer.h[0].output @ raw(model)
        with tracer.invoke(IDS[1:]):
            model.lm_head.output
    return found


def in_a_generation(model: LanguageModel) -> Any:
    with model.generate(IDS, max_new_tokens=2, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            found = model.transformer.h[0].output @ raw(model)
    return found


def by_a_lasting_edit(model: LanguageModel) -> Any:
    with model.edit() as edited:
        hidden = model.transformer.h[0].output
        model.transformer.h[0].output = hidden @ raw(model)
    return edited(IDS).logits


def by_a_function_of_an_edit(model: LanguageModel) -> Any:
    return model.run(IDS, edits=[("transformer.h.0", lambda hidden: hidden @ raw(model))]).result


def by_a_function_at_an_activation(model: LanguageModel) -> Any:
    return model.run_with_hooks(IDS, fwd_hooks=[("resid_post", lambda hid, _: hid @ raw(model))])


def in_a_verified_run(model: LanguageModel) -> Any:
    with model.trace(IDS, verify=True):
        found = model.transformer.h[0].output @ raw(model)
    return found


def through_parameters(model: LanguageModel) -> Any:
    with model.trace(IDS):
        weight, _ = model.transformer.h[0].attn.c_proj.parameters()
        found = model.transformer.h[0].output @ weight
    return found


def with_a_list(model: LanguageModel) -> Any:
    with model.trace(IDS):
        found = torch.stack([model.transformer.h[0].output[0, 0], raw(model)[0]])
    return found


@pytest.mark.parametrize(
    "mistake",
    [
        in_a_block,
        in_a_block_that_stays_in_place,
        in_place,
        in_one_of_several_blocks,
        in_a_generation,
        by_a_lasting_edit,
        by_a_function_of_an_edit,
        by_a_function_at_an_activation,
        in_a_verified_run,
        through_parameters,
        with_a_list,
    ],
)
def test_a_weight_on_meta_is_not_computed_with(
    away: LanguageModel, mistake: Callable[[LanguageModel], Any]
) -> None:
    cure = r"offloaded.*weights\.of\("
    with pytest.raises(OffloadedError, match=cure) as caught:
        mistake(away)
    frames = [each.path.name for each in caught.traceback]
    assert Path(__file__).name in frames[-1]  # the user's own line


def test_what_an_envoy_hands_out_is_refused(away: LanguageModel) -> None:
    for ask in (
        lambda: away.lm_head.weight,
        lambda: away.lm_head.state_dict(),
        lambda: away.lm_head.get_parameter("weight"),
    ):
        with pytest.raises(OffloadedError, match=r"model\.weights\.of\(model\.lm_head\)"):
            ask()
    assert sum(each.numel() for each in away.lm_head.parameters()) == 128 * 32


class ReadsItsChild(nn.Module):
    """Uses a weight of a module that it does not call, so accelerate does not bring it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight


def test_a_forward_that_reads_what_nobody_brought_is_refused() -> None:
    net = accelerate.cpu_offload(ReadsItsChild(), execution_device=torch.device("cpu"))
    model, x = Model(net), torch.randn(3, 4)
    for run in (lambda: model.trace(x).run(), lambda: model(x), lambda: model.run(x)):
        with pytest.raises(OffloadedError, match="preload_module_classes"):
            run()


def test_modules_that_are_brought_by_the_one_around_them(tmp_path: Path) -> None:
    net, memory = make("llama")[0], LanguageModel(make("llama")[0])
    accelerate.disk_offload(
        net, tmp_path, torch.device("cpu"), preload_module_classes=["LlamaDecoderLayer"]
    )
    model = LanguageModel(net)
    projection = model.model.layers[0].self_attn.q_proj
    with model.trace(IDS):
        logits = model.lm_head.output
    assert torch.equal(logits, memory.module(IDS).logits)
    expected = memory.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(model.weights.of(projection)["weight"], expected)
    for ask in (lambda: projection(torch.ones(1, 32)), lambda: model.W_Q):
        with pytest.raises(OffloadedError):
            ask()


def test_a_part_that_is_offloaded_alone() -> None:
    net, expected = plain(), plain()(IDS).logits
    accelerate.cpu_offload(net.transformer.h[1], execution_device=torch.device("cpu"))
    model = LanguageModel(net)
    with model.trace(IDS):
        logits = model.lm_head.output
    assert torch.equal(logits, expected)
    with pytest.raises(OffloadedError, match=r"mlp\.c_fc"):
        with model.trace(IDS):
            model.transformer.h[1].ln_2.output @ model.module.transformer.h[1].mlp.c_fc.weight


def test_a_value_on_meta_can_not_be_written(away: LanguageModel) -> None:
    empty = torch.empty(2, 6, 32, device="meta")
    with pytest.raises(MisfitError, match=r"meta was written \(its \.to\('cpu'\) fits\)"):
        with away.trace(IDS):
            away.transformer.h[0].output = empty
    with pytest.raises(OffloadedError, match="which has no numbers"):
        with away.trace(IDS):
            away.transformer.h[0].output[:] = empty


def test_dry_runs_and_caches_on_meta_go_on(away: LanguageModel) -> None:
    with away.trace(IDS) as tracer:
        cache = tracer.cache(device="meta")
        first = away.transformer.h[0].output
        with away.scan(IDS):
            shape = (away.transformer.ln_f.output @ away.lm_head.weight.T).shape
        logits = away.lm_head.output
    assert shape == (2, 6, 128)
    assert cache["model.transformer.h.0"].output.is_meta
    assert first.device == torch.device("cpu")
    assert torch.equal(logits, plain()(IDS).logits)


def test_a_model_in_memory_runs_under_no_guard() -> None:
    net = plain()
    model = LanguageModel(net)
    modes: list[int] = []
    depth = torch._C._len_torch_function_stack  # pyright: ignore
    handle = net.lm_head.register_forward_pre_hook(lambda *_: modes.append(depth()))
    with model.trace(IDS):
        model.lm_head.output
    model(IDS)
    handle.remove()
    assert modes == [0, 0]


def test_an_edit_that_holds_a_weight_on_meta_is_not_saved(
    away: LanguageModel, tmp_path: Path
) -> None:
    row = raw(away)[0]
    with away.edit() as edited:
        away.transformer.h[0].output[:] += row
    with pytest.raises(UnsupportedError, match=r"weights\.of"):
        edited.edits.save(tmp_path / "edits")


# -- weights.of -----------------------------------------------------------------------------------


def test_weights_of_a_module_are_copies_of_those_in_memory(away: LanguageModel) -> None:
    net = plain()
    for model in (LanguageModel(net), away):
        found = model.weights.of(model.transformer.h[1])
        named = dict(net.transformer.h[1].named_parameters())
        assert list(found)[: len(named)] == list(named)
        for name, weight in named.items():
            assert torch.equal(found[name], weight), name
            assert not found[name].requires_grad
        found["mlp.c_fc.weight"].zero_()
        assert found["mlp.c_fc.weight"].abs().sum() > 0
    assert "mlp.c_fc.weight: Tensor[32, 128] float32" in repr(away.weights.of("transformer.h.1"))


def test_weights_of_takes_envoys_modules_and_paths(away: LanguageModel) -> None:
    expected = plain().lm_head.weight
    for given in (away.lm_head, away.module.lm_head, "lm_head", "model.lm_head"):
        assert torch.equal(away.weights.of(given)["weight"], expected)
    whole = away.weights.of(away)
    assert torch.equal(whole["lm_head.weight"], expected)
    assert len(whole) == len(list(away.module.named_parameters(remove_duplicate=False)))
    with pytest.raises(InputError, match="this Linear is none"):
        away.weights.of(nn.Linear(1, 1))
    with pytest.raises(UnknownPathError, match=r"no weight 'wieght'; did you mean 'weight'"):
        away.weights.of(away.lm_head)["wieght"]


def test_a_lens_by_hand_of_copied_weights(away: LanguageModel) -> None:
    with away.trace(IDS):
        normed = away.transformer.ln_f.output
        lens = normed @ away.weights.of(away.lm_head)["weight"].T
        logits = away.lm_head.output
    assert torch.equal(lens, logits)


def test_weights_of_a_module_that_is_running_leave_it_its_own() -> None:
    net = accelerate.cpu_offload(make("gpt_oss")[0], execution_device=torch.device("cpu"))
    model, memory = LanguageModel(net), make("gpt_oss")[0]
    with empty_memory_is_nan(), model.trace(IDS):
        model.model.layers[0].self_attn.q_proj.output  # within the attention, whose sinks are there
        sinks = model.weights.of(model.model.layers[0].self_attn)["sinks"]
        logits = model.lm_head.output
    assert torch.equal(sinks, memory.model.layers[0].self_attn.sinks)
    assert torch.equal(logits, memory(IDS).logits)


class WithScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.randn(4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def test_a_root_with_weights_of_its_own_has_two_hooks() -> None:
    net = accelerate.cpu_offload(WithScale(), execution_device=torch.device("cpu"))
    assert type(net._hf_hook).__name__ == "SequentialHook"
    model, x = Model(net), torch.randn(3, 4)
    with model.trace(x):
        output = model.output
    assert torch.equal(output, WithScale()(x))
    assert torch.equal(model.weights.of(model)["scale"], WithScale().scale)


def test_weights_that_are_nowhere_or_packed_are_refused() -> None:
    empty = LanguageModel(make("llama")[0].to("meta"))
    with pytest.raises(OffloadedError, match="nothing is there to bring it"):
        empty.weights.of(empty.lm_head)["weight"]
    net = make("llama")[0]
    part = net.model.layers[0].self_attn.q_proj
    part.weight = nn.Parameter(part.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="quantised, to int8"):
        LanguageModel(net).weights.of("model.layers.0.self_attn.q_proj")["weight"]


def test_weights_that_were_left_out_are_loaded_first() -> None:
    late = LanguageModel("tracekit/tiny", dispatch=False)
    expected = LanguageModel("tracekit/tiny").module.lm_head.weight
    assert torch.equal(late.weights.of("lm_head")["weight"], expected)


class OwnWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights


def test_a_models_own_attribute_wins() -> None:
    assert torch.equal(Model(OwnWeights()).weights, torch.ones(2))

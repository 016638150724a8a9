"""What cache.verify() confirms, what it finds wrong, and what it says it can't tell."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import X, changing, small, state_of
from tracekit import Cache, Model
from tracekit.errors import CacheError

IDS = make("gpt2")[1]["input_ids"]  # two rows of eight
H = "transformer.h.1"
GREEDY = {"do_sample": False, "max_new_tokens": 5}
V = torch.randn(32, generator=torch.Generator().manual_seed(3))


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def net() -> Any:
    return make("gpt2", initializer_range=0.2)[0]


@pytest.fixture(scope="module")
def model(net: nn.Module) -> Model:
    return Model(net)


def confirmed(cache: Cache, count: int = 5) -> None:
    """verify() agrees, and has compared so many sites."""
    found = cache.verify()
    assert found, found
    assert sum(check.deviation is not None for check in found) >= count


# -- edits of blocks are made again ---------------------------------------------------------------


def in_place(model: Any) -> None:
    model.transformer.h[0].hidden[:, -1] += V


def in_place_in_one_row(model: Any) -> None:
    model.transformer.h[0].hidden[1, -1] *= 2


def replaced(model: Any) -> None:
    model.transformer.h[0].hidden = model.transformer.h[0].hidden * 1.3


def by_another_value(model: Any) -> None:
    model.transformer.h[1].hidden = model.transformer.h[0].hidden + V


def of_an_input(model: Any) -> None:
    model.transformer.h[1].input[:, -1] -= V


def of_all_inputs(model: Any) -> None:
    args, kwargs = model.transformer.h[1].inputs
    model.transformer.h[1].inputs = ((args[0] * 2, *args[1:]), kwargs)


def of_two_sites(model: Any) -> None:
    model.transformer.h[0].attn.c_proj.output[:] += V
    model.transformer.h[0].mlp.output[:] *= 0.5


def of_one_site_twice(model: Any) -> None:
    model.transformer.h[0].mlp.output[:] += V
    model.transformer.h[0].mlp.output = model.transformer.h[0].mlp.output * 3


def a_skipped_module(model: Any) -> None:
    value = model.transformer.h[0].ln_2.output
    model.transformer.h[0].mlp.skip(value * 0.5)


BLOCKS = [
    in_place,
    in_place_in_one_row,
    replaced,
    by_another_value,
    of_an_input,
    of_all_inputs,
    of_two_sites,
    of_one_site_twice,
    a_skipped_module,
]


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 20}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("edit", BLOCKS, ids=lambda edit: edit.__name__)
def test_edits_of_every_step_are_made_again(
    edit: Callable[[Any], None], options: dict[str, Any], net: Any, model: Model
) -> None:
    with model.generate(IDS, **GREEDY, **options) as tracer:
        cache = tracer.cache("transformer.h.*", include_inputs=True)
        for _ in tracer.iter[:]:
            edit(model)
        tokens = tracer.result
    confirmed(cache, 20)
    with model.generate(IDS, **GREEDY, **options) as tracer:
        plain = tracer.cache("transformer.h.*")
    same = torch.equal(tokens, net.generate(IDS, **GREEDY, **options))
    assert not same or not torch.allclose(cache.sequence(H), plain.sequence(H), atol=1e-3)


def test_edits_of_some_steps_are_made_again(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
        for _ in tracer.iter[1:3]:
            model.transformer.h[0].hidden[:, -1] += V
    confirmed(cache, 20)
    assert [made.step for made in cache._changes.made] == [1, 2]


def test_edits_of_the_prompt_alone_are_made_again(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
        model.transformer.h[0].hidden[:, 2:5] = 0
    confirmed(cache, 20)


@pytest.mark.parametrize("written", [0, 0.5, V], ids=["zero", "one number", "a vector"])
def test_what_is_written_is_the_same_again_though_a_norm_makes_rounding_large(
    written: Any, model: Model
) -> None:
    for options in ({}, {"use_cache": False}, {"num_beams": 3}):
        with model.generate(IDS, **GREEDY, **options) as tracer:
            cache = tracer.cache("transformer.h.*")
            for _ in tracer.iter[:]:
                model.transformer.h[0].hidden[:] = written
        confirmed(cache, 20)


def test_lasting_edits_of_steps_are_made_again(model: Model) -> None:
    with model.edit() as edited:
        model.transformer.h[0].hidden[:, -1] += V
    with edited.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
    confirmed(cache, 20)
    assert cache._changes.made


def test_edits_of_an_encoder_are_made_again_once() -> None:
    net, inputs = make("t5")
    model = Model(net)
    for options in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        torch.manual_seed(0)
        with model.generate(inputs["input_ids"], **{**GREEDY, **options}) as tracer:
            cache = tracer.cache()
            model.encoder.block[0].hidden[:, 2:4] *= 2
        confirmed(cache, 40)


def test_a_block_that_writes_one_tensor_of_a_tuple_has_changed_no_other() -> None:
    for name, path in (("gptj", "transformer.h.0.attn"), ("t5", "decoder.block.0")):
        net, inputs = make(name)
        model = Model(net)
        envoy = model.get(path)
        for use_cache in (True, False):
            with model.generate(inputs["input_ids"], **GREEDY, use_cache=use_cache) as tracer:
                cache = tracer.cache()
                for _ in tracer.iter[:]:
                    envoy.hidden = envoy.hidden * 1.3
            confirmed(cache, 20)
            assert {made.leaf for made in cache._changes.made} == {0}


def test_without_kv_cache_an_edit_of_the_last_position_is_none_of_tokens(model: Model) -> None:
    with model.generate(IDS, **GREEDY, use_cache=False) as tracer:
        cache = tracer.cache("transformer.h.*")
        for _ in tracer.iter[:]:
            model.transformer.h[0].hidden[:, -1] += V
    found = cache.verify()
    assert not found
    assert found.wrong, "no single forward gives what those steps gave"
    with model.generate(IDS, **GREEDY, use_cache=False) as tracer:
        cache = tracer.cache("transformer.h.*")
        for _ in tracer.iter[:]:
            model.transformer.h[0].hidden *= 1.5  # of all positions, in each forward
    confirmed(cache, 20)


# -- what is compared -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float64, 1e-9), (torch.float32, 1e-5)]
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text"])
def test_the_tolerance_is_that_of_the_dtype(name: str, dtype: torch.dtype, limit: float) -> None:
    net = make(name)[0].to(dtype)
    model = Model(net)
    first = "transformer.h.0" if name == "gpt2" else "model.layers.0"
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache(first.rpartition(".")[0] + ".*")
        model.get(first).output.at("generated").edit(lambda hidden: hidden * 1.5)
    found = cache.verify()
    assert found, found
    assert found.tolerance == limit
    assert cache[first][0].hidden.dtype == dtype
    entry = cache._entries[f"model.{first}"][2]
    entry.hidden[0] += 3 * limit * float(entry.hidden.abs().max()) + 5 * limit
    assert not cache.verify()


def test_a_tolerance_that_is_given_is_used(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
    assert not cache.verify(tolerance=1e-12)
    assert cache.verify(tolerance=1e-4).tolerance == 1e-4
    assert not cache.verify(tolerance=0)  # which is no None


def test_a_cache_in_lower_precision_is_held_to_that(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*", dtype=torch.bfloat16)
    confirmed(cache, 20)
    assert cache.verify().tolerance == 2e-2


def test_one_site_is_enough(model: Model) -> None:
    for path in ("transformer.h.1.mlp", "lm_head", "transformer.wpe", "transformer.ln_f"):
        with model.generate(IDS, **GREEDY) as tracer:
            cache = tracer.cache(path)
        assert [check.site for check in cache.verify()] == [f"model.{path}.output"]
        assert cache.verify()


def test_an_input_is_compared_with_the_input_of_its_name() -> None:
    net, inputs = make("bart")  # whose encoder is called with other names in front by generate
    model = Model(net)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with model.generate(**given, **GREEDY) as tracer:
        cache = tracer.cache(include_inputs=True)
    confirmed(cache, 60)
    found = {check.site: check for check in cache.verify()}
    assert found["model.model.encoder.input"].is_right


@pytest.mark.parametrize("beams", [1, 2])
def test_a_value_for_each_pair_of_positions_is_told_apart_from_rows(beams: int) -> None:
    net, inputs = make("t5")
    model = Model(net)
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    for new in (3, 4, 6):
        options = {**GREEDY, "max_new_tokens": new, "use_cache": False, "num_beams": beams}
        with model.generate(inputs["input_ids"], **options) as tracer:
            cache = tracer.cache()
        confirmed(cache, 40)
        with pytest.raises(CacheError):
            cache.sequence(bias)


def test_what_has_no_positions_is_named_with_the_reason() -> None:
    net, _ = make("gptj")
    model = Model(net)
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache()
    found = cache.verify()
    left_out = [check for check in found if check.deviation is None]
    assert [check.site.rpartition(".h.")[2] for check in left_out] == [
        "0.attn.attn_dropout.output",
        "1.attn.attn_dropout.output",
    ]
    assert all(check.is_right is None for check in left_out)
    assert all("not compared: " in check.verdict for check in left_out)
    assert f"{len(left_out)} were not compared" in repr(found)
    assert repr(found).startswith("VERIFIED")


# -- what is wrong --------------------------------------------------------------------------------


def test_weights_that_have_changed_since_are_noticed() -> None:
    net: Any = make("gpt2")[0]
    model = Model(net)
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
    assert cache.verify()
    net.transformer.h[1].mlp.c_fc.weight.data[3, 4] += 1
    wrong = {check.site for check in cache.verify().wrong}
    assert f"model.{H}.mlp.c_fc.output" in wrong
    assert not any(".h.0." in site for site in wrong)


def test_a_hook_of_the_users_is_a_part_of_the_model_while_it_is_there(net: Any) -> None:
    model = Model(net)
    with changing(net.transformer.h[0].mlp, lambda output: output * 2):
        with model.generate(IDS, **GREEDY) as tracer:
            cache = tracer.cache("transformer.h.*")
        assert cache.verify()
    assert not cache.verify()


# -- what can't be told ---------------------------------------------------------------------------


def test_a_run_that_is_no_generation_has_nothing_to_be_held_against() -> None:
    model = Model(small())
    with model.trace(X) as tracer:
        cache = tracer.cache()
    with pytest.raises(CacheError, match="not recorded in a generation"):
        cache.verify()


def test_a_model_that_is_gone_is_told() -> None:
    model = Model(make("gpt2")[0])
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
    del model, tracer
    with pytest.raises(CacheError, match="the model that this cache was recorded from is gone"):
        cache.verify()
    assert cache.sequence(H).shape == (2, 12, 32)


def test_a_cache_that_is_not_complete_can_not_be_verified(model: Model) -> None:
    with pytest.raises(CacheError, match="ask for it when the run has ended"):
        with model.generate(IDS, **GREEDY) as tracer:
            cache = tracer.cache("transformer.h.*")
            model.transformer.h[0].output
            cache.verify()


def test_an_edit_that_is_no_change_of_numbers_is_told(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
        for _ in tracer.iter[:]:
            model.transformer.wte.input[:] = 7  # tokens
    with pytest.raises(CacheError, match=r"can't be made again in one forward.*no change of numb"):
        cache.verify()


# -- what it leaves -------------------------------------------------------------------------------


def test_verifying_leaves_model_and_generator_as_they_were(net: Any, model: Model) -> None:
    before = state_of(net)
    with model.generate(IDS, do_sample=True, max_new_tokens=5) as tracer:
        cache = tracer.cache("transformer.h.*")
        model.transformer.h[0].output.at("all").edit(lambda hidden: hidden * 2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert cache.verify()
    assert torch.equal(torch.rand(3), expected)
    assert state_of(net) == before


def test_an_error_while_verifying_leaves_no_hook(net: Any, model: Model) -> None:
    before = state_of(net)

    def fails(_: Any) -> None:
        raise LookupError("in a hook of the user's")

    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
    with pytest.raises(LookupError):
        with changing(net.transformer.h[1], fails):
            cache.verify()
    assert state_of(net) == before
    assert cache.verify()


def test_verifying_while_another_thread_generates_is_undisturbed(model: Model) -> None:
    found: list[bool] = []

    def run(factor: float) -> None:
        with torch.no_grad(), model.generate(IDS, **GREEDY) as tracer:
            cache = tracer.cache("transformer.h.*")
            model.transformer.h[0].output.at("all").edit(lambda hidden: hidden * factor)
        found.extend(bool(cache.verify()) for _ in range(3))

    threads = [threading.Thread(target=run, args=(factor,)) for factor in (0.5, 1.5, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 12


def test_a_tensor_that_the_user_changes_afterwards_is_found(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
    value: Tensor = cache[H][2].hidden
    value[0, 0, 0] += 1
    wrong = cache.verify().wrong
    assert [(check.site, check.row, check.position) for check in wrong] == [
        (f"model.{H}.output", 0, 9)
    ]


def test_a_cache_that_is_made_while_the_model_runs_is_verified(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        model.transformer.h[0].hidden
        cache = tracer.cache("transformer.h.1")
        for _ in tracer.iter[:]:
            model.transformer.h[1].mlp.output[:] += V
    assert cache.sequence(H).shape == (2, 12, 32)
    assert [entry.positions for entry in cache[H]][:2] == [range(8), range(8, 9)]
    assert cache.verify()


def test_an_edit_that_came_before_the_cache_is_not_known_and_so_refused(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        model.transformer.h[0].hidden[:] += V
        cache = tracer.cache("transformer.h.1")
    with pytest.raises(CacheError, match=r"h\.0\.output .* was edited before there was a cache"):
        cache.verify()


def test_a_read_that_came_before_the_cache_is_no_edit(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        seen = model.transformer.h[0].hidden
        seen.sum()
        cache = tracer.cache("transformer.h.1")
    assert cache.verify()


def test_the_report_says_how_much_of_a_run_a_site_has(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache(["lm_head", "transformer.h.1"])
    verdicts = {check.site: check.verdict for check in cache.verify()}
    assert verdicts["model.lm_head.output"] == "right (5 of 12 positions)"
    assert verdicts["model.transformer.h.1.output"] == "right"


def test_a_run_under_autocast_is_verified_as_it_ran(model: Model) -> None:
    with torch.autocast("cpu", torch.bfloat16), model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.1.*")
    with model.generate(IDS, **GREEDY) as tracer:
        plain = tracer.cache("transformer.h.1.*")
    assert cache["transformer.h.1.mlp.c_fc"][0].output.dtype == torch.bfloat16
    assert cache.verify()
    with torch.autocast("cpu", torch.bfloat16):
        assert cache.verify()
        assert plain.verify()

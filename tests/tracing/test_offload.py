"""Caches leave an accelerator beside the model, and hold what it computed: no more, no less.

The accelerator is tests/fake_lane.py; `device="cpu:0"` is another one than the model's in name, so
that values of a model on the processor go through it.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.fake_lane import HERE, Accelerator
from tracekit import LanguageModel, Model, settings
from tracekit.core import streams
from tracekit.core.ring import Ring
from tracekit.core.versions import version
from tracekit.errors import OffloadError, OverwrittenError
from tracekit.tracing import offload
from tracekit.tracing.offload import Offload

PROMPT = "The cat sat on"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with Accelerator().at_work() as found:
        yield found


class Net(nn.Module):
    """Three layers; `overwrites` says that the first's output is overwritten behind it."""

    def __init__(self, overwrites: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.overwrites = overwrites

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.overwrites:
            with torch.no_grad():
                hidden.detach().mul_(2)
        return self.third(self.second(hidden))


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def by_hooks(module: nn.Module, run: Callable[[], object], *paths: str) -> dict[str, list[Tensor]]:
    """What plain hooks see at once, in copies."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}

    def see(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            found[path].append(tensor.detach().clone())

        return hook

    handles = [module.get_submodule(path).register_forward_hook(see(path)) for path in paths]
    run()
    for handle in handles:
        handle.remove()
    return found


def agree(cache: Any, expected: dict[str, list[Tensor]]) -> None:
    for path, values in expected.items():
        came = cache[f"model.{path}"].outputs
        assert len(came) == len(values), path
        for one, other in zip(came, values, strict=True):
            tensor = one if isinstance(one, Tensor) else one[0]
            assert torch.equal(tensor, other), path


# -- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capacity", [2**28, 2**16, 4096])
def test_a_generation_is_recorded_as_hooks_see_it(
    model: LanguageModel, seed: int, capacity: int
) -> None:
    paths = [f"transformer.h.{layer}" for layer in range(4)]
    ids = model.tokenizer([PROMPT] * 3, return_tensors="pt")["input_ids"]
    length = {"max_new_tokens": 6, "do_sample": False}
    expected = by_hooks(model.module, lambda: model.module.generate(ids, **length), *paths)
    with Accelerator(seed).at_work() as accelerator, settings.changed(offload_bytes=capacity):
        for _ in range(2):  # copies of all the first time, of none the second
            with model.generate(ids, **length) as tracer:
                cache = tracer.cache(modules=list(model.transformer.h), device=HERE)
            assert accelerator.peak["pinned"] <= capacity
            accelerator.check()
            agree(cache, expected)
        assert accelerator.copies
        assert capacity < 2**28 or accelerator.copies == 2  # all layers and steps of a run in one


def test_every_module_with_its_inputs_is_recorded_as_without(
    model: LanguageModel, accelerator: Accelerator
) -> None:
    for _ in range(2):
        with model.trace(PROMPT) as tracer:
            sent = tracer.cache(device=HERE, include_inputs=True)
            usual = tracer.cache(include_inputs=True)
        accelerator.check()
        assert list(sent) == list(usual)
        for path in usual:
            assert repr(sent[path]) == repr(usual[path])
            for one, other in zip(sent[path], usual[path], strict=True):
                torch.testing.assert_close(one.output, other.output, rtol=0, atol=0)
                torch.testing.assert_close(one.input, other.input, rtol=0, atol=0)


def test_names_positions_and_dtypes_are_cut_and_cast_before_they_leave(
    model: LanguageModel, accelerator: Accelerator
) -> None:
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        send = Ring.send
        patch.setattr(
            Ring,
            "send",
            lambda ring, load: (sizes.extend(t.nbytes for t, _ in load), send(ring, load)),
        )
        with model.trace(PROMPT) as tracer:
            options: Any = {"names": ["resid_post", "pattern"], "pos_slice": -1}
            sent = tracer.cache(device=HERE, dtype=torch.bfloat16, **options)
            usual = tracer.cache(dtype=torch.bfloat16, **options)
    accelerator.check()
    assert list(sent) == list(usual)
    for key in usual:
        assert torch.equal(sent[key], usual[key])
        assert sent[key].dtype is torch.bfloat16
    assert sum(sizes) == sum(usual[key].nbytes for key in usual)


def test_rows_of_an_invoke_are_recorded(model: LanguageModel, accelerator: Accelerator) -> None:
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            sent = tracer.cache(modules=model.transformer.h[2], device=HERE)
        with tracer.invoke("Dogs"):
            model.transformer.h[1].output[:] = 0
            usual = model.transformer.h[2].output.save()
    accelerator.check()
    with model.trace(PROMPT):
        alone = model.transformer.h[2].output.save()
    assert usual.shape[0] == 1
    torch.testing.assert_close(sent["model.transformer.h.2"].output[:, -alone.shape[1] :], alone)


def test_what_a_block_edits_is_recorded_as_the_model_goes_on(accelerator: Accelerator) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4))
    expected = by_hooks(net, lambda: net(X), "0")
    model = Model(net)
    for _ in range(3):
        with torch.no_grad(), model.trace(X) as tracer:
            cache = tracer.cache(device=HERE)
            model[1].output[:] = 1  # in the memory of the record before, which waits
            model[2].output = model[2].output * 3
            after = model[2].output.save()
        accelerator.check()
        agree(cache, expected)
        assert torch.equal(cache["model.1"].output, torch.ones(2, 4))
        assert torch.equal(cache["model.2"].output, after)
        assert torch.equal(cache["model"].output, after)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_it_is_recorded_in_every_mode_of_gradients(
    accelerator: Accelerator, mode: Callable[[], Any]
) -> None:
    module = Net(overwrites=True)
    expected = by_hooks(module, lambda: module(X), "first", "second", "third")
    for _ in range(2):
        with mode(), Model(module).trace(X) as tracer:
            cache = tracer.cache(device=HERE)
        accelerator.check()
        agree(cache, expected)


def test_gradients_and_graphs_are_as_ever(accelerator: Accelerator) -> None:
    model = Model(Net())
    with model.trace(X) as tracer:
        sent = tracer.cache(device=HERE, include_grads=True)
        usual = tracer.cache(include_grads=True)
        attached = tracer.cache(device=HERE, detach=False)
    assert attached["model.first"].output.requires_grad
    attached["model.third"].output.sum().backward()
    accelerator.check()
    for path in ("model.first", "model.second", "model.third"):
        assert torch.equal(sent[path].grad, usual[path].grad)
        assert torch.equal(sent[path].output, attached[path].output)
        assert sent[path].output.grad_fn is None


# -- what the model overwrites --------------------------------------------------------------------


def test_what_the_model_overwrites_is_recorded_as_it_was(accelerator: Accelerator) -> None:
    module = Net(overwrites=True)
    expected = by_hooks(module, lambda: module(X), "first", "second")
    model = Model(module)
    for _ in range(3):
        with model.trace(X) as tracer:
            cache = tracer.cache(device=HERE)
        accelerator.check()
        agree(cache, expected)


def test_what_is_overwritten_when_it_was_sent_does_no_harm(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "MOST", 1)
    module = Net()
    expected = by_hooks(module, lambda: module(X), "first", "second")
    model = Model(module)
    with model.trace(X) as tracer:
        tracer.cache(device=HERE)
    given: list[Tensor] = []
    module.first.register_forward_hook(lambda module, args, output: given.append(output))
    module.third.register_forward_pre_hook(lambda *_: drop(given))
    with torch.no_grad(), model.trace(X) as tracer:  # the first left when the second was recorded
        cache = tracer.cache(modules=["first", "second", "third"], device=HERE)
    accelerator.check()
    agree(cache, expected)


def test_a_model_that_overwrites_what_it_did_not_before_is_refused(
    accelerator: Accelerator,
) -> None:
    model = Model(module := Net())
    with model.trace(X) as tracer:
        tracer.cache(device=HERE)
    module.overwrites = True
    expected = by_hooks(module, lambda: module(X), "first")
    with pytest.raises(OverwrittenError, match=r"model\.first\.output \(step 0\) was overwritten"):
        with model.trace(X) as tracer:
            tracer.cache(device=HERE)
    accelerator.check()
    with model.trace(X) as tracer:  # from now on it is copied
        cache = tracer.cache(device=HERE)
    agree(cache, expected)


def test_without_the_versions_an_overwritten_value_would_pass(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    model = Model(module := Net())
    with model.trace(X) as tracer:
        tracer.cache(device=HERE)
    module.overwrites = True
    monkeypatch.setattr(offload, "_renewed", lambda before, then, now: version_of(now))
    with model.trace(X) as tracer:
        cache = tracer.cache(device=HERE)
    expected = by_hooks(module, lambda: module(X), "first")
    assert not torch.equal(cache["model.first"].output, expected["first"][0])


def version_of(value: Any) -> Any:
    return version(value) if isinstance(value, Tensor) else ()


# -- however it ends ------------------------------------------------------------------------------


def drop(given: list[Tensor]) -> None:
    given.pop().zero_()


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("seed", range(4))
def test_what_came_before_an_error_is_in_the_cache(error: type[BaseException], seed: int) -> None:
    module = Net()
    expected = by_hooks(module, lambda: module(X), "first", "second")
    caches: list[Any] = []

    def fail(*_: Any) -> None:
        raise error

    module.third.register_forward_hook(fail)
    with Accelerator(seed).at_work() as accelerator:
        with pytest.raises(error):
            with Model(module).trace(X) as tracer:
                cache = tracer.cache(device=HERE)
                caches.append(cache)
        accelerator.check()
    agree(caches[0], expected)


def test_stop_leaves_what_was_recorded(model: LanguageModel, accelerator: Accelerator) -> None:
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=list(model.transformer.h), device=HERE)
        kept = model.transformer.h[1].output.save()
        tracer.stop()
    accelerator.check()
    assert torch.equal(cache["model.transformer.h.1"].output, kept)
    assert "model.transformer.h.3" not in cache


@pytest.mark.parametrize("point", ["send", "fence", "ship", "_deliver"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_in_the_middle_of_the_offload_loses_nothing(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, point: str, when: str
) -> None:
    owner: Any = Ring if hasattr(Ring, point) and point != "ship" else Offload
    whole, calls = getattr(owner, point), []

    def interrupted(*args: Any) -> Any:
        calls.append(point)
        if len(calls) > 1:
            return whole(*args)
        if when == "after":
            whole(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, point, interrupted)
    module = Net()
    expected = by_hooks(module, lambda: module(X), "first", "second", "third")
    caches: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        with Model(module).trace(X) as tracer:
            cache = tracer.cache(device=HERE)
            caches.append(cache)
    accelerator.check()
    agree(caches[0], expected)


def test_a_device_that_fails_takes_only_what_it_still_had(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "MOST", 1)
    accelerator.fails_after = 1
    module = Net()
    expected = by_hooks(module, lambda: module(X), "first")
    caches: list[Any] = []
    told = "not in the cache: CUDA error: an illegal memory access was encountered. An operation"
    with pytest.raises(OffloadError, match=re.escape(told)):
        with Model(module).trace(X) as tracer:
            cache = tracer.cache(modules=["first", "second"], device=HERE)
            caches.append(cache)
    agree(caches[0], expected)
    assert list(caches[0]) == ["model.first"]


def test_the_error_of_the_model_comes_before_that_of_the_device(accelerator: Accelerator) -> None:
    accelerator.fails_after = 0

    def fail(*_: Any) -> None:
        raise Stop

    module = Net()
    module.third.register_forward_hook(fail)
    with pytest.raises(Stop):
        with Model(module).trace(X) as tracer:
            tracer.cache(device=HERE)


def test_nothing_is_held_when_the_run_is_over(accelerator: Accelerator) -> None:
    gc.disable()
    try:
        with Model(Net()).trace(X) as tracer:
            cache = tracer.cache(device=HERE)
        assert accelerator.peak["pinned"]
        assert accelerator.live == {"staging": 0, "pinned": 0}
        assert len(cache) == 4
    finally:
        gc.enable()


# -- while it runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_is_read_as_it_goes(model: LanguageModel, seed: int) -> None:
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    length = {"max_new_tokens": 5, "do_sample": False}
    path = "transformer.h.2"
    expected = by_hooks(model.module, lambda: model.module.generate(ids, **length), path)[path]
    with Accelerator(seed).at_work() as accelerator:
        options = {"device": HERE}
        stream = model.generate_stream(
            ids, **length, capture=model.transformer.h[2], cache_options=options
        )
        for step, _ in enumerate(stream):
            if step % 2:
                read = stream.cache[f"model.{path}"].outputs
                assert len(read) == step + 1
                assert torch.equal(read[step], expected[step])
                assert torch.equal(read[step - 1], expected[step - 1])
                read[step].fill_(0)  # it is the reader's
        accelerator.check()
        came = stream.cache[f"model.{path}"].outputs
    assert torch.equal(came[2], expected[2])
    assert torch.equal(came[4], expected[4])


def test_records_wait_until_there_are_enough_for_a_copy(
    model: LanguageModel, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "MOST", 10)
    ids = model.tokenizer([PROMPT] * 2, return_tensors="pt")["input_ids"]
    with model.generate(ids, max_new_tokens=5, do_sample=False) as tracer:
        cache = tracer.cache(modules=list(model.transformer.h), device=HERE)
    accelerator.check()
    assert sum(map(len, cache.values())) == 20
    assert accelerator.copies == 2


def test_another_stream_of_the_model_has_a_ring_of_its_own(accelerator: Accelerator) -> None:
    module = Net()
    expected = by_hooks(module, lambda: module(X), "first", "second", "third")

    def switch(*_: Any) -> None:
        accelerator.current += 1

    module.second.register_forward_pre_hook(switch)
    with settings.changed(offload_bytes=4096):
        with Model(module).trace(X) as tracer:
            cache = tracer.cache(modules=["first", "second", "third"], device=HERE)
    accelerator.check()
    agree(cache, expected)
    assert accelerator.copies == 2
    assert accelerator.peak["pinned"] <= 4096


def test_values_of_other_kinds_are_moved_as_ever(accelerator: Accelerator) -> None:
    class Kinds(nn.Module):
        def forward(self, x: Tensor) -> tuple[Any, ...]:
            return x.to_sparse(), nn.Parameter(x * 2), {"plain": x + 1}, None, 3

    with Model(Kinds()).trace(X) as tracer:
        cache = tracer.cache(device=HERE)
    accelerator.check()
    sparse, parameter, plain, nothing, number = cache["model"].output
    assert torch.equal(sparse.to_dense(), X) and torch.equal(parameter, X * 2)
    assert torch.equal(plain["plain"], X + 1) and nothing is None and number == 3


def test_a_dry_run_asks_nothing_of_a_device(model: LanguageModel, accelerator: Accelerator) -> None:
    with model.scan(PROMPT) as tracer:
        cache = tracer.cache(device=HERE)
    assert cache["model.transformer.h.1"].output.shape[-1] == 128
    assert accelerator.copies == 0 and accelerator.peak["pinned"] == 0


# -- where there is nothing to do -----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"device": None}, {"device": HERE, "detach": False}, {"device": "meta"}],
    ids=str,
)
def test_nothing_is_asked_of_a_device_for(accelerator: Accelerator, options: Any) -> None:
    with Model(Net()).trace(X) as tracer:
        tracer.cache(**options)
    assert accelerator.copies == 0 and accelerator.peak["pinned"] == 0


def test_without_bytes_for_it_each_value_is_copied_at_once(accelerator: Accelerator) -> None:
    module = Net()
    expected = by_hooks(module, lambda: module(X), "first", "second")
    with settings.changed(offload_bytes=0), Model(module).trace(X) as tracer:
        cache = tracer.cache(device=HERE)
    agree(cache, expected)
    assert accelerator.peak["pinned"] == 0


def test_without_an_accelerator_there_is_no_outbox() -> None:
    assert not streams.has_lanes()
    assert streams.lane_of(torch.device("cpu")) is None
    assert streams.lane_of(torch.device("meta")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a real device is needed")
def test_a_model_on_a_real_device_is_recorded_as_hooks_see_it() -> None:
    paths = [f"transformer.h.{layer}" for layer in range(4)]
    other = LanguageModel("tracekit/tiny")
    other.module.to("cuda")
    ids = other.tokenizer([PROMPT] * 3, return_tensors="pt")["input_ids"].cuda()
    length = {"max_new_tokens": 6, "do_sample": False}
    expected = by_hooks(other.module, lambda: other.module.generate(ids, **length), *paths)
    expected = {path: [each.cpu() for each in values] for path, values in expected.items()}
    for capacity in (2**28, 2**16, 4096, 0):
        with settings.changed(offload_bytes=capacity):
            with other.generate(ids, **length) as tracer:
                cache = tracer.cache(modules=list(other.transformer.h))
            agree(cache, expected)


# -- any program ----------------------------------------------------------------------------------

KINDS = st.sampled_from(["linear", "overwritten", "view", "pair", "empty", "bfloat16"])


class Part(nn.Module):
    """One step of a random program; `seen` has copies of what it gave."""

    def __init__(self, kind: str, seen: list[list[Tensor]]) -> None:
        super().__init__()
        self.kind, self.seen = kind, seen

    def forward(self, x: Tensor) -> Any:
        given = self.made(x)
        self.seen.append([each.clone() for each in flat(given)])
        return given

    def made(self, x: Tensor) -> Any:
        if self.kind == "view":
            return x[:, ::2]
        if self.kind == "pair":
            return x + 1, x[:1]
        if self.kind == "empty":
            return x[:0] * 1
        return x.bfloat16() if self.kind == "bfloat16" else x * 1.5


class Program(nn.Module):
    """Parts one behind another, and what is done to what they gave; it may fail before one."""

    def __init__(self, kinds: list[str], fails_at: int) -> None:
        super().__init__()
        self.seen: list[list[Tensor]] = []
        self.parts = nn.ModuleList(Part(kind, self.seen) for kind in kinds)
        self.fails_at = fails_at

    def forward(self, x: Tensor) -> Tensor:
        for index, part in enumerate(self.parts):
            if index == self.fails_at:
                raise Stop
            given = part(x)
            if part.kind == "overwritten":
                given.add_(1)
            x = flat(given)[0].float().repeat(1, 2)[:, :6]
            x = x if len(x) else torch.ones(3, 6)
        return x


def flat(value: Any) -> list[Tensor]:
    return list(value) if type(value) is tuple else [value]


@examples(max_examples=60, deadline=None)
@given(
    kinds=st.lists(KINDS, min_size=1, max_size=12),
    fails_at=st.integers(1, 24),
    capacity=st.integers(16, 4096),
    most=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_any_program_is_recorded_as_it_ran(
    kinds: list[str], fails_at: int, capacity: int, most: int, seed: int
) -> None:
    program = Program(kinds, fails_at)
    model = Model(program)
    with (
        Accelerator(seed).at_work() as accelerator,
        settings.changed(offload_bytes=capacity),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(offload, "MOST", most)
        for _ in range(2):
            program.seen.clear()
            caches: list[Any] = []
            with suppress(Stop), model.trace(torch.arange(18.0).reshape(3, 6)) as tracer:
                cache = tracer.cache(modules="parts.*", device=HERE)
                caches.append(cache)
            accelerator.check()
            assert accelerator.peak["pinned"] <= capacity
            assert len(program.seen) == min(fails_at, len(kinds)) == len(caches[0])
            for entries, seen in zip(caches[0].values(), program.seen, strict=True):
                assert all(map(torch.equal, flat(entries.output), seen))

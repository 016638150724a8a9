"""`tracer.cache(path=...)`: on the disk by steps, and equal to the cache in memory."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.storage.same import assert_same, assert_same_cache, assert_same_entry
from tests.tiny_models import SPECS, make
from tracekit import Cache, LanguageModel, Model, load_cache
from tracekit.core.nest import map_leaves
from tracekit.errors import CacheError, OverwrittenError, StorageError, UnsupportedError
from tracekit.tracing import spool

FAMILIES = ("gpt2", "llama", "falcon", "mamba", "mixtral", "t5", "whisper", "llava", "gemma2")
GENERATING = [name for name in FAMILIES if name in SPECS and SPECS[name].generate]
TEXT = "The Eiffel Tower is in"


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "BUFFER", 1)


@pytest.mark.parametrize("name", GENERATING)
def test_it_is_the_cache_in_memory(name: str, tmp_path: Path, small_buffer: None) -> None:
    net, inputs = make(name)
    model, spec = Model(net), SPECS[name]
    given: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    given = {**spec.gen_inputs(inputs), **given, **spec.generation}

    def generate(**options: Any) -> Cache:
        with model.generate(**given) as tracer:
            cache = tracer.cache(include_inputs=True, **options)
        return cache

    first = generate(path=tmp_path / "first")  # nothing is known of the model yet
    cache = generate()
    again = generate(path=tmp_path / "again")
    found = load_cache(tmp_path / "again", model=model)
    for other in (first, again, found, load_cache(tmp_path / "first")):
        assert_same_cache(cache, other)
    assert repr(found.verify()) == repr(cache.verify())


# -- written while it comes -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"include_grads": True}, {"detach": False}])
def test_what_comes_after_the_run_is_not_written_while_it_runs(
    tiny: LanguageModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(CacheError, match="path= writes values while the model runs"):
        with tiny.trace(TEXT) as tracer:
            tracer.cache(path=tmp_path / "run", **options)


def test_a_run_writes_over_nothing(tiny: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="there is something at"):
        with tiny.trace(TEXT) as tracer:
            tracer.cache(path=tmp_path)


def test_what_a_block_edits_is_written_as_the_model_went_on(
    tiny: LanguageModel, tmp_path: Path, small_buffer: None
) -> None:
    def generate(**options: Any) -> Cache:
        with tiny.generate(TEXT, max_new_tokens=5) as tracer:
            cache = tracer.cache(include_inputs=True, **options)
            for step in tracer.iter[:]:
                tiny.transformer.h[1].output[:] += step + 1.0
                tiny.transformer.h[2].mlp.output = tiny.transformer.h[2].mlp.output * 0
        return cache

    assert_same_cache(generate(), generate(path=tmp_path / "run"))


class Reusing(nn.Module):
    """Gives the same memory in each step, with other numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.memory: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        value = self.inner(x)
        if self.memory is None or self.memory.shape != value.shape:
            self.memory = value.clone()
        else:
            self.memory.copy_(value)
        return self.memory


def test_what_a_later_step_overwrites_is_written_before(tmp_path: Path, small_buffer: None) -> None:
    net: Any = make("gpt2")[0]
    net.transformer.h[0].mlp = Reusing(net.transformer.h[0].mlp)
    model = Model(net)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), model.trace(ids) as tracer:
        tracer.cache()  # nothing is overwritten in one forward, and that is remembered
    seen: list[Tensor] = []
    handle = net.transformer.h[0].mlp.register_forward_hook(lambda *a: seen.append(a[2].clone()))
    with model.generate(ids, max_new_tokens=5, do_sample=False) as tracer:
        cache = tracer.cache(path=tmp_path / "run")
    handle.remove()
    for found in (cache, load_cache(tmp_path / "run")):
        for entry, expected in zip(found["transformer.h.0.mlp"], seen, strict=True):
            assert_same(entry.output, expected)


class Moody(nn.Module):
    """Overwrites what its first module gave, if it is in the mood to."""

    is_in_the_mood = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y)
        return z + (y.add_(1) if self.is_in_the_mood else y)


@torch.no_grad()
def test_what_the_model_overwrote_unawares_is_left_out_and_told(tmp_path: Path) -> None:
    net = Moody()
    model, x = Model(net), torch.ones(1, 2)
    with model.trace(x) as tracer:
        tracer.cache()
    net.is_in_the_mood = True
    with pytest.raises(OverwrittenError, match=r"model\.first\.output \(step 0\) was overwritten"):
        with model.trace(x) as tracer:
            tracer.cache(path=tmp_path / "run")
    found = load_cache(tmp_path / "run")
    assert list(found) == ["model.second", "model"]
    with model.trace(x) as tracer:
        cache = tracer.cache(path=tmp_path / "again")  # it is known now
    assert torch.equal(cache["first"].output, net.first(x))


def test_what_can_not_be_written_ends_the_run_and_keeps_what_was(
    tmp_path: Path, small_buffer: None
) -> None:
    class Sparse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to_sparse() if x.shape[1] == 1 else x

    net: Any = make("gpt2")[0]
    net.transformer.drop.register_module("odd", Sparse())
    net.transformer.drop.register_forward_hook(lambda m, _, out: (m.odd(out), out)[1])
    model = Model(net)
    with pytest.raises(UnsupportedError, match=r"drop\.odd\.output \(step 1\) is a tensor of"):
        with model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5) as tracer:
            tracer.cache(path=tmp_path / "run")
    found = load_cache(tmp_path / "run", partial=True)
    assert found["lm_head"][-1].step == 0


KILLED = """
import sys, torch
from tracekit import LanguageModel
from tracekit.tracing import spool
spool.BUFFER = 1
tiny = LanguageModel("tracekit/tiny")
with tiny.generate({text!r}, max_new_tokens=60, min_new_tokens=60) as tracer:
    cache = tracer.cache(include_inputs=True, path={path!r})
    for step in tracer.iter[:]:
        tiny.transformer.h[2].output
        print(step, flush=True)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_what_was_finished(tiny: LanguageModel, tmp_path: Path) -> None:
    code = KILLED.format(text=TEXT, path=str(tmp_path / "run"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if int(line) == 7:
                run.send_signal(signal.SIGKILL)
                break
    with pytest.raises(StorageError, match=r"was not written to its end: it came to step \d+"):
        load_cache(tmp_path / "run")
    found = load_cache(tmp_path / "run", partial=True)
    assert "without the end of its run" in repr(found)
    count = len(found["lm_head"])
    assert count >= 6
    with tiny.generate(TEXT, max_new_tokens=60, min_new_tokens=60) as tracer:
        cache = tracer.cache(include_inputs=True)
    for path in cache:
        for one, other in zip(cache[path][:count], found[path], strict=True):
            assert_same_entry(one, other)
    whole = cache.sequence("transformer.h.1")
    some = found.sequence("transformer.h.1")
    assert torch.equal(whole[:, : some.shape[1]], some.as_subclass(Tensor))
    assert torch.equal(whole.tokens[:, : some.shape[1]], some.tokens)


def test_memory_stays_bounded_however_long_the_run(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step = 200_000  # bytes that all modules give for one token, and more
    monkeypatch.setattr(spool, "BUFFER", one_step)
    live: list[int] = []
    count = Counted(live)
    with tiny.generate(TEXT, max_new_tokens=40, min_new_tokens=40) as tracer:
        cache = tracer.cache(path=tmp_path / "run")
        for _ in tracer.iter[:]:
            tiny.transformer.h[0].output
            count(cache)
    total = sum(each.nbytes for found in cache.values() for e in found for each in flat(e.output))
    assert total > 6 * one_step
    assert max(live) < 3 * one_step


class Counted:
    """Counts the bytes of tensors that the recorder of a cache holds."""

    def __init__(self, live: list[int]) -> None:
        self._live = live

    def __call__(self, cache: Cache) -> None:
        recorder: Any = cache._filling()
        held: dict[int, int] = {}
        values = [record[3] for record in recorder._records if record is not None]
        values += [original for _, _, original, _ in recorder._habits._originals]
        for value in values:
            for tensor in flat(value):
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
        for found in recorder._listing.found.values():
            for entry in found:
                for tensor in flat(entry._output):
                    storage = tensor.untyped_storage()
                    held[storage.data_ptr()] = storage.nbytes()
        self._live.append(sum(held.values()))


def flat(nest: Any) -> Iterator[Tensor]:
    found: list[Any] = []
    map_leaves(found.append, nest)
    return (each for each in found if isinstance(each, Tensor))


def test_a_named_cache_is_written_while_it_comes(
    tiny: LanguageModel, tmp_path: Path, small_buffer: None
) -> None:
    names = ["resid_post", "pattern", "norm1_scale", "transformer.h.*.mlp"]
    with tiny.generate(TEXT, max_new_tokens=5) as tracer:
        cache = tracer.cache(names=names[:2])
    with tiny.generate(TEXT, max_new_tokens=5) as tracer:
        written = tracer.cache(names=names[:2], path=tmp_path / "run")
    for found in (written, load_cache(tmp_path / "run")):
        assert list(found) == list(cache)
        for key in cache:
            for one, other in zip(cache.values_of(key), found.values_of(key), strict=True):
                assert_same(one, other)
        assert torch.equal(cache.sequence(("resid_post", 1)), found.sequence(("resid_post", 1)))

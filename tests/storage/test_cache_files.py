"""Caches in files: `cache.save` and `load_cache`, against the caches in memory."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.storage.same import assert_same, assert_same_cache
from tests.tiny_models import SPECS, make
from tracekit import Cache, LanguageModel, Model, load_cache
from tracekit.errors import CacheError, StorageError, UnsupportedError
from tracekit.tracing import cache_parts

FAMILIES = (
    "gpt2",
    "llama",
    "falcon",
    "mamba",
    "mixtral",
    "t5",
    "whisper",
    "bert",
    "vit",
    "llava",
    "gemma2",
    "qwen2_moe",
)
KNOWN = [name for name in FAMILIES if name in SPECS]
GENERATING = [name for name in KNOWN if SPECS[name].generate]
TEXT = "The Eiffel Tower is in"


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


def run(name: str, *, generates: bool, **options: Any) -> tuple[Model, Cache]:
    net, inputs = make(name)
    model = Model(net)
    if generates:
        spec = SPECS[name]
        given = {**spec.gen_inputs(inputs), "max_new_tokens": 3, "do_sample": False}
        with model.generate(**given, **spec.generation) as tracer:
            cache = tracer.cache(**options)
    else:
        with torch.no_grad(), model.trace(**inputs) as tracer:
            cache = tracer.cache(**options)
    return model, cache


# -- whole caches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_the_cache_of_a_trace_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    _, cache = run(name, generates=False, include_inputs=True)
    cache.save(tmp_path / "run")
    assert_same_cache(cache, load_cache(tmp_path / "run"))


@pytest.mark.parametrize("name", GENERATING)
def test_the_cache_of_a_generation_comes_back_and_is_verified(name: str, tmp_path: Path) -> None:
    model, cache = run(name, generates=True, include_inputs=True)
    cache.save(tmp_path / "run")
    found = load_cache(tmp_path / "run", model=model)
    assert_same_cache(cache, found)
    assert repr(found.verify()) == repr(cache.verify())


def test_gradients_come_back(tiny: LanguageModel, tmp_path: Path) -> None:
    with tiny.trace(TEXT) as tracer:
        cache = tracer.cache(include_grads=True)
        loss = tiny.lm_head.output.sum().save()
    loss.backward()
    cache.save(tmp_path / "run")
    found = load_cache(tmp_path / "run")
    assert_same(cache["transformer.h.1"].grad, found["transformer.h.1"].grad)
    assert_same_cache(cache, found)


def test_gradients_that_have_not_come_are_still_to_come(
    tiny: LanguageModel, tmp_path: Path
) -> None:
    with tiny.trace(TEXT) as tracer:
        cache = tracer.cache("transformer.h.0", include_grads=True)
    cache.save(tmp_path / "run")
    with pytest.raises(CacheError, match="no backward pass has come to"):
        load_cache(tmp_path / "run")["transformer.h.0"].grad


def test_a_loaded_cache_is_read_like_any_other(tiny: LanguageModel, tmp_path: Path) -> None:
    with tiny.generate([TEXT, "Paris is the capital of"], max_new_tokens=4) as tracer:
        cache = tracer.cache()
    cache.save(tmp_path / "run")
    found = load_cache(tmp_path / "run")
    assert_same(cache["transformer.h.1"].at(2).output, found["transformer.h.1"].at(2).output)
    assert_same(cache.model.transformer.h[1][1].output, found.model.transformer.h[1][1].output)
    one, other = cache.sequence("transformer.h.1"), found.sequence("transformer.h.1")
    for name in ("tokens", "positions", "valid"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(one, other)
    assert found["lm_head"][1].positions == cache["lm_head"][1].positions
    assert dir(found) == dir(cache)


def test_beams_are_followed_in_a_loaded_cache(tmp_path: Path) -> None:
    net, inputs = make("gpt2")
    model = Model(net)
    with model.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False) as tracer:
        cache = tracer.cache()
    cache.save(tmp_path / "run")
    found = load_cache(tmp_path / "run", model=model)
    assert torch.equal(cache.sequence("transformer.h.1"), found.sequence("transformer.h.1"))
    assert found.verify()


def test_edits_are_made_again_by_the_verification_of_a_loaded_cache(
    tiny: LanguageModel, tmp_path: Path
) -> None:
    with tiny.generate(TEXT, max_new_tokens=4) as tracer:
        cache = tracer.cache()
        for _ in tracer.iter[:]:
            tiny.transformer.h[1].output[:] += 0.5
    cache.save(tmp_path / "run")
    load_cache(tmp_path / "run").save(tmp_path / "again")
    assert load_cache(tmp_path / "run", model=tiny).verify()
    assert load_cache(tmp_path / "again", model=tiny).verify()


def test_the_block_of_an_invoke_saves_its_rows(tiny: LanguageModel, tmp_path: Path) -> None:
    with tiny.generate(max_new_tokens=3) as tracer:
        with tracer.invoke("Paris is"):
            tiny.transformer.h[0].output
        with tracer.invoke(TEXT):
            cache = tracer.cache()
    cache.save(tmp_path / "run")
    found = load_cache(tmp_path / "run", model=tiny)
    assert torch.equal(cache.sequence("transformer.h.1"), found.sequence("transformer.h.1"))
    assert found.verify()


def test_without_its_model_a_loaded_cache_says_what_to_write(
    tiny: LanguageModel, tmp_path: Path
) -> None:
    with tiny.generate(TEXT, max_new_tokens=2) as tracer:
        cache = tracer.cache()
    cache.save(tmp_path / "run")
    with pytest.raises(CacheError, match=r"load_cache\('.*run', model=model\)"):
        load_cache(tmp_path / "run").verify()


def test_what_a_function_edited_can_not_be_run_again_from_a_file(
    tiny: LanguageModel, tmp_path: Path
) -> None:
    with tiny.generate(TEXT, max_new_tokens=2) as tracer:
        cache = tracer.cache()
        tiny.transformer.h[1].output.at("generated")[:] += 1.0
    cache.save(tmp_path / "run")
    with pytest.raises(CacheError, match="is a function of the block"):
        load_cache(tmp_path / "run", model=tiny).verify()


def test_a_named_cache_comes_back_with_its_names(tiny: LanguageModel, tmp_path: Path) -> None:
    _, cache = tiny.run_with_cache(TEXT)
    cache.save(tmp_path / "run")
    found = load_cache(tmp_path / "run")
    assert list(found) == list(cache)
    for key in cache:
        assert_same(cache[key], found[key])
    assert torch.equal(found["blocks.2.hook_resid_post"], cache["resid_post", 2])
    assert torch.equal(found.layers[-1].z, cache.layers[-1].z)


def test_a_copy_of_a_loaded_cache_is_in_memory(tiny: LanguageModel, tmp_path: Path) -> None:
    with tiny.trace(TEXT) as tracer:
        cache = tracer.cache()
    cache.save(tmp_path / "run")
    copied = pickle.loads(pickle.dumps(load_cache(tmp_path / "run")))
    (tmp_path / "run" / "part-00000.safetensors").unlink()
    assert_same_cache(cache, copied)


def test_a_loaded_cache_says_where_it_lies_and_how_large_it_is(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny.trace(TEXT) as tracer:
        cache = tracer.cache("transformer.h.0")
    monkeypatch.chdir(tmp_path)
    cache.save("run")
    size = sum(each.stat().st_size for each in (tmp_path / "run").iterdir())
    assert f"Cache(1 modules, 1 entries; {size / 1e3:.1f} kB in 'run')" in repr(load_cache("run"))


def test_pictures_of_a_loaded_cache_are_those_of_the_original(
    tiny: LanguageModel, tmp_path: Path
) -> None:
    from tracekit import show

    with tiny.trace(TEXT) as tracer:
        cache = tracer.cache()
    cache.save(tmp_path / "run")
    assert str(show(tiny, load_cache(tmp_path / "run"))) == str(show(tiny, cache))
    _, named = tiny.run_with_cache(TEXT)
    named.save(tmp_path / "named")
    found = load_cache(tmp_path / "named")
    assert str(show(found, layer=1)) == str(show(named, layer=1))


# -- files ----------------------------------------------------------------------------------------


def test_the_files_are_plain_safetensors(tiny: LanguageModel, tmp_path: Path) -> None:
    with tiny.generate(TEXT, max_new_tokens=4) as tracer:
        cache = tracer.cache("transformer.h.1")
    cache.save(tmp_path / "run")
    plain = load_file(tmp_path / "run" / "part-00000.safetensors")
    steps = [entry.output for entry in cache["transformer.h.1"]]
    assert torch.equal(plain["model.transformer.h.1.output"][0], steps[0])
    assert torch.equal(plain["model.transformer.h.1.output#2"], torch.stack(steps[1:]))


def test_a_large_cache_is_divided_into_parts(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_parts, "PART_BYTES", 20_000)
    with tiny.trace(TEXT) as tracer:
        cache = tracer.cache(include_inputs=True)
    cache.save(tmp_path / "run")
    assert len(list((tmp_path / "run").glob("part-*"))) > 5
    assert_same_cache(cache, load_cache(tmp_path / "run"))


def test_a_tensor_that_several_values_are_is_written_once(tmp_path: Path) -> None:
    class Passed(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return x, x.view(-1), x.t(), x

    model, x = Model(Passed()), torch.randn(300, 200)
    for _ in range(2):  # what is recorded for the first time is copied
        with model.trace(x) as tracer:
            cache = tracer.cache(include_inputs=True, include_output=True)
    cache.save(tmp_path / "run")
    size = sum(each.stat().st_size for each in (tmp_path / "run").iterdir())
    assert size < 1.1 * 300 * 200 * 4
    first, flat, turned, again = load_cache(tmp_path / "run")["model"].output
    assert first is again
    assert turned.stride() == (1, 200)
    first[0, 1] = 7
    assert flat[1] == 7
    assert turned[1, 0] == 7


def test_a_value_is_read_when_it_is_asked_for_and_no_other_is(
    tiny: LanguageModel, tmp_path: Path
) -> None:
    with tiny.trace(TEXT) as tracer:
        cache = tracer.cache()
    cache.save(tmp_path / "run")
    flip(tmp_path / "run" / "part-00000.safetensors", cache["transformer.h.2"].output)
    found = load_cache(tmp_path / "run")
    assert_same(cache["transformer.h.1"].output, found["transformer.h.1"].output)
    with pytest.raises(StorageError, match=r"part-00000.safetensors' is damaged: model\.tr.*h\.2"):
        found["transformer.h.2"].output


def flip(path: Path, tensor: Tensor) -> None:
    """Change one bit of a tensor in a file."""
    content = bytearray(path.read_bytes())
    at = content.find(tensor.numpy().tobytes())
    assert at > 0
    content[at + 5] ^= 4
    path.write_bytes(content)


def saved(model: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(cache_parts, "PART_BYTES", 20_000)
    with model.generate(TEXT, max_new_tokens=4) as tracer:
        cache = tracer.cache("transformer.h.*")
    cache.save(folder)
    assert len(list(folder.glob("part-*"))) >= 3
    return cache


def why_damaged(cache: Cache, folder: Path) -> str | None:
    try:
        assert_same_cache(cache, load_cache(folder))
    except StorageError as error:
        return str(error)
    return None


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    cache = saved(tiny, folder, monkeypatch)
    choose = torch.Generator().manual_seed(0)
    named = 0
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in torch.randint(len(whole) * 8, (6,), generator=choose).tolist():
            content = bytearray(whole)
            content[place // 8] ^= 1 << place % 8
            path.write_bytes(content)
            told = why_damaged(cache, folder)
            assert told is None or path.name in told
            named += told is not None
        path.write_bytes(whole)
    assert named > 8
    assert_same_cache(cache, load_cache(folder))


def test_what_is_missing_short_or_of_another_run_is_named(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tiny, tmp_path / "run", monkeypatch)
    saved(tiny, tmp_path / "other", monkeypatch)
    path = tmp_path / "run" / "part-00001.safetensors"
    whole = path.read_bytes()
    for content, told in (
        (None, "can't be read: No such file"),
        (whole[: len(whole) // 2], "can't be read: it is cut short"),
        (b"", "can't be read: it is cut short"),
        ((tmp_path / "other" / path.name).read_bytes(), "is of another cache"),
        ((tmp_path / "run" / "part-00000.safetensors").read_bytes(), "is part 0 of its cache"),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(StorageError, match=f"part-00001.safetensors' {told}"):
            load_cache(tmp_path / "run")
        path.write_bytes(whole)


def test_another_version_of_the_format_is_named(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache_parts, "FORMAT", "tracekit cache 9")
        saved(tiny, tmp_path / "run", monkeypatch)
    with pytest.raises(StorageError, match="'tracekit cache 9', and 'tracekit cache 1'"):
        load_cache(tmp_path / "run")


def test_a_cache_of_another_model_is_refused(tiny: LanguageModel, tmp_path: Path) -> None:
    net, inputs = make("gpt2")
    with Model(net).trace(**inputs) as tracer:
        cache = tracer.cache()
    cache.save(tmp_path / "run")
    other = Model(make("llama")[0])
    with pytest.raises(StorageError, match="a cache of a GPT2LMHeadModel, and this model is a Ll"):
        load_cache(tmp_path / "run", model=other)
    with pytest.raises(StorageError, match="a GPT2LMHeadModel with other weights"):
        load_cache(tmp_path / "run", model=Model(make("gpt2", seed=1)[0]))
    assert load_cache(tmp_path / "run", model=Model(net))


def test_no_pickle_is_read_or_written(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    with tiny.generate(TEXT, max_new_tokens=2) as tracer:
        cache = tracer.cache(include_inputs=True)
    for owner, name in (
        (pickle, "loads"),
        (pickle, "load"),
        (pickle, "dumps"),
        (pickle, "dump"),
        (pickle, "Unpickler"),
        (pickle, "Pickler"),
        (torch, "load"),
        (torch, "save"),
    ):
        monkeypatch.setattr(owner, name, refused)
    cache.save(tmp_path / "run")
    assert_same_cache(cache, load_cache(tmp_path / "run"))


# -- what is there already, and what can't be written ---------------------------------------------


def test_saving_again_replaces_a_cache_and_nothing_else(
    tiny: LanguageModel, tmp_path: Path
) -> None:
    with tiny.trace(TEXT) as tracer:
        cache = tracer.cache()
    cache.save(tmp_path / "run")
    load_cache(tmp_path / "run").save(tmp_path / "run")
    assert_same_cache(cache, load_cache(tmp_path / "run"))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"there is something at '.*run' already"):
        cache.save(tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_what_can_not_be_written_is_named_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"fine": x, "odd": x.to_sparse() if kind == "sparse" else x.to("meta")}

    with Model(Odd()).trace(torch.ones(2, 2)) as tracer:
        cache = tracer.cache(device=None)
    with pytest.raises(UnsupportedError, match=r"model\.output\.odd \(step 0\) is a tensor of sh"):
        cache.save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_is_saved_when_its_run_has_ended(tiny: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="saved when its run has ended"):
        with tiny.trace(TEXT) as tracer:
            tracer.cache().save(tmp_path / "run")

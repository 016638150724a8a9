"""A harvest against the bare model with plain hooks, one document at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tracekit import Harvest, LanguageModel, harvest, load_activations
from tracekit.errors import (
    InputError,
    StorageError,
    UnknownPathError,
    UnsupportedError,
)
from tracekit.storage.activations import Activations

TEXTS = [
    "The Eiffel Tower is in the city of Paris",
    "Paris",
    "When Mary and John went to the store , John gave",
    "The Colosseum is in",
    "hot : cold , big : small , fast :",
] * 3


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


def alone(module: nn.Module, path: str, ids: list[int]) -> Tensor:
    """The output of a module for one row of tokens, by a plain hook: `[pos, …]`."""
    found: list[Any] = []
    handle = module.get_submodule(path).register_forward_hook(lambda *args: found.append(args[2]))
    with torch.no_grad():
        module(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    value = found[0]
    return (value if isinstance(value, Tensor) else value[0])[0]


def run(
    model: LanguageModel, out: Path, sites: Any, texts: Any = TEXTS, **options: Any
) -> Activations:
    return harvest(model, texts, sites, out, progress=False, **options)


def marks(folder: Path) -> dict[str, str]:
    """The digest of each file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def test_each_row_is_what_its_document_alone_gives(model: LanguageModel, tmp_path: Path) -> None:
    acts = run(model, tmp_path, ["resid_post", "transformer.h.1.mlp"], shard_documents=4)
    assert acts.sites == [f"layers.{n}.resid_post" for n in range(4)] + ["transformer.h.1.mlp"]
    doc, tokens = acts.doc[:], acts.tokens[:]
    for number, text in enumerate(TEXTS):
        ids = model.to_tokens(text)[0].tolist()
        own = doc == number
        assert tokens[own].tolist() == ids
        assert acts.pos[:][own].tolist() == list(range(len(ids)))
        for site, path in (
            ("layers.2.resid_post", "transformer.h.2"),
            ("transformer.h.1.mlp", "transformer.h.1.mlp"),
        ):
            expected = alone(model.module, path, ids)
            torch.testing.assert_close(acts[site][own], expected, atol=1e-5, rtol=1e-5)
    assert not acts.step[:].any() and doc.diff().min() >= 0
    assert acts.counts == {"contexts": 15, "documents": 15, "rows": len(doc), "tokens": len(doc)}


@pytest.mark.parametrize(
    "family", ["llama", "mixtral", "bert", "gpt_neox", "gemma2", "mamba", "rwkv"]
)
def test_other_families_have_the_rows_of_the_bare_model(family: str, tmp_path: Path) -> None:
    tiny = LanguageModel(make(family)[0])
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [3, 4, 5]]  # rwkv reads its padding
    acts = run(tiny, tmp_path, "resid_post", rows, shard_documents=3)
    for number, ids in enumerate(rows):
        for layer, envoy in enumerate(tiny.layers):
            expected = alone(tiny.module, envoy.path.partition(".")[2], ids)
            mine = acts[f"layers.{layer}.resid_post"][acts.doc[:] == number]
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


def test_a_long_document_goes_on_in_the_next_context(model: LanguageModel, tmp_path: Path) -> None:
    acts = run(model, tmp_path, ("resid_post", 1), context_size=4)
    ids = model.to_tokens(TEXTS[0])[0].tolist()
    own = acts.doc[:] == 0
    assert acts.tokens[:][own].tolist() == ids
    assert acts.pos[:][own].tolist() == [place % 4 for place in range(len(ids))]
    expected = torch.cat(
        [alone(model.module, "transformer.h.1", ids[n : n + 4]) for n in range(0, len(ids), 4)]
    )
    torch.testing.assert_close(acts["layers.1.resid_post"][own], expected, atol=1e-5, rtol=1e-5)
    assert acts.counts["split documents"] == 12


def test_packed_documents_stand_one_behind_the_other(model: LanguageModel, tmp_path: Path) -> None:
    acts = run(model, tmp_path, ("resid_post", 1), context_size=16, pack=True, shard_documents=15)
    every = [model.to_tokens(text)[0].tolist() for text in TEXTS]
    joined = [token for row in every for token in row]
    assert acts.tokens[:].tolist() == joined  # each begins with its own <bos>
    assert acts.doc[:].tolist() == [n for n, row in enumerate(every) for _ in row]
    expected = torch.cat(
        [
            alone(model.module, "transformer.h.1", joined[start : start + 16])
            for start in range(0, len(joined), 16)
        ]
    )
    torch.testing.assert_close(acts["layers.1.resid_post"][:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        ("last", lambda row: row[-1:]),
        (0, lambda row: row[:1]),
        (-2, lambda row: row[-2:-1] if len(row) > 1 else []),
        (slice(1, None), lambda row: row[1:]),
        (99, lambda row: []),
        ([0, -1, 99], lambda row: row[:1] if len(row) == 1 else [row[0], row[-1]]),
    ],
)
def test_only_the_positions_asked_for_are_kept(
    model: LanguageModel, tmp_path: Path, positions: Any, chosen: Callable[[list[int]], list[int]]
) -> None:
    acts = run(model, tmp_path, ("resid_post", 3), positions=positions)
    places = [list(range(len(model.to_tokens(text)[0]))) for text in TEXTS]
    expected = [place for row in places for place in chosen(row)]
    assert acts.pos[:].tolist() == expected
    assert acts.counts["dropped tokens"] == sum(map(len, places)) - len(expected)
    whole = run(model, tmp_path / "whole", ("resid_post", 3))
    key = torch.stack([acts.doc[:], acts.pos[:]], 1)
    index = [
        int(((whole.doc[:] == doc) & (whole.pos[:] == pos)).nonzero()[0, 0]) for doc, pos in key
    ]
    assert torch.equal(acts["layers.3.resid_post"][:], whole["layers.3.resid_post"][index])


def test_special_tokens_are_left_out_when_that_is_asked_for(
    model: LanguageModel, tmp_path: Path
) -> None:
    acts = run(model, tmp_path, ("resid_post", 3), skip_special=True)
    assert model.tokenizer.bos_token_id not in acts.tokens[:].tolist()
    assert acts.counts["dropped tokens"] == 15


def test_it_ends_behind_the_last_layer_that_is_needed(model: LanguageModel, tmp_path: Path) -> None:
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
        for path, module in model.module.named_modules()
    ]
    run(model, tmp_path, ["transformer.h.1.mlp", ("attn_out", 0)], TEXTS[:1])
    for handle in handles:
        handle.remove()
    assert "transformer.h.1.mlp" in ran and not any("h.2" in path for path in ran)


def test_values_are_kept_as_they_are_unless_a_dtype_is_given(
    model: LanguageModel, tmp_path: Path
) -> None:
    plain = run(model, tmp_path / "plain", ("resid_post", 3))
    half = run(model, tmp_path / "half", ("resid_post", 3), dtype=torch.float16)
    key = "layers.3.resid_post"
    assert plain[key].dtype == torch.float32
    assert torch.equal(half[key][:], plain[key][:].half())
    with model.edit() as loud:
        model.transformer.h[3].output[:] *= 1e4
    over = run(loud, tmp_path / "over", ("resid_post", 3), dtype=torch.float16)
    count = int(over[key][:].isinf().sum())
    assert count and over.counts["overflowed values"] == count
    assert f"{count:,} overflowed values" in repr(over)


def test_run_again_it_makes_only_what_is_missing(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Harvest(model, TEXTS, "resid_post", tmp_path, shard_documents=4)
    whole.run(progress=False)
    before = marks(tmp_path)
    whole.path_of(1).unlink()
    again = Harvest(model, TEXTS, "resid_post", tmp_path, shard_documents=4)
    assert again.plan().left == (1,) and again.plan().done == (0, 2, 3)
    made: list[int] = []
    original = Harvest._made

    def noted(self: Harvest, number: int, *more: Any) -> Any:
        made.append(number)
        return original(self, number, *more)

    monkeypatch.setattr(Harvest, "_made", noted)
    again.run(progress=False)
    assert made == [1] and marks(tmp_path) == before
    assert repr(again.plan()) == (
        f"Plan({str(tmp_path)!r}: 15 documents in 4 shards of 4; 4 done, 0 left)"
    )


def test_shards_in_any_order_are_the_same_files(model: LanguageModel, tmp_path: Path) -> None:
    for name, order in (("one", [0, 1, 2, 3]), ("two", [3, 1, 2, 0])):
        made = Harvest(model, TEXTS, "resid_post", tmp_path / name, shard_documents=4)
        for number in order:
            made.run_shard(number)
    assert marks(tmp_path / "one") == marks(tmp_path / "two")


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"context_size": 8}, "context_size"),
        ({"dtype": torch.float16}, "dtype"),
        ({"positions": "last"}, "positions"),
        ({"pack": True}, "pack"),
        ({"sites": "attn_out"}, "sites"),
        ({"texts": [*TEXTS[:-1], "another"]}, "its documents"),
        ({"note": "with noise"}, r"model\.note"),
    ],
)
def test_shards_of_another_harvest_are_named_and_stay(
    model: LanguageModel, tmp_path: Path, change: dict[str, Any], differing: str
) -> None:
    given = {"sites": "resid_post", "texts": TEXTS, "shard_documents": 15}
    run(model, tmp_path, **given)
    before = marks(tmp_path)
    with pytest.raises(StorageError, match=f"is of another harvest: .*{differing}.* differ"):
        run(model, tmp_path, **{**given, **change})
    assert marks(tmp_path) == before
    mended = run(model, tmp_path, **{**given, **change}, repair=True)
    assert mended.rows and marks(tmp_path) != before


def test_a_model_with_other_weights_or_edits_is_another(tmp_path: Path) -> None:
    model = LanguageModel("tracekit/tiny")
    run(model, tmp_path, "resid_post")
    with model.edit() as edited:
        model.transformer.h[1].output[:] = 0
    with pytest.raises(StorageError, match=r"model\.edits differ"):
        run(edited, tmp_path, "resid_post")
    with torch.no_grad():
        model.module.transformer.h[2].mlp.c_fc.weight[-1, -1] += 1e-3
    with pytest.raises(StorageError, match=r"model\.weights differ"):
        run(model, tmp_path, "resid_post")


def test_edits_are_made_in_what_is_harvested(model: LanguageModel, tmp_path: Path) -> None:
    with model.edit() as edited:
        model.transformer.h[1].output[:] = 7.0
    acts = run(edited, tmp_path, ["resid_post"])
    assert (acts["layers.1.resid_post"][:] == 7).all()
    assert not (acts["layers.2.resid_post"][:] == 7).any()


def test_functions_have_no_fingerprint_and_want_a_note(tmp_path: Path) -> None:
    model = LanguageModel("tracekit/tiny")
    model.add_hook(("resid_post", 1), lambda tensor, hook: tensor * 2)
    with pytest.raises(UnsupportedError, match=r"functions .* make them model\.edit\(\) blocks"):
        run(model, tmp_path, "resid_post")
    assert run(model, tmp_path, "resid_post", note="layer 1 doubled").rows


def test_documents_may_be_added_behind(model: LanguageModel, tmp_path: Path) -> None:
    run(model, tmp_path, "resid_post", TEXTS[:8], shard_documents=4)
    grown = run(model, tmp_path, "resid_post", TEXTS, shard_documents=4)
    assert grown.counts["documents"] == 15


def test_empty_documents_are_counted(model: LanguageModel, tmp_path: Path) -> None:
    acts = run(model, tmp_path, "resid_post", ["", "Paris", "", ""], shard_documents=2)
    assert acts.counts["empty documents"] == 3
    assert set(acts.doc[:].tolist()) == {1}


@pytest.mark.parametrize(
    ("sites", "error", "told"),
    [
        ("pattern", UnsupportedError, "has no value for each token"),
        ("resid_pots", UnknownPathError, "did you mean 'resid_post'"),
    ],
)
def test_sites_that_are_no_rows_are_refused_before_anything_runs(
    model: LanguageModel, tmp_path: Path, sites: str, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        run(model, tmp_path, sites)
    assert not list(tmp_path.iterdir())


def test_numbers_that_can_not_be_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"context_size=500.*positions for 128"):
        Harvest(model, TEXTS, "resid_post", tmp_path, context_size=500)
    with pytest.raises(InputError, match="batch_size=0"):
        Harvest(model, TEXTS, "resid_post", tmp_path, batch_size=0)
    with pytest.raises(InputError, match="positions= is 'all', 'last'"):
        Harvest(model, TEXTS, "resid_post", tmp_path, positions="first")
    with pytest.raises(InputError, match="there is no shard 1: there are 1"):
        Harvest(model, TEXTS, "resid_post", tmp_path).run_shard(1)


def test_the_size_of_shards_is_told_from_the_documents(
    model: LanguageModel, tmp_path: Path
) -> None:
    one = Harvest(model, TEXTS, ("resid_post", 0), tmp_path)
    four = Harvest(model, TEXTS, "resid_post", tmp_path)
    assert one.documents_of_shard // four.documents_of_shard == 4
    rows = sum(len(model.to_tokens(text)[0]) for text in TEXTS) / len(TEXTS)
    assert one.documents_of_shard * rows * 128 * 4 == pytest.approx(64 << 20, rel=0.01)


def test_what_is_loaded_is_what_was_harvested(model: LanguageModel, tmp_path: Path) -> None:
    made = run(model, tmp_path, "resid_post", shard_documents=4)
    loaded = load_activations(tmp_path)
    assert loaded.rows == made.rows and loaded.spec["context_size"] == 128
    some = loaded.batches(32, site="layers.0.resid_post", shuffle=0)
    assert sum(map(len, some)) == made.rows

"""Activations on disk, read by site and by rows; each held against the tensors written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tracekit import load_activations
from tracekit.errors import InputError, StorageError, TracekitWarning, UnknownPathError
from tracekit.storage.activations import Activations
from tracekit.storage.shards import Told, name_of, write_shard

SIZES = (700, 0, 512, 91)
ACTS = torch.randn(sum(SIZES), 6)
SPEC = {"sites": ["layers.0.z", "layers.1.resid_post"], "model": {"weights": "abc"}}


def write(folder: Path, number: int, spec: dict[str, object] = SPEC, shards: int = 4) -> Path:
    begin = sum(SIZES[:number])
    rows = torch.arange(begin, begin + SIZES[number], dtype=torch.int32)
    mine = ACTS[begin : begin + SIZES[number]]
    acts = {"layers.0.z": mine.reshape(-1, 2, 3).bfloat16(), "layers.1.resid_post": mine}
    columns = {"tokens": rows, "doc": rows // 10, "pos": rows % 10, "step": 0 * rows}
    counts = {"documents": SIZES[number] // 10, "dropped tokens": number}
    told = Told(f"mark {number}", spec, number, shards, begin // 10, counts)
    write_shard(folder / name_of(number), acts, columns, told)
    return folder / name_of(number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("acts")
    for number in range(len(SIZES)):
        write(found, number)
    return found


@pytest.fixture(scope="module")
def acts(folder: Path) -> Activations:
    return load_activations(folder)


def test_a_site_is_one_long_table(acts: Activations) -> None:
    rows = acts["layers.1.resid_post"]
    assert rows.shape == (1303, 6) and len(rows) == acts.rows == 1303
    assert torch.equal(rows[:], ACTS)
    assert torch.equal(acts["layers.0.z"][:], ACTS.reshape(-1, 2, 3).bfloat16())
    assert acts.tokens[:].tolist() == list(range(1303))
    assert acts.counts == {"documents": 130, "dropped tokens": 6}


@pytest.mark.parametrize(
    "index",
    [slice(690, 720), slice(5, 3), slice(-4, None), slice(0, None, 7), slice(1302, 690, -3)],
)
def test_a_slice_crosses_shards(acts: Activations, index: slice) -> None:
    expected = ACTS[range(1303)[index]]
    assert torch.equal(acts["layers.1.resid_post"][index], expected)


def test_rows_by_number_by_list_and_by_mask(acts: Activations) -> None:
    rows = acts["layers.1.resid_post"]
    assert torch.equal(rows[-1], ACTS[-1]) and torch.equal(rows[701], ACTS[701])
    assert torch.equal(rows[[1302, 0, 700, 0]], ACTS[[1302, 0, 700, 0]])
    assert torch.equal(rows[acts.pos[:] == 3], ACTS[torch.arange(1303) % 10 == 3])
    with pytest.raises(IndexError, match="row 1303 of 1303"):
        rows[1303]
    with pytest.raises(IndexError, match=r"a mask \[5\] for 1303 rows"):
        rows[torch.ones(5, dtype=torch.bool)]


def test_a_misspelled_site_is_answered_with_near_names(acts: Activations) -> None:
    with pytest.raises(UnknownPathError, match=r"did you mean 'layers\.1\.resid_post'"):
        acts["layers.1.resid_pos"]


def joined(batches: object) -> Tensor:
    return torch.cat(list(batches))  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_batches_in_order_are_the_table(acts: Activations) -> None:
    batches = acts.batches(100, site="layers.1.resid_post", buffer_rows=256)
    assert [len(batch) for batch in batches] == [100] * 13 + [3]
    assert len(batches) == 14
    assert torch.equal(joined(batches), ACTS)
    whole = acts.batches(100, site="layers.1.resid_post", drop_last=True)
    assert [len(batch) for batch in whole] == [100] * 13 and len(whole) == 13


@pytest.mark.parametrize("buffer", [100, 600, 1 << 18])
def test_shuffled_batches_have_each_row_once_and_the_same_order_for_a_seed(
    acts: Activations, buffer: int
) -> None:
    def order(seed: int, epochs: int = 1) -> list[int]:
        batches = acts.batches(
            64, site=["layers.1.resid_post"], shuffle=seed, buffer_rows=buffer, epochs=epochs
        )
        found = torch.cat([batch["layers.1.resid_post"] for batch in batches])
        matches = (found[:, None, :2] == ACTS[None, :, :2]).all(-1)
        assert (matches.sum(1) == 1).all()
        return matches.int().argmax(1).tolist()

    one = order(0)
    assert sorted(one) == list(range(1303)) and one != sorted(one)
    assert order(0) == one and order(1) != one
    twice = order(0, epochs=2)
    assert twice[:1303] == one and sorted(twice[1303:]) == sorted(one) and twice[1303:] != one
    distance = torch.tensor(one).diff().abs().float().mean()  # 434 of independent rows
    assert distance > 200 or buffer == 100


def test_several_sites_come_row_beside_row(acts: Activations) -> None:
    for batch in acts.batches(50, shuffle=2):
        assert torch.equal(batch["layers.0.z"].flatten(1), batch["layers.1.resid_post"].bfloat16())


def test_epochs_without_end_go_on(acts: Activations) -> None:
    batches = acts.batches(1000, site="layers.1.resid_post", shuffle=0, epochs=None)
    seen = [len(batch) for batch, _ in zip(batches, range(5), strict=False)]
    assert seen == [1000, 303, 1000, 303, 1000]
    with pytest.raises(TypeError, match="no length"):
        len(batches)


def test_a_harvest_that_is_not_finished_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there are no activations in"):
        load_activations(tmp_path)
    write(tmp_path, 0)
    write(tmp_path, 3)
    with pytest.raises(StorageError, match=r"not finished: of 4 shards 2 are missing \(1, 2\)"):
        load_activations(tmp_path)
    partial = load_activations(tmp_path, partial=True)
    assert torch.equal(partial["layers.1.resid_post"][:], torch.cat([ACTS[:700], ACTS[-91:]]))


def test_shards_of_two_harvests_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path, 0, shards=2)
    write(tmp_path, 1, {**SPEC, "model": {"weights": "another"}}, shards=2)
    with pytest.raises(StorageError, match=r"shard-00001.*another harvest.*model\.weights differ"):
        load_activations(tmp_path)


def test_a_shard_under_the_name_of_another_is_named(tmp_path: Path) -> None:
    write(tmp_path, 0, shards=1).rename(tmp_path / name_of(1))
    with pytest.raises(StorageError, match="is shard 0 of its harvest, under the name of another"):
        load_activations(tmp_path)


def test_check_names_the_file_that_is_damaged(tmp_path: Path) -> None:
    write(tmp_path, 0, shards=2)
    path = write(tmp_path, 2, shards=2).rename(tmp_path / "shard-00002.safetensors")
    load_activations(tmp_path, partial=True).check()
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"shard-00002\.safetensors' is damaged"):
        load_activations(tmp_path, partial=True).check()


# -- SAELens --------------------------------------------------------------------------------------


def contexts(folder: Path, lengths: list[int], pos: Tensor | None = None) -> Activations:
    """Activations of contexts of these lengths."""
    count = sum(lengths)
    found = torch.cat([torch.arange(length) for length in lengths]) if pos is None else pos
    rows = torch.arange(count, dtype=torch.int32)
    columns = {"tokens": rows, "doc": rows, "pos": found.int(), "step": 0 * rows}
    acts = {"layers.0.z": ACTS[:count].reshape(-1, 2, 3), "layers.1.resid_post": ACTS[:count]}
    told = Told("mark", SPEC, 0, 1, 0, {})
    write_shard(folder / name_of(0), acts, columns, told)
    return load_activations(folder)


def test_saelens_gets_a_row_for_each_context_under_its_names(tmp_path: Path) -> None:
    acts = contexts(tmp_path, [8, 8, 8])
    found = acts.to_saelens(tmp_path / "sae", site="layers.1.resid_post").with_format("torch")
    assert found.column_names == ["blocks.1.hook_resid_post", "token_ids"]
    assert torch.equal(found["blocks.1.hook_resid_post"][:], ACTS[:24].reshape(3, 8, 6))
    assert found["token_ids"][:].tolist() == torch.arange(24).reshape(3, 8).tolist()
    heads = acts.to_saelens(tmp_path / "heads", site="layers.0.z").with_format("torch")
    assert torch.equal(heads["blocks.0.attn.hook_z"][:], ACTS[:24].reshape(3, 8, 6))


def test_saelens_gets_no_shorter_contexts_unless_that_is_asked_for(tmp_path: Path) -> None:
    acts = contexts(tmp_path, [8, 8, 3])
    with pytest.raises(InputError, match="1 of 3 are shorter than 8"):
        acts.to_saelens(tmp_path / "sae", site="layers.1.resid_post")
    with pytest.warns(TracekitWarning, match="1 of 3 contexts are shorter than 8, and left out"):
        found = acts.to_saelens(tmp_path / "sae", site="layers.1.resid_post", drop_short=True)
    assert len(found) == 2
    with pytest.raises(InputError, match=r"one site at a time: site='layers\.0\.z'"):
        acts.to_saelens(tmp_path / "sae")


def test_saelens_gets_no_contexts_with_gaps(tmp_path: Path) -> None:
    acts = contexts(tmp_path, [4], torch.tensor([0, 1, 3, 4]))
    with pytest.raises(InputError, match="whole contexts: harvest with positions='all'"):
        acts.to_saelens(tmp_path / "sae", site="layers.1.resid_post")

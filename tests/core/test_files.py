"""Files of tensors: whole or not there, the same bytes each time, and damage that is named."""

from __future__ import annotations

import os
import random
import stat
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tracekit.core import files
from tracekit.core.files import TensorFile, remove_parts, write_tensors
from tracekit.errors import StorageError

FORMAT = {"format": "a test 1"}
TENSORS = {
    "wide": torch.randn(900, 64),
    "half": torch.randn(900, 64).bfloat16(),
    "numbers": torch.arange(900, dtype=torch.int32),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "one of two": torch.tensor([1.5, 2.5])[::2],
    "mask": torch.arange(900) % 3 == 0,
    "long rows": torch.randn(3, 40_000),
}


def opened(path: Path) -> TensorFile:
    return TensorFile(path, FORMAT["format"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_tensors(tmp_path / "a.safetensors", TENSORS, {**FORMAT, "said": [1, {"x": None}]})
    return tmp_path / "a.safetensors"


def test_what_was_written_is_read_bit_by_bit(path: Path) -> None:
    file = opened(path)
    assert set(file) == set(TENSORS)
    assert file.described == {**FORMAT, "said": [1, {"x": None}]}
    for name, tensor in TENSORS.items():
        assert file.all(name).dtype == tensor.dtype
        assert torch.equal(file.all(name), tensor)


def test_it_is_a_plain_file_of_safetensors(path: Path) -> None:
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("name", ["wide", "half", "numbers", "long rows"])
def test_rows_are_read_by_slices_and_by_numbers(path: Path, name: str) -> None:
    file, tensor = opened(path), TENSORS[name]
    some = random.Random(0)
    for _ in range(20):
        start, stop = sorted(some.randrange(len(tensor) + 1) for _ in range(2))
        assert torch.equal(file.rows(name, slice(start, stop)), tensor[start:stop])
        index = torch.tensor([some.randrange(len(tensor)) for _ in range(7)])
        assert torch.equal(file.rows(name, index), tensor[index])


def test_what_is_read_is_in_memory_of_its_own(path: Path) -> None:
    file = opened(path)
    file.rows("wide", slice(0, 9)).zero_()
    file.all("wide").zero_()
    assert torch.equal(opened(path).all("wide"), TENSORS["wide"])
    assert torch.equal(file.all("wide"), TENSORS["wide"])


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    described = {**FORMAT, "b": 1, "a": 2, "c": "…"}
    for name in ("one", "two"):
        tensors = dict(sorted(TENSORS.items(), reverse=name == "two"))
        write_tensors(tmp_path / name, tensors, dict(sorted(described.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_tensors_that_share_memory_are_written_each(tmp_path: Path) -> None:
    whole = TENSORS["wide"]
    write_tensors(tmp_path / "a", {"x": whole, "y": whole, "part": whole[5:9, ::2]}, FORMAT)
    file = opened(tmp_path / "a")
    assert torch.equal(file.all("y"), whole) and torch.equal(file.all("part"), whole[5:9, ::2])


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_tensors(tmp_path / "a", TENSORS, FORMAT)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_a_flipped_bit_is_named_with_its_rows(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = content.rindex(TENSORS["wide"][700].numpy().tobytes()) + 5
    content[at] ^= 4
    path.write_bytes(content)
    file = opened(path)
    assert torch.equal(file.rows("wide", slice(0, 512)), TENSORS["wide"][:512])  # other blocks
    for index in (slice(600, 800), torch.tensor([3, 710])):
        with pytest.raises(StorageError, match=r"a\.safetensors' is damaged: wide in rows 512 to"):
            file.rows("wide", index)


def test_no_single_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(20, 3), "n": torch.arange(20)}
    path = tmp_path / "a"
    write_tensors(path, tensors, FORMAT)
    content = path.read_bytes()
    some, noticed = random.Random(1), 0
    for _ in range(300):
        at, bit = some.randrange(len(content)), some.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        read = {}
        with suppress(StorageError):
            file = opened(path)
            read = {name: file.all(name) for name in file}
        # What may be read is damaged between the header's text and the tensors.
        assert all(torch.equal(read[name], tensors[name]) for name in read)
        noticed += not read
    assert noticed > 250


def test_a_file_that_is_cut_short_is_named(path: Path) -> None:
    content = path.read_bytes()
    for length in (0, 5, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(StorageError, match=r"a\.safetensors' can't be read: it is cut short"):
            opened(path)


def test_another_file_of_safetensors_is_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "foreign")
    with pytest.raises(StorageError, match="that tracekit did not write"):
        opened(tmp_path / "foreign")
    write_tensors(tmp_path / "other", TENSORS, {"format": "another 7"})
    with pytest.raises(StorageError, match="holds 'another 7', and 'a test 1' was looked for"):
        opened(tmp_path / "other")


def test_a_write_that_fails_leaves_the_file_that_was_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "flush", fails)
    with pytest.raises(OSError, match="no space left"):
        write_tensors(path, {"wide": torch.ones(3)}, FORMAT)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_what_a_killed_writer_left_is_removed(path: Path) -> None:
    (path.parent / f".{path.name}.elsewhere-77.part").write_bytes(b"half")
    (path.parent / ".b.safetensors.elsewhere-77.part").write_bytes(b"of another file")
    remove_parts(path)
    left = {each.name for each in path.parent.iterdir()}
    assert left == {path.name, ".b.safetensors.elsewhere-77.part"}


def test_a_few_rows_of_a_large_file_are_read_without_the_others(tmp_path: Path) -> None:
    tensor = torch.arange(1 << 20).reshape(-1, 64)
    write_tensors(tmp_path / "a", {"x": tensor}, FORMAT)
    file = opened(tmp_path / "a")
    file.rows("x", torch.tensor([5, 9000]))
    assert len(file._sound["x"]) == 2  # pyright: ignore[reportPrivateUsage]

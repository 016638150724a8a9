"""`tracekit harvest` and `tracekit activations`: what is written, planned, refused and proved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Tell
from tracekit import LanguageModel, harvest, load_activations
from tracekit.cli import harvest as command

TEXTS = ["The Eiffel Tower is in", "Paris", "the city of", "John and Mary went to the"]
Give = tuple[str, ...]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("\n".join(TEXTS) + "\n", "utf-8")
    return tmp_path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


GIVEN: Give = ("harvest", "tracekit/tiny", "texts.txt", "--sites", "resid_post", "--out", "acts")


def test_the_command_writes_what_the_function_does(
    tell: Tell, here: Path, tiny: LanguageModel
) -> None:
    options = ("--shard-documents", "2", "--positions", "1:", "--save-as", "float16")
    told = tell(*GIVEN, *options, "--context-size", "3", "--note", "mine")
    assert told.status == 0 and "rows of 4 sites in acts" in told.out
    harvest(
        tiny,
        TEXTS,
        "resid_post",
        "own",
        shard_documents=2,
        positions=slice(1, None),
        dtype=torch.float16,
        context_size=3,
        note="mine",
        progress=False,
    )
    assert files_of(here / "acts") == files_of(here / "own")


def test_parts_of_an_array_job_are_the_whole(tell: Tell, here: Path) -> None:
    for part in ("2/2", "1/2"):
        told = tell(*GIVEN, "--shard-documents", "1", "--shards", part, "--json")
        assert told.status == 0 and told.json["counts"]["documents"] == 2
    assert load_activations("acts").rows == 19
    told = tell(*GIVEN, "--shard-documents", "1", "--plan", "--json")
    assert told.json["done"] == [0, 1, 2, 3] and told.json["left"] == []
    (here / "acts/shard-00002.safetensors").unlink()
    told = tell(*GIVEN, "--shard-documents", "1", "--plan")
    assert told.out == "4 documents in 4 shards of 1: 3 done, 1 left\n"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--shards", "0/8"), "shards='0/8': give a part as '1/8' to '8/8'"),
        (("--shards", "1/8"), "1 shards can't be divided among 8 processes"),
        (("--positions", "some"), "--positions some: give all, last, a number"),
        (("--workers", "2"), "workers=2 are those of Ray: give on='ray' too"),
        (("--sites", "resid_pots"), "resid_pots"),
    ],
)
def test_what_can_not_be_meant_is_a_wrong_command_line(
    tell: Tell, here: Path, more: Give, text: str
) -> None:
    told = tell(*GIVEN, *more)
    assert told.status == 2 and text in told.err


def test_a_file_that_is_not_there_is_told(tell: Tell, here: Path) -> None:
    told = tell("harvest", "tracekit/tiny", "txets.txt", "--sites", "resid_post", "--out", "acts")
    assert told.status == 2 and "there is no file 'txets.txt'" in told.err


def test_a_data_set_that_was_saved_to_disk_is_read(tell: Tell, here: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk("saved")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk("both")
    assert tell(*GIVEN).status == 0
    for name in ("saved", "both"):
        given = ("harvest", "tracekit/tiny", name, "--sites", "resid_post", "--out", f"of_{name}")
        assert tell(*given).status == 0
        assert files_of(here / f"of_{name}") == files_of(here / "acts")
    told = tell("harvest", "tracekit/tiny", "both", *GIVEN[3:], "--split", "valid")
    assert told.status == 2 and "--split valid: 'both' has train, test" in told.err


def test_an_interrupt_keeps_the_shards_and_says_so_by_its_status(
    tell: Tell, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second shard: the first is there, and run again the rest is made."""
    original = command.Harvest._made

    def interrupted(self: object, number: int, *more: object) -> object:
        if number == 1:
            raise KeyboardInterrupt
        return original(self, number, *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(command.Harvest, "_made", interrupted)
        told = tell(*GIVEN, "--shard-documents", "2")
    assert told.status == 130 and told.err == "tracekit: interrupted\n"
    assert [path.name for path in (here / "acts").iterdir()] == ["shard-00000.safetensors"]
    assert tell(*GIVEN, "--shard-documents", "2").status == 0
    assert load_activations("acts").rows == 19


def test_activations_are_told_and_damage_is_named(tell: Tell, here: Path) -> None:
    tell(*GIVEN, "--shard-documents", "2")
    told = tell("activations", "acts", "--check")
    assert told.status == 0
    assert "19 rows of GPT2LMHeadModel in acts" in told.out
    assert "layers.3.resid_post  [19, 128]  float32" in told.out
    assert told.out.endswith("sound: every value is what was written\n")
    data = tell("activations", "acts", "--json").json
    assert data["is_sound"] is None and data["sites"]["layers.0.resid_post"]["shape"] == [19, 128]

    damaged = here / "acts/shard-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1000] ^= 1
    damaged.write_bytes(content)
    assert tell("activations", "acts").status == 0  # nothing was read
    told = tell("activations", "acts", "--check", "--json")
    assert told.status == 1 and json.loads(told.out)["is_sound"] is False
    assert "shard-00001.safetensors' is damaged" in told.out
    damaged.unlink()
    told = tell("activations", "acts")
    assert told.status == 1 and "1 are missing" in told.out
    assert tell("activations", "acts", "--partial").status == 0

"""Who makes the shards makes no difference: a loop, parts, ranks of torchrun, workers on Ray."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tracekit import Harvest, LanguageModel, harvest, load_activations
from tracekit.distributed import harvest_ray
from tracekit.distributed.harvest_parcel import packed, unpacked
from tracekit.distributed.harvest_ray import Recipe, Worker
from tracekit.errors import InputError, StorageError, UnsupportedError

ROOT = Path(__file__).parents[2]
TEXTS = [f"The Eiffel Tower is in {'the city of ' * (number % 4)}" for number in range(14)]
SITES = ["resid_post", "layers.2.z"]
SHARDS = 5
OPTIONS: dict[str, Any] = {"shard_documents": 3, "batch_size": 2, "progress": False}


def edited() -> LanguageModel:
    model = LanguageModel("tracekit/tiny")
    with model.edit(inplace=True):
        model.layers[1].mlp_out[:] *= 0.5
    return model


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return edited()


@pytest.fixture(scope="module")
def alone(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that one process makes in a loop."""
    out = tmp_path_factory.mktemp("alone")
    acts = harvest(model, TEXTS, SITES, out, **OPTIONS)
    assert acts.counts["documents"] == len(TEXTS)
    return sums(out)


def test_it_takes_what_a_harvest_takes() -> None:
    own, whole = (inspect.signature(each).parameters for each in (Harvest, harvest))
    assert {name: each.default for name, each in own.items()}.items() <= {
        name: each.default for name, each in whole.items()
    }.items()


# -- parts and ranks -------------------------------------------------------------------------------


def test_parts_of_a_job_are_the_whole(
    model: LanguageModel, alone: dict[str, str], tmp_path: Path
) -> None:
    first = harvest(model, TEXTS, SITES, tmp_path, shards="2/2", **OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {
        "shard-00001.safetensors",
        "shard-00003.safetensors",
    }
    assert first.counts["documents"] == 6
    with pytest.raises(StorageError, match=r"of 5 shards 3 are missing \(0, 2, 4\)"):
        load_activations(tmp_path)
    harvest(model, TEXTS, SITES, tmp_path, shards=" 1 / 2 ", **OPTIONS)
    assert sums(tmp_path) == alone


def test_shards_by_number_are_those(
    model: LanguageModel, alone: dict[str, str], tmp_path: Path
) -> None:
    acts = harvest(model, TEXTS, SITES, tmp_path, shards=[4, 1], **OPTIONS)
    assert sorted(sums(tmp_path)) == ["shard-00001.safetensors", "shard-00004.safetensors"]
    assert acts.counts["documents"] == 5
    assert sums(tmp_path).items() <= alone.items()


def test_ranks_divide_the_shards_and_each_gets_its_own(
    model: LanguageModel, alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    documents: list[int] = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        acts = harvest(model, TEXTS, SITES, tmp_path, **OPTIONS)
        documents.append(acts.counts["documents"])
    assert documents == [6, 8] and sums(tmp_path) == alone


def test_ranks_of_a_part_divide_the_part(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    harvest(model, TEXTS, SITES, tmp_path, shards="1/2", **OPTIONS)
    assert list(sums(tmp_path)) == ["shard-00002.safetensors"]


@pytest.mark.parametrize(
    ("shards", "text"),
    [
        ("0/8", r"shards='0/8': give a part as '1/8' to '8/8' \(counted from 1"),
        ("9/8", "shards='9/8': give a part"),
        ("half", "shards='half': give a part"),
        ("1/6", r"5 shards can't be divided among 6 processes: some would have none"),
        ([5], "there is no shard 5: there are 5, from 0"),
        ([], "shards= names none: there are 5"),
    ],
)
def test_parts_that_can_not_be_are_refused(
    model: LanguageModel, tmp_path: Path, shards: Any, text: str
) -> None:
    with pytest.raises(InputError, match=text):
        harvest(model, TEXTS, SITES, tmp_path, shards=shards, **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_what_can_not_be_combined_is_refused(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="on='dask': a harvest runs here"):
        harvest(model, TEXTS, SITES, tmp_path, on="dask", **OPTIONS)
    with pytest.raises(InputError, match="workers=2 are those of Ray: give on='ray' too"):
        harvest(model, TEXTS, SITES, tmp_path, workers=2, **OPTIONS)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"this is rank 0 of 2 \(torchrun\)"):
        harvest(model, TEXTS, SITES, tmp_path, on="ray", **OPTIONS)


@pytest.mark.slow
def test_torchrun_makes_the_same_files(alone: dict[str, str], tmp_path: Path) -> None:
    """In processes of their own, by a script in which the edit stands elsewhere."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, os, sys
            from pathlib import Path
            import tracekit

            model = tracekit.LanguageModel("tracekit/tiny")
            with model.edit(inplace=True):
                model.layers[1].mlp_out[:] *= 0.5
            out = Path(sys.argv[1])
            acts = tracekit.harvest(model, {TEXTS!r}, {SITES!r}, out / "acts", **{OPTIONS!r})
            (out / os.environ["RANK"]).write_text(json.dumps(acts.counts["documents"]))
            """
        ),
        "utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [8, 6]
    assert sums(tmp_path / "acts") == alone


# -- what travels ----------------------------------------------------------------------------------


def test_a_model_travels_with_its_edits_names_and_changed_weights() -> None:
    model = LanguageModel("tracekit/tiny", name="gpt", rename={"transformer.h": "blocks"})
    with torch.no_grad():
        model.module.transformer.wte.weight[5] += 1
    with model.edit(inplace=True):
        model.blocks[1].resid_post[:] *= 0.5
    found = unpacked(packed(model), "cpu")
    assert len(found.edits) == 1 and found.blocks[1].path == "gpt.transformer.h.1"
    assert found.module.lm_head.weight is found.module.transformer.wte.weight
    with torch.no_grad():
        _, own = model.run_with_cache("The Eiffel", names_filter="resid_post")
        _, theirs = found.run_with_cache("The Eiffel", names_filter="resid_post")
    assert all(own[key].equal(theirs[key]) for key in own)


def test_what_would_not_be_the_same_elsewhere_is_refused() -> None:
    model = LanguageModel("tracekit/tiny")
    model.module.mine = Lock()
    with pytest.raises(UnsupportedError, match=r"can't be sent to a worker: .*Run the script"):
        packed(model)
    del model.module.mine
    model.module.transformer.wpe.to("meta")
    with pytest.raises(UnsupportedError, match="whose weights are on cpu, meta can't be sent"):
        packed(model)


def test_functions_on_a_model_do_not_travel() -> None:
    model = LanguageModel("tracekit/tiny")
    model.add_hook("layers.1.resid_post", lambda value, hook: None)
    with pytest.raises(UnsupportedError, match="don't travel to workers: make them"):
        packed(model)


def recipe_of(made: Harvest, out: Path, **more: Any) -> Recipe:
    told = {
        "sites": made.sites.keys,
        "out": str(out),
        "options": {"shard_documents": 3, "batch_size": 2},
        "spec": made.spec,
        "documents": len(TEXTS),
        "threads": 1,
        "device": "cpu",
    }
    return Recipe(**{**told, **more})


def test_a_worker_with_another_model_refuses_to_begin(
    model: LanguageModel, alone: dict[str, str], tmp_path: Path
) -> None:
    made = Harvest(model, TEXTS, SITES, tmp_path, shard_documents=3, batch_size=2)
    worker = Worker(packed(model), recipe_of(made, tmp_path))
    worker.make(3, TEXTS[9:12])
    assert sums(tmp_path).items() <= alone.items()
    with pytest.raises(UnsupportedError, match=r"another than that of the driver: model\.edits"):
        Worker(packed(LanguageModel("tracekit/tiny")), recipe_of(made, tmp_path))


# -- Ray -------------------------------------------------------------------------------------------


def test_without_ray_the_cure_is_named(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r'pip install "tracekit\[ray\]"'):
        harvest(model, TEXTS, SITES, tmp_path, on="ray", **OPTIONS)


@pytest.mark.parametrize("runs", [True, False])
def test_ray_is_left_as_it_was_found(monkeypatch: pytest.MonkeyPatch, runs: bool) -> None:
    calls: list[str] = []
    fake = SimpleNamespace(
        is_initialized=lambda: runs,
        init=lambda **_: calls.append("init"),
        shutdown=lambda: calls.append("shutdown"),
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(KeyError), harvest_ray._ray() as ray:
        assert ray is fake
        raise KeyError
    assert calls == ([] if runs else ["init", "shutdown"])


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray with two processors, started and stopped here."""
    found = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # the first Ray of a process says it for all
        found.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield found
        found.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)  # the first: Ray starts
def test_ray_makes_the_same_files(
    ray: Any, model: LanguageModel, alone: dict[str, str], tmp_path: Path
) -> None:
    acts = harvest(model, TEXTS, SITES, tmp_path, on="ray", workers=2, **OPTIONS)
    assert sums(tmp_path) == alone
    assert acts.counts["documents"] == len(TEXTS)
    assert ray.is_initialized()
    with pytest.raises(InputError, match="workers=3: Ray has 2 CPUs here"):
        harvest(model, TEXTS, SITES, tmp_path / "more", on="ray", workers=3, **OPTIONS)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_that_dies_is_started_again_and_its_error_is_the_drivers(
    ray: Any, alone: dict[str, str], tmp_path: Path
) -> None:
    """A hook, which travels with the module, kills the first worker at its second batch.

    The last document has a token that the model does not have: the shards before it are there.
    """
    model, driver, died, seen = edited(), os.getpid(), tmp_path / "died", [0]

    def kill(*_: object) -> None:
        seen[0] += 1
        if os.getpid() != driver and seen[0] == 2 and not died.exists():
            died.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    model.module.transformer.h[2].register_forward_hook(kill)
    texts, out = [*TEXTS, [100_000]], tmp_path / "acts"
    with pytest.raises(IndexError, match="out of range"):
        harvest(model, texts, SITES, out, on="ray", workers=1, **OPTIONS)
    assert died.exists()
    assert sums(out) == {name: each for name, each in alone.items() if "00004" not in name}

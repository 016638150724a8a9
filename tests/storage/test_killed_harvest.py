"""A harvest that is killed: what is there is whole, and run again it ends with the same files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RANDOM_POINTS = 20
SHARDS = 6


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of each, as tests/storage/killing.py tells it, which forks them."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/storage/killing.py"), str(tmp_path_factory.mktemp("k"))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(300)  # two dozen harvests, each begun twice
def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_files(
    kills: list[dict[str, Any]],
) -> None:
    assert len(kills) > RANDOM_POINTS
    for each in kills:
        assert each["signal"] == signal.SIGKILL, each
        assert each["are whole"] and each["is the same"], each


@pytest.mark.slow
def test_the_kills_were_at_all_stages(kills: list[dict[str, Any]]) -> None:
    """Else the test above would say little: few shards there, many, and a file half written."""
    at_random = kills[:RANDOM_POINTS]
    assert {0, SHARDS - 1} < {each["shards"] for each in at_random}
    by_name = {each["kill"]: each for each in kills[RANDOM_POINTS:]}
    assert by_name["half of a file written"]["parts"] == 1
    assert by_name["before the file is flushed"]["parts"] == 1
    assert by_name["before it has its name"]["parts"] == 1
    assert by_name["before the directory is flushed"]["shards"] == 1

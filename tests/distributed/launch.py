"""Start a script of this folder on two processes, with a limit on how long it may take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def on_two_ranks(script: str, folder: Path, seconds: int = 100) -> None:
    """Run it under torchrun; AssertionError, with what it printed, if it fails or takes longer."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(Path(__file__).with_name(script)), str(folder)]
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    env = {**os.environ, **more, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    ran = subprocess.run(
        command, env=env, cwd=ROOT, timeout=seconds, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr

"""What this machine has for a model to run on, and how its Python lets blocks be lifted."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Generator
from contextlib import contextmanager

import torch


def devices() -> dict[str, str]:
    """The system and its devices, as PyTorch sees them."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
        "cuda": ", ".join(names) or "none",
        "mps": "there" if torch.backends.mps.is_available() else "none",
    }


@contextmanager
def one_thread() -> Generator[None]:
    """Let torch compute on one thread: small models gain nothing from more, and wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def capture_way() -> dict[str, str]:
    """How the body of a `with` is kept from running in place, and how its names are shared."""
    by = "sys.monitoring" if sys.version_info >= (3, 12) else "opcode events of a trace function"
    is_known = sys.implementation.name == "cpython" and (3, 10) <= sys.version_info < (3, 14)
    names = "shared by their cells" if is_known else "copied: this Python was never tested"
    return {"python": platform.python_version(), "skips_by": by, "names": names}

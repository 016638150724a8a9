"""What every test runs under: offline, one thread for torch, properties without a clock.

Imports neither torch nor transformers: tests/capture runs on interpreters that have neither.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Tiny matrices gain nothing from a second thread, and an OpenMP team costs more than they do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A fork after the tokenizers' pool has started makes them print a warning.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

# No deadline: the first example of a property pays for imports. In CI the same examples each time.
settings.register_profile("tracekit", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tracekit")


def pytest_configure() -> None:
    """Let the tests press Ctrl-C: what a shell starts in the background ignores it from birth."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def _old_objects_rest() -> None:
    """Let the garbage collector pass over what the modules before have left.

    Whoever asks it what there is (core/versions.py, for every value that was overwritten) looks at
    all objects; those of a whole suite, with transformers, are a million.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def without_gradients() -> Iterator[None]:
    """The test runs as generation does."""
    import torch

    with torch.no_grad():
        yield

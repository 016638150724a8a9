"""A host of the packaged model, by transport."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tracekit import LanguageModel
from tracekit.distributed import LocalHost, ModelHost, connect, serve, serve_on_ray


@contextmanager
def opened(transport: str, model: LanguageModel) -> Iterator[ModelHost]:
    """A host, which is closed at the end."""
    if transport == "local":
        yield LocalHost(model)
    elif transport == "socket":
        with serve("tracekit/tiny") as server:
            host = connect(server.address, server.key)
            yield host
            host.close()
    else:
        with ray_cluster():
            host = serve_on_ray("tracekit/tiny")
            yield host
            host.close()


@contextmanager
def ray_cluster() -> Iterator[None]:
    """A Ray of two workers, which is started here and ends at the end."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), *sys.path]))
        environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
        ray.init(
            address="local",  # never that of tests beside these, which ends with them
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            runtime_env=environment,
        )
        try:
            yield
        finally:
            ray.shutdown()

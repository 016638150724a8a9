"""What hosts on Ray have beyond the blocks: two at once, an actor that dies, one that is ended."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.distributed.helpers import small
from tests.distributed.hosts import ray_cluster
from tracekit.distributed import RayHost, serve_on_ray
from tracekit.errors import HostError

pytestmark = pytest.mark.slow

X = torch.ones(1, 2)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[RayHost]]:
    with ray_cluster():
        found = [serve_on_ray(small) for _ in range(2)]
        yield found
        for host in found:
            host.close()


def output_on(host: RayHost) -> torch.Tensor:
    model = small()
    with model.trace(X, on=host):
        out = model.output
    return out.detach()


def test_two_workers_are_at_work_at_once(hosts: list[RayHost], tmp_path: Any) -> None:
    """Each block waits for a file that the other one writes: one after the other would not end."""
    model = small()
    found: dict[int, tuple[int, torch.Tensor]] = {}
    folder = str(tmp_path)

    def work(own: int) -> None:
        with model.trace(X * (own + 1), on=hosts[own].within(60)):
            out = model.output.detach()
            open(os.path.join(folder, str(own)), "w").close()
            while not os.path.exists(os.path.join(folder, str(1 - own))):
                pass
            process = os.getpid()
        found[own] = process, out

    threads = [threading.Thread(target=work, args=(own,)) for own in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({process for process, _ in found.values()} | {os.getpid()}) == 3
    for own in range(2):
        assert torch.equal(found[own][1], model(X * (own + 1)))


def test_an_actor_that_dies_in_a_block_says_so_and_the_next_block_runs_in_a_new_one(
    hosts: list[RayHost],
) -> None:
    model, host = small(), hosts[0]
    before = host.run(lambda _: os.getpid())
    with pytest.raises(HostError, match="the actor of the host died while it ran this block"):
        with model.trace(X, on=host):
            model[0].output
            os.kill(os.getpid(), 9)
    assert torch.equal(output_on(host), model(X).detach())
    assert host.run(lambda _: os.getpid()) != before
    assert torch.equal(output_on(hosts[1]), model(X).detach())


def test_a_host_that_was_ended_says_so(hosts: list[RayHost]) -> None:
    host = serve_on_ray(small)
    output_on(host)
    host.close()
    with pytest.raises(HostError, match="has ended for good"):
        output_on(host)

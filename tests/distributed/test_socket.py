"""What a host in another process has: keys, workers that hang or die, clients in turn."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from tests.distributed.helpers import small
from tracekit import LanguageModel, Model
from tracekit.distributed import Server, SocketHost, connect, serve
from tracekit.errors import HostError, InputError, LoadingError, TimeLimitError, TracekitWarning

EIFFEL = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("tracekit/tiny") as found:
        yield found


@pytest.fixture
def host(server: Server) -> Iterator[SocketHost]:
    found = connect(server.address, server.key)
    yield found
    found.close()


def logits_of(host: SocketHost) -> torch.Tensor:
    return host.run(lambda model: model(EIFFEL).logits.detach())


def test_a_wrong_key_is_refused_and_an_empty_one_never_taken(server: Server) -> None:
    with pytest.raises(HostError, match="refused the key"):
        connect(server.address, "not this one")
    with pytest.raises(InputError, match="the key is empty"):
        connect(server.address, "")
    with pytest.raises(InputError, match="the key is empty"):
        serve("tracekit/tiny", key="")


def test_a_host_that_others_reach_says_what_that_means() -> None:
    net = Model(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.warns(TracekitWarning, match="may run any code here"):
        serve(net, ("0.0.0.0", 0)).close()


def test_a_model_that_can_not_be_made_is_said_at_once() -> None:
    with pytest.raises(LoadingError, match="tracekit/tinny"):
        serve("tracekit/tinny")


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_says_so_and_the_next_block_runs() -> None:
    model, x = small(), torch.ones(1, 2)
    with serve(small) as server:
        host = connect(server.address, server.key)
        with pytest.raises(HostError, match=r"died while it ran this block \(exit code 7\)"):
            with model.trace(x, on=host):
                os._exit(7)
        with pytest.raises(TimeLimitError, match="its worker was killed"):
            with model.trace(x, on=host.within(0.2)):
                time.sleep(1000)  # in C, where no interrupt comes
        with model.trace(x, on=host):
            out = model.output
        host.close()
    assert torch.equal(out, model(x))


def test_ctrl_c_stops_the_block_there(model: LanguageModel, host: SocketHost) -> None:
    main = threading.main_thread().ident
    assert main is not None

    class Presses:
        """Presses Ctrl-C here when the block has printed there: it runs by then."""

        def write(self, text: str) -> None:
            if "begun" in text:
                threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGINT)).start()

        def flush(self) -> None:
            pass

    hidden = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", Presses())
        with pytest.raises(KeyboardInterrupt), model.trace(EIFFEL, on=host):
            hidden = model.transformer.h[0].output
            print("begun")
            while True:
                pass
    assert hidden is not None and hidden.shape == (1, 9, 128)
    assert torch.equal(logits_of(host), model(EIFFEL).logits)


def test_what_the_block_prints_is_printed_here_as_it_comes(
    model: LanguageModel, host: SocketHost, capsys: pytest.CaptureFixture[str]
) -> None:
    with model.generate(EIFFEL, max_new_tokens=3, on=host) as tracer:
        for step in tracer.iter[:]:
            print("step", step)
    assert capsys.readouterr().out == "step 0\nstep 1\nstep 2\n"


def test_clients_take_turns(model: LanguageModel, server: Server) -> None:
    expected = model(EIFFEL).logits.detach()
    results: list[torch.Tensor] = []

    def work() -> None:
        own = connect(server.address, server.key)
        for _ in range(3):
            with model.trace(EIFFEL, on=own):
                model.transformer.h[0].output[:] = 0
            with model.trace(EIFFEL, on=own):
                logits = model.lm_head.output
            results.append(logits.detach())
        own.close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6 and all(torch.equal(each, expected) for each in results)


def test_a_live_model_is_served_by_this_process() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    live = Model(net)
    x = torch.ones(1, 2)
    with serve(live) as server:
        host = connect(f"127.0.0.1:{server.address[1]}", server.key)
        with live.trace(x, on=host):
            live[0].output[:] = 5
            out = live.output
        host.close()
    assert torch.equal(out, torch.full((1, 2), 5.0))


def test_a_host_that_has_gone_says_so(model: LanguageModel) -> None:
    net = Model(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    server = serve(net)
    host = connect(server.address, server.key)
    server.close()
    with pytest.raises(HostError), net.trace(torch.ones(1, 2), on=host):
        net[0].output

"""Workers: real threads, one at a time, reused."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from tests.interleave.stage import Module, Stage, misfit, output
from tracekit.interleave import worker
from tracekit.interleave.baton import Baton
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.protocol import State, Unwind


def stage_with(
    body: Callable[[Mediator], None], grad: bool | None = None
) -> tuple[Stage, Mediator]:
    stage = Stage(Module("model", [Module("a"), Module("b")]))
    mediator = Mediator(None, stage.interleaver, misfit, lambda: "line 0")
    stage.interleaver.mediators.append(mediator)
    worker.run_beside(mediator, lambda: body(mediator), grad)
    stage.mediators.append(mediator)
    return stage, mediator


def test_a_block_runs_on_another_thread_and_never_at_the_same_time() -> None:
    turns: list[int] = []

    def body(mediator: Mediator) -> None:
        turns.append(threading.get_ident())
        mediator.read(output("model.a"))
        turns.append(threading.get_ident())

    stage, _ = stage_with(body)
    stage.run()
    assert len(set(turns)) == 1
    assert turns[0] != threading.get_ident()


def test_a_run_after_a_run_reuses_the_thread() -> None:
    idents: set[int] = set()
    for _ in range(20):
        stage, _ = stage_with(lambda _: idents.add(threading.get_ident()))
        stage.run()
    assert len(idents) == 1


def test_an_idle_worker_holds_nothing_of_its_job() -> None:
    stage, _ = stage_with(lambda mediator: None)
    stage.run()
    assert worker._idle[-1]._job is None


def test_an_error_of_the_block_reaches_the_mediator_without_frames_of_tracekit() -> None:
    def body(mediator: Mediator) -> None:
        mediator.read(output("model.a"))
        raise ValueError("mine")

    stage, mediator = stage_with(body)
    stage.run()
    assert isinstance(mediator.error, ValueError)
    assert mediator.error.__traceback__ is not None
    assert mediator.error.__traceback__.tb_frame.f_code.co_filename == __file__


def test_a_parked_block_is_unwound_through_its_finally() -> None:
    seen: list[str] = []

    def body(mediator: Mediator) -> None:
        try:
            mediator.read(output("model.b"))
        except Exception:
            seen.append("an Exception, which it must not be")
        finally:
            seen.append("finally")

    stage, mediator = stage_with(body)
    stage.interleaver.start()
    assert mediator.state is State.WAITING
    stage.interleaver.close()
    assert seen == ["finally"]
    assert mediator.error is None


def test_an_interrupt_while_the_block_runs_is_raised_in_the_block() -> None:
    seen: list[str] = []

    def body(mediator: Mediator) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            while True:
                threading.Event().wait(0.001)
        except KeyboardInterrupt:
            seen.append("interrupted")
            raise

    stage, mediator = stage_with(body)
    with pytest.raises(Unwind):
        stage.interleaver.start()
    assert seen == ["interrupted"]
    assert isinstance(mediator.error, KeyboardInterrupt)
    stage.interleaver.close()


def test_a_block_sees_the_grad_mode_of_its_user_or_the_one_it_is_given() -> None:
    modes: list[bool] = []
    with torch.no_grad():
        stage_with(lambda _: modes.append(torch.is_grad_enabled()))[0].run()
    stage_with(lambda _: modes.append(torch.is_grad_enabled()), grad=False)[0].run()
    stage_with(lambda _: modes.append(torch.is_grad_enabled()))[0].run()
    assert modes == [False, False, True]


def test_after_a_fork_the_pool_is_empty_and_a_new_worker_serves() -> None:
    stage, _ = stage_with(lambda _: None)
    stage.run()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert worker._idle == []
            stage, mediator = stage_with(lambda m: (m.read(output("model.a")), None)[1])
            stage.run()
            code = 0 if mediator.error is None else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_baton_is_never_lost_however_the_threads_are_switched() -> None:
    baton, rounds = Baton(), 20_000
    turns: list[int] = []

    def other() -> None:
        for number in range(rounds):
            baton.wait_for_model()
            turns.append(number)
            baton.give_to_model()

    thread = threading.Thread(target=other, daemon=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for number in range(rounds):
            assert len(turns) == number
            baton.give_to_worker()
    finally:
        sys.setswitchinterval(interval)
    assert turns == list(range(rounds))

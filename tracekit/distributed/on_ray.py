"""Hosts on a Ray cluster: an actor holds the model, with the GPUs that it asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, final

import torch

from tracekit.capture import showing_own_lines
from tracekit.distributed.host import Heard, ModelHost
from tracekit.distributed.messages import Message
from tracekit.distributed.streams import METHOD as STREAM
from tracekit.distributed.supervisor import GRACE
from tracekit.errors import HostError, LoadingError, TimeLimitError, UnsupportedError
from tracekit.interleave.protocol import Unwind
from tracekit.models.model import Model
from tracekit.tracing.relay import Relay

_LOOK: Final = 0.5  # seconds between two looks for an interrupt
_TRIES: Final = 60  # looks for a new actor; also the seconds that it has to load its model


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UnsupportedError('hosts on Ray need Ray: pip install "tracekit[ray]"') from None
    return ray


class _Actor:
    """The actor's side: one executor, whose programs another method can stop."""

    def __init__(self, make: Callable[[], Model]) -> None:
        from tracekit.distributed.executor import Executor

        self._executor = Executor(make())

    def respond(self, kind: str, head: Any, buffers: list[Any]) -> tuple[str, Any, list[Any]]:
        answer = self._executor.respond(Message(kind, head, buffers))
        return answer.kind, dict(answer.head), [bytes(each) for each in answer.buffers]

    def respond_in_steps(
        self, kind: str, head: Any, buffers: list[Any]
    ) -> Iterator[tuple[str, Any, list[Any]]]:
        """What comes before the answer, as it comes, and the answer."""

        def run(relay: Relay) -> None:
            relay.hand_over(self._executor.respond(Message(kind, head, buffers), relay.hand_over))

        relay = Relay(run)
        try:
            while found := relay.advance():
                yield found[0].kind, dict(found[0].head), [bytes(it) for it in found[0].buffers]
        finally:
            relay.close()

    def stop(self) -> None:
        self._executor.stop()


@showing_own_lines
def serve_on_ray(
    model: str | Path | Callable[[], Model],
    *,
    name: str | None = None,
    device: torch.device | str | None = None,
    timeout: float | None = None,
    resources: dict[str, Any] | None = None,
    **options: Any,
) -> RayHost:
    """`host = serve_on_ray("gpt2", resources={"num_gpus": 1})`: a model in an actor, as a host.

    `model` is a name, with `options` as LanguageModel takes them, or a function that makes one.
    `resources` are options of the actor. With a `name` it lives on when this program ends, until
    `host.close()`, and `RayHost(name)` is it in another program. ray.init() is called if nobody
    has. An actor that dies is made anew, up to 100 times.
    """
    ray = _ray()
    if not ray.is_initialized():
        ray.init()
    if isinstance(model, (str, Path)):
        from functools import partial

        from tracekit.models.language import LanguageModel

        make: Callable[[], Model] = partial(LanguageModel, str(model), **options)
    else:
        make = model
    told = {"max_restarts": 100, "max_concurrency": 2, **(resources or {})}
    if name is not None:
        told |= {"name": name, "lifetime": "detached", "namespace": "tracekit"}
    return RayHost(ray.remote(_Actor).options(**told).remote(make), device=device, timeout=timeout)


@final
class RayHost(ModelHost):
    """A model in an actor of Ray: that of a name, or of a handle."""

    def __init__(
        self,
        actor: Any,
        *,
        device: torch.device | str | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(device, timeout)
        ray = _ray()
        if isinstance(actor, str):
            try:
                actor = ray.get_actor(actor, namespace="tracekit")
            except ValueError as error:
                raise HostError(f"there is no host named {actor!r} on this Ray: {error}") from None
        self._actor = actor
        self._said: dict[str, Any] | None = None

    def close(self) -> None:
        """End the actor."""
        _ray().kill(self._actor)

    def _hello(self) -> dict[str, Any]:
        if self._said is None:
            self._said = dict(self._exchange(Message("hello"), None).head)
        return self._said

    def _exchange(self, message: Message, hear: Heard | None) -> Message:
        ray = _ray()
        buffers = [bytes(each) for each in message.buffers]
        told = (message.kind, dict(message.head), buffers)
        try:
            if message.head.get("method") == STREAM:
                steps = self._actor.respond_in_steps.options(num_returns="streaming")
                return self._streamed(steps.remote(*told), message.head.get("timeout"), hear)
            reference = self._actor.respond.remote(*told)
            return Message(*self._got(reference, message.head.get("timeout")))
        except ray.exceptions.ActorDiedError as error:
            text = str(error).strip().splitlines()
            if "respond" not in str(error) and "init" in str(error).lower():
                raise LoadingError(f"the model of the host can't be made: {text[-1]}") from None
            raise HostError(_died("the actor has ended for good")) from None
        except (ray.exceptions.ActorUnavailableError, ray.exceptions.RayActorError):
            self._wait_for_another()
            raise HostError(_died("Ray makes another one")) from None

    def _wait_for_another(self) -> None:
        """Until Ray has made the actor anew: until then it refuses what it is sent."""
        ray = _ray()
        for _ in range(_TRIES):
            try:
                ray.get(self._actor.stop.remote(), timeout=_TRIES)
            except ray.exceptions.ActorDiedError:
                return
            except ray.exceptions.RayActorError:
                time.sleep(_LOOK)
            else:
                return

    def _streamed(self, steps: Any, timeout: float | None, hear: Heard | None) -> Message:
        """The answer behind the items; the limit holds for each step anew, the actor's for all."""
        while True:
            message = Message(*self._got(steps, timeout))
            if message.kind not in ("print", "item"):
                return message
            try:
                if hear is not None:
                    hear(message)
            except Unwind:  # nobody wants more; waited for, that it stops no later block
                hear = None
                _ray().get(self._actor.stop.remote())

    def _got(self, reference: Any, timeout: float | None) -> Any:
        """What a reference, or the next one of a stream of them, stands for."""
        ray = _ray()
        waited, was_stopped = 0.0, False
        limit = None if timeout is None else timeout + GRACE
        while True:
            try:
                ready, _ = ray.wait([reference], timeout=_LOOK)
            except KeyboardInterrupt:
                if was_stopped:
                    raise
                was_stopped = True
                self._actor.stop.remote()
                limit = waited + GRACE
                continue
            if ready:
                is_one = isinstance(reference, ray.ObjectRef)
                return ray.get(reference if is_one else next(reference))
            waited += _LOOK
            if limit is not None and waited >= limit:
                ray.kill(self._actor, no_restart=False)
                asked = "to stop" if was_stopped else f"to end after {timeout:g} seconds"
                raise (HostError if was_stopped else TimeLimitError)(
                    f"the block was asked {asked} and did not, as it was in code that is not "
                    f"Python: its actor was killed, and what it had bound is lost. The next block "
                    f"runs, in a new actor."
                )

    def __repr__(self) -> str:
        return "<RayHost>"


def _died(what: str) -> str:
    return (
        f"the actor of the host died while it ran this block ({what}): what it had bound is lost."
    )

"""A host in this very process: all that is sent is bytes, as to any other host."""

from __future__ import annotations

from typing import Any, final

import torch

from tracekit.distributed.executor import Executor
from tracekit.distributed.host import Heard, ModelHost
from tracekit.distributed.messages import Message
from tracekit.models.model import Model


@final
class LocalHost(ModelHost):
    """`host = LocalHost(model)`: try here what is to run on another host, or test it.

    The model is used as it is; input, values and results go through bytes both ways. A block that
    is blocked in C goes on over its time limit, as nobody can stop it here.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: torch.device | str | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(device, timeout)
        self._executor = Executor(model)

    def _hello(self) -> dict[str, Any]:
        return dict(self._executor.hello().copied().head)

    def _exchange(self, message: Message, hear: Heard | None) -> Message:
        def emit(item: Message) -> None:
            if hear is not None:
                hear(item.copied())

        return self._executor.respond(message.copied(), emit).copied()

    def __repr__(self) -> str:
        return f"<LocalHost of {type(self._executor.model.module).__name__}>"

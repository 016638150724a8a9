"""The client's side of one run on a host: work becomes a program, and an answer what came of it."""

# A program is data: in its head the block's text, its place in the user's file, the call, and the
# torch modes of the user's thread; beside it one parcel with the input and the values it captures.

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final, final

import torch

from tracekit.capture import warn_user
from tracekit.distributed.directory import ModelDirectory
from tracekit.distributed.failures import Entry, Failure, error_of
from tracekit.distributed.left import Left
from tracekit.distributed.messages import Message
from tracekit.distributed.parcel import Packer, Parcel, Unpacker
from tracekit.errors import UnsendableError, UnsupportedError
from tracekit.tracing.elsewhere import Done, Work

OF_A_NAME: Final = "name "  # in front of the names of variables, in a parcel


@final
class Errand:
    """One piece of work, from its program to what came of it."""

    def __init__(
        self,
        work: Work,
        python: list[int],
        device: torch.device | str | None = None,
        timeout: float | None = None,
        host: object = None,
    ) -> None:
        edits = getattr(work.model, "_edits", None) or getattr(work.model, "_functions", None)
        if edits:
            raise UnsupportedError(
                "a model with lasting edits or hooks can't be traced on a host, as these are here: "
                "make the edits in the block, or edit the model that is served."
            )
        self.directory = ModelDirectory(work.model, True, device or "cpu", host)
        self._packer = Packer(self.directory, may_send_code=python == python_here())
        self.program = self._program(work, timeout)

    def _program(self, work: Work, timeout: float | None) -> Message:
        where = "the call of the trace" if work.method else "the call"
        self._add("args", work.args, f"the input of {where}")
        self._add("kwargs", dict(work.kwargs), f"the options of {where}")
        if work.function is not None:
            self._add("function", work.function, "the function")
        for name, value in work.names.items():
            self._add(OF_A_NAME + name, value, f"the block uses {name!r}")
        head = {
            "python": python_here(),
            "method": work.method,
            "block": None if work.block is None else asdict(work.block),
            "modes": modes_here(),
            "timeout": timeout,
        }
        parcel = self._packer.parcel
        return Message("program", head, [parcel.index(), *parcel.buffers])

    def _add(self, key: str, value: object, what: str) -> None:
        try:
            self._packer.add(key, value)
        except Exception as error:  # noqa: BLE001 - whatever the pickling of a user's object raises
            kind = type(value).__name__
            reason = error.args[0] if isinstance(error, UnsendableError) else str(error)
            text = f"{what} can't be sent to the host: {reason}."
            if key.startswith(OF_A_NAME):
                text = (
                    f"{what}, a {kind}, which can't be sent to the host: {reason}. Make it in the "
                    f"block, or take what the block needs from it before."
                )
            raise UnsendableError(text) from None

    def done(self, answer: Message) -> Done:
        """What came of it, with this side's objects changed as they were over there."""
        head = answer.head
        parcel = Parcel.of(bytes(answer.buffers[0]), list(answer.buffers[1:]))
        unpacker = Unpacker(parcel, self.directory, self._packer.objects)
        unpacker.take_changes()
        for what in head["lost"]:
            warn_user(
                f"the block changed {what}, on the host alone: only pickle can tell what is in it, "
                f"so it is here as it was. Bind what the block makes of it to a name, or use a "
                f"list, a dict or a plain class."
            )
        names = {
            key.removeprefix(OF_A_NAME): unpacker.value(key)
            for key in parcel.names
            if key.startswith(OF_A_NAME)
        }
        left: dict[str, str] = head["left"]
        names.update({name: Left(name, why) for name, why in left.items() if name != "value"})
        value = unpacker.value("value") if "value" in parcel.names else None
        if "value" in left:
            value = Left("what the function returned", left["value"])
        failure = None if head["failure"] is None else failure_from(head["failure"])
        sent = unpacker.value("error") if "error" in parcel.names else None
        error = None if failure is None else error_of(failure, sent)
        return Done(names, tuple(head["removed"]), value, error)


def failure_from(told: dict[str, Any]) -> Failure:
    """A Failure again, from its data."""
    inner: dict[str, Any] = {
        key: failure_from(told[key]) for key in ("cause", "context") if told[key] is not None
    }
    inner["entries"] = tuple(Entry(**each) for each in told["entries"])
    return Failure(**{**told, **inner})


def python_here() -> list[int]:
    """The version of Python whose code this process can run."""
    return list(sys.version_info[:2])


def modes_here() -> dict[str, Any]:
    """The torch modes of this thread that a block feels."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": dict(_autocasts()),
    }


def _autocasts() -> Iterator[tuple[str, str]]:
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            yield device, str(torch.get_autocast_dtype(device)).removeprefix("torch.")

"""What is asked of an accelerator to copy values to the host while it goes on computing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, final

import torch
from torch import Tensor

_WITH_STREAMS = ("cuda", "xpu")  # the latter is asked by the same names; mps has no pinned memory


class Event(Protocol):
    """A place in what a stream was given to do."""

    def is_done(self) -> bool:
        """Whether the stream has come there; waits for nothing."""
        ...

    def wait(self) -> None:
        """Wait, on the host, until the stream has come there."""
        ...


class Lane(Protocol):
    """The stream that a model computes on, and one beside it that copies to the host."""

    def is_current(self) -> bool:
        """Whether what this thread computes now goes to the stream of the model."""
        ...

    def computing(self) -> AbstractContextManager[object]:
        """What is computed under it goes to the stream of the model, whoever is current."""
        ...

    def staging(self, size: int) -> Tensor:
        """This many bytes on the device, for both streams; RuntimeError if there is no room."""
        ...

    def pinned(self, size: int) -> Tensor:
        """This many on the host, which the device writes to by itself; or RuntimeError."""
        ...

    def gather(self, sources: Sequence[Tensor], into: Tensor) -> None:
        """Write flat tensors one behind another into bytes, on the stream of the model.

        In its order: behind what made them, and before whatever it is given to overwrite them.
        """
        ...

    def mark(self) -> Event:
        """An event behind all that the stream of the model was given."""
        ...

    def copy(self, staging: Tensor, pinned: Tensor, after: Event) -> Event:
        """Copy bytes to the host, beside the model and behind `after`; the event is its end."""
        ...


def has_lanes() -> bool:
    """Whether there can be values on a device that has a Lane, in this process."""
    return torch.cuda.is_initialized() or torch.xpu.is_initialized()


def lane_of(device: torch.device) -> Lane | None:
    """That of the stream which is current on the device; None if it copies nothing by itself."""
    return TorchLane(device) if device.type in _WITH_STREAMS else None


@final
class TorchLane:
    """A Lane of PyTorch's streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch: Any = getattr(torch, device.type)
        self._home = self._torch.current_stream(device)
        self._side = self._torch.Stream(device)

    def is_current(self) -> bool:
        return self._torch.current_stream(self._device) == self._home

    def computing(self) -> AbstractContextManager[object]:
        return self._torch.stream(self._home)

    def staging(self, size: int) -> Tensor:
        with self.computing():
            found = torch.empty(size, dtype=torch.uint8, device=self._device)
        found.record_stream(self._side)  # the allocator waits for both, whenever it is dropped
        return found

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def gather(self, sources: Sequence[Tensor], into: Tensor) -> None:
        with self.computing():
            write_in_a_row(sources, into)

    def mark(self) -> Event:
        return self._event(self._home)

    def copy(self, staging: Tensor, pinned: Tensor, after: Event) -> Event:
        assert isinstance(after, _TorchEvent)
        self._side.wait_event(after.event)
        with self._torch.stream(self._side):
            pinned.copy_(staging, non_blocking=True)
        return self._event(self._side)

    def _event(self, stream: Any) -> _TorchEvent:
        event = self._torch.Event()
        event.record(stream)
        return _TorchEvent(event)

    def __repr__(self) -> str:
        return f"TorchLane({self._device})"


@final
class _TorchEvent:
    def __init__(self, event: Any) -> None:
        self.event = event

    def is_done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()


def write_in_a_row(sources: Sequence[Tensor], into: Tensor) -> None:
    """Write flat tensors one behind another into the bytes `into`, which they fill, in one call."""
    unit = sources[0].dtype
    if unit is torch.uint8 or any(source.dtype is not unit for source in sources):
        sources = [bytes_of(source) for source in sources]
        # Eight at a time where all allow it: a kernel moves elements, however small they are.
        unit = torch.int64 if all(map(_is_wide, sources)) else torch.uint8
        sources = [source.view(unit) for source in sources]
    torch.cat(list(sources), out=into.view(unit))


def bytes_of(tensor: Tensor) -> Tensor:
    """All bytes of a tensor in order; its own memory where that is contiguous."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    whole = tensor.contiguous()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


def _is_wide(flat: Tensor) -> bool:
    return not (flat.numel() % 8 or flat.storage_offset() % 8 or flat.data_ptr() % 8)

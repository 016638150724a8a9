"""Ranks that run one model meet, and tell each other where they are."""

# Guarantees:
#   - every meeting is the same call of the same size, in a group of its own: ranks that come to it
#     from different places do not wait for each other, but learn that they differ, all of them;
#   - what is compared is bits; numbers that differ by rounding alone are let pass.

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.core.shares import Ranks, all_gathered
from tracekit.errors import RankError

_PATIENCE: Final = timedelta(minutes=30)  # as torch has it, where the group does not say
_WIDTH: Final = (
    1021  # columns over which a digest is summed: prime, so no size of a model divides it
)


@final
class Meeting:
    """The place where the ranks of one model meet."""

    def __init__(self, ranks: Ranks) -> None:
        import torch.distributed as dist

        self.ranks = ranks
        members: list[int] = dist.get_process_group_ranks(ranks.group)
        self._group: Any = dist.new_group(
            members,
            timeout=_timeout(ranks.group),
            backend="gloo",  # of numbers on the CPU: no device has to wait for it
            use_local_synchronization=True,
        )
        self.count = 0  # of meetings so far

    def exchange(self, *own: int) -> list[list[int]]:
        """What each rank says, in order. RankError if one does not come."""
        import torch.distributed as dist

        sent = torch.tensor(own, dtype=torch.int64)
        came = [torch.empty_like(sent) for _ in range(self.ranks.size)]
        self.count += 1
        try:
            dist.all_gather(came, sent, group=self._group)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.ranks.rank} waited for the other ranks of the model, and they did not "
                f"come ({str(error).splitlines()[0]}): run the same traces on all ranks, each with "
                f"the same block and input."
            ) from error
        return [each.tolist() for each in came]

    def told(self, own: Any) -> list[Any]:
        """What each rank has to say at length; all of them have to come here."""
        import torch.distributed as dist

        came: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(came, own, group=self._group)
        return came

    def differ(self, key: str, text: str, values: Sequence[Tensor] = ()) -> list[str] | None:
        """The `text` of each rank, if they did not all come with the same `key` and `values`."""
        came = self.exchange(mark(key), digest(values), 0)
        if came.count(came[0]) == len(came):
            return None
        if len({each[0] for each in came}) > 1:
            return self.told(text)
        if all(map(self._is_rounding, values)):
            return None
        return self.told(f"{text}, with other values")

    def _is_rounding(self, value: Tensor) -> bool:
        if not value.is_floating_point() or not value.numel():
            return all(torch.equal(each, value) for each in all_gathered(value, self.ranks))
        every = torch.stack(all_gathered(value.detach(), self.ranks)).double()
        spread = (every - every[0]).abs().max()
        return bool(spread <= 8 * torch.finfo(value.dtype).eps * every.abs().max())


def mark(*texts: str) -> int:
    """A number for some texts, the same in every process."""
    return zlib.crc32("\0".join(texts).encode())


def digest(values: Sequence[Tensor]) -> int:
    """A number for the bits of these tensors, and where they lie."""
    total = 0
    for value in values:
        total = (total * 1_000_003 + _digest(value)) & (2**63 - 1)
    return total


def _digest(value: Tensor) -> int:
    flat = value.detach().contiguous().view(-1)
    if not flat.numel():
        return 0
    flat = flat.view(torch.uint8)
    bits = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
    rows = len(bits) // _WIDTH
    square, rest = bits[: rows * _WIDTH].view(rows, _WIDTH), bits[rows * _WIDTH :]
    sums = (square.sum(0, dtype=torch.int64), square.sum(1, dtype=torch.int64), rest.long())
    return sum(int((each * _odd(each)).sum()) for each in sums) & (2**63 - 1)


def _odd(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device) * 2_654_435_761 + 40_503


def _timeout(group: Any) -> timedelta:
    """How long the model's own group waits."""
    try:
        return group._get_backend(torch.device("cpu")).options._timeout
    except (RuntimeError, AttributeError):
        return _PATIENCE


# -- random numbers -------------------------------------------------------------------------------


def agree_on_random(meeting: Meeting, device: torch.device) -> None:
    """Let all ranks draw the random numbers that the first would draw."""
    came = meeting.exchange(mark("random"), random_mark(device), 0)
    if came.count(came[0]) < len(came):
        adopt_random(meeting, device)


def random_mark(device: torch.device) -> int:
    """A number for what random numbers come next."""
    found = 0
    for state in _states(device):
        found = zlib.crc32(state.numpy().tobytes(), found)
    return found


def adopt_random(meeting: Meeting, device: torch.device) -> None:
    """Draw what the first rank draws; all ranks have to come here."""
    states = meeting.told(_states(device) if meeting.ranks.rank == 0 else None)[0]
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def _states(device: torch.device) -> list[Tensor]:
    own = [torch.get_rng_state()]
    return [*own, torch.cuda.get_rng_state(device)] if device.type == "cuda" else own

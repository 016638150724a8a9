"""Which shards of a harvest this process makes: all, those that were asked for, or its share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias, final

import torch.distributed

from tracekit.errors import InputError

Shards: TypeAlias = "str | Iterable[int] | None"
_PART: Final = re.compile(r"\s*(\d+)\s*/\s*(\d+)\s*")


@final
@dataclass(frozen=True)
class Share:
    """Every `of`-th of some shards, beginning with number `first` of them (from 0)."""

    first: int = 0
    of: int = 1

    def take(self, numbers: range) -> range:
        """This share of them; InputError if there are fewer shards than shares."""
        if self.of > max(len(numbers), 1):
            raise InputError(
                f"{len(numbers)} shards can't be divided among {self.of} processes: some would "
                f"have none. Take fewer, or make smaller shards with shard_documents=."
            )
        return numbers[self.first :: self.of]


def numbers_of(asked: Shards, shards: int, ranks: Share) -> list[int]:
    """The numbers of the shards that this process makes, of `shards` that there are.

    None is all of them, "2/8" every 8th from the 2nd, and ranks divide either among themselves.
    Numbers that are listed are taken as they are.
    """
    if asked is None or isinstance(asked, str):
        part = Share() if asked is None else part_of(asked)
        return list(ranks.take(part.take(range(shards))))
    numbers = sorted(set(asked))
    outside = [number for number in numbers if not 0 <= number < shards]
    if outside or not numbers:
        told = f"there is no shard {outside[0]}" if outside else "shards= names none"
        raise InputError(f"{told}: there are {shards}, from 0.")
    return numbers


def part_of(text: str) -> Share:
    """What "2/8" says: the second of eight parts; InputError for what is none."""
    found = _PART.fullmatch(text)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise InputError(
            f"shards={text!r}: give a part as '1/8' to '8/8' (counted from 1: of an array job, its "
            f"task number where that begins with 1), or the numbers of shards, from 0."
        )
    return Share(part - 1, parts)


def ranks_here() -> Share:
    """The rank of this process, as torch.distributed or the environment of torchrun has it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Share(torch.distributed.get_rank(), torch.distributed.get_world_size())
    rank, ranks = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdigit() and ranks.isdigit()):
        return Share()
    if int(rank) >= int(ranks):
        raise InputError(f"the environment says RANK={rank} of WORLD_SIZE={ranks}: from 0.")
    return Share(int(rank), int(ranks))

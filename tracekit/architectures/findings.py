"""What a proof of names found: claim by claim, how far the numbers are off, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

# Over the largest value: what different orders of summing may come to.
TOLERANCES: Final = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}


@final
@dataclass(frozen=True)
class Claim:
    """One thing that a name says of a model, held against its numbers.

    `deviation` is over the largest value; None where nothing could be compared, or where what was
    checked is no number. `is_right` is None where nothing was checked, for the reason in `why`.
    """

    where: str  # "layers.3"; "" for the model itself
    name: str
    claim: str
    is_right: bool | None
    deviation: float | None = None
    why: str = ""

    def __str__(self) -> str:
        verdict = {True: "right", False: "WRONG", None: "not checked"}[self.is_right]
        size = "" if self.deviation is None else f"{self.deviation:.1e}"
        why = f" ({self.why})" if self.why else ""
        return f"{self.where:16} {self.name:18} {size:>7}  {verdict}: {self.claim}{why}"


@final
class Proof(Sequence[Claim]):
    """What was found of each name; true if something was checked and nothing is wrong."""

    def __init__(self, family: str, claims: Sequence[Claim]) -> None:
        self.family = family
        self._claims = tuple(claims)

    def __bool__(self) -> bool:
        return not self.failed and any(claim.is_right for claim in self._claims)

    @property
    def failed(self) -> list[Claim]:
        """The claims that do not hold."""
        return [claim for claim in self._claims if claim.is_right is False]

    @property
    def open(self) -> list[Claim]:
        """The claims that could not be checked."""
        return [claim for claim in self._claims if claim.is_right is None]

    @property
    def largest(self) -> float:
        """The largest deviation among the claims that hold."""
        return max((each.deviation or 0.0 for each in self._claims if each.is_right), default=0.0)

    def __getitem__(self, index: Any) -> Any:
        return self._claims[index]

    def __len__(self) -> int:
        return len(self._claims)

    def __repr__(self) -> str:
        right = sum(claim.is_right is True for claim in self._claims)
        head = (
            f"{self.family}: {'PROVED' if self else 'NOT PROVED'}: {right} of {len(self)} claims "
            f"hold, {len(self.failed)} do not, {len(self.open)} could not be checked; "
            f"largest deviation {self.largest:.1e}"
        )
        return "\n".join([head, *(f"  {claim}" for claim in self.failed)])

    @property
    def report(self) -> str:
        """Every claim, a line for each."""
        return "\n".join(map(str, self._claims))


def compared(where: str, name: str, claim: str, found: Tensor, expected: Tensor) -> Claim:
    """The claim that `found` is `expected`, up to rounding."""
    if found.shape != expected.shape:
        why = f"shapes {list(found.shape)} and {list(expected.shape)}"
        return Claim(where, name, claim, False, None, why)
    size = deviation(found, expected)
    return Claim(where, name, claim, size <= tolerance(found), size)


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest value; infinite where one is not a number."""
    if found.numel() == 0:
        return 0.0
    found, expected = found.double(), expected.double()
    size = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    return float("inf") if math.isnan(size) else size


def tolerance(tensor: Tensor) -> float:
    """How far two ways to a number may be apart in this dtype."""
    return TOLERANCES.get(tensor.dtype, 0.0)

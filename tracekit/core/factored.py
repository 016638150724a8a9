"""A matrix that is a product of two thin ones, worked with without ever being multiplied out."""

# The idea, and what it is for (the QK and OV circuits of attention heads), are of Elhage et al.
# 2021, "A Mathematical Framework for Transformer Circuits"; TransformerLens has a class like this.

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from tracekit.errors import InputError


class SVD(NamedTuple):
    """`U @ diag(S) @ Vh`, for each matrix of a stack; largest first."""

    U: Tensor  # [..., left, rank]
    S: Tensor  # [..., rank]
    Vh: Tensor  # [..., rank, right]


@final
class FactoredMatrix:
    """`A @ B`, for A `[..., left, inner]` and B `[..., inner, right]`; leading axes broadcast.

    Vectors multiply from the left, as in `x @ W`: `FactoredMatrix(W_V, W_O)` maps what a head reads
    to what it writes.
    """

    __slots__ = ("_first", "_second")

    def __init__(self, A: Tensor, B: Tensor) -> None:
        if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2]:
            raise InputError(
                f"A [..., left, inner] and B [..., inner, right] are needed, and their shapes are "
                f"{list(A.shape)} and {list(B.shape)}."
            )
        stack = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        self._first = A.expand(*stack, *A.shape[-2:])
        self._second = B.expand(*stack, *B.shape[-2:])

    @property
    def A(self) -> Tensor:
        """The first factor, `[..., left, inner]`."""
        return self._first

    @property
    def B(self) -> Tensor:
        """The second factor, `[..., inner, right]`."""
        return self._second

    @property
    def AB(self) -> Tensor:
        """The matrix itself, multiplied out: `[..., left, right]`."""
        return self.A @ self.B

    @property
    def T(self) -> FactoredMatrix:
        """The transpose."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @property
    def shape(self) -> torch.Size:
        """Of the matrix: `[..., left, right]`."""
        return torch.Size((*self.A.shape[:-1], self.B.shape[-1]))

    @property
    def ndim(self) -> int:
        """How many axes the matrix has, the leading ones counted."""
        return self.A.ndim

    def __matmul__(self, other: Tensor | FactoredMatrix) -> Any:
        """`self @ other`: factored again, with the thinner inner axis; a tensor for a vector."""
        if isinstance(other, FactoredMatrix):
            between = self.B @ other.A
            if between.shape[-2] > between.shape[-1]:
                return FactoredMatrix(self.A @ between, other.B)
            return FactoredMatrix(self.A, between @ other.B)
        if other.ndim == 1:
            return (self.A @ (self.B @ other).unsqueeze(-1)).squeeze(-1)
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> Any:
        """`other @ self`: factored again; a tensor for a vector."""
        if other.ndim == 1:
            return ((other @ self.A).unsqueeze(-2) @ self.B).squeeze(-2)
        return FactoredMatrix(other @ self.A, self.B)

    def __mul__(self, number: float | Tensor) -> FactoredMatrix:
        """The matrix times a number; for a stack, a tensor of numbers `[..., 1, 1]`."""
        return FactoredMatrix(self.A * number, self.B)

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> FactoredMatrix:
        """Of the leading axes what `key` picks, as of a tensor: `OV[3, 2]` is one head's.

        Behind them, rows and columns may be picked by slices and lists: `OV[3, 2, :8, :]`.
        """
        keys = key if isinstance(key, tuple) else (key,)
        keys = _without_ellipsis(keys, self.ndim)
        stack, rest = keys[: self.ndim - 2], keys[self.ndim - 2 :]
        if any(isinstance(each, int) for each in rest):
            raise InputError(
                "rows and columns of a FactoredMatrix are picked by slices, as in [..., 3:4, :]; "
                ".AB[..., 3, :] is the row itself."
            )
        first, second = self.A[stack], self.B[stack]
        first = first[(..., rest[0], slice(None))] if rest else first
        second = second[(..., rest[1])] if len(rest) > 1 else second
        return FactoredMatrix(first, second)

    def svd(self) -> SVD:
        """Singular values and vectors, from a decomposition as small as `inner` allows."""
        left, A = torch.linalg.qr(self.A)
        right, B = torch.linalg.qr(self.B.mT)
        U, S, Vh = torch.linalg.svd(A @ B.mT, full_matrices=False)
        return SVD(left @ U, S, Vh @ right.mT)

    @property
    def eigenvalues(self) -> Tensor:
        """Complex, `[..., inner]`: those of a square matrix that may not be zero."""
        if self.shape[-1] != self.shape[-2]:
            raise InputError(f"only square matrices have eigenvalues, not {list(self.shape)}.")
        if self.A.shape[-1] > self.A.shape[-2]:
            return torch.linalg.eigvals(self.AB)
        return torch.linalg.eigvals(self.B @ self.A)

    def norm(self) -> Tensor:
        """The Frobenius norm of each matrix: `[...]`."""
        A, B = torch.linalg.qr(self.A, mode="r").R, torch.linalg.qr(self.B.mT, mode="r").R
        return torch.linalg.matrix_norm(A @ B.mT)

    def __repr__(self) -> str:
        return f"FactoredMatrix({list(self.shape)}, inner {self.A.shape[-1]})"


def _without_ellipsis(keys: tuple[Any, ...], ndim: int) -> tuple[Any, ...]:
    at = next((place for place, key in enumerate(keys) if key is Ellipsis), None)
    if at is None:  # looked for by identity, as a tensor among the keys can't be compared
        return keys
    missing = ndim - len(keys) + 1
    return (*keys[:at], *[slice(None)] * missing, *keys[at + 1 :])

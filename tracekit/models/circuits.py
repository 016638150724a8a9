"""How much heads read of what earlier heads write: composition scores, of weights alone."""

# Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (Composition): the norm of
# the product of two circuits over the product of their norms. 0 is none; random matrices are not 0.

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from tracekit.architectures import Stacked
from tracekit.core.factored import FactoredMatrix
from tracekit.errors import InputError

MODES: Final = {"Q": "queries", "K": "keys", "V": "values"}


class CompositionScores(NamedTuple):
    """`values[i, g, j, h]`: how much head h of layers[j] reads of head g of layers[i], i < j.

    Elsewhere it is 0. `labels` are of the heads, flattened: "L0H0", "L0H1", …
    """

    values: Tensor  # [layers, heads, layers, heads]
    layers: tuple[int, ...]
    labels: tuple[str, ...]

    def __repr__(self) -> str:
        heads = f"{self.labels[0]} … {self.labels[-1]}"
        return f"CompositionScores({list(self.values.shape)}: {heads})"


def composition_scores(mode: str, QK: Stacked, OV: Stacked) -> CompositionScores:
    """Of every head with every head of a later layer, through its queries, keys or values."""
    if mode not in MODES:
        raise InputError(f"heads compose through 'Q', 'K' or 'V', not {mode!r}.")
    layers = tuple(layer for layer in QK.layers if layer in OV.layers)
    writes = _in_float(OV, layers)
    reads = _in_float(QK, layers) if mode in "QK" else writes
    reads = reads.T if mode == "K" else reads
    count, heads = writes.shape[:2]
    values = writes.A.new_zeros(count, heads, count, heads)
    sizes, others = writes.norm(), reads.norm()
    for earlier in range(count):
        for later in range(earlier + 1, count):
            both = _norms(writes[earlier], reads[later])
            values[earlier, :, later] = both / (sizes[earlier, :, None] * others[later, None, :])
    labels = tuple(f"L{layer}H{head}" for layer in layers for head in range(heads))
    return CompositionScores(values, layers, labels)


def _in_float(circuits: Stacked, layers: tuple[int, ...]) -> FactoredMatrix:
    assert isinstance(circuits.value, FactoredMatrix)
    places = [circuits.layers.index(layer) for layer in layers]
    A, B = circuits.value.A[places].detach(), circuits.value.B[places].detach()
    is_half = A.dtype in (torch.float16, torch.bfloat16)
    return FactoredMatrix(A.float(), B.float()) if is_half else FactoredMatrix(A, B)


def _norms(left: FactoredMatrix, right: FactoredMatrix) -> Tensor:
    """Of the products of every matrix with every: `[heads, heads]`."""
    A = torch.linalg.qr(left.A, mode="r").R
    B = torch.linalg.qr(right.B.mT, mode="r").R
    between = left.B.unsqueeze(1) @ right.A.unsqueeze(0)
    return torch.linalg.matrix_norm(A.unsqueeze(1) @ between @ B.mT.unsqueeze(0))

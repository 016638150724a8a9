"""A FactoredMatrix does what the matrix does that it stands for."""

from __future__ import annotations

import pytest
import torch

from tracekit import FactoredMatrix
from tracekit.errors import InputError


@pytest.fixture
def pair() -> tuple[FactoredMatrix, torch.Tensor]:
    torch.manual_seed(0)
    A, B = torch.randn(3, 2, 7, 4), torch.randn(3, 2, 4, 7)
    return FactoredMatrix(A, B), A @ B


def test_it_multiplies_as_the_matrix_does(pair: tuple[FactoredMatrix, torch.Tensor]) -> None:
    factored, matrix = pair
    torch.testing.assert_close(factored.AB, matrix)
    torch.testing.assert_close(factored.T.AB, matrix.mT)
    other, vector = torch.randn(7, 9), torch.randn(7)
    torch.testing.assert_close((factored @ other).AB, matrix @ other)
    torch.testing.assert_close((other.T @ factored).AB, other.T @ matrix)
    torch.testing.assert_close(factored @ vector, matrix @ vector)
    torch.testing.assert_close(vector @ factored, vector @ matrix)
    torch.testing.assert_close((factored @ factored.T).AB, matrix @ matrix.mT)
    torch.testing.assert_close((2 * factored).AB, 2 * matrix)


def test_a_product_keeps_the_thinner_inner_axis() -> None:
    wide = FactoredMatrix(torch.randn(7, 5), torch.randn(5, 7))
    thin = FactoredMatrix(torch.randn(7, 2), torch.randn(2, 7))
    for product in (wide @ thin, thin @ wide):
        assert product.A.shape == (7, 2)


def test_its_singular_values_and_norm_are_the_matrix_s(
    pair: tuple[FactoredMatrix, torch.Tensor],
) -> None:
    factored, matrix = pair
    U, S, Vh = factored.svd()
    torch.testing.assert_close(S, torch.linalg.svdvals(matrix)[..., :4])
    torch.testing.assert_close(U @ torch.diag_embed(S) @ Vh, matrix)
    torch.testing.assert_close(U.mT @ U, torch.eye(4).expand(3, 2, 4, 4))
    torch.testing.assert_close(factored.norm(), torch.linalg.matrix_norm(matrix))


def test_its_eigenvalues_are_those_of_the_matrix_that_are_not_zero() -> None:
    torch.manual_seed(0)
    factored = FactoredMatrix(torch.randn(7, 3), torch.randn(3, 7))
    every = torch.linalg.eigvals(factored.AB)
    largest = every[every.abs().argsort(descending=True)[:3]]
    mine = factored.eigenvalues
    assert mine.shape == (3,)
    torch.testing.assert_close(mine.sum(), largest.sum())
    torch.testing.assert_close(mine.abs().sort().values, largest.abs().sort().values)


def test_its_parts_are_the_matrix_s(pair: tuple[FactoredMatrix, torch.Tensor]) -> None:
    factored, matrix = pair
    assert factored.shape == matrix.shape
    assert factored.ndim == 4
    torch.testing.assert_close(factored[1].AB, matrix[1])
    torch.testing.assert_close(factored[1, 0].AB, matrix[1, 0])
    torch.testing.assert_close(factored[[0, 2]].AB, matrix[[0, 2]])
    torch.testing.assert_close(factored[..., 1:3, :].AB, matrix[..., 1:3, :])
    torch.testing.assert_close(factored[2, 1, :5, [0, 6]].AB, matrix[2, 1, :5, [0, 6]])


def test_leading_axes_broadcast() -> None:
    A, B = torch.randn(3, 1, 5, 2), torch.randn(4, 2, 5)
    factored = FactoredMatrix(A, B)
    assert factored.shape == (3, 4, 5, 5)
    torch.testing.assert_close(factored[2, 3].AB, A[2, 0] @ B[3])


def test_what_is_no_product_is_refused() -> None:
    with pytest.raises(InputError, match=r"shapes are \[3, 2\] and \[3, 2\]"):
        FactoredMatrix(torch.randn(3, 2), torch.randn(3, 2))
    oblong = FactoredMatrix(torch.randn(3, 2), torch.randn(2, 4))
    with pytest.raises(InputError, match="only square"):
        oblong.eigenvalues
    with pytest.raises(InputError, match="picked by slices"):
        oblong[1]

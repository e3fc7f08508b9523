"""Hadamard matrices of the sizes that language models have, built and not stored, and their fast application.

A size n = 2^k m has a matrix when m is 1 or the order of a Paley matrix: q + 1 for a prime power q = 3 mod 4 (first
construction), 2 (q + 1) for a prime power q = 1 mod 4 (second construction). R. E. A. C. Paley, On orthogonal
matrices, Journal of Mathematics and Physics 12, 1933; the Kronecker step is J. J. Sylvester's, 1867.

Shapes: ``...`` any leading dimensions, n the rotated dimension.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch

from masq.errors import ConfigError
from masq.numerics.paley import factor, paley_field, quadratic_character


@lru_cache(maxsize=32)
def hadamard_matrix(n: int) -> torch.Tensor:
    """A Hadamard matrix: entries +-1, ``H H^T = n I``.

    Args:
        n: size.

    Returns:
        float64 [n, n], the Kronecker product of Sylvester's 2^k and the dense factor of ``factor``; do not change it.

    Raises:
        ConfigError: no construction is known here for ``n``.
    """
    power, order = factor(n)
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(power):
        sylvester = torch.kron(sylvester, pair)
    return torch.kron(sylvester, paley_matrix(order))


@lru_cache(maxsize=32)
def paley_matrix(order: int) -> torch.Tensor:
    """Dense Hadamard matrix of a Paley order (or 1), float64 [order, order].

    Raises:
        ConfigError: ``order`` is not one.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    field = paley_field(order)
    if field is None:
        raise ConfigError("a dense Hadamard factor needs a Paley order", value=order, remedy="for example 12, 20, 28")
    core = _conference(*field)
    eye = torch.eye(len(core), dtype=torch.float64)
    if len(core) == order:
        # First construction: the conference matrix C is skew, (C + I)(C + I)^T = C C^T + I = (q + 1) I.
        return core + eye
    # Second construction: C is symmetric with zero diagonal; each entry becomes a 2 x 2 block.
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(eye, minus)


@lru_cache(maxsize=64)
def _paley_like(order: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """``paley_matrix`` where it is needed: a GPU is not sent it again for every row, nor inside a captured graph."""
    return paley_matrix(order).to(device, dtype)


def random_signs(n: int, *key: object) -> torch.Tensor:
    """Signs +-1, float64 [n], of a stream of its own for ``key`` (seed, stage, place)."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)
    return torch.randint(0, 2, (n,), generator=generator, dtype=torch.int64).double() * 2 - 1


def rotate(x: torch.Tensor, signs: torch.Tensor | None = None) -> torch.Tensor:
    """``x D H^T / sqrt(n)`` along the last dimension: an orthogonal map, in n log n and one small dense product.

    Args:
        x: floating point [..., n]; computed in its own dtype.
        signs: diagonal of D, [n], None for the identity.

    Returns:
        [..., n] in the dtype of ``x``.

    Raises:
        ConfigError: no matrix of this size.
    """
    n = x.shape[-1]
    power, order = factor(n)
    y = x if signs is None else x * signs.to(x)
    y = y.reshape(-1, 2**power, order)
    if order > 1:
        y = y @ _paley_like(order, y.device, y.dtype).t()
    return (_butterfly(y).reshape(x.shape) * n**-0.5).to(x.dtype)


def rotate_back(x: torch.Tensor, signs: torch.Tensor | None = None) -> torch.Tensor:
    """Inverse of ``rotate``: ``x H D / sqrt(n)``. Arguments and result as there."""
    n = x.shape[-1]
    power, order = factor(n)
    y = x.reshape(-1, 2**power, order)
    if order > 1:
        y = y @ _paley_like(order, y.device, y.dtype)
    # Sylvester's factor is symmetric: the same butterfly undoes it.
    y = (_butterfly(y).reshape(x.shape) * n**-0.5).to(x.dtype)
    return y if signs is None else y * signs.to(y)


def _butterfly(x: torch.Tensor) -> torch.Tensor:
    """Multiply [N, 2^k, m] by Sylvester's matrix along the middle: k passes of sums and differences."""
    size, order, half = x.shape[1], x.shape[2], 1
    while half < size:
        pairs = x.reshape(-1, size // (2 * half), 2, half, order)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        half *= 2
    return x


def _conference(prime: int, exponent: int) -> torch.Tensor:
    """Conference matrix [q + 1, q + 1] of GF(q): zero diagonal, a border of ones, chi(a_i - a_j) inside."""
    elements, character = quadratic_character(prime, exponent)
    q = len(elements)
    inside = [
        [character[tuple((a - b) % prime for a, b in zip(row, column, strict=True))] for column in elements]
        for row in elements
    ]
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:] = 1
    core[1:, 0] = -1 if q % 4 == 3 else 1
    core[1:, 1:] = torch.tensor(inside, dtype=torch.float64)
    return core

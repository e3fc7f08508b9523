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

# Orders above this would make the dense factor the cost of a fast transform; 344 serves 11008 channels.
_LARGEST_FACTOR = 400


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


@lru_cache(maxsize=256)
def factor(n: int) -> tuple[int, int]:
    """``(k, m)`` with n = 2^k m, m the smallest order (1 if it can be) that has a dense factor.

    Raises:
        ConfigError: there is none.
    """
    power, rest = 0, n
    while rest > 1 and rest % 2 == 0:
        power, rest = power + 1, rest // 2
    # Paley orders above 1 are multiples of 4, so two of the twos go into the dense factor at least.
    for taken in range(power + 1):
        order = rest * 2**taken
        if n > 0 and order <= _LARGEST_FACTOR and (order == 1 or _paley_field(order) is not None):
            return power - taken, order
    raise ConfigError(
        "a Hadamard rotation needs a size 2^k m with m the order of a Paley matrix",
        value=n,
        remedy="use method.rotation=none for this model",
    )


@lru_cache(maxsize=32)
def paley_matrix(order: int) -> torch.Tensor:
    """Dense Hadamard matrix of a Paley order (or 1), float64 [order, order].

    Raises:
        ConfigError: ``order`` is not one.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    field = _paley_field(order)
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
        y = y @ paley_matrix(order).to(y).t()
    half = 1
    while half < 2**power:
        pairs = y.view(-1, 2**power // (2 * half), 2, half, order)
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        half *= 2
    return (y.reshape(x.shape) * n**-0.5).to(x.dtype)


def rotate_back(x: torch.Tensor, signs: torch.Tensor | None = None) -> torch.Tensor:
    """Inverse of ``rotate``: ``x H D / sqrt(n)``. Arguments and result as there."""
    n = x.shape[-1]
    power, order = factor(n)
    y = x.reshape(-1, 2**power, order)
    if order > 1:
        y = y @ paley_matrix(order).to(y)
    # Sylvester's factor is symmetric: the same butterfly undoes it.
    half = 1
    while half < 2**power:
        pairs = y.view(-1, 2**power // (2 * half), 2, half, order)
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        half *= 2
    y = (y.reshape(x.shape) * n**-0.5).to(x.dtype)
    return y if signs is None else y * signs.to(y)


def _paley_field(order: int) -> tuple[int, int] | None:
    """Prime p and exponent e of the field behind a Paley order, None if there is none."""
    if order % 4:
        return None
    first = _prime_power(order - 1)
    if first is not None and (order - 1) % 4 == 3:
        return first
    second = _prime_power(order // 2 - 1)
    return second if second is not None and (order // 2 - 1) % 4 == 1 else None


def _prime_power(q: int) -> tuple[int, int] | None:
    if q < 2:
        return None
    prime = next((p for p in range(2, int(q**0.5) + 1) if q % p == 0), q)
    exponent, rest = 0, q
    while rest % prime == 0:
        exponent, rest = exponent + 1, rest // prime
    return (prime, exponent) if rest == 1 else None


def _conference(prime: int, exponent: int) -> torch.Tensor:
    """Conference matrix [q + 1, q + 1] of GF(q): zero diagonal, a border of ones, chi(a_i - a_j) inside."""
    elements, character = _quadratic_character(prime, exponent)
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


def _quadratic_character(prime: int, exponent: int) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]:
    """Elements of GF(p^e) as coefficient tuples, and chi: 0 at zero, 1 at squares, -1 elsewhere."""
    elements = [tuple(value // prime**i % prime for i in range(exponent)) for value in range(prime**exponent)]
    modulus = _irreducible(prime, exponent)
    squares = {_multiply(element, element, modulus, prime) for element in elements[1:]}
    zero = elements[0]
    return elements, {element: 0 if element == zero else 1 if element in squares else -1 for element in elements}


def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """Low coefficients c of a monic irreducible x^d + c: for d of 2 or 3, a polynomial without a root.

    Raises:
        ConfigError: a degree above 3; no model size so far needs one.
    """
    if degree == 1:
        return (0,)
    if degree > 3:
        raise ConfigError("fields of degree above 3 are not built", value=f"{prime}^{degree}")
    for value in range(1, prime**degree):
        low = tuple(value // prime**i % prime for i in range(degree))
        if all((x**degree + sum(c * x**i for i, c in enumerate(low))) % prime for x in range(prime)):
            return low
    raise AssertionError("every finite field has an irreducible polynomial of every degree")


def _multiply(a: tuple[int, ...], b: tuple[int, ...], low: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """Product in GF(p)[x] / (x^d + low)."""
    degree = len(a)
    product = [0] * (2 * degree - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    for top in range(2 * degree - 2, degree - 1, -1):
        lead, product[top] = product[top], 0
        for i, c in enumerate(low):
            product[top - degree + i] -= lead * c
    return tuple(value % prime for value in product[:degree])

"""Which sizes have a Hadamard matrix, and the finite fields behind Paley's constructions. No torch here."""

from __future__ import annotations

from functools import lru_cache

from masq.errors import ConfigError

# Orders above this would make the dense factor the cost of a fast transform; 344 serves 11008 channels.
_LARGEST_FACTOR = 400


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
        if n > 0 and order <= _LARGEST_FACTOR and (order == 1 or paley_field(order) is not None):
            return power - taken, order
    raise ConfigError(
        "a Hadamard rotation needs a size 2^k m with m the order of a Paley matrix",
        value=n,
        remedy="use method.rotation=none for this model",
    )


def paley_field(order: int) -> tuple[int, int] | None:
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


def quadratic_character(prime: int, exponent: int) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]:
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

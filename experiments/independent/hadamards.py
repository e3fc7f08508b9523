"""Hadamard matrices of other packages against masq's."""

from __future__ import annotations

from typing import Any

import torch

from experiments.independent.verdicts import CHOICE, DIFFERENT, EQUAL
from masq.errors import ConfigError
from masq.numerics.hadamard import hadamard_matrix
from masq.numerics.paley import factor

Spec = dict[str, Any]


def figures(theirs: torch.Tensor) -> Spec:
    """Whether a matrix [n, n] is a Hadamard matrix, and masq's."""
    order, matrix = len(theirs), theirs.double()
    found: Spec = {"orthogonal": bool(torch.equal(matrix @ matrix.t(), order * torch.eye(order).double()))}
    try:
        ours = hadamard_matrix(order)
    except ConfigError:
        return found | {"masq_has_it": False, "equal": False}
    orthogonal = bool(torch.equal(ours @ ours.t(), order * torch.eye(order).double()))
    return found | {"masq_has_it": True, "masq_orthogonal": orthogonal, "equal": bool(torch.equal(ours, matrix))}


def verdict(found: dict[str, Spec]) -> tuple[str, str]:
    """Verdict over all orders: equal where Sylvester's construction fixes the matrix, valid everywhere."""
    valid = all(one["orthogonal"] and one.get("masq_orthogonal", True) for one in found.values())
    powers = [one["equal"] for order, one in found.items() if int(order).bit_count() == 1]
    if not valid or not all(powers):
        return DIFFERENT, ""
    others = [order for order, one in found.items() if not one["equal"]]
    text = (
        "powers of two are equal; of the other orders there are many Hadamard matrices, the package has tables and "
        f"masq Paley's: {', '.join(others)} are others, and all are orthogonal"
    )
    return (CHOICE, text) if others else (EQUAL, "")


def without_matrix(orders: list[int]) -> list[int]:
    """Orders of a list for which masq builds no Hadamard matrix."""
    return [order for order in orders if not _has_matrix(order)]


def _has_matrix(order: int) -> bool:
    try:
        factor(order)
    except ConfigError:
        return False
    return True

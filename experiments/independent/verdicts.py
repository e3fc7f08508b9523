"""How a check may end."""

from __future__ import annotations

EQUAL = "equal"
"""Scales, zero points and codes, to the last bit; factors to float32 rounding."""
TIES = "equal but for ties"
"""Other codes only for values half-way between two levels; the package's order of operations gives all its codes."""
PRECISION = "equal but for precision"
"""The package, told to compute in float64 as masq does, gives masq's codes."""
RULE = "another rule, reproduced"
"""The package has another convention: that rule gives its result exactly, or without it the package gives masq's."""
CHOICE = "another choice, as valid"
"""The definition leaves it open, and both results fulfil it exactly."""
DIFFERENT = "different"
"""None of these."""

VERDICTS = (EQUAL, TIES, PRECISION, RULE, CHOICE, DIFFERENT)

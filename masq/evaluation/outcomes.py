"""What one metric of one task made of every sample: enough for its score, its error and any paired comparison.

In a record outcomes are JSON, kept short: right and wrong are one string of ones and zeros, denominators that are all 1
are null, whole numbers have no decimals, and answers are digests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from masq.errors import DataError
from masq.files import canonical_hash

TRANSFORMS = ("identity", "exp")
# Two different answers to one sample share a digest once in four thousand million.
_DIGEST_CHARACTERS = 8


@dataclass(frozen=True)
class Outcomes:
    """One metric of one task, sample by sample; its value is a ratio of sums, or the exponential of one.

    Attributes:
        metric: its name.
        higher_is_better: direction.
        samples: SHA-256 of the sample ids in order (`hash_samples`); outcomes pair only where it is equal.
        numerators: per sample; exact match: 1 if right, else 0; word error rate: errors; perplexity: NLL in nats.
        denominators: per sample; exact match: 1; word error rate: words of the reference; perplexity: tokens. None
            stands for 1 everywhere. A sample with 0 (a passage without predicted tokens) has numerator 0 as well.
        transform: "exp" where the value is the exponential of the ratio (perplexity), else "identity".
        groups: number of the cluster each sample belongs to (`number_groups`), where samples are not independent:
            several questions about one picture. None where they are.
        answers: digest of what was answered to each sample (`digests`), None for metrics without answers.

    Raises:
        DataError: fields that contradict each other, or numbers that are not finite.
    """

    metric: str
    higher_is_better: bool
    samples: str
    numerators: tuple[float, ...]
    denominators: tuple[float, ...] | None = None
    transform: Literal["identity", "exp"] = "identity"
    groups: tuple[int, ...] | None = None
    answers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, kind in (("numerators", float), ("denominators", float), ("groups", int), ("answers", str)):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, tuple(kind(value) for value in values))
        if self.denominators is None:
            object.__setattr__(self, "denominators", (1.0,) * self.n)
        _check(self)

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.numerators)

    @property
    def counts(self) -> tuple[float, ...]:
        """The denominators, 1 each where none were given."""
        assert self.denominators is not None
        return self.denominators

    @property
    def is_binary(self) -> bool:
        """Whether every sample counts alike and is either right or wrong."""
        ones = all(count == 1 for count in self.counts)
        return self.transform == "identity" and ones and set(self.numerators) <= {0.0, 1.0}

    @property
    def is_clustered(self) -> bool:
        """Whether any two samples belong together."""
        return self.groups is not None and len(set(self.groups)) < self.n

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON, in the short form that records hold."""
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        plain["numerators"] = (
            "".join(str(int(hit)) for hit in self.numerators) if self.is_binary else _short(self.numerators)
        )
        plain["denominators"] = None if all(count == 1 for count in self.counts) else _short(self.counts)
        plain["groups"] = None if self.groups is None else list(self.groups)
        plain["answers"] = None if self.answers is None else " ".join(self.answers)
        return plain

    @classmethod
    def from_dict(cls, plain: object) -> Outcomes:
        """The inverse of ``to_dict``.

        Raises:
            DataError: unknown or missing keys, values of a wrong type, or fields that contradict each other.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        keys = set(cast("dict[str, Any]", plain)) if isinstance(plain, dict) else set()
        if keys != set(names):
            raise DataError("outcomes must hold exactly " + ", ".join(names), value=", ".join(sorted(keys)) or plain)
        content = cast("dict[str, Any]", plain)
        numerators, answers = content["numerators"], content["answers"]
        if isinstance(numerators, str) and set(numerators) <= {"0", "1"}:
            numerators = [int(hit) for hit in numerators]
        _check_types(content | {"numerators": numerators})
        return cls(**content | {"numerators": numerators, "answers": None if answers is None else answers.split(" ")})


def hash_samples(ids: Iterable[str]) -> str:
    """SHA-256 of sample ids in order."""
    return canonical_hash(list(ids))


def number_groups(labels: Iterable[Hashable]) -> tuple[int, ...]:
    """Clusters numbered from 0 as they first appear: a short form of any labels, such as hashes of pictures."""
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(label, len(numbers)) for label in labels)


def digests(answers: Iterable[str]) -> tuple[str, ...]:
    """Short digests of answers, equal where the answers are; normalise them first as the metric does."""
    return tuple(hashlib.sha256(answer.encode()).hexdigest()[:_DIGEST_CHARACTERS] for answer in answers)


def _short(values: Sequence[float]) -> list[float]:
    whole = all(value.is_integer() for value in values)
    return [int(value) for value in values] if whole else list(values)


def _check(outcomes: Outcomes) -> None:
    """The rules that hold between the fields."""
    if not outcomes.n:
        raise DataError("outcomes need at least one sample", value=0)
    if outcomes.transform not in TRANSFORMS:
        raise DataError(f"transform must be one of {', '.join(TRANSFORMS)}", value=outcomes.transform)
    if not re.fullmatch("[0-9a-f]{64}", outcomes.samples):
        raise DataError("samples must be a SHA-256 in hexadecimal", value=outcomes.samples, remedy="use hash_samples")
    for name in ("denominators", "groups", "answers"):
        values = getattr(outcomes, name)
        if values is not None and len(values) != outcomes.n:
            raise DataError(f"{name} must be as many as numerators", value=f"{len(values)} for {outcomes.n}")
    if not all(answer and not re.search(r"\s", answer) for answer in outcomes.answers or ()):
        raise DataError("answers must be digests, without spaces", value=outcomes.metric, remedy="use digests")
    _check_numbers(outcomes)


def _check_numbers(outcomes: Outcomes) -> None:
    """Numerators and denominators make ratios."""
    if not all(map(math.isfinite, (*outcomes.numerators, *outcomes.counts))):
        raise DataError("numerators and denominators must be finite", value=outcomes.metric)
    if min(outcomes.counts) < 0 or not any(outcomes.counts):
        raise DataError("denominators must not be negative, nor all 0", value=min(outcomes.counts))
    if any(a and not b for a, b in zip(outcomes.numerators, outcomes.counts, strict=True)):
        raise DataError("a numerator must be 0 where its denominator is 0", value=outcomes.metric)


def _check_types(plain: dict[str, Any]) -> None:
    """The types that JSON may hold in each field."""
    rules: dict[str, tuple[str, bool]] = {
        "metric": ("text", isinstance(plain["metric"], str)),
        "higher_is_better": ("true or false", isinstance(plain["higher_is_better"], bool)),
        "samples": ("text", isinstance(plain["samples"], str)),
        "numerators": ("a list of numbers, or a text of zeros and ones", _are(plain["numerators"], (int, float))),
        "denominators": (
            "a list of numbers or null",
            plain["denominators"] is None or _are(plain["denominators"], (int, float)),
        ),
        "transform": ("text", isinstance(plain["transform"], str)),
        "groups": ("a list of whole numbers or null", plain["groups"] is None or _are(plain["groups"], (int,))),
        "answers": ("text or null", plain["answers"] is None or isinstance(plain["answers"], str)),
    }
    for name, (wanted, holds) in rules.items():
        if not holds:
            raise DataError(f"{name} of outcomes must be {wanted}", value=repr(plain[name])[:80])


def _are(values: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, kinds) and not isinstance(value, bool) for value in values
    )

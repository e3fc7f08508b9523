"""The measurement behind figures 5 and 6: ranks and energies against plain linear algebra in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from experiments.residual.measure import RATIOS, effective_rank, measure_linear, spectra, sqnr_by_ratio
from experiments.residual.report import report
from masq.calibration.statistics import GroupStatistics
from masq.compensation.low_rank import fit_low_rank_from_covariance
from masq.files import read_json
from masq.models.base import Modality
from masq.numerics.affine import fake_quantize
from masq.numerics.linalg import whitener
from masq.numerics.scheme import TensorFormat

ROOT = Path(__file__).parent.parent
INNER, OUTER = 20, 33
FORMAT = TensorFormat(4)


def test_the_committed_table_is_that_of_the_record() -> None:
    measured = read_json(ROOT / "results" / "residual" / "smol_omni.json")
    assert measured["provenance"]["dirty"] is False
    assert (ROOT / "results" / "tables" / "residual.md").read_text() == report(measured)


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_effective_rank_of_known_spectra() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([9.0, 0.0, 0.0])) == pytest.approx(1)
    shares = torch.tensor([0.8, 0.2])
    entropy = -(shares * shares.log()).sum()
    assert effective_rank(shares.square()) == pytest.approx(float(entropy.exp()))


def test_energies_left_are_those_of_the_fits() -> None:
    """At every rank, against the correction itself: whitened and plain."""
    error, rows = rand(OUTER, INNER, seed=0), rand(50, INNER, seed=1) @ rand(INNER, INNER, seed=2)
    covariance = rows.t() @ rows / len(rows)
    root = whitener(covariance, 1e-4).sqrt
    made = spectra(error.t(), root)
    whole = float((root @ error.t()).square().sum())
    for kind, left in (("whitened", made["whitened"]), ("plain", made["plain_cost"])):
        assert float(left.sum()) == pytest.approx(whole)
        for rank in (0, 1, 7, INNER):
            fit = fit_low_rank_from_covariance(error, covariance, rank, 1e-4, whiten=kind == "whitened")
            remaining = float((root @ (error.t() - fit.left @ fit.right)).square().sum())
            assert float(left[rank:].sum()) == pytest.approx(remaining, abs=1e-9 * whole), (kind, rank)


def test_sqnr_grows_with_the_rank_and_begins_without_a_correction() -> None:
    left = torch.tensor([8.0, 1.0, 0.5, 0.5] * 5, dtype=torch.float64).sort(descending=True).values
    curve = sqnr_by_ratio(100.0, left, len(left))
    assert curve[0] == pytest.approx(10 * math.log10(100 / 50))
    assert curve == sorted(curve)
    assert len(curve) == len(RATIOS)


def test_a_linear_as_the_paper_writes_it() -> None:
    weight = rand(OUTER, INNER, seed=3).float()
    rows = {m: (rand(60, INNER, seed=4 + m) * scale).float() for m, scale in ((Modality.TEXT, 1), (Modality.VISION, 5))}
    stats = GroupStatistics(second_moment={m: (x.double().t() @ x.double()) / len(x) for m, x in rows.items()})
    factors = {Modality.TEXT: torch.full((INNER,), 0.5), Modality.VISION: torch.full((INNER,), 2.0)}
    found = measure_linear(weight, factors, stats, FORMAT)
    assert set(found) == {"given.vision", "text.vision"}
    # Equal factors but for their scale: at text's scale the error is that of rounding alone.
    x = rows[Modality.VISION].double()
    stored = fake_quantize(weight * 0.5, FORMAT).double() / 0.5
    exact = x @ weight.double().t()
    wanted = 10 * math.log10(float(exact.square().sum() / (exact - x @ stored.t()).square().sum()))
    assert found["text.vision"]["sqnr"]["whitened"][0] == pytest.approx(wanted, abs=0.02)
    assert found["given.vision"]["sqnr"]["whitened"][0] < wanted - 3
    assert all(0 < rank <= 1 for rank in found["given.vision"]["effective_rank"].values())

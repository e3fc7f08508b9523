"""Whether tensors are finite, without a copy of their size."""

from __future__ import annotations

import torch


def is_finite(x: torch.Tensor, rows: torch.Tensor | None = None) -> bool:
    """Whether no element is NaN or infinite.

    The largest and the smallest element of a row keep every NaN and infinity, and are several times faster to find than
    a mask of the same size.

    Args:
        x: [..., d], floating point.
        rows: bool [...], the rows that count, on any device; None for all.
    """
    if x.shape[-1] == 0:
        return True
    ends = torch.stack((x.amax(-1), x.amin(-1)))
    if rows is not None:
        ends = ends[:, rows.to(ends.device)]
    return bool(torch.isfinite(ends).all())

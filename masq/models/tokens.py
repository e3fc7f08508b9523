"""Which tokens of a forward call are real, from the attention mask that the call was given. Pure functions of tensors.

Shapes: B batch, T tokens of the call, S tokens that can be attended (past and present, or a static cache's capacity).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from masq.errors import ModelError


def real_tokens(mask: Any, batch: int, num_tokens: int, cache: Any) -> torch.Tensor | None:
    """Which tokens are not padding.

    Args:
        mask: 2-D [B, S] with S >= T (its last T columns belong to the call); 4-D [B or 1, heads, T, S], bool or
            additive float with 0 where attended (a token is padding if it does not see itself); a mapping from the
            kind of attention to such masks, as transformers prepares it for a static cache; or None.
        batch: B.
        num_tokens: T.
        cache: the transformers cache of the call, or None. It tells how many tokens come before a 4-D mask's first row,
            which the columns of a static mask do not.

    Returns:
        bool [B, T], or None if nothing is padded.

    Raises:
        ModelError: the mask does not cover the tokens.
    """
    if isinstance(mask, Mapping):
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is None:
        return None
    if mask.dim() == 2 and mask.shape[1] >= num_tokens:
        return mask[:, mask.shape[1] - num_tokens :].to(torch.bool)
    if mask.dim() == 4 and mask.shape[2] == num_tokens and mask.shape[3] >= num_tokens:
        past = mask.shape[3] - num_tokens if cache is None else int(cache.get_seq_length())
        diagonal = mask[:, 0].diagonal(offset=past, dim1=1, dim2=2)
        seen = diagonal if mask.dtype == torch.bool else diagonal == 0
        return seen.expand(batch, num_tokens)
    raise ModelError(
        "an attention mask must cover the tokens of the call",
        value=f"mask {tuple(mask.shape)} for {num_tokens} tokens",
        remedy="pass a mask [batch, past + tokens] or [batch, heads, tokens, past + tokens]",
    )

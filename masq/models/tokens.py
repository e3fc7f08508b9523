"""Which modality the tokens of a forward call have, and which of them are real, from the call's own arguments alone.

Shapes: B batch, T tokens of the call, S tokens that can be attended (past and present, or a static cache's capacity).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from masq.errors import ModelError
from masq.models.sample import Modality


class TokenModalities:
    """Modality of every token of a call, looked up by its id.

    Args:
        placeholders: modality by token id, for the ids that stand for a piece of image, video or audio.
    """

    def __init__(self, placeholders: Mapping[int, Modality]) -> None:
        self._placeholders = dict(placeholders)
        self._table = torch.zeros(0, dtype=torch.int8)

    def of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Modality of every token of a forward call.

        Args:
            inputs: keyword arguments of the model; ``input_ids`` int64 [B, T] is needed. For the forms that
                ``attention_mask`` may take, see ``real_tokens``.

        Returns:
            int8 [B, T].

        Raises:
            ModelError: no ``input_ids``, or a mask that does not cover the tokens.
        """
        ids = inputs.get("input_ids")
        if ids is None:
            raise ModelError(
                "the modality of tokens is looked up from input_ids",
                value=f"arguments {sorted(name for name, value in inputs.items() if value is not None)}",
                remedy="pass input_ids, or give the modality ids explicitly (ModalityContext.override)",
            )
        table = self._on(ids.device)
        modality = table[ids.clamp(min=0, max=len(table) - 1)]
        real = real_tokens(inputs.get("attention_mask"), ids.shape[0], ids.shape[1], inputs.get("past_key_values"))
        return modality if real is None else modality.masked_fill(~real, int(Modality.PADDING))

    def _on(self, device: torch.device) -> torch.Tensor:
        """Modality id by token id; ids past the last placeholder share the final entry, text."""
        if self._table.device != device or not self._table.numel():
            table = torch.zeros(max(self._placeholders, default=0) + 2, dtype=torch.int8)
            for token_id, modality in self._placeholders.items():
                table[token_id] = int(modality)
            self._table = table.to(device)
        return self._table


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

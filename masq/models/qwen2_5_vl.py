"""Qwen2.5-VL (arXiv 2502.13923): text and vision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from masq.errors import ModelError
from masq.models.base import Modality
from masq.models.decoder import DecoderAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


class Qwen25VLAdapter(DecoderAdapter):
    """``Qwen2_5_VLForConditionalGeneration`` and ``Qwen2_5_VLProcessor``."""

    modalities = (Modality.TEXT, Modality.VISION)
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)

    @staticmethod
    def classes() -> tuple[Any, Any]:
        """The transformers classes of the model and of its processor."""
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

        return Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    def projectors(self) -> list[nn.Linear]:
        """The last linear of the vision tower's patch merger."""
        return [self.model.model.visual.merger.mlp[-1]]

    def placeholders(self) -> dict[int, Modality]:
        """Image and video pads."""
        config = self.model.config
        return {config.image_token_id: Modality.VISION, config.video_token_id: Modality.VISION}

    @staticmethod
    def check_call(inputs: Mapping[str, Any]) -> None:
        """See ``ModelAdapter.check_call``.

        Raises:
            ModelError: a call with pictures whose positions the model would get wrong: without ``mm_token_type_ids``
                transformers numbers image tokens like text and drops their rows and columns.
        """
        has_media = inputs.get("pixel_values") is not None or inputs.get("pixel_values_videos") is not None
        if has_media and inputs.get("mm_token_type_ids") is None and inputs.get("position_ids") is None:
            raise ModelError(
                "mm_token_type_ids must reach Qwen2.5-VL with every picture",
                value=f"arguments {sorted(name for name, value in inputs.items() if value is not None)}",
                remedy="pass on everything that the processor returned, or use ModelAdapter.encode",
            )

"""InternVL (arXiv 2504.10479), in the layout of transformers ("-hf" checkpoints): text and vision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from masq.models.base import Modality
from masq.models.decoder import DecoderAdapter

if TYPE_CHECKING:
    from torch import nn


class InternVLAdapter(DecoderAdapter):
    """``InternVLForConditionalGeneration`` and ``InternVLProcessor``."""

    modalities = (Modality.TEXT, Modality.VISION)
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)

    @staticmethod
    def classes() -> tuple[Any, Any]:
        """The transformers classes of the model and of its processor."""
        from transformers import InternVLForConditionalGeneration, InternVLProcessor

        return InternVLForConditionalGeneration, InternVLProcessor

    def projectors(self) -> list[nn.Linear]:
        """The last linear between the vision tower and the language model."""
        return [self.model.model.multi_modal_projector.linear_2]

    def placeholders(self) -> dict[int, Modality]:
        """Pieces of pictures, and the token that the processor replaces by those of a video's frames."""
        pieces: int = self.model.config.image_token_id
        return {pieces: Modality.VISION, self.tokenizer.video_token_id: Modality.VISION}

"""LLaVA-OneVision (arXiv 2408.03326) around a Qwen2 language model: text and vision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from masq.models.base import Modality
from masq.models.decoder import DecoderAdapter

if TYPE_CHECKING:
    import torch


class LlavaOnevisionAdapter(DecoderAdapter):
    """``LlavaOnevisionForConditionalGeneration`` and ``LlavaOnevisionProcessor``."""

    modalities = (Modality.TEXT, Modality.VISION)
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)

    @staticmethod
    def classes() -> tuple[Any, Any]:
        """The transformers classes of the model and of its processor."""
        from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

        return LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

    def projectors(self) -> list[nn.Linear]:
        """The last linear between the vision tower and the language model."""
        return [self.model.model.multi_modal_projector.linear_2]

    def media_vectors(self) -> list[nn.Embedding]:
        """See ``ModelAdapter.media_vectors``: the vector that ends every row of a picture."""
        newline: torch.Tensor = self.model.model.image_newline
        return [nn.Embedding.from_pretrained(newline.detach()[None])]

    def placeholders(self) -> dict[int, Modality]:
        """Image and video tokens; the ends of a picture's rows are among them."""
        config = self.model.config
        return {config.image_token_id: Modality.VISION, config.video_token_id: Modality.VISION}

"""Qwen2-Audio (arXiv 2407.10759): text and audio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from masq.models.base import Modality
from masq.models.decoder import DecoderAdapter

if TYPE_CHECKING:
    from torch import nn


class Qwen2AudioAdapter(DecoderAdapter):
    """``Qwen2AudioForConditionalGeneration`` and ``Qwen2AudioProcessor``."""

    modalities = (Modality.TEXT, Modality.AUDIO)
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_audio",)

    @staticmethod
    def classes() -> tuple[Any, Any]:
        """The transformers classes of the model and of its processor."""
        from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

        return Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

    def projectors(self) -> list[nn.Linear]:
        """The one linear between the audio tower and the language model."""
        return [self.model.model.multi_modal_projector.linear]

    def staying_parts(self) -> list[nn.Module]:
        """See ``ModelAdapter.staying_parts``: the model sends sounds to where it finds its tower before it calls it."""
        return [self.model.model.audio_tower]

    def placeholders(self) -> dict[int, Modality]:
        """Audio pads."""
        return {self.model.config.audio_token_id: Modality.AUDIO}

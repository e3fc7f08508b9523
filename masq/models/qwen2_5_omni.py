"""Qwen2.5-Omni (arXiv 2503.20215), its thinker: text, vision and audio in, text out. The speech parts are not read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from masq.models.base import Modality
from masq.models.decoder import DecoderAdapter

if TYPE_CHECKING:
    from torch import nn


class Qwen25OmniAdapter(DecoderAdapter):
    """``Qwen2_5OmniThinkerForConditionalGeneration`` and ``Qwen2_5OmniProcessor``."""

    modalities = (Modality.TEXT, Modality.VISION, Modality.AUDIO)
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_omni", "qwen2_5_omni_thinker")

    @staticmethod
    def classes() -> tuple[Any, Any]:
        """The transformers classes of the model and of its processor."""
        from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

        return Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniProcessor

    def projectors(self) -> list[nn.Linear]:
        """The last linear of the vision tower's patch merger and the audio tower's output projection."""
        towers = self.model.model
        return [towers.visual.merger.mlp[-1], towers.audio_tower.proj]

    def placeholders(self) -> dict[int, Modality]:
        """Image, video and audio pads. The audio track of a video is audio."""
        config = self.model.config
        return {
            config.image_token_id: Modality.VISION,
            config.video_token_id: Modality.VISION,
            config.audio_token_id: Modality.AUDIO,
        }

"""Fixed-shape prompts: token ids, three-axis positions and answer spans for every task and question."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import constants as C

IMAGE_TOKENS = C.ROWS * C.COLUMNS
ANSWER_TOKENS = {"digits": 2, "read": 4, "speech": 3, "joint": 1}
MEDIA = {
    "digits": ("image",),
    "read": ("image",),
    "speech": ("audio",),
    "joint": ("image", "audio"),
}


def prompt_text(task: str, question: str, audio_tokens: int) -> str:
    """The chat prompt of one question, its placeholders repeated as the processor does."""
    s, text = C.SPECIALS, ""
    if "image" in MEDIA[task]:
        text += s["vision_bos_token"] + s["image_token"] * IMAGE_TOKENS + s["vision_eos_token"]
    if "audio" in MEDIA[task]:
        text += s["audio_bos_token"] + s["audio_token"] * audio_tokens + s["audio_eos_token"]
    return f"<|im_start|>user\n{text}{question}<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Prompt:
    """Ids of prompt and room for the answer, positions [3, length], where images and audio go."""

    ids: torch.Tensor
    positions: torch.Tensor
    image: torch.Tensor
    audio: torch.Tensor
    start: int


def build_prompt(thinker, tokenizer, task: str, question: str, audio_tokens: int = C.AUDIO_TOKENS) -> Prompt:
    """Prompt of ``question`` with room for the longest answer of its task, less the final end token."""
    ids = tokenizer(prompt_text(task, question, audio_tokens), add_special_tokens=False).input_ids
    start = len(ids)
    row = torch.tensor([ids + [tokenizer.eos_token_id] * ANSWER_TOKENS[task]])
    grid = torch.tensor([[1, C.HEIGHT // C.PATCH, C.WIDTH // C.PATCH]]) if "image" in MEDIA[task] else None
    positions, _ = thinker.get_rope_index(
        row, image_grid_thw=grid, attention_mask=torch.ones_like(row), audio_seqlens=torch.tensor([4 * audio_tokens])
    )
    image = row[0] == tokenizer.convert_tokens_to_ids(C.SPECIALS["image_token"])
    audio = row[0] == tokenizer.convert_tokens_to_ids(C.SPECIALS["audio_token"])
    return Prompt(row[0], positions[:, 0], image.nonzero()[:, 0], audio.nonzero()[:, 0], start)


def answer_targets(tokenizer, task: str, answers: list[str]) -> torch.Tensor:
    """Targets [batch, answer + end]: answer tokens, the end token, then -100."""
    width = ANSWER_TOKENS[task] + 1
    rows = [[*tokenizer(a, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for a in answers]
    return torch.tensor([r + [-100] * (width - len(r)) for r in rows])

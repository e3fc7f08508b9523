"""Several questions about one picture and one clip in one sequence: a shared prefix, then one branch per question.

A branch sees the prefix and itself, and its positions go on from the prefix, so that every answer is predicted as it
would be if its question stood there alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import constants as C

IMAGE_TOKENS = C.ROWS * C.COLUMNS
TURN = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Packed:
    """One batch of B samples of T tokens.

    Attributes:
        ids: int64 [B, T].
        targets: int64 [B, T], the token that follows where it belongs to an answer, -100 elsewhere.
        positions: int64 [3, T].
        mask: float32 [1, 1, T, T], 0 where a token may look, -inf elsewhere.
        image: positions of picture tokens.
        audio: positions of sound tokens.
        branches: first and last position of every branch.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    image: torch.Tensor
    audio: torch.Tensor
    branches: list[tuple[int, int]]


def prefix_text(media: tuple[str, ...]) -> str:
    """The user's turn up to the question, its placeholders repeated as the processor does."""
    s, text = C.SPECIALS, "<|im_start|>user\n"
    if "image" in media:
        text += s["vision_bos_token"] + s["image_token"] * IMAGE_TOKENS + s["vision_eos_token"]
    if "audio" in media:
        text += s["audio_bos_token"] + s["audio_token"] * C.AUDIO_TOKENS + s["audio_eos_token"]
    return text


def _branch(tokenizer, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets [B, longest] of one question per sample and its answer, padded at the end."""
    rows, targets = [], []
    for question, answer in pairs:
        asked = tokenizer(question + TURN, add_special_tokens=False).input_ids
        said = tokenizer(answer, add_special_tokens=False).input_ids
        rows.append(asked + said)
        targets.append([-100] * (len(asked) - 1) + said + [tokenizer.eos_token_id])
    width = max(map(len, rows))
    ids = [row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor([row + [-100] * (width - len(row)) for row in targets])


def pack(thinker, tokenizer, media: tuple[str, ...], asked: list[list[tuple[str, str]]]) -> Packed:
    """Pack ``asked``, for every branch the (question, answer) of each sample."""
    start = tokenizer(prefix_text(media), add_special_tokens=False).input_ids
    grid = torch.tensor([[1, C.HEIGHT // C.PATCH, C.WIDTH // C.PATCH]]) if "image" in media else None
    row = torch.tensor([start])
    seconds = torch.tensor([4 * C.AUDIO_TOKENS])
    rope, _ = thinker.get_rope_index(
        row, image_grid_thw=grid, attention_mask=torch.ones_like(row), audio_seqlens=seconds
    )
    made = [_branch(tokenizer, pairs) for pairs in asked]
    ids = [row.expand(len(asked[0]), -1), *(ids for ids, _ in made)]
    targets = [torch.full_like(ids[0], -100), *(wanted for _, wanted in made)]
    positions, owner, first = [rope[:, 0]], [torch.zeros(len(start))], int(rope.max()) + 1
    branches, at = [], len(start)
    for index, (part, _) in enumerate(made):
        width = part.shape[1]
        positions.append(torch.arange(first, first + width).expand(3, -1))
        owner.append(torch.full((width,), float(index + 1)))
        branches.append((at, at + width))
        at += width
    of = torch.cat(owner)
    seen = (of[None, :] == 0) | (of[None, :] == of[:, None])
    allowed = seen & torch.ones(at, at).tril().bool()
    mask = torch.zeros(at, at).masked_fill(~allowed, -torch.inf)[None, None]
    image = (row[0] == tokenizer.convert_tokens_to_ids(C.SPECIALS["image_token"])).nonzero()[:, 0]
    audio = (row[0] == tokenizer.convert_tokens_to_ids(C.SPECIALS["audio_token"])).nonzero()[:, 0]
    return Packed(torch.cat(ids, 1), torch.cat(targets, 1), torch.cat(positions, 1), mask, image, audio, branches)

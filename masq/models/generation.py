"""Greedy decoding through transformers' ``generate`` with nothing inherited from a checkpoint's sampling defaults."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from masq.errors import ModelError
from masq.models.step_graph import replayed_steps

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from transformers import GenerationConfig

    from masq.models.base import EncodedBatch, ModelAdapter


def end_ids(tokenizer: Any, published: Any) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's end token, and the checkpoint's further ones if they are special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        published: the checkpoint's ``GenerationConfig``, or None.

    Raises:
        ModelError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer must name the token that ends an answer",
            value="eos_token is not set",
            remedy="set eos_token in tokenizer_config.json",
        )
    further = getattr(published, "eos_token_id", None)
    further = [] if further is None else ([further] if isinstance(further, int) else list(further))
    special = set(tokenizer.all_special_ids)
    return (tokenizer.eos_token_id, *sorted({int(i) for i in further} & special - {tokenizer.eos_token_id}))


def greedy_config(ends: Collection[int], pad_id: int, suppressed: Collection[int]) -> GenerationConfig:
    """Greedy decoding with the KV cache that never emits ``suppressed``."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=list(ends),
        pad_token_id=pad_id,
        suppress_tokens=sorted(suppressed) or None,
    )


@torch.no_grad()
def greedy(
    adapter: ModelAdapter, batch: EncodedBatch, max_new_tokens: int, max_seconds: float | None = None
) -> list[list[int]]:
    """Body of ``ModelAdapter.generate``; see there."""
    config = greedy_config(adapter.end_ids, adapter.pad_id, adapter.placeholders())
    config.max_new_tokens, config.max_time = max_new_tokens, max_seconds
    with _steps(adapter, config):
        sequences = adapter.model.generate(**batch.inputs, generation_config=config)
    prompt_length = batch.inputs["input_ids"].shape[1]
    return [_cut(row, adapter.end_ids) for row in sequences[:, prompt_length:].tolist()]


def _steps(adapter: ModelAdapter, config: GenerationConfig) -> AbstractContextManager[Any]:
    """How steps are run: as ``adapter.decoding`` says, for which ``config`` is changed.

    Raises:
        ModelError: the model's attention is not one whose steps can be replayed.
    """
    if adapter.decoding == "eager":
        return nullcontext()
    kinds = set(adapter.block_attention_kinds())
    if kinds != {"full_attention"}:
        raise ModelError(
            "graphs replay steps of models whose blocks look at all tokens: windows move where no graph looks",
            value=", ".join(sorted(kinds)),
            remedy="set evaluation.decoding=eager",
        )
    # Steps are captured here: transformers is not to compile them as well.
    config.cache_implementation, config.disable_compile = "static", True
    known = adapter.context

    def is_text(inputs: Mapping[str, Any]) -> bool:
        # Asked before a step is captured, inside of which nobody may wait for an answer.
        return known.text_only if known is not None else not bool((adapter.modality_of(inputs) > 0).any())

    return replayed_steps(adapter.model, is_text)


def _cut(ids: list[int], ends: Collection[int]) -> list[int]:
    """``ids`` up to and with the first end token: what follows is padding."""
    for position, token_id in enumerate(ids):
        if token_id in ends:
            return ids[: position + 1]
    return ids

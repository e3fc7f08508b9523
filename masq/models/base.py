"""What the rest of masq may know about a model: linears by role, the modality of every token, text in and text out.

Nothing outside ``masq/models`` knows a module path or a family name. A new family is one file with a ``BlockAdapter``
and a ``ModelAdapter``, and one line in ``loading.py``.

Shapes: B batch, T tokens, d hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from masq.errors import ModelError, memory_errors_of
from masq.models.batch import EncodedBatch as EncodedBatch
from masq.models.residence import Residence, cover
from masq.models.sample import Modality as Modality
from masq.models.sample import Sample as Sample
from masq.models.tokens import TokenModalities
from masq.numerics.hadamard import rotate_back
from masq.numerics.scheme import GROUP_ROLES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from masq.models.conversation import Conversation
    from masq.models.residence import After


class Role(StrEnum):
    """A linear of a decoder block, by what it computes."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"


GROUPS: dict[str, tuple[Role, ...]] = {group: tuple(map(Role, roles)) for group, roles in GROUP_ROLES.items()}
"""Linears that read the same input, by group name, in the order in which a block computes them."""


class BlockAdapter(ABC):
    """One decoder block, by role.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads; it divides ``num_heads``.
        head_dim: channels of one head.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The decoder layer itself (for hooks, parameters, state)."""

    @abstractmethod
    def linear(self, role: Role) -> nn.Module:
        """The module now in the place of the linear ``role``: ``nn.Linear`` until it is replaced.

        A run-time rotation of its input (``masq.models.rotated.RotatedInput``) is looked through.
        """

    @abstractmethod
    def set_linear(self, role: Role, module: nn.Module) -> None:
        """Put ``module`` in the place of the linear ``role``; a run-time rotation of its input stays before it."""

    @abstractmethod
    def norm(self, group: str) -> nn.Module | None:
        """The norm whose output feeds ``group`` directly and feeds nothing else, or None.

        Raises:
            ModelError: ``group`` is not a key of ``GROUPS``.
        """

    @abstractmethod
    def gated(self) -> tuple[nn.Module, nn.Module] | None:
        """The module that is ``down(act(gate(x)) * up(x))`` and its ``act``, None for a block without one."""

    def forward(self, hidden: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """Output [B, T, d] of the block for input ``hidden`` [B, T, d].

        Args:
            hidden: block input.
            kwargs: what the model passes besides (attention mask, position embeddings, ...), as captured by a hook.
        """
        output = self.module(hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class KnownModality(Protocol):
    """What decoding asks of the context of quantized linears."""

    @property
    def text_only(self) -> bool:
        """Whether all tokens of the running call are text."""
        ...


class ModelAdapter(ABC):
    """A loaded multimodal model and its processor behind one contract.

    Attributes:
        model: the transformers model, in evaluation mode.
        processor: its transformers processor.
        tokenizer: the processor's tokenizer.
        modalities: modalities that the model takes, text first.
        min_pixels: smallest image area after resizing, None to keep the processor's.
        max_pixels: largest image area after resizing, None to keep the processor's.
        end_ids: token ids that end an answer, the tokenizer's own first.
        pad_id: token id that fills padded positions.
        residence: where its weights are.
        residual_signs: signs of the Hadamard rotation that the residual stream was given, None in its own basis.
        decoding: how ``generate`` runs steps, see ``EvaluationConfig``.
        context: where quantized linears read the modality of tokens, None where there are none.
    """

    modalities: tuple[Modality, ...] = (Modality.TEXT,)
    decoding: Literal["eager", "graphed"] = "eager"
    context: KnownModality | None
    _towers: dict[str, nn.Module] | None

    def __init__(
        self, model: Any, processor: Any, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        from masq.models import generation

        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.end_ids = generation.end_ids(self.tokenizer, model.generation_config)
        self.pad_id = int(self.end_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id)
        self._token_modalities = TokenModalities(self.placeholders())
        self.residual_signs: torch.Tensor | None = None
        self.residence, self._towers, self.context = Residence(), None, None
        # generate() fills what a caller leaves open from here; a published file would make it sample.
        self.model.generation_config = generation.greedy_config(self.end_ids, self.pad_id, self.placeholders())
        self.check_blocks()

    @abstractmethod
    def blocks(self) -> list[BlockAdapter]:
        """Decoder blocks in order of execution."""

    @property
    def device(self) -> torch.device:
        """Where inputs go; weights that are on disk have none."""
        return self.residence.device or self.model.device

    def parts(self) -> list[nn.Module]:
        """Modules that come into memory and go as a whole where weights are streamed; the towers come besides."""
        return [*(block.module for block in self.blocks()), self.embeddings(), self.final_norm(), self.head()]

    def staying_parts(self) -> list[nn.Module]:
        """Parts that stay in memory where weights are streamed."""
        return []

    def towers(self) -> dict[str, nn.Module]:
        """What makes media tokens, by name: the vision and audio towers and projectors that are modules of their own.

        They are the largest modules beside ``parts``, and come and go as wholes where weights are streamed.
        """
        if self._towers is None:
            # Asked once, while they have parameters.
            parts = set(self.parts())
            names = {module: name for name, module in self.model.named_modules()}
            self._towers = {names[module]: module for module in cover(self.model, list(parts)) if module not in parts}
        return self._towers

    def visited_blocks(self, after: After = "forget") -> Iterator[BlockAdapter]:
        """Decoder blocks in order of execution, each with its weights in memory until the loop moves on.

        Args:
            after: what becomes of changes to a block; see ``masq.models.residence``.
        """
        for index, block in enumerate(self.blocks()):
            with ExitStack() as stack:
                # What the loop does with the block has its own names for errors.
                with memory_errors_of(f"block {index}"):
                    stack.enter_context(self.residence.present(block.module, after=after))
                yield block

    @abstractmethod
    def embeddings(self) -> nn.Embedding:
        """Token embeddings."""

    @abstractmethod
    def head(self) -> nn.Linear:
        """The linear that writes the logits (its weight may be the embeddings')."""

    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the head."""

    @abstractmethod
    def projectors(self) -> list[nn.Linear]:
        """The linears that write image and audio tokens into the residual stream: the last of each tower."""

    def media_vectors(self) -> list[nn.Embedding]:
        """Learned vectors that are media tokens as they are, as embeddings over the parameters' own storage."""
        return []

    @abstractmethod
    def placeholders(self) -> dict[int, Modality]:
        """Modality by token id, for the ids that stand for a piece of image, video or audio."""

    @abstractmethod
    def block_attention_kinds(self) -> tuple[str, ...]:
        """The kind of attention mask that each block takes ("full_attention", "sliding_attention", ...)."""

    def check_blocks(self) -> None:
        """Check that one capture of a block's keyword arguments serves every block.

        Raises:
            ModelError: the blocks take different attention masks.
        """
        kinds = self.block_attention_kinds()
        if len(set(kinds)) > 1:
            raise ModelError(
                "all decoder blocks must take the same attention mask, because each is replayed with the captured one",
                value=", ".join(sorted(set(kinds))),
                remedy="switch sliding-window attention off in the model's configuration",
            )

    def residual_writers(self) -> list[nn.Module]:
        """Every module that writes into the residual stream, biases included: a rotation multiplies their outputs."""
        blocks = self.blocks()
        ends = [block.linear(role) for block in blocks for role in (Role.OUTPUT, Role.DOWN)]
        return [self.embeddings(), *self.projectors(), *self.media_vectors(), *ends]

    def residual_readers(self) -> list[nn.Module]:
        """Every linear that reads the (normed) residual stream: a rotation multiplies their inputs."""
        roles = (*GROUPS["qkv"], *GROUPS["gate_up"])
        return [*(block.linear(role) for block in self.blocks() for role in roles), self.head()]

    def in_own_basis(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., d] of the residual stream without the rotation that it was given."""
        if self.residual_signs is None:
            return hidden
        return rotate_back(hidden.float(), self.residual_signs)

    def modality_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Modality of every token of a forward call, from its own arguments alone.

        Args:
            inputs: keyword arguments of the model; ``input_ids`` int64 [B, T] is needed. For the forms that
                ``attention_mask`` may take, see ``masq.models.tokens.real_tokens``.

        Returns:
            int8 [B, T].

        Raises:
            ModelError: no ``input_ids``, or a mask that does not cover the tokens.
        """
        self.check_call(inputs)
        return self._token_modalities.of(inputs)

    @staticmethod
    def check_call(inputs: Mapping[str, Any]) -> None:
        """Refuse a forward call that the model would silently compute wrongly; by default none.

        Args:
            inputs: keyword arguments of the model.
        """
        del inputs

    def encode(self, samples: Sequence[Sample], *, with_answer: bool) -> EncodedBatch:
        """Turn samples into one left-padded batch on the model's device.

        The prompt is the processor's chat template around image, audio, question (in that order); a prose sample is its
        plain text. Answers are tokenized apart and appended with the end token, so a prompt's tokens do not depend on
        whether its answer follows.

        A sample with choices is read as plain text too: the context, then a space and the right choice, no end token.
        Context and choice are tokenized apart, the space with the choice. Byte-level tokenizers begin a new piece at a
        space, so this gives the same tokens as the text in one piece.

        Args:
            samples: at least one.
            with_answer: append the answer and the end token.

        Returns:
            The batch; ``answer_mask`` marks the answer and its end token, all but the first token of prose, or the
            right choice.

        Raises:
            ModelError: a sample carries a modality that the model does not take.
            DataError: unreadable media, a wrong sampling rate, a placeholder token inside a text.
        """
        from masq.models import prompts

        return prompts.encode(self, samples, with_answer=with_answer)

    def encode_conversations(self, conversations: Sequence[Conversation]) -> EncodedBatch:
        """Turn conversations into one left-padded batch on the model's device, ready for the answers.

        All turns go through the processor's chat template in their order; sounds are resampled to the model's rate.

        Args:
            conversations: at least one.

        Returns:
            The batch; ``answer_mask`` is nowhere set.

        Raises:
            ModelError: a modality that the model does not take.
            DataError: sound that is too short or too long, a placeholder token inside a text.
        """
        from masq.models import prompts

        return prompts.encode_conversations(self, conversations)

    def generate(self, batch: EncodedBatch, max_new_tokens: int, max_seconds: float | None = None) -> list[list[int]]:
        """Greedy answers, with the KV cache; media placeholders are never generated.

        Args:
            batch: encoded without answers.
            max_new_tokens: upper bound on the length of an answer.
            max_seconds: stop the whole batch after the token at which so much time has passed; None for never.

        Returns:
            By sample, the generated ids up to and with the first end token (one of ``end_ids``). An answer that never
            ended has ``max_new_tokens`` ids, fewer if time ran out, none of them an end token.
        """
        from masq.models import generation

        return generation.greedy(self, batch, max_new_tokens, max_seconds)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

"""lm-eval through its public interface: a live masq model as an ``HFLM`` whose finished requests stay on disk."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, cast

from lm_eval.models.huggingface import HFLM

from masq.errors import ConfigError, ModelError, NumericalError
from masq.evaluation.batch_store import BatchStore, Progress, ProgressLog, run_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lm_eval.api.instance import Instance

    from masq.models.base import ModelAdapter

# Its registration hides its signature from type checkers.
_HFLM = cast("Any", HFLM)

# Requests that are answered and kept together, in batches: enough for the harness to sort by length and to read a
# context with several choices once.
BATCHES_TOGETHER = 8


@dataclass(frozen=True, eq=False)
class Request:
    """One request of the harness.

    Attributes:
        id: its place and a hash of its arguments: what a result on disk must fit.
        task: name of the task.
        instance: as the harness made it.
    """

    id: str
    task: str
    instance: Instance


class MasqLm(_HFLM):
    """A model adapter as lm-eval sees it (``simple_evaluate(model=MasqLm(adapter), ...)``)."""

    def __init__(
        self,
        adapter: ModelAdapter,
        *,
        folder: Path | str | None = None,
        batch_size: int = 1,
        max_length: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Wrap a live model.

        Args:
            adapter: the model; with quantized linears, the modality hook is already installed.
            folder: finished requests are kept there and reused; of this model alone. A temporary one by default.
            batch_size: sequences per forward pass.
            max_length: longest sequence in tokens, None for what the model was made for.
            progress: told as requests are finished; logs a line by default.
        """
        if batch_size < 1:
            raise ConfigError("batch_size must be positive", value=batch_size)
        weight = adapter.head().weight
        super().__init__(
            pretrained=adapter.model,
            backend="causal",
            tokenizer=adapter.tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            # A sequence begins with its first token, or with the end token where the tokenizer has no other.
            add_bos_token=False,
        )
        # HFLM asks the model where it is, and weights that are on disk are nowhere.
        self._device = adapter.device
        # HFLM ties the weights of every model that it is given, if the model's configuration says that they are tied.
        if adapter.head().weight is not weight:
            raise ModelError(
                "a head with a weight of its own must not be tied to the embeddings",
                value="lm-eval has just tied it, as model.config.tie_word_embeddings asks",
                remedy="set config.tie_word_embeddings=False where the head gets its own weight, and load it again",
            )
        self.folder = Path(mkdtemp(prefix="masq-likelihoods-") if folder is None else folder)
        self.progress = progress or ProgressLog()
        self._settings = {"batch_size": batch_size, "max_length": self.max_length}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of every continuation, and whether it is the greedy one."""
        found = self._kept("loglikelihood", requests, lambda part: super(MasqLm, self).loglikelihood(part, True))
        return [(value, greedy) for value, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of every whole text, its first token included."""
        return self._kept("rolling", requests, lambda part: super(MasqLm, self).loglikelihood_rolling(part, True))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Answers to plain text."""
        return self._kept("generate", requests, lambda part: super(MasqLm, self).generate_until(part, True))

    def _kept(
        self, kind: str, requests: Sequence[Instance], compute: Callable[[list[Instance]], Sequence[Any]]
    ) -> list[Any]:
        """Results in the order of the requests, those of finished parts from disk."""
        listed = [Request(f"{index}/{_digest(one)}", one.task_name or kind, one) for index, one in enumerate(requests)]

        def compute_part(part: Sequence[Request]) -> list[dict[str, Any]]:
            results = compute([one.instance for one in part])
            _require_finite(part, results)
            return [{"id": one.id, "result": result} for one, result in zip(part, results, strict=True)]

        store = BatchStore(self.folder / kind, self._settings)
        size = int(self.batch_size) * BATCHES_TOGETHER
        entries = run_batches(kind, _parts(listed, size), compute_part, store, self.progress)
        by_id = {entry["id"]: entry["result"] for entry in entries}
        return [by_id[one.id] for one in listed]


def _require_finite(requests: Sequence[Request], results: Sequence[Any]) -> None:
    """The harness itself would go on with NaN and call it a wrong choice."""
    for request, result in zip(requests, results, strict=True):
        value = result[0] if isinstance(result, tuple) else result
        if isinstance(value, float) and not math.isfinite(value):
            raise NumericalError(
                "logits must be finite",
                value=f"log-likelihood {value} of a request of {request.task}",
                remedy="raise model.dtype to float32 or use a wider scheme; finished batches are kept",
            )


def _digest(request: Instance) -> str:
    return hashlib.sha256(json.dumps(request.args, default=str).encode()).hexdigest()[:16]


def _parts(requests: Sequence[Request], size: int) -> Iterable[tuple[str, list[Request]]]:
    """Requests of one task together, in their order; choices of one document are not torn apart."""
    by_task: dict[str, list[list[Request]]] = {}
    for request in requests:
        documents = by_task.setdefault(request.task, [])
        if documents and documents[-1][0].instance.doc_id == request.instance.doc_id:
            documents[-1].append(request)
        else:
            documents.append([request])
    for task, documents in by_task.items():
        for number, start in enumerate(range(0, len(documents), size)):
            yield f"{task}-{number:04d}", [one for document in documents[start : start + size] for one in document]

"""How close a quantized model stays to its float original, without labels: SQNR by modality, answer NLL, KL.

Both models read the same teacher-forced batches in lockstep, so that the float outputs of one batch are all that is
ever held. Everything is summed by sample in float64; sums of finished batches are kept on disk.

Shapes: B batch, T tokens, R answer tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from masq.calibration.replay import capture
from masq.errors import DataError, NumericalError
from masq.evaluation.batch_store import BatchStore, Progress, ProgressLog, named_batches, run_batches
from masq.evaluation.float_outputs import FloatBatch, FloatOutputs, block_outputs
from masq.evaluation.likelihood import (
    ROWS_PER_CHUNK,
    head_inputs,
    log_probabilities,
    picked,
    predicting_rows,
    sum_by_owner,
)
from masq.evaluation.statistics import ratio
from masq.models.base import Modality
from masq.numerics.finite import is_finite
from masq.numerics.sqnr import token_sqnr

if TYPE_CHECKING:
    from pathlib import Path

    from masq.models.base import EncodedBatch, ModelAdapter, Sample

FIRST = "first"
"""Group of each sequence's first real token: one massive activation there would decide the mean of all tokens."""

_TOKEN_MODALITIES = tuple(modality for modality in Modality if modality is not Modality.PADDING)
_MEDIA = tuple(modality.name.lower() for modality in _TOKEN_MODALITIES if modality is not Modality.TEXT)
_LIKELIHOODS = ("nll", "nll_float", "nll_increase", "kl")


def fidelity(
    reference: ModelAdapter,
    quantized: ModelAdapter,
    batches: Sequence[Sequence[Sample]],
    folder: Path,
    progress: Progress | None = None,
    keep: Path | None = None,
    towers: bool = False,
) -> dict[str, Any]:
    """Compare a quantized model with its float original on held-out samples.

    SQNR of a token at a block's output is ``10 log10(|y|^2 / |y - y_q|^2)``, y of the float chain and y_q of the
    quantized chain, at most 200 dB (identical outputs); it is averaged over tokens, then over blocks. Padding is
    excluded, and so is the first real token of a sequence, reported apart.

    NLL is that of the expected answer per token, end token included (for prose, of every token but the first; of
    choices, the right one after its context); KL is KL(float || quantized) at the same positions. Both are in nats and
    keyed by what else than text a sample holds.

    Args:
        reference: the float model.
        quantized: the quantized model, modality hook installed. It may be ``reference`` itself.
        batches: samples in batches that never change between runs (``masq.calibration.data.batches``).
        folder: sums of finished batches are kept there; it must not be shared between models.
        progress: told after every batch; logs a line by default.
        keep: where outputs of the float model are kept for other calls, see ``FloatOutputs``.
        towers: also compare what the vision and audio towers give the decoder.

    Returns:
        ``sqnr`` {text, vision, audio} headline in dB, ``sqnr_first`` the same for first tokens,
        ``sqnr_by_block`` a list of {text, vision, audio, first}; with ``towers`` also ``sqnr_towers`` {vision, audio}
        of the tokens that enter the first block; ``nll``, ``nll_float``, ``nll_increase`` (quantized
        minus float, paired) and ``kl``, each {text, vision, audio, joint}; ``standard_error`` of all of them over
        samples (null for one sample); ``num_tokens``, ``num_samples``, ``num_answer_tokens``. A key that no sample
        belongs to is absent.

    Raises:
        NumericalError: a block output or a logit is NaN or infinite; finished batches are kept.
        DataError: no samples at all.
    """
    if not any(batches):
        raise DataError("fidelity needs at least one sample", value=0)

    outputs = FloatOutputs(reference, keep)

    def compute(samples: Sequence[Sample]) -> list[dict[str, Any]]:
        batch = reference.encode(samples, with_answer=True)
        measured = _compare(reference, quantized, batch, outputs(samples, batch))
        if towers:
            entering = _entering(reference, quantized, batch)
            measured = [{**sums, "entering": own} for sums, own in zip(measured, entering, strict=True)]
        return [
            {"id": sample.id, "kind": sample_kind(sample), **sums}
            for sample, sums in zip(samples, measured, strict=True)
        ]

    entries = run_batches("fidelity", named_batches(batches), compute, BatchStore(folder), progress or ProgressLog())
    return summarize(entries)


def sample_kind(sample: Sample) -> str:
    """What a sample holds besides text: "text" (nothing), "vision", "audio", or "joint"."""
    media = sample.modalities - {Modality.TEXT}
    return "joint" if len(media) > 1 else next((modality.name.lower() for modality in media), "text")


def _compare(
    reference: ModelAdapter, quantized: ModelAdapter, batch: EncodedBatch, known: FloatBatch
) -> list[dict[str, Any]]:
    """Sums of one batch by sample: SQNR by group and block, numbers of tokens, NLL, KL."""
    groups = token_groups(batch.modality)
    outputs = known.blocks
    for number, output in enumerate(outputs):
        _require_finite(output, groups, f"block {number} of the float model")
    sqnr: list[torch.Tensor] = []

    def measure(index: int, output: torch.Tensor) -> None:
        expected = outputs[index].to(output.device)
        # Freed as soon as it is used: the float chain of a batch is the largest thing that is held.
        outputs[index] = torch.empty(0)
        _require_finite(output, groups, f"block {index} of the quantized model")
        tokens = token_sqnr(expected, quantized.in_own_basis(output)).cpu()
        sqnr.append(torch.stack([tokens.where(mask, 0.0).sum(1) for mask in groups.values()]))

    on_device = batch.to(quantized.device)
    with block_outputs(quantized, measure):
        rows_quantized = head_inputs(quantized, on_device)
    likelihoods = _likelihoods(reference, quantized, batch, known.rows, rows_quantized)
    counts = torch.stack([mask.sum(1) for mask in groups.values()])
    return [
        {
            "sqnr": _present(groups, counts[:, index], torch.stack(sqnr)[:, :, index].t()),
            "num_tokens": _present(groups, counts[:, index], counts[:, index]),
            **{name: values[index] for name, values in likelihoods.items()},
        }
        for index in range(counts.shape[1])
    ]


def _entering(reference: ModelAdapter, quantized: ModelAdapter, batch: EncodedBatch) -> list[dict[str, Any]]:
    """By sample, sums of the SQNR of media tokens where they enter the decoder."""
    (expected,), _ = capture(reference, [batch])
    (found,), _ = capture(quantized, [batch.to(quantized.device)])
    groups = {name: mask for name, mask in token_groups(batch.modality).items() if name in _MEDIA}
    _require_finite(found, groups, "the towers")
    tokens = token_sqnr(expected, quantized.in_own_basis(found).to(expected.device)).cpu()
    counts = torch.stack([mask.sum(1) for mask in groups.values()])
    sums = torch.stack([tokens.where(mask, 0.0).sum(1) for mask in groups.values()])
    return [_present(groups, counts[:, index], sums[:, index]) for index in range(counts.shape[1])]


def token_groups(modality: torch.Tensor) -> dict[str, torch.Tensor]:
    """Masks, bool [B, T] on the CPU: tokens of each modality without the first real ones, and ``FIRST``.

    Args:
        modality: int8 [B, T], -1 where padded.
    """
    modality = modality.cpu()
    real = modality != int(Modality.PADDING)
    first = real & (real.long().cumsum(1) == 1)
    masks = {one.name.lower(): (modality == int(one)) & ~first for one in _TOKEN_MODALITIES}
    return {**masks, FIRST: first}


def _present(groups: dict[str, torch.Tensor], counts: torch.Tensor, values: torch.Tensor) -> dict[str, Any]:
    """Values by name of the groups that have tokens."""
    return {name: value.tolist() for name, count, value in zip(groups, counts, values, strict=True) if count}


def _require_finite(output: torch.Tensor, groups: dict[str, torch.Tensor], name: str) -> None:
    """Check ``output`` [B, T, d] at the tokens that are not padding."""
    real = torch.stack(list(groups.values())).any(0)
    if not is_finite(output, real):
        raise NumericalError(
            f"the output of {name} must be finite",
            value="NaN or infinity",
            remedy="raise model.dtype to float32 or use a wider scheme; finished batches are kept",
        )


def _likelihoods(
    reference: ModelAdapter,
    quantized: ModelAdapter,
    batch: EncodedBatch,
    rows_float: torch.Tensor,
    rows_quantized: torch.Tensor,
) -> dict[str, list[Any]]:
    """By sample: summed answer NLL of both models, summed KL(float || quantized), number of answer tokens."""
    owners, targets = predicting_rows(batch)
    sums: dict[str, list[torch.Tensor]] = {"nll": [], "nll_float": [], "kl": []}
    chunks = zip(
        log_probabilities(reference, rows_float),
        log_probabilities(quantized, rows_quantized),
        targets.split(ROWS_PER_CHUNK),
        strict=True,
    )
    for log_p, log_q, ids in chunks:
        log_q = log_q.to(log_p.device)
        sums["nll_float"].append(-picked(log_p, ids))
        sums["nll"].append(-picked(log_q, ids))
        sums["kl"].append((log_p.exp() * (log_p - log_q)).sum(1))
    by_sample = {name: sum_by_owner(values, owners, len(batch.answer_mask)) for name, values in sums.items()}
    return {**{name: total for name, (total, _) in by_sample.items()}, "num_answer_tokens": by_sample["nll"][1]}


def summarize(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over tokens, blocks and samples; see ``fidelity`` for the keys.

    Args:
        entries: sums by sample, in the order of the samples.
    """
    errors: dict[str, Any] = {}
    result: dict[str, Any] = {**_summarize_sqnr(entries, errors), **_summarize_likelihoods(entries, errors)}
    if any("entering" in entry for entry in entries):
        result["sqnr_towers"], errors["sqnr_towers"] = _summarize_towers(entries)
    tokens = {name: sum(entry["num_tokens"].get(name, 0) for entry in entries) for name in _groups_of(entries)}
    return {**result, "standard_error": errors, "num_tokens": tokens}


def _summarize_towers(entries: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float | None]]:
    """Means over media tokens, and their standard errors over samples."""
    found = {}
    for name in _MEDIA:
        having = [entry for entry in entries if name in entry["entering"]]
        if having:
            sums, counts = ([entry[key][name] for entry in having] for key in ("entering", "num_tokens"))
            found[name] = ratio(sums, counts)
    return {name: one[0] for name, one in found.items()}, {name: one[1] for name, one in found.items()}


def _groups_of(entries: Sequence[dict[str, Any]]) -> list[str]:
    names = (*(modality.name.lower() for modality in _TOKEN_MODALITIES), FIRST)
    return [name for name in names if any(name in entry["num_tokens"] for entry in entries)]


def _summarize_sqnr(entries: Sequence[dict[str, Any]], errors: dict[str, Any]) -> dict[str, Any]:
    headline: dict[str, float] = {}
    by_block: list[dict[str, float]] = []
    sqnr_errors: dict[str, float | None] = {}
    for name in _groups_of(entries):
        having = [entry for entry in entries if name in entry["num_tokens"]]
        counts = [entry["num_tokens"][name] for entry in having]
        sums = [entry["sqnr"][name] for entry in having]
        by_block = by_block or [{} for _ in sums[0]]
        for block, values in zip(by_block, zip(*sums, strict=True), strict=True):
            block[name] = ratio(values, counts)[0]
        over_blocks = [math.fsum(values) / len(values) for values in sums]
        headline[name], sqnr_errors[name] = ratio(over_blocks, counts)
    errors["sqnr"], errors["sqnr_first"] = sqnr_errors, sqnr_errors.pop(FIRST)
    return {"sqnr": headline, "sqnr_first": headline.pop(FIRST), "sqnr_by_block": by_block}


def _summarize_likelihoods(entries: Sequence[dict[str, Any]], errors: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {name: {} for name in (*_LIKELIHOODS, "num_samples", "num_answer_tokens")}
    errors |= {name: {} for name in _LIKELIHOODS}
    for kind in ("text", "vision", "audio", "joint"):
        chosen = [entry for entry in entries if entry["kind"] == kind and entry["num_answer_tokens"]]
        if not chosen:
            continue
        counts = [entry["num_answer_tokens"] for entry in chosen]
        sums = {name: [entry[name] for entry in chosen] for name in ("nll", "nll_float", "kl")}
        sums["nll_increase"] = [entry["nll"] - entry["nll_float"] for entry in chosen]
        for name in _LIKELIHOODS:
            result[name][kind], errors[name][kind] = ratio(sums[name], counts)
        result["num_samples"][kind], result["num_answer_tokens"][kind] = len(chosen), sum(counts)
    return result

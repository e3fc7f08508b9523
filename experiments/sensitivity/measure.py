"""Sensitivity profiles: one part of the decoder rounded to nearest at a time, on held-out samples.

Parts are every linear role over all blocks, every block over all roles, and the whole decoder. Of each, the weights
alone, the activations alone and both are rounded on the grids of the scheme; the rest stays in float. A profile holds,
against the float model and teacher-forced:

- ``kl``: KL(float || rounded) of the next-token distributions, in nats per answer token;
- ``nll_delta``: the increase in negative log-likelihood of the expected answer, in nats per answer token;
- ``sqnr``: of the hidden states after the last block, in dB, mean over tokens; at most 200 (identical).

``kl`` and ``nll_delta`` are keyed by what else than text a sample holds, ``sqnr`` by the modality of tokens (the first
token of each sequence is left out). What no sample has is absent. Each comes with its standard error over samples.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.sensitivity.chain import Chain
from experiments.sensitivity.parts import Kind, Part, bits_of, format_of, kinds_of, parts_of
from experiments.sensitivity.record import begin, finish, resume
from experiments.sensitivity.rounded import num_weights, rounded
from masq.calibration.data import batches as batches_of
from masq.calibration.data import dataset_hash, load_samples
from masq.config import MethodConfig, RunConfig, active_modalities
from masq.errors import ConfigError
from masq.evaluation.fidelity import summarize
from masq.files import atomic_write_json
from masq.models.fingerprint import fingerprint
from masq.models.loading import load, source_folder
from masq.pipeline.progress import BlockClock

if TYPE_CHECKING:
    from masq.numerics.scheme import LinearFormat

_LOG = logging.getLogger(__name__)


def measure(config: RunConfig, source: Path, output: Path) -> dict[str, Any]:
    """All profiles of the model of ``config`` at its scheme, on its evaluation samples.

    The record is written after every profile. A record that is there already goes on where it stopped, and ends with
    the same profiles as one that was never interrupted.

    Args:
        config: model, modality set, scheme, and the evaluation's tasks, samples per task and batch size.
        source: Parquet file of the samples.
        output: JSON file of the record.

    Returns:
        The record, see ``experiments.sensitivity.record``.

    Raises:
        ConfigError: a float scheme or one with overrides, or a method other than rounding to nearest.
        DataError: ``output`` holds a record of another model, data or scheme, or something else.
        NumericalError: a profile left the finite numbers; finished ones are kept.
    """
    _check_method(config.method)
    fmt, evaluation, active = format_of(config.scheme), config.evaluation, active_modalities(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    samples = load_samples(source, evaluation.tasks, evaluation.samples_per_task, 0, active)
    hashes = {"evaluation": dataset_hash(samples), "model": fingerprint(config.model, source_folder(config.model))}
    record = resume(output, begin(config, samples, hashes))
    if record["provenance"]["finished"] is not None:
        _LOG.info("%s: finished before, skipped", output.name)
        return record
    adapter = load(replace(config.model, modalities=active))
    todo = _missing(record, parts_of(config.scheme, len(adapter.blocks())), kinds_of(fmt))
    chain = Chain(adapter, batches_of(samples, evaluation.batch_size))
    clock = BlockClock("runs of a block", sum(len(chain.blocks) - part.first for part, _ in todo))
    for part, kind in todo:
        chain.move_to(part.first)
        summary = profile(chain, part, kind, fmt)
        record.update({name: summary.pop(name) for name in ("nll_float", "counts")})
        record["profiles"].append(summary)
        atomic_write_json(output, record)
        # The clock counts one block at a time; what a profile costs is the blocks after its first one.
        clock.done += len(chain.blocks) - part.first - 1
        clock.tick(f"{part.name}, {kind}: KL {_shown(summary['kl'])}")
    finish(record)
    atomic_write_json(output, record)
    return record


def profile(chain: Chain, part: Part, kind: Kind, fmt: LinearFormat) -> dict[str, Any]:
    """Round one part and compare; the model is float again afterwards.

    Args:
        chain: at the first block of the part, or before it.
        part: what is rounded.
        kind: weights, activations or both.
        fmt: on which grids.

    Returns:
        ``part``, ``kind``, ``bits``, ``num_weights`` of the part, ``kl``, ``nll_delta`` and ``sqnr`` (see the module),
        ``standard_error`` of these; and what is the same in all profiles: ``nll_float`` and ``counts``.

    Raises:
        NumericalError: an output is NaN or infinite.
    """
    assert chain.at <= part.first, f"{part.name} begins before the chain, which is at block {chain.at}"
    with rounded(chain.blocks, part, kind, fmt):
        found = summarize(chain.measure())
    errors = found["standard_error"]
    return {
        "part": part.name,
        "kind": kind,
        "bits": bits_of(fmt, kind),
        "num_weights": num_weights(chain.blocks, part),
        "kl": found["kl"],
        "nll_delta": found["nll_increase"],
        "sqnr": found["sqnr"],
        "standard_error": {"kl": errors["kl"], "nll_delta": errors["nll_increase"], "sqnr": errors["sqnr"]},
        "nll_float": found["nll_float"],
        "counts": {name: found[name] for name in ("num_samples", "num_answer_tokens", "num_tokens")},
    }


def _check_method(method: MethodConfig) -> None:
    if method != MethodConfig(method.name, method.description):
        raise ConfigError(
            "a profile rounds to nearest, without rotation, smoothing, clipping or compensation",
            value=f"method {method.name}",
            remedy="leave the method out",
        )


def _missing(record: dict[str, Any], parts: list[Part], kinds: tuple[Kind, ...]) -> list[tuple[Part, Kind]]:
    """Profiles that the record lacks, in the order in which they are measured."""
    done = {(one["part"], one["kind"]) for one in record["profiles"]}
    return [(part, kind) for part in parts for kind in kinds if (part.name, kind) not in done]


def _shown(values: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in values.items())


def _source(config: RunConfig) -> Path:
    """The Parquet file of the samples: a given one, or a split of the embedded data."""
    from masq.models.zoo.smol_omni import data_path

    given = config.evaluation.source
    return data_path(config.evaluation.split) if given == "auto" else Path(given)


def main(arguments: list[str] | None = None) -> None:
    """Command line: a model, a scheme, samples per task, where the record goes, other keys of a configuration."""
    from masq.compose import compose

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smol_omni")
    parser.add_argument("--modality", default="tri")
    parser.add_argument("--scheme", default="w4a6")
    parser.add_argument("--samples-per-task", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for masq run: model.source=FOLDER")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    named = [f"{axis}={getattr(options, axis)}" for axis in ("model", "modality", "scheme")]
    samples = f"evaluation.samples_per_task={options.samples_per_task}"
    config = compose([*named, "method=rtn", samples, *options.overrides])
    measure(config, _source(config), options.output)


if __name__ == "__main__":
    main()

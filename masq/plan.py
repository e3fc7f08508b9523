"""What a run would do and need, from configuration alone: no weight is read and torch is not imported.

Parameters are counted, memory and disk are estimated from the same counts, time from assumed speeds: an order of
magnitude, meant to tell minutes from hours before they are spent.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masq.config import RunConfig, active_modalities, check_sizes, notes
from masq.identity import folder_name
from masq.models.architecture import architecture, count_parameters, linear_shapes
from masq.models.config import Architecture
from masq.models.zoo import SPLITS, is_trained
from masq.numerics.scheme import GROUP_ROLES
from masq.planned_memory import Workload, memory_by_stage
from masq.stored import DTYPE_BYTES, Stored, stored
from masq.transforms.config import LearnedSmoothing, MbqSmoothing, SearchedSmoothing, takes_moments

# A core: so that half of the committed records took less than planned and half more (tests/test_results.py).
_FLOPS = {"cpu_core": 140e9, "accelerator": 60e12}
# Simulated integer products and fake quantization cost about this many float products.
_SIMULATION_COST = 1.0
_FLOAT64_COST = 4.0


@dataclass(frozen=True)
class Plan:
    """Estimates for one run.

    Attributes:
        folder: pattern of the run's folder name; the identity is known once the data are hashed.
        existing: folders that already match the pattern.
        num_parameters: by part: language model, embeddings and head, towers.
        num_weights: elements of the linears that are quantized.
        effective_bits: stored bits per weight of the decoder's linears, scales, smoothing, adapters and linears left
            in float included.
        memory_bytes: by stage; the peak is the largest.
        disk_bytes: of the run's folder.
        seconds: by stage.
        steps: what would run, in order.
        notes: settings without effect, and limits of the estimate.
    """

    folder: str
    existing: tuple[str, ...]
    num_parameters: dict[str, int]
    num_weights: int
    effective_bits: float
    memory_bytes: dict[str, float]
    disk_bytes: float
    seconds: dict[str, float]
    steps: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def peak_memory_bytes(self) -> float:
        """Largest stage."""
        return max(self.memory_bytes.values())


def plan(config: RunConfig) -> Plan:
    """Estimate one run.

    Raises:
        ConfigError: the sizes of the model are not known.
        ModelError: a local checkpoint folder is missing or holds no readable config.json.
    """
    sizes = architecture(config.model)
    check_sizes(config, sizes)
    weights = stored(config, sizes)
    parameters = count_parameters(sizes)
    workload = Workload.of(config)
    root = Path(config.output.root)
    pattern = folder_name(config, "*")
    return Plan(
        folder=str(root / pattern),
        existing=tuple(sorted(path.name for path in root.glob(pattern) if path.is_dir())),
        num_parameters=parameters,
        num_weights=weights.num_quantized,
        effective_bits=weights.effective_bits,
        memory_bytes=memory_by_stage(config, sizes, parameters, weights.num_quantized, workload),
        disk_bytes=_disk(config, sizes, weights, workload),
        seconds=_seconds(config, sizes, parameters, workload),
        steps=tuple(_steps(config, sizes, workload)),
        notes=(
            *notes(config),
            *_absent_files(config),
            *(["the time of benchmarks is not counted"] if config.evaluation.benchmarks else []),
            "time is an order of magnitude; parameters are exact where the towers' sizes are given",
        ),
    )


def _absent_files(config: RunConfig) -> list[str]:
    """Data that a run would ask for and this machine does not have: the run may be meant for another one."""
    sources = {"evaluation": config.evaluation.source}
    if not config.method.is_float:
        sources["calibration"] = config.calibration.source
    return [
        f"{split}.source={source} is not on this machine"
        for split, source in sources.items()
        if source != "auto" and not Path(source).expanduser().is_file()
        if not (split == "calibration" and source in SPLITS and is_trained(config.model.source))
    ]


def render(planned: Plan) -> str:
    """The plan as text for a terminal."""
    total = sum(planned.num_parameters.values())
    lines = [f"Would run in {planned.folder}"]
    lines += [f"  {index}. {step}" for index, step in enumerate(planned.steps, 1)]
    lines += [
        f"Folders there already: {', '.join(planned.existing) or 'none'}",
        f"Parameters      {_count(total)} ({_parts(planned.num_parameters, _count)})",
        f"Quantized       {_count(planned.num_weights)} weights; the decoder's linears take "
        f"{planned.effective_bits:.2f} bits a weight, everything counted",
        f"Peak memory     about {size_text(planned.peak_memory_bytes)} ({_parts(planned.memory_bytes, size_text)})"
        f"; main memory available: {_available_memory()}",
        f"Disk            about {size_text(planned.disk_bytes)}",
        f"Time            about {_duration(sum(planned.seconds.values()))} ({_parts(planned.seconds, _duration)})",
    ]
    return "\n".join(lines + [f"Note: {note}" for note in planned.notes])


def _disk(config: RunConfig, sizes: Architecture, weights: Stored, workload: Workload) -> float:
    """Block checkpoints hold a byte per code; answers and the record are small, outputs of the float model are not."""
    text = 300.0 * workload.evaluation_samples + 200_000
    if config.evaluation.keep_float:
        tokens = _compared(config, workload) * workload.sample_tokens
        text += tokens * sizes.num_layers * sizes.hidden_size * DTYPE_BYTES[config.model.dtype]
    if config.method.is_float or config.scheme.weight is None:
        return text
    norms = 2 * sizes.num_layers * sizes.hidden_size * 4
    return text + norms + weights.num_quantized + (weights.bits - weights.code_bits) / 8


def _seconds(
    config: RunConfig, sizes: Architecture, parameters: dict[str, int], workload: Workload
) -> dict[str, float]:
    """Time by stage from counted products and assumed speeds."""
    cores = config.threads or os.cpu_count() or 1
    speed = _FLOPS["cpu_core"] * cores if config.model.device.startswith("cpu") else _FLOPS["accelerator"]
    per_token = 2.0 * (parameters["decoder"] + parameters["towers"])
    per_answer = per_token * config.evaluation.max_new_tokens + 2.0 * sizes.vocab_size * sizes.hidden_size
    cost = 1.0 if config.method.is_float else _SIMULATION_COST
    compared = _compared(config, workload)
    head = 2.0 * sizes.vocab_size * sizes.hidden_size
    result = {
        "evaluation": cost * (per_token * workload.evaluation_tokens + per_answer * workload.evaluation_samples),
        "fidelity": (per_token * (1 + cost) + 2 * head) * compared * workload.sample_tokens,
    }
    # How long benchmarks take depends on records that have not been read.
    if not config.evaluation.score or config.evaluation.benchmarks:
        del result["evaluation"]
    if not config.method.is_float:
        smoothing = config.method.smoothing
        # Forward and backward cost three forward passes; two more measure the loss before and after.
        passes = 3 + _SIMULATION_COST * (3 * smoothing.epochs + 2 if isinstance(smoothing, LearnedSmoothing) else 1)
        result["calibration"] = passes * per_token * workload.calibration_tokens
        if isinstance(smoothing, SearchedSmoothing):
            result["search"] = _search_products(config, sizes, workload)
            if isinstance(smoothing, MbqSmoothing):
                # Forward, forward again block by block, and back to the inputs of blocks.
                result["gradients"] = 3 * (per_token + head) * workload.calibration_tokens
        if config.method.compensation.kind != "none":
            sides = sum(25.0 * a * b * min(a, b) for a, b in linear_shapes(sizes).values())
            result["compensation"] = sides * sizes.num_layers * len(workload.other_modalities)
        result["rounding"] = _rounding_products(config, sizes)
    return {stage: flops / speed for stage, flops in result.items() if flops}


def _compared(config: RunConfig, workload: Workload) -> int:
    """Samples behind SQNR, NLL and KL."""
    count = config.evaluation.fidelity_samples_per_task
    return workload.evaluation_samples if count is None else workload.num_tasks * count


def _rounding_products(config: RunConfig, sizes: Architecture) -> float:
    """What rounding against second moments costs, in float64: nothing for plain rounding to nearest."""
    rounding, shapes = config.method.rounding, linear_shapes(sizes)
    products = 0.0
    if rounding.kind == "gptq":
        # One update of the weight per column and the factors of the Hessian.
        products += sum(2.0 * a * b * b + 2.0 * b**3 for a, b in shapes.values())
    if rounding.kind != "none" and rounding.clip is not None:
        clipped = [shapes[role] for role in rounding.clip.roles if role in config.scheme.quantized_roles]
        products += len(rounding.clip.shares) * sum(2.0 * a * b * b for a, b in clipped)
    return _FLOAT64_COST * products * sizes.num_layers


def _search_products(config: RunConfig, sizes: Architecture, workload: Workload) -> float:
    """Products of every candidate factor with the sampled tokens, or with the second moments of each modality."""
    smoothing, shapes = config.method.smoothing, linear_shapes(sizes)
    assert isinstance(smoothing, SearchedSmoothing)
    searched = [
        shapes[role]
        for group in smoothing.groups
        for role in GROUP_ROLES[group]
        if role in config.scheme.quantized_roles
    ]
    modalities = 1 + len(workload.other_modalities)
    if takes_moments(smoothing.error, [config.scheme.activation]):
        products = sum(_FLOAT64_COST * modalities * 2.0 * a * b * b for a, b in searched)
    else:
        rows = min(workload.calibration_tokens, modalities * smoothing.tokens)
        products = sum(2.0 * a * b * rows for a, b in searched)
    return products * smoothing.steps * sizes.num_layers


def _steps(config: RunConfig, sizes: Architecture, workload: Workload) -> list[str]:
    """What would run, in order."""
    modalities = ", ".join(active_modalities(config))
    method = config.method
    steps = [f"load {config.model.name} from {config.model.source} ({config.model.dtype}, {config.model.device})"]
    if not method.is_float:
        steps += [
            f"calibrate on {workload.calibration_tokens // workload.sample_tokens} samples: {modalities}",
            f"quantize {sizes.num_layers} blocks to {config.scheme.name} with {method.name} ({method.description}): "
            f"rotation {method.rotation.kind}, smoothing {method.smoothing.kind}, rounding {method.rounding.kind}, "
            f"compensation {method.compensation.kind}",
        ]
    if config.towers.kind != "none":
        steps.insert(1, f"round the linears of the towers to {config.towers.name}")
    scored = f"{config.evaluation.samples_per_task} samples of each task"
    if config.evaluation.samples_per_task is None:
        scored = f"the whole {config.evaluation.split} split"
    compare = "compare with the float model: SQNR, NLL and KL by modality"
    score = [f"score {scored}: {modalities}"] if config.evaluation.score else []
    if config.evaluation.benchmarks:
        where = config.evaluation.records or "the hub"
        score = [f"score {', '.join(config.evaluation.benchmarks)}, records from {where}"]
    return [*steps, *score, compare, "write record.json"]


def _available_memory() -> str:
    try:
        import psutil
    except ImportError:
        return "unknown"
    return size_text(psutil.virtual_memory().available)


def _parts(values: dict[str, Any], show: Any) -> str:
    return ", ".join(f"{name} {show(value)}" for name, value in values.items())


def _count(number: float) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return str(int(number))


def size_text(number: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

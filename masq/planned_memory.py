"""How much memory a run would take, by stage: everything resident, or weights streamed part by part. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from masq.config import RunConfig, active_modalities
from masq.models.architecture import input_sizes, linear_shapes
from masq.models.config import RESIDENT_SHARE, Architecture
from masq.models.zoo import embedded_name
from masq.numerics.scheme import GROUP_ROLES
from masq.stored import DTYPE_BYTES
from masq.transforms.config import LearnedSmoothing

# Tasks of the embedded data by what they need besides text, and tokens of one sample: (embedded model, real model).
_TASKS = {"text": 3, "vision": 4, "audio": 1}
_JOINT_TASKS = 3
_TOKENS = {"zoo": 96, "real": 512}
_SPLIT_SAMPLES = 400
_PROCESS_BYTES = 700e6
# Streamed: the process with transformers and both harnesses, and activations in memory at most (``tensor_files``).
_STREAMING_PROCESS_BYTES = 1.1e9
_ACTIVATION_BYTES = 512 << 20
# Of the two towers of an Omni model the one for pictures is the larger, with this share.
_LARGER_TOWER = 0.512
# Float64 copies of a weight: smoothed and on its grid; for a correction residual, whitened residual and a product.
_ROUNDING_COPIES, _CORRECTION_COPIES = 2, 3
# Square matrices by modality: second moment, eigenvectors, root, inverse root, and what the decomposition works on.
_MOMENT_COPIES = 5
# Float32 copies of a weight in the backward pass: smoothed, on its grid, its gradient, temporaries; more if asymmetric.
_LEARNING_COPIES, _ASYMMETRIC_COPIES = 6, 9


@dataclass(frozen=True)
class Workload:
    """How much data flows.

    Attributes:
        num_tasks: that are evaluated.
        calibration_tokens: of all calibration samples.
        evaluation_samples: of all tasks.
        evaluation_tokens: of those.
        sample_tokens: of one sample.
        other_modalities: active ones besides text.
    """

    num_tasks: int
    calibration_tokens: int
    evaluation_samples: int
    evaluation_tokens: int
    sample_tokens: int
    other_modalities: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig) -> Workload:
        """What a configuration asks for, as far as it can be known before data are read."""
        active = active_modalities(config)
        joint = _JOINT_TASKS if len(active) == len(_TASKS) else 0
        num_tasks = sum(_TASKS[name] for name in active) + joint
        calibration_tasks = len(config.calibration.tasks or ()) or num_tasks
        evaluation_tasks = len(config.evaluation.tasks or ()) or num_tasks
        tokens = _TOKENS["real" if embedded_name(config.model.source) is None else "zoo"]
        samples = evaluation_tasks * (config.evaluation.samples_per_task or _SPLIT_SAMPLES)
        drawn = config.calibration.samples_per_task or _SPLIT_SAMPLES
        calibration = 0 if config.method.is_float else config.calibration.samples or calibration_tasks * drawn
        return cls(evaluation_tasks, calibration * tokens, samples, samples * tokens, tokens, active[1:])


def memory_by_stage(
    config: RunConfig, sizes: Architecture, parameters: dict[str, int], num_weights: int, workload: Workload
) -> dict[str, float]:
    """Bytes by stage; the peak is the largest.

    Args:
        config: of the run.
        sizes: of the model.
        parameters: of its parts, see ``count_parameters``.
        num_weights: elements of the linears that are quantized.
        workload: how much data flows.
    """
    width = DTYPE_BYTES[config.model.dtype]
    if is_streamed(config, sum(parameters.values()) * width):
        return _streamed(config, sizes, parameters, workload)
    model = sum(parameters.values()) * width
    batch_tokens = config.evaluation.batch_size * workload.sample_tokens
    logits = 2 * batch_tokens * sizes.vocab_size * 4
    if config.method.is_float:
        # Fidelity compares with a second copy even here: its answer, "identical", is a check of the harness.
        return {"evaluation": _PROCESS_BYTES + 2 * model + logits}
    # A format without an integer product keeps a float32 copy of the weight beside its codes.
    has_copy = config.scheme.activation is None
    quantized = model + num_weights * ((5 if has_copy else 1) - width)
    cached = 2 * workload.calibration_tokens * sizes.hidden_size * width
    largest = max(input_sizes(sizes, config.scheme.quantized_roles))
    moments = 4 * largest**2 * 8 * (1 + len(workload.other_modalities))
    training = config.calibration.batch_size * workload.sample_tokens * 40 * sizes.intermediate_size
    block = 3 * 8 * num_weights / sizes.num_layers
    return {
        "calibration": _PROCESS_BYTES + model + cached + block + max(moments, training),
        "evaluation": _PROCESS_BYTES + model + quantized + logits,
    }


def is_streamed(config: RunConfig, num_bytes: float) -> bool:
    """Whether a model whose weights take ``num_bytes`` would be streamed on this machine."""
    if config.model.weights != "auto" or embedded_name(config.model.source) is not None:
        return config.model.weights == "streamed"
    try:
        import psutil
    except ImportError:
        return False
    return num_bytes > psutil.virtual_memory().available * RESIDENT_SHARE


def _streamed(
    config: RunConfig, sizes: Architecture, parameters: dict[str, int], workload: Workload
) -> dict[str, float]:
    """A tower, the embeddings or a block at a time, and what is computed with it."""
    width, modalities = DTYPE_BYTES[config.model.dtype], 1 + len(workload.other_modalities)
    towers = parameters["towers"] * (_LARGER_TOWER if "audio" in config.model.modalities else 1.0)
    head = sizes.vocab_size * sizes.hidden_size * width
    batch_tokens = config.evaluation.batch_size * workload.sample_tokens
    found = {
        "towers": _STREAMING_PROCESS_BYTES + towers * width,
        "embeddings": _STREAMING_PROCESS_BYTES + head,
        "evaluation": _STREAMING_PROCESS_BYTES + head + 64 * sizes.vocab_size * 8 * 3 + batch_tokens * 4,
    }
    if config.method.is_float:
        return found
    block = parameters["decoder"] / sizes.num_layers * width
    shapes = linear_shapes(sizes)
    largest = max(a * b for role, (a, b) in shapes.items() if role in config.scheme.quantized_roles)
    chains = min(_ACTIVATION_BYTES, 4 * workload.calibration_tokens * sizes.hidden_size * width)
    base = _STREAMING_PROCESS_BYTES + block + chains
    copies, side = _ROUNDING_COPIES, 0
    if config.method.compensation.kind != "none":
        groups = [role for group in config.method.compensation.groups for role in GROUP_ROLES[group]]
        copies, side = _CORRECTION_COPIES, max(shapes[role][1] for role in groups)
    if config.method.rounding.kind == "gptq" or (config.method.rounding.kind != "none" and config.method.rounding.clip):
        side = max(input_sizes(sizes, config.scheme.quantized_roles))
    codes = block / width
    found["rounding"] = base + codes + copies * largest * 8 + _MOMENT_COPIES * side**2 * 8 * modalities
    if isinstance(config.method.smoothing, LearnedSmoothing):
        tokens = config.calibration.batch_size * workload.sample_tokens
        rows = tokens * 4 * (4 * sizes.intermediate_size + 8 * sizes.hidden_size)
        symmetric = config.scheme.weight is None or config.scheme.weight.symmetric
        kept = max(modalities * codes, (_LEARNING_COPIES if symmetric else _ASYMMETRIC_COPIES) * largest * 4)
        found["learning"] = base + kept + rows
    return found

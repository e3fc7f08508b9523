"""The configuration of one run: what to load, how to quantize it, what to score.

Plain dictionaries come in (from YAML, composed by Hydra or not), frozen dataclasses go on. Each part's class lives
beside the code it configures, and its defaults live there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from masq import sizes
from masq.calibration.config import CalibrationConfig
from masq.decoding import decode_dataclass, to_plain
from masq.errors import ConfigError, unknown_name
from masq.evaluation.config import EvaluationConfig
from masq.kernels import AUTO, FUSING, KERNELS
from masq.method import MethodConfig
from masq.method import check as check_method
from masq.models.config import Architecture, ModelConfig
from masq.numerics.scheme import NoTowers, Scheme, Towers
from masq.transforms.config import LearnedSmoothing, SearchedSmoothing


@dataclass(frozen=True, slots=True)
class ModalityConfig:
    """The set of modalities that is calibrated, learned and scored.

    Attributes:
        name: ``dual`` is text and vision (text and audio for a model without vision); ``tri`` is all three.
    """

    name: Literal["dual", "tri"] = "tri"


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """Where results go.

    Attributes:
        root: folder that holds one folder per run.
        wandb: also log to Weights & Biases.
        wandb_project: project to log to.
        wandb_group: group of the run there, the experiment's name where it is one's cell.
        wandb_checkpoint: also send the quantized blocks.
    """

    root: str = "runs"
    wandb: bool = False
    wandb_project: str = "masq"
    wandb_group: str | None = None
    wandb_checkpoint: bool = False

    def __post_init__(self) -> None:
        """Reject an empty folder name.

        Raises:
            ConfigError: ``root`` is empty.
        """
        if not self.root:
            raise ConfigError("root must not be empty", value="''", remedy="set output.root=FOLDER")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything one run depends on.

    Attributes:
        model: what is loaded.
        modality: the active modalities.
        scheme: number formats.
        method: the five slots.
        calibration: what is looked at.
        evaluation: what is scored.
        output: where results go.
        seed: of every random stream, keyed further by stage and block.
        threads: CPU threads, None for torch's choice. Recorded; does not change the identity.
        execution: ``simulated`` keeps integer codes in bytes and multiplies them in torch; ``packed`` keeps the stored
            bits and multiplies by a kernel, so that scores and fidelity come from what would be deployed; ``fused``
            also computes norms and gates in the pass that quantizes what they feed (``masq.modules.fused``).
        kernel: of packed and fused execution, ``auto`` for the fastest that can run each linear.
        towers: what becomes of the vision and audio towers.
        preset: name of a set of overrides that was used, shown under tables.
    """

    model: ModelConfig
    modality: ModalityConfig
    scheme: Scheme
    method: MethodConfig
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    seed: int = 0
    threads: int | None = None
    preset: str | None = None
    execution: Literal["simulated", "packed", "fused"] = "simulated"
    kernel: str = AUTO
    towers: Towers = field(default_factory=NoTowers)

    def __post_init__(self) -> None:
        """Refuse combinations that cannot run or mean nothing.

        Raises:
            ConfigError: which rule is broken, by what, and the way out.
        """
        if self.seed < 0:
            raise ConfigError("seed must not be negative", value=self.seed)
        if self.threads is not None and self.threads < 1:
            raise ConfigError("threads must be positive", value=self.threads, remedy="set null for torch's choice")
        active = active_modalities(self)
        check_method(self.method)
        _check_execution(self, active)
        _check_decoding(self)
        if not self.method.is_float:
            _check_formats(self)


def decode(plain: Mapping[str, Any]) -> RunConfig:
    """Build a checked configuration from a plain dictionary.

    Raises:
        ConfigError: wrong key, name, value, type or combination; the message carries the dotted path and near matches.
    """
    return decode_dataclass(RunConfig, plain)


def load(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a resolved ``config.yaml``, as every run leaves one behind; no Hydra is needed.

    Args:
        path: the file.
        overrides: changes as ``a.b=value``, values in YAML.

    Raises:
        ConfigError: an unreadable file or override, or a configuration that cannot be run.
    """
    import yaml

    try:
        plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        changes = [(override.partition("="), override) for override in overrides]
        values = [(key, separator, yaml.safe_load(value), whole) for (key, separator, value), whole in changes]
    except OSError as error:
        raise ConfigError(f"cannot read {path}", value=error.strerror, remedy="check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} or an override is not YAML", value=str(error).replace("\n", " ")) from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} must hold the keys of a run", value=type(plain).__name__)
    for key, separator, value, whole in values:
        *parents, last = key.split(".")
        node = plain
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not separator or not isinstance(node, dict):
            raise ConfigError("an override must be KEY=VALUE of an existing group", value=whole)
        node[last] = value
    return decode(plain)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as JSON content; ``decode`` of it gives ``config`` again."""
    return to_plain(config)


def active_modalities(config: RunConfig) -> tuple[str, ...]:
    """Modalities that are calibrated, learned and scored, text first.

    Raises:
        ConfigError: the model does not have what the set asks for.
    """
    available = config.model.modalities
    wanted: tuple[str, ...] = ("text", "vision", "audio")
    if config.modality.name == "dual":
        wanted = ("text", "vision") if "vision" in available else ("text", "audio")
    missing = [name for name in wanted if name not in available]
    if missing:
        raise ConfigError(
            f"modality={config.modality.name} needs {' and '.join(wanted[1:])}, and {config.model.name} has no "
            f"{' and no '.join(missing)}",
            value=f"modalities of the model: {', '.join(available)}",
            remedy="use modality=dual, or another model" if len(available) > 1 else "use another model",
        )
    return wanted


def notes(config: RunConfig) -> list[str]:
    """What a reader of the record should know about settings that had no effect or bend the comparison."""
    found = []
    if config.method.is_float and not config.scheme.is_float:
        found.append(f"method {config.method.name} keeps the float model: scheme {config.scheme.name} is ignored")
    if config.towers.kind != "none":
        found.append(f"towers are rounded to nearest at {config.towers.name}")
    if config.method.stores_weight_per_modality:
        found.append(f"method {config.method.name} stores one weight per modality: an upper bound, not deployable")
    return found


def _check_execution(config: RunConfig, active: tuple[str, ...]) -> None:
    if config.method.is_float and config.towers.kind != "none":
        raise ConfigError("a method that rounds nothing leaves towers in float", remedy="set towers=none")
    if config.kernel not in (AUTO, *KERNELS.names()):
        raise unknown_name("kernel", config.kernel, [AUTO, *KERNELS.names()])
    if config.execution == "simulated" and config.kernel != AUTO:
        value = f"kernel={config.kernel}, execution=simulated"
        raise ConfigError("a kernel runs packed weights", value=value, remedy=f"set execution=packed, or kernel={AUTO}")
    can_fuse = config.scheme.activation is not None and config.kernel in (AUTO, *FUSING)
    if config.execution == "fused" and not can_fuse:
        rule = "fused execution needs integer activations and a kernel that quantizes what a norm gives"
        remedy = f"set execution=packed, or kernel to one of {', '.join((AUTO, *FUSING))}"
        raise ConfigError(rule, value=f"scheme {config.scheme.name}, kernel={config.kernel}", remedy=remedy)
    base = config.method.compensation.base
    if base not in active:
        remedy = f"use one of {', '.join(active)}"
        raise ConfigError("the base of corrections must be a modality of the run", value=base, remedy=remedy)
    if config.execution != "simulated" and (config.method.stores_weight_per_modality or base != "text"):
        rule = f"{config.execution} execution has one weight for all modalities, and corrects no text"
        remedy = "use execution=simulated, or a method with rounding.per_modality=false and compensation.base=text"
        raise ConfigError(rule, value=f"method {config.method.name}, method.compensation.base={base}", remedy=remedy)


def _check_decoding(config: RunConfig) -> None:
    if config.evaluation.decoding == "eager":
        return
    simulated = config.execution == "simulated" and not config.method.is_float
    if not config.model.device.startswith("cuda") or config.model.weights != "resident" or simulated:
        model = config.model
        raise ConfigError(
            "graphs replay steps of models that lie on an NVIDIA GPU, in float or with packed weights",
            value=f"model.device={model.device}, model.weights={model.weights}, execution={config.execution}",
            remedy="set evaluation.decoding=eager, or model.device=cuda, model.weights=resident and execution=packed",
        )


def _check_formats(config: RunConfig) -> None:
    weight = config.scheme.weight
    if weight is None:
        raise ConfigError(
            f"scheme {config.scheme.name} leaves nothing for method {config.method.name} to round",
            value=f"scheme={config.scheme.name}, method={config.method.name}",
            remedy="use method=none for the float model, or a scheme with integer weights",
        )
    if config.scheme.activation is not None and config.scheme.activation.clip < 1:
        raise ConfigError("a method says how activations are clipped", remedy="set method.rounding.activation_clip")
    _check_rounding(config)
    smoothing = config.method.smoothing
    fitted = isinstance(smoothing, LearnedSmoothing | SearchedSmoothing)
    if fitted and not sizes.roles_in(smoothing.groups, config.scheme.quantized_roles):
        raise ConfigError(
            "learned or searched smoothing needs a quantized linear in one of its groups",
            value=f"groups {', '.join(smoothing.groups)}, quantized roles {', '.join(config.scheme.quantized_roles)}",
            remedy="choose other groups or roles, or method.smoothing=modality or shared",
        )
    # The sizes of a local checkpoint are read from it, and checked, when the run begins.
    if config.model.architecture is not None and not Path(config.model.source).expanduser().is_dir():
        check_sizes(config, config.model.architecture)


def check_sizes(config: RunConfig, architecture: Architecture) -> None:
    """Check scheme and method against the sizes of the model.

    Raises:
        ConfigError: what does not fit, see ``masq.sizes.check``.
    """
    if not config.method.is_float:
        method = config.method
        sizes.check(config.scheme, method.rotation, method.compensation, architecture, config.model.name)


def _check_rounding(config: RunConfig) -> None:
    rounding, weight = config.method.rounding, config.scheme.weight
    if rounding.kind != "gptq" or weight is None or not weight.group_size:
        return
    if rounding.act_order and not rounding.static_groups and rounding.clip is None:
        raise ConfigError(
            "act_order visits columns out of their groups, so the scales of groups must be fixed before",
            value=f"act_order=true with groups of {weight.group_size} and static_groups=false",
            remedy="set method.rounding.static_groups=true",
        )

"""What a packed checkpoint says of itself: ``quantization_config`` of its ``config.json``, parsed strictly.

The fields are documented in ``masq.export.checkpoint``. No torch here, and nothing is believed: every value has a type
and a bound, unknown and missing keys are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from masq.errors import ConfigError, ModelError
from masq.export.parsing import (
    boolean_of,
    check_keys,
    dtype_of,
    error_of,
    integer_of,
    list_of,
    object_of,
    shown,
    text_of,
)
from masq.files import canonical_hash
from masq.models.sample import Modality
from masq.numerics.scheme import LinearFormat, TensorFormat

METHOD = "masq"
VERSIONS = (1, 2, 3, 4)
"""Of the format, of which the first that can say all is written: 2 has int8 factors, 3 has centres."""
SIDES = tuple(m.name.lower() for m in Modality if m is not Modality.PADDING)
"""Names of the modalities of tokens, in the order of their ids."""
STORED_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names in safetensors of the dtypes that biases and low-rank factors may have."""
FACTOR_DTYPES = {**STORED_DTYPES, "int8": "I8"}
"""Those of factors: int8 means codes, and a scale for each component."""

_MAX_FEATURES = 1 << 24
_MAX_LINEARS = 1 << 16
_MAX_TOKEN_ID = 1 << 24
_NIBBLE_BITS = 4


@dataclass(frozen=True, slots=True)
class LinearEntry:
    """One quantized linear.

    Attributes:
        in_features: I.
        out_features: O.
        format: of weight and input.
        bias: its dtype, None for none.
        smoothing: U, the number of distinct smoothing vectors at run time; 0 for none.
        ranks: R of the low-rank correction by name of the modality.
        factor_dtype: dtype of the corrections' factors, int8 for codes with scales, None without corrections.
        group: linears with the same number read the same input.
        centres: K, the number of centres, and of biases; 0 for none.
        tower: whether it is of a vision or audio tower, whose rows are no tokens.
    """

    in_features: int
    out_features: int
    format: LinearFormat
    bias: str | None
    smoothing: int
    ranks: Mapping[str, int]
    factor_dtype: str | None
    group: int
    centres: int = 0
    tower: bool = False

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype (as safetensors writes it) and shape of every stored tensor, by its name below the linear's."""
        weight, d_in, d_out = self.format.weight, self.in_features, self.out_features
        halves = weight.bits <= _NIBBLE_BITS
        groups = (d_out, d_in // (weight.group_size or d_in))
        codes = "I8" if weight.symmetric and not halves else "U8"
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "codes": (codes, (d_out, (d_in + 1) // 2 if halves else d_in)),
            "scale": ("F32", groups),
        }
        if not weight.symmetric:
            found["zero_point"] = ("U8", groups)
        if self.bias is not None:
            found["bias"] = (STORED_DTYPES[self.bias], (self.centres, d_out) if self.centres else (d_out,))
        if self.centres:
            found |= {"centre": ("BF16", (self.centres, d_in)), "centre_rows": ("I64", (len(SIDES),))}
        if self.smoothing:
            found["inverse_smoothing"] = ("F32", (self.smoothing, d_in))
            found["smoothing_rows"] = ("I64", (len(SIDES),))
        for side, rank in self.ranks.items():
            dtype = FACTOR_DTYPES[self.factor_dtype or "float32"]
            found |= {f"left_{side}": (dtype, (d_in, rank)), f"right_{side}": (dtype, (rank, d_out))}
            if dtype == "I8":
                found[f"factor_scale_{side}"] = ("F32", (rank,))
        return found


@dataclass(frozen=True, slots=True)
class Description:
    """A whole checkpoint.

    Attributes:
        linears: quantized linears by the name of their module.
        rotated: modules whose input is rotated at run time; the signs of each are the tensor ``<name>.signs``.
        residual_rotation: whether the residual stream is in a rotated basis (information: nothing undoes it).
        placeholders: ids of the tokens that stand for pieces of a medium, by name of the modality.
        made_by: masq's version and what is known of the run.
        tensors_sha256: of the listing of all tensors with their checksums, which every weight file holds.
        config_sha256: of the rest of config.json (``masq.export.files.config_digest``).
    """

    linears: Mapping[str, LinearEntry]
    rotated: tuple[str, ...]
    residual_rotation: bool
    placeholders: Mapping[str, tuple[int, ...]]
    made_by: Mapping[str, Any] = field(default_factory=dict)
    tensors_sha256: str = ""
    config_sha256: str = ""

    @property
    def version(self) -> int:
        """Of the format: the first that can say this."""
        formats = {entry.format.activation for entry in self.linears.values()}
        if any(entry.tower for entry in self.linears.values()) or any(one and one.clip < 1 for one in formats):
            return 4
        if any(entry.centres for entry in self.linears.values()):
            return 3
        return 2 if any(entry.factor_dtype == "int8" for entry in self.linears.values()) else 1

    def sealed(self, tensors_sha256: str, config_sha256: str) -> Description:
        """The same, of these contents."""
        return replace(self, tensors_sha256=tensors_sha256, config_sha256=config_sha256)

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...] | None]]:
        """Dtype and shape of every tensor that quantization adds; the shape of signs is that of their linear."""
        found: dict[str, tuple[str, tuple[int, ...] | None]] = {}
        for name, entry in self.linears.items():
            found |= {f"{name}.{key}": value for key, value in entry.tensors().items()}
        for name in self.rotated:
            inside = self.linears.get(f"{name}.linear")
            found[f"{name}.signs"] = ("F32", None if inside is None else (inside.in_features,))
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON content; ``from_dict`` gives the description back."""
        formats = list(dict.fromkeys(entry.format for entry in self.linears.values()))
        content: dict[str, Any] = {
            "quant_method": METHOD,
            "version": self.version,
            "formats": [_format_to_dict(one) for one in formats],
            "linears": {name: _entry_to_dict(entry, formats) for name, entry in self.linears.items()},
            "rotation": {"inputs": list(self.rotated), "residual": self.residual_rotation},
            "placeholders": {side: list(ids) for side, ids in self.placeholders.items()},
            "made_by": dict(self.made_by),
            "tensors_sha256": self.tensors_sha256,
            "config_sha256": self.config_sha256,
        }
        return {**content, "sha256": canonical_hash(content)}

    @classmethod
    def from_dict(cls, content: Any) -> Description:
        """Parse what ``to_dict`` made.

        Raises:
            ModelError: a wrong version, checksum, key, type or value.
        """
        content = object_of(content, "quantization_config")
        _check_version(content)
        _check_seal(content)
        keys = set(cls(linears={}, rotated=(), residual_rotation=False, placeholders={}).to_dict())
        check_keys(content, keys, "quantization_config")
        formats = [_linear_format(one, f"formats[{index}]") for index, one in enumerate(list_of(content["formats"]))]
        rotation = object_of(content["rotation"], "rotation")
        check_keys(rotation, {"inputs", "residual"}, "rotation")
        linears = object_of(content["linears"], "linears")
        if not 0 < len(linears) <= _MAX_LINEARS:
            raise error_of("linears must name between 1 and 65536 linears", len(linears))
        found = cls(
            linears={name: _entry(name, one, formats) for name, one in linears.items()},
            rotated=tuple(text_of(name, "rotation.inputs") for name in list_of(rotation["inputs"])),
            residual_rotation=boolean_of(rotation["residual"], "rotation.residual"),
            placeholders=_placeholders(content["placeholders"]),
            made_by=object_of(content["made_by"], "made_by"),
            tensors_sha256=text_of(content["tensors_sha256"], "tensors_sha256"),
            config_sha256=text_of(content["config_sha256"], "config_sha256"),
        )
        if found.version != content["version"]:
            raise error_of("version 4 has towers or clips, 3 centres, 2 int8 factors, 1 neither", content["version"])
        return found


def _format_to_dict(fmt: LinearFormat) -> dict[str, Any]:
    """Whole ranges are left out, as before there were others."""
    found = asdict(fmt)
    for one in found.values():
        if one is not None and one["clip"] == 1:
            del one["clip"]
    return found


def _entry_to_dict(entry: LinearEntry, formats: list[LinearFormat]) -> dict[str, Any]:
    return {
        "in_features": entry.in_features,
        "out_features": entry.out_features,
        "format": formats.index(entry.format),
        "bias": entry.bias,
        "smoothing": entry.smoothing,
        "ranks": dict(entry.ranks),
        "factor_dtype": entry.factor_dtype,
        "group": entry.group,
        **({"centres": entry.centres} if entry.centres else {}),
        **({"tower": True} if entry.tower else {}),
    }


def _entry(name: str, content: Any, formats: list[LinearFormat]) -> LinearEntry:
    content = object_of(content, name)
    check_keys(content, set(LinearEntry.__dataclass_fields__) - ({"centres", "tower"} - content.keys()), name)
    d_in, d_out = (
        integer_of(content[key], f"{name}.{key}", 1, _MAX_FEATURES) for key in ("in_features", "out_features")
    )
    fmt = formats[integer_of(content["format"], f"{name}.format", 0, len(formats) - 1)]
    if d_in % (fmt.weight.group_size or 1):
        raise error_of(f"{name}: the group size must divide the inputs", f"{fmt.weight.group_size} of {d_in}")
    ranks = object_of(content["ranks"], f"{name}.ranks")
    for side in ranks:
        _known_side(side)
        integer_of(ranks[side], f"{name}.ranks.{side}", 1, min(d_in, d_out))
    factor_dtype = dtype_of(content["factor_dtype"], f"{name}.factor_dtype", FACTOR_DTYPES)
    if bool(ranks) != (factor_dtype is not None):
        raise error_of(f"{name}: factor_dtype belongs to ranks", f"{factor_dtype} with {len(ranks)} ranks")
    centres = integer_of(content["centres"], f"{name}.centres", 1, len(SIDES)) if "centres" in content else 0
    if centres and content["bias"] is None:
        raise error_of(f"{name}: centres need a bias", None)
    if (tower := boolean_of(content.get("tower", False), f"{name}.tower")) and (
        centres or ranks or content["smoothing"]
    ):
        raise error_of(
            f"{name}: rows of towers are no tokens, so nothing depends on their modality", "centres or factors"
        )
    return LinearEntry(
        in_features=d_in,
        out_features=d_out,
        format=fmt,
        bias=dtype_of(content["bias"], f"{name}.bias", STORED_DTYPES),
        smoothing=integer_of(content["smoothing"], f"{name}.smoothing", 0, len(SIDES)),
        ranks=ranks,
        factor_dtype=factor_dtype,
        group=integer_of(content["group"], f"{name}.group", 0, _MAX_LINEARS),
        centres=centres,
        tower=tower,
    )


def _linear_format(content: Any, place: str) -> LinearFormat:
    content = object_of(content, place)
    check_keys(content, {"weight", "activation"}, place)
    weight = _tensor_format(content["weight"], f"{place}.weight")
    activation = content["activation"]
    if activation is not None:
        activation = _tensor_format(activation, f"{place}.activation")
    if weight.granularity == "per_token" or (activation is not None and activation.granularity != "per_token"):
        raise error_of(f"{place}: weights are per channel or per group, activations per token", "another granularity")
    if activation is not None and not activation.symmetric:
        raise error_of(f"{place}: activations are symmetric", "symmetric=false")
    return LinearFormat(weight, activation)


def _tensor_format(content: Any, place: str) -> TensorFormat:
    content = object_of(content, place)
    check_keys(content, {"bits", "symmetric", "granularity", "group_size"} | ({"clip"} & content.keys()), place)
    if type(content.get("clip", 1.0)) not in (int, float):
        raise error_of(f"{place}.clip must be a number", shown(content["clip"]))
    granularity, size = content["granularity"], content["group_size"]
    if granularity not in ("per_channel", "per_group", "per_token"):
        raise error_of(f"{place}.granularity must be per_channel, per_group or per_token", shown(granularity))
    try:
        return TensorFormat(
            bits=integer_of(content["bits"], f"{place}.bits", 2, 8),
            symmetric=boolean_of(content["symmetric"], f"{place}.symmetric"),
            granularity=granularity,
            group_size=None if size is None else integer_of(size, f"{place}.group_size", 1, _MAX_FEATURES),
            clip=content.get("clip", 1.0),
        )
    except ConfigError as error:
        raise error_of(f"{place}: {error.rule}", error.value) from error


def _placeholders(content: Any) -> dict[str, tuple[int, ...]]:
    content = object_of(content, "placeholders")
    for side in content:
        _known_side(side)
    found = {side: tuple(list_of(ids)) for side, ids in content.items()}
    every = [integer_of(one, "placeholders", 0, _MAX_TOKEN_ID) for ids in found.values() for one in ids]
    if len(set(every)) != len(every):
        raise error_of("a placeholder token has one modality", "an id twice")
    return found


def _check_version(content: Mapping[str, Any]) -> None:
    if content.get("quant_method") != METHOD:
        raise error_of("quantization_config must be of quant_method masq", shown(content.get("quant_method")))
    version = content.get("version")
    if type(version) is not int or version not in VERSIONS:
        raise ModelError(
            f"this masq reads packed checkpoints of version {' or '.join(map(str, VERSIONS))}",
            value=f"version {shown(version)}",
            remedy="load it with the masq that wrote it, or export the run again",
        )


def _check_seal(content: Mapping[str, Any]) -> None:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    try:
        found = canonical_hash(rest)
    except (ValueError, RecursionError) as error:
        raise error_of("quantization_config must be plain JSON", error) from error
    if content.get("sha256") != found:
        raise error_of("the checksum of quantization_config must fit its content", "another one")


def _known_side(side: str) -> None:
    if side not in SIDES:
        raise error_of(f"a modality is one of {', '.join(SIDES)}", shown(side))

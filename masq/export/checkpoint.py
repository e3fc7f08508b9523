"""masq's packed checkpoint: a transformers folder whose quantized linears are stored in their few bits.

``save`` writes it, ``AutoModelForImageTextToText.from_pretrained(folder)`` loads it once ``masq`` is imported (so does
the class that ``config.json`` names under ``architectures``; the automatic one does not know all of them), and
``AutoProcessor.from_pretrained(folder)`` its processor. ``load`` is the same with every error one of masq.

Versions 1 to 4 of the format
    ``config.json``
        The model's own, with ``tie_word_embeddings`` as the weights are, and ``quantization_config``:

        - ``quant_method`` "masq", ``version``: the first that can say it, 4 where a tower is quantized or a range is
          clipped, else 3 where a linear has centres, else 2 where one has int8 factors, else 1.
        - ``formats``: list of {"weight", "activation"}, each {"bits", "symmetric", "granularity", "group_size"}
          (``masq.numerics.scheme.TensorFormat``), and "clip" where it is below 1; an activation is null where it stays
          in float.
        - ``linears``: by module name, every quantized linear: ``in_features`` I, ``out_features`` O, ``format`` (number
          in ``formats``), ``bias`` (dtype or null), ``smoothing`` U (number of distinct smoothing vectors applied at
          run time), ``ranks`` (R of the low-rank correction by modality), ``factor_dtype``, and ``group``: linears
          with one number read the same input, and may be run as one; ``centres`` K (number of centres and biases of
          modalities), left out where there are none; ``tower``, true of linears of the vision and audio towers, else
          left out.
        - ``rotation``: ``inputs``, the modules whose input is multiplied by a Hadamard matrix at run time
          (``masq.numerics.hadamard.rotate``; signs are tensors); ``residual``, whether the residual stream is in a
          rotated basis, which nothing has to undo.
        - ``placeholders``: ids of the tokens that stand for image, video or sound, by modality.
        - ``made_by``: version of masq, identity of the run's record, model, method, scheme.
        - ``tensors_sha256``, ``config_sha256``, ``sha256``: see below.
    ``model.safetensors``, or ``model-NNNNN-of-NNNNN.safetensors`` with ``model.safetensors.index.json``
        Ordinary tensors (embeddings, head, norms, towers, linears left in float) under the names of the modules in
        memory, in the dtype of the model. Of a quantized linear, below its name:

        - ``codes``: at up to 4 bits uint8 [O, ceil(I / 2)], column 2j in the low half of byte j, symmetric codes in
          two's complement; else [O, I], int8 if symmetric and uint8 otherwise. Row-wise and plain: a kernel
          rearranges them when it takes them over.
        - ``scale``: float32 [O, G], G groups of inputs; ``zero_point``: uint8 [O, G] of asymmetric formats.
        - ``bias``: [O]; with centres [K, O], ``centre`` bfloat16 [K, I] and ``centre_rows``, int64 [3], which of them
          text, vision and audio use: what is smoothed and multiplied is ``x - centre``.
        - ``inverse_smoothing``: 1 / s, float32 [U, I]; ``smoothing_rows``: int64 [3], which of them text, vision and
          audio use.
        - ``left_<modality>`` [I, R] and ``right_<modality>`` [R, O]. If they are int8, they are codes between -127 and
          127 with ``factor_scale_<modality>``, float32 [R], the same for both: what is added is
          ``(x / s) (left diag(scale)) (diag(scale) right)``.

        Of a rotated module ``signs``, float32 [I], and its linear is ``<name>.linear``.
        The metadata of each file hold ``masq_tensors``: JSON {name: [dtype, shape, sha256]} of all tensors.
    ``generation_config.json``, processor and tokenizer files
        As transformers writes them. They have no checksum: they are there to be edited.

Checksums, all SHA-256: of every tensor's bytes, in the listing; of the listing (``tensors_sha256``); of the rest of
``config.json`` (``config_sha256``: all keys but ``quantization_config``, ``dtype``, ``architectures``,
``transformers_version``); of ``quantization_config`` itself (``sha256``, over canonical JSON: sorted keys, no spaces).
They survive ``save_pretrained``, which computes them anew.

Everything is checked before a weight is read: types, versions, sizes, names, shapes, dtypes, checksums, and that scales
and factors are finite. A checksum runs at more than 1 GB/s a core, which is less than reading the file takes: there is
no option to leave it out. It guards against damage, not against a forger; nothing stored is ever executed.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from masq import __version__
from masq.errors import ModelError, OutputError
from masq.export import files
from masq.export.assemble import blocks_of, family_of
from masq.export.describe import describe, portion_state, stored_names
from masq.export.description import Description
from masq.export.shards import write_portions
from masq.kernels import AUTO, FUSING
from masq.models.base import GROUPS
from masq.modules.fused import fuse_blocks
from masq.modules.packed_linear import PackedLinear, tower_linears
from masq.numerics.low_rank import QMAX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from masq.models.base import ModelAdapter

MAX_SHARD_BYTES = 5_000_000_000

_checked: ContextVar[Path | None] = ContextVar("masq_checked_folder", default=None)


def save(
    adapter: ModelAdapter, folder: Path, made_by: Mapping[str, Any], max_shard_bytes: int = MAX_SHARD_BYTES
) -> Description:
    """Write a quantized model and its processor as a packed checkpoint: the whole folder, or nothing.

    Args:
        adapter: a quantized model, simulated or packed; it is not changed.
        folder: to be made; it may exist if it is empty.
        made_by: what is known of the run, plain JSON; masq's version is added.
        max_shard_bytes: a weight file is at most so large, unless one tensor is larger.

    Returns:
        What the checkpoint says of itself.

    Raises:
        ModelError: nothing is quantized, or a linear has one weight per modality.
        OutputError: the folder holds files already, or cannot be written.
    """
    description = describe(
        adapter.model,
        groups=_groups(adapter),
        placeholders=adapter.placeholders(),
        residual_rotation=adapter.residual_signs is not None,
        made_by={"masq": __version__, **made_by},
    )
    with new_folder(folder) as temporary:
        model, tied = adapter.model, getattr(adapter.model, "all_tied_weights_keys", {})
        found = write_portions(
            (portion_state(name, part, tied) for name, part in adapter.residence.portions(model)),
            temporary,
            stored_names(model, description),
            max_shard_bytes,
            lambda found: {files.LISTING: files.listing_text(found)},
        )
        config = model_config(adapter)
        description = description.sealed(files.tensors_digest(found), files.config_digest(json_of(config)))
        config.quantization_config = description.to_dict()
        config.save_pretrained(temporary)
        adapter.model.generation_config.save_pretrained(temporary)
        save_processor(adapter, temporary)
    return description


def check(folder: Path) -> Description:
    """Check a packed checkpoint whole: see ``masq.export.files.check``, and that its numbers are ones.

    Raises:
        ModelError: something is missing, damaged, of another version, does not belong together, or is not finite.
    """
    description = files.check(folder)
    tensors, _ = files.read_headers(folder)
    by_file: dict[Path, list[str]] = {}
    for name in description.tensors():
        by_file.setdefault(tensors[name].file, []).append(name)
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                _check_values(name, file, description)
    return description


def load(folder: Path | str, *, device: str = "cpu", kernel: str = AUTO, fused: bool = False, **options: Any) -> Any:
    """The model of a packed checkpoint, ready to run: ``from_pretrained`` after a check of everything.

    Args:
        folder: that ``save`` or ``save_pretrained`` wrote.
        device: where to put it.
        kernel: name of the kernel, ``auto`` for the best that can run each linear.
        fused: whether norms and gates are computed in the pass that quantizes what they feed (``masq.modules.fused``).
        options: passed on to ``from_pretrained``.

    Raises:
        ModelError: the checkpoint is damaged or not one of masq, or nothing of it can be fused.
    """
    path = Path(folder)
    check(path)
    model_class, _ = family_of(files.read_config(path)["model_type"]).classes()
    token = _checked.set(path)
    try:
        model = model_class.from_pretrained(path, local_files_only=True, **options)
    finally:
        _checked.reset(token)
    set_kernel(model, kernel)
    model = model.to(device)
    if fused and not fuse_blocks(blocks_of(model)):
        raise ModelError(
            "a model to be fused needs integer activations and a kernel that quantizes what a norm gives",
            value=f"kernel={kernel}",
            remedy=f"set fused=False, or kernel to one of {', '.join((AUTO, *FUSING))}",
        )
    return model


def check_once(folder: Path) -> Description:
    """``check``, unless ``load`` is on the way and did so already."""
    if _checked.get() == folder:
        return Description.from_dict(files.read_config(folder)["quantization_config"])
    return check(folder)


def set_kernel(model: torch.nn.Module, kernel: str) -> None:
    """Have every packed linear of ``model`` run on ``kernel`` from its next call on."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for module in packed:
        module.stack.release()
        module.kernel = kernel


def require_new(folder: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        OutputError: it does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            "an export never overwrites what is there",
            value=f"{folder} exists and is not an empty folder",
            remedy="name another folder, or delete this one first",
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends well, and is gone otherwise.

    Raises:
        OutputError: ``folder`` holds files already, or cannot be written.
    """
    require_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield temporary
        _settle(temporary)
        temporary.replace(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Have the content of a folder reach the disk, and give it the user's usual permissions.

    Temporary folders and safetensors' files are private; a checkpoint is meant to be shared.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    folder.chmod(0o777 & ~mask)


def model_config(adapter: ModelAdapter) -> Any:
    """A copy of the model's configuration as a checkpoint needs it."""
    config = copy.deepcopy(adapter.model.config)
    config.dtype = str(adapter.embeddings().weight.dtype).removeprefix("torch.")
    config.architectures = [type(adapter.model).__name__]
    return config


def json_of(config: Any) -> dict[str, Any]:
    """What transformers will write of a configuration."""
    return files.parse(config.to_json_string().encode(), files.CONFIG)


def save_processor(adapter: ModelAdapter, folder: Path) -> None:
    """Write processor and tokenizer, with the pixel budget that the run had."""
    processor = copy.deepcopy(adapter.processor)
    for edge, pixels in (("shortest_edge", adapter.min_pixels), ("longest_edge", adapter.max_pixels)):
        if pixels is not None:
            processor.image_processor.size[edge] = pixels
    processor.save_pretrained(folder)


def _groups(adapter: ModelAdapter) -> dict[torch.nn.Module, int]:
    """Number of the group of every linear of the blocks: linears with one number read the same input."""
    found = {}
    for index, block in enumerate(adapter.blocks()):
        for number, roles in enumerate(GROUPS.values()):
            found |= {block.linear(role): index * len(GROUPS) + number for role in roles}
    alone = len(adapter.blocks()) * len(GROUPS)
    return found | {linear: alone + number for number, linear in enumerate(tower_linears(adapter))}


def _check_values(name: str, file: Any, description: Description) -> None:
    """The numbers beside the codes mean something, and rows of the tables exist."""
    owner, _, kind = name.rpartition(".")
    if kind == "codes":
        return
    values = file.get_tensor(name)
    if kind in ("smoothing_rows", "centre_rows"):
        entry = description.linears[owner]
        good = (values >= 0) & (values < (entry.smoothing if kind == "smoothing_rows" else entry.centres))
    elif kind == "zero_point":
        good = values <= description.linears[owner].format.weight.qmax
    elif kind == "signs":
        good = values.abs() == 1
    elif kind in ("scale", "inverse_smoothing") or kind.startswith("factor_scale"):
        good = values.isfinite() & (values >= 0)
    elif values.dtype == torch.int8:
        good = values >= -QMAX
    else:
        good = values.isfinite()
    if not good.all():
        raise ModelError(
            "scales, factors and signs must be finite numbers in their range",
            value=name,
            remedy="the checkpoint is damaged: copy it again, or export the run again",
        )


def _cannot_write(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {folder}", value=error.strerror or error, remedy="check the path, its permissions and space"
    )

"""Write what ships: weights in one safetensors file, configuration, data, checksums."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from masq.models.zoo import smol_omni

from . import architecture, dataset
from . import constants as C

log = logging.getLogger(__name__)


def weights(work: Path) -> dict[str, torch.Tensor]:
    """Towers and adapter of the alignment checkpoint in float16, under the names the loader reads."""
    found = {}
    for name, value in load_file(work / "align.safetensors").items():
        if name.startswith("towers."):
            found[name.removeprefix("towers.")] = value
        elif name.startswith("adapters."):
            place, side = name.removeprefix("adapters.").split(".")
            layer, projection = place.split("_")
            found[f"adapter.{layer}.{projection}.{side}"] = value
    halves = {name: value.half().contiguous() for name, value in sorted(found.items())}
    assert all(torch.isfinite(value).all() for value in halves.values()), "a weight does not fit float16"
    return halves


def write_checksums(folder: Path) -> None:
    """List the SHA-256 of every shipped file, once all of them are there."""
    names = (smol_omni.WEIGHTS, smol_omni.CONFIG, *(f"{split}.parquet" for split in smol_omni.SPLITS))
    if not all((folder / name).exists() for name in names):
        return
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / smol_omni.CHECKSUMS).write_text("".join(lines))
    for name in names:
        log.info("%s: %.1f MB", name, (folder / name).stat().st_size / 1e6)


def main() -> None:
    """Command line: the training folder; ``--part`` writes weights or data alone and keeps the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/train"))
    parser.add_argument("--output", type=Path, default=smol_omni.FOLDER)
    parser.add_argument("--part", choices=["all", "weights", "data"], default="all")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    options.output.mkdir(exist_ok=True, parents=True)
    if options.part != "weights":
        dataset.write(options.output, smol_omni.build_tokenizer(smol_omni.language_file()), C.SHIPPED)
        log.info("data written")
    if options.part != "data":
        save_file(weights(options.work), options.output / smol_omni.WEIGHTS)
        config = architecture.thinker_config().to_dict()
        (options.output / smol_omni.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_checksums(options.output)


if __name__ == "__main__":
    main()

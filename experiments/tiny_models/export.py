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

log = logging.getLogger(__name__)
SHIPPED = ("weights.safetensors", "config.json", "calibration.parquet", "evaluation.parquet")


def weights(work: Path) -> dict[str, torch.Tensor]:
    """Towers and adapter of the alignment checkpoint, under the names the loader reads."""
    state = load_file(work / "align.safetensors")
    found = {k.removeprefix("towers."): v for k, v in state.items() if k.startswith("towers.")}
    if not bool(state["towers"]):
        for name, target in (("vision", "visual"), ("audio", "audio_tower")):
            warm = load_file(work / f"warm_{name}.safetensors")
            found |= {k.replace("tower", target, 1): v for k, v in warm.items() if k.startswith("tower.")}
    for name, value in state.items():
        if name.startswith("adapters."):
            place, side = name.removeprefix("adapters.").split(".")
            layer, projection = place.split("_")
            found[f"adapter.{layer}.{projection}.{side}"] = value
    return {k: v.float().contiguous() for k, v in sorted(found.items())}


def write_checksums(folder: Path) -> None:
    """List the SHA-256 of every shipped file."""
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in SHIPPED]
    (folder / smol_omni.CHECKSUMS).write_text("".join(lines))


def main() -> None:
    """Command line: the training folder; ``--weights-only`` keeps the data files that are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/train"))
    parser.add_argument("--part", choices=["all", "weights", "data"], default="all")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    folder = smol_omni.FOLDER
    folder.mkdir(exist_ok=True)
    if options.part != "weights":
        dataset.write(folder, smol_omni.build_tokenizer(smol_omni.language_file()))
        log.info("data written")
    if options.part != "data":
        save_file(weights(options.work), folder / smol_omni.WEIGHTS)
        config = architecture.thinker_config().to_dict()
        (folder / smol_omni.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if all((folder / name).exists() for name in SHIPPED):
        write_checksums(folder)
    for name in SHIPPED:
        if (folder / name).exists():
            log.info("%s: %.1f MB", name, (folder / name).stat().st_size / 1e6)


if __name__ == "__main__":
    main()

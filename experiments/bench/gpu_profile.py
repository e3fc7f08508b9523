"""What the times of ``gpu_linears`` are made of: bytes, steps, quantization and corrections beside their floors.

Decoding: a tensor-core tile walks its inputs in steps of 128; if time follows bytes, weights of 4 bits take half as
long as those of 8, if it follows steps, as long. Prefill: what quantization and corrections add to a product, beside
what their bytes would take at the speed of a copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments.bench.gpu_linears import BASE, COPY, QUANTIZE, RANK_RATIOS
from experiments.bench.linears import SHAPES
from masq.files import atomic_write_bytes, read_json

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "results" / "bench" / "gpu_linears.json"
TABLE = ROOT / "results" / "tables" / "gpu_profile.md"
TILE, STEP = 64, 128
"""Outputs of a tile of few rows, and inputs of a step."""
BITS = {"w8a8": 8, "w4a8": 4}
PREFILL = 2048
_COPIED, _READ_AND_CODED = 4, 3
"""Bytes of an element that a copy in bf16 moves, and that quantization does."""


def decoding(seconds: dict[tuple[str, int, str], float], shapes: list[str]) -> str:
    """One row: how fast weights are read, and the time of a step of a tile on one of 132 multiprocessors."""
    rows = []
    for shape in shapes:
        inner, outputs = SHAPES[shape]
        base = 2 * inner * outputs / seconds[shape, 1, BASE] / 1e12
        line = [shape, f"{base:.2f}"]
        for scheme, bits in BITS.items():
            taken = seconds[shape, 1, f"{scheme}, gemm"]
            steps = -(-outputs // TILE) * -(-inner // STEP)
            line += [f"{bits / 8 * inner * outputs / taken / 1e12:.2f}", f"{132 * taken / steps * 1e9:.0f}"]
        rows.append(line)
    names = [f"{scheme}: {what}" for scheme in BITS for what in ("TB/s", "ns a step")]
    return tabulate(rows, ["1 row", "bf16: TB/s", *names], tablefmt="github", disable_numparse=True)


def prefill(seconds: dict[tuple[str, int, str], float], shapes: list[str]) -> str:
    """2048 rows at W4A8: microseconds of the product, and what comes on top."""
    rows = []
    for shape in shapes:
        copy, quantize = seconds[shape, PREFILL, COPY], seconds[shape, PREFILL, QUANTIZE]
        product, full = (seconds[shape, PREFILL, f"w4a8, {what}"] for what in ("gemm", "full"))
        added = [seconds[shape, PREFILL, f"w4a8, rank ratio {ratio}"] - full for ratio in RANK_RATIOS]
        share = _READ_AND_CODED / _COPIED * copy / quantize
        # Rows read, and smoothed ones of two thirds of them written and read again.
        floor = (1 + 2 * 2 / 3) / 2 * copy
        rows.append([shape, *(f"{1e6 * one:.0f}" for one in (product, quantize, *added, floor)), f"{share:.2f}"])
    ranks = [f"rank ratio {ratio}: more" for ratio in RANK_RATIOS]
    heads = [f"{PREFILL} rows, us", "product", "quantization", *ranks, "floor of the first factor's rows"]
    return tabulate(rows, [*heads, "quantization, of a copy's speed"], tablefmt="github", disable_numparse=True)


def render(found: dict[str, Any]) -> str:
    """Both tables and what they say."""
    seconds = {(cell["shape"], cell["rows"], cell["name"]): cell["seconds"] for cell in found["cells"]}
    shapes = list(dict.fromkeys(cell["shape"] for cell in found["cells"]))
    made = found["provenance"]
    about = (
        f"From `results/bench/gpu_linears.json` ({made['device_name']}, commit {made['commit'][:7]}) by `python -m "
        "experiments.bench.gpu_profile`. A step: a multiprocessor's time for one, several programs taking turns; on "
        "small shapes much of it is the call itself. Decoding at 4 bits reads half the bytes in nearly the time of 8: "
        "it is steps that take the time (each a wait, barriers, an unpacking through shared memory, as the compiled "
        "code shows), "
        "not bytes. Corrections take many times what their rows need: the kernel of their first factor had a program "
        "for 64 rows and 64 ranks, too few for so many processors, and second factors were read two bytes at a time, "
        "each step waiting for them. Quantization divided every value with branches. All of it has been rewritten "
        "since, and not been measured."
    )
    return f"{decoding(seconds, shapes)}\n\n{prefill(seconds, shapes)}\n\n{about}\n"


def main() -> None:
    """Write the table."""
    table = render(read_json(RECORD))
    atomic_write_bytes(TABLE, table.encode())
    print(table)


if __name__ == "__main__":
    main()

"""Models of 3B and 7B quantized, exported and run with streamed weights: seconds and peak memory of every step.

A random checkpoint of the exact configuration is written once; then each step runs in a process of its own, whose
largest resident memory the system reports when it ends. A run that is killed twice and goes on must end with the same
bits.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from masq.files import atomic_write_json, read_json
from masq.models.zoo.smol_omni import data_path
from masq.report.provenance import provenance
from masq.report.record import comparable, read_record

log = logging.getLogger(__name__)

TASKS = {
    "qwen2_5_vl_3b": ("read", "manual"),
    "qwen2_5_vl_7b": ("read", "manual"),
    "qwen2_5_omni_3b": ("same", "manual"),
}
"""A sample of each is all the calibration there is: the sizes are at stake, not the scores."""
KILLED_AFTER = (12, 24)
"""Finished blocks after which a run is killed."""
_POLL_SECONDS = 0.2
_ANSWER_TOKENS = 4
_GENERATE = """
import sys
import masq
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
inputs = processor(text=["The answer is"], return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=int(sys.argv[3]), min_new_tokens=int(sys.argv[3]), do_sample=False)
assert ids.shape[1] == inputs["input_ids"].shape[1] + int(sys.argv[3])
print(ids[0].tolist())
"""


def overrides(name: str, method: str, checkpoint: Path, root: Path, threads: int) -> list[str]:
    """The cell: two samples in one batch, one epoch where something is learned, next to no evaluation."""
    modality = "tri" if "omni" in name else "dual"
    return [
        *(f"model={name}", f"model.source={checkpoint}", "model.weights=streamed", f"modality={modality}"),
        *("scheme=w4a8", f"method={method}", f"output.root={root}", f"threads={threads}"),
        *(f"calibration.source={data_path('calibration')}", f"evaluation.source={data_path('evaluation')}"),
        *(f"++calibration.tasks=[{','.join(TASKS[name])}]", "++calibration.samples_per_task=1"),
        *("++calibration.batch_size=2", f"++evaluation.tasks=[{TASKS[name][0]}]", "++evaluation.samples_per_task=1"),
        *("++evaluation.score=false", *(["++method.smoothing.epochs=1"] if method == "masquant" else [])),
    ]


def timed(command: list[str], kill_when: Path | None = None) -> dict[str, Any]:
    """Run a command to its end, or kill it as soon as a file is there.

    Returns:
        ``seconds`` and ``peak_memory_bytes``, its largest resident memory.

    Raises:
        RuntimeError: it failed.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while kill_when is not None and process.poll() is None and not kill_when.exists():
        time.sleep(_POLL_SECONDS)
    if kill_when is not None:
        process.kill()
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != (-signal.SIGKILL if kill_when is not None else 0):
        raise RuntimeError(f"{' '.join(command[:4])} ended with {code}: {said[-2000:]}")
    return {"seconds": time.perf_counter() - started, "peak_memory_bytes": usage.ru_maxrss * 1024}


def planned_bytes(cell: list[str]) -> float:
    """What ``masq plan`` says of the largest memory."""
    from masq.compose import compose
    from masq.plan import plan

    return plan(compose(cell)).peak_memory_bytes


def quantized(name: str, method: str, checkpoint: Path, root: Path, threads: int) -> tuple[dict[str, Any], Path]:
    """Quantize: what it took, and the folder of the run."""
    cell = overrides(name, method, checkpoint, root, threads)
    found = timed([sys.executable, "-m", "masq", "run", *cell])
    folder = next(path for path in root.glob(f"{name}-*-{method}-*") if path.is_dir())
    record = read_record(folder / "record.json")
    return {
        **found,
        "step": method,
        "planned_bytes": planned_bytes(cell),
        "identity": record.identity,
        "timings": record.timings,
        "effective_bits": record.effective_bits["total"],
    }, folder


def exported(folder: Path, out: Path, threads: int) -> list[dict[str, Any]]:
    """Export a run, load the checkpoint and have it answer."""
    steps = [{**timed([sys.executable, "-m", "masq", "export", str(folder), str(out)]), "step": "export"}]
    steps[0]["bytes"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    steps[0]["files"] = len(list(out.glob("*.safetensors")))
    command = [sys.executable, "-c", _GENERATE, str(out), str(threads), str(_ANSWER_TOKENS)]
    return [*steps, {**timed(command), "step": f"load and generate {_ANSWER_TOKENS} tokens"}]


def resumed(name: str, checkpoint: Path, root: Path, undisturbed: Path, threads: int) -> dict[str, Any]:
    """Kill a run of rtn twice and let it end: whether blocks and record are those of the undisturbed one."""
    cell = overrides(name, "rtn", checkpoint, root, threads)
    command = [sys.executable, "-m", "masq", "run", *cell]
    blocks = root / undisturbed.name / "blocks"
    killed = [timed(command, blocks / f"block-{number - 1:03d}.safetensors") for number in KILLED_AFTER]
    last = timed(command)
    files = sorted(path.name for path in (undisturbed / "blocks").glob("*.safetensors"))
    same = all(_same_block(blocks / file, undisturbed / "blocks" / file) for file in files)
    records = [comparable(read_record(folder / "record.json")) for folder in (undisturbed, blocks.parent)]
    for record in records:
        record["config"].pop("output")
    return {
        "step": f"rtn, killed after {' and '.join(map(str, KILLED_AFTER))} blocks",
        "seconds": sum(one["seconds"] for one in killed) + last["seconds"],
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in (*killed, last)),
        "blocks": len(files),
        "same_blocks": same,
        "same_record": records[0] == records[1],
    }


def _same_block(one: Path, other: Path) -> bool:
    """Whether two stored blocks hold the same bits and the same note; safetensors writes metadata in any order."""
    from masq.tensors import load_tensors

    first, second = load_tensors(one), load_tensors(other)
    assert first is not None
    assert second is not None
    tensors = first[0].keys() == second[0].keys() and all(first[0][key].equal(second[0][key]) for key in first[0])
    return tensors and first[1] == second[1]


def measure(
    name: str, methods: list[str], folder: Path, threads: int, *, resume: bool, keep: Callable[[dict[str, Any]], None]
) -> None:
    """All steps of one model; what they wrote is deleted as soon as it has served.

    Args:
        name: of the model.
        methods: each quantizes once; the first and the last are exported.
        folder: for everything that is written.
        threads: of every process.
        resume: whether a run of rtn is also killed twice.
        keep: is given every step that ended.
    """
    checkpoint = folder / name
    if not (checkpoint / "config.json").exists():
        written = timed([sys.executable, "-m", "experiments.bench.random_checkpoint", name, str(checkpoint)])
        keep({**written, "step": "write the checkpoint"})
    for method in methods:
        root = folder / "runs" / name / method
        step, run = quantized(name, method, checkpoint, root, threads)
        keep(step)
        if method in (methods[0], methods[-1]):
            for one in exported(run, folder / f"exported-{name}", threads):
                keep({**one, "step": f"{one['step']}, {method}"})
            shutil.rmtree(folder / f"exported-{name}")
        if resume and method == "rtn":
            keep(resumed(name, checkpoint, folder / "killed", run, threads))
            shutil.rmtree(folder / "killed")
        shutil.rmtree(root)


def render(found: dict[str, Any]) -> str:
    """A Markdown table."""
    rows = []
    for name, cell in found["models"].items():
        for step in cell["steps"]:
            planned = f"{step['planned_bytes'] / 2**30:.1f}" if "planned_bytes" in step else ""
            verdict = {True: "same bits", False: "other bits", None: ""}[
                step["same_blocks"] and step["same_record"] if "same_blocks" in step else None
            ]
            memory = f"{step['peak_memory_bytes'] / 2**30:.1f}"
            rows.append([name, step["step"], f"{step['seconds']:.0f}", memory, planned, verdict])
    headers = ["model", "step", "seconds", "peak GiB", "planned GiB", ""]
    about = "Random weights, streamed, w4a8, two calibration samples; `python -m experiments.bench.sizes`."
    return f"{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n\n{about}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(TASKS))
    parser.add_argument("folder", type=Path, help="for the checkpoint and the runs; 20 GB for 3B, 30 GB for 7B")
    parser.add_argument("--methods", nargs="+", default=["rtn", "smoothquant", "masquant"])
    parser.add_argument("--resume", action="store_true", help="also kill a run of rtn twice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/sizes.json"))
    parser.add_argument("--table", type=Path, default=Path("results/tables/sizes.md"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    made_by = provenance(0, {}, threads=options.threads)
    steps: list[dict[str, Any]] = []

    def keep(step: dict[str, Any]) -> None:
        steps.append(step)
        log.info("%s %s", options.name, json.dumps(step))
        found = read_json(options.output) if options.output.exists() else {"models": {}}
        found["models"][options.name] = {"provenance": made_by, "steps": steps}
        atomic_write_json(options.output, found)
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(render(found))

    measure(options.name, options.methods, options.folder, options.threads, resume=options.resume, keep=keep)


if __name__ == "__main__":
    main()

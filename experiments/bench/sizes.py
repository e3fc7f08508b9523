"""Models of 3B and 7B quantized, exported and run with streamed weights: seconds and peak memory of every step.

A random checkpoint of the exact configuration is written once; then each step runs in a process of its own, whose
largest resident memory and processor time the system reports when it ends. A run that is killed twice and goes on must
end with the same bits. ``--blocks`` cuts the decoder short: memory hardly changes, for it is that of a block.
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
import tempfile
import time
from collections.abc import Callable, Sequence
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
KILLED_AFTER = (1 / 3, 2 / 3)
"""Shares of finished blocks after which a run is killed."""
_POLL_SECONDS = 0.02
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
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
        ``seconds``, ``cpu_seconds`` of user and system (a busy machine does not lengthen them), and
        ``peak_memory_bytes``, its largest resident memory.

    Raises:
        RuntimeError: it failed.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        if kill_when is not None:
            while os.waitid(os.P_PID, process.pid, _ENDED) is None and not kill_when.exists():
                time.sleep(_POLL_SECONDS)
            process.kill()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read()
    if process.returncode != (-signal.SIGKILL if kill_when is not None else 0):
        raise RuntimeError(f"{' '.join(command[:4])} ended with {process.returncode}: {said[-2000:]}")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


def planned_bytes(cell: list[str]) -> float:
    """What ``masq plan`` says of the largest memory."""
    from masq.compose import compose
    from masq.plan import plan

    return plan(compose(cell)).peak_memory_bytes


def quantized(name: str, method: str, checkpoint: Path, root: Path, threads: int) -> tuple[dict[str, Any], Path]:
    """Quantize: what it took, and the folder of the run."""
    cell = overrides(name, method, checkpoint, root, threads)
    found = timed([sys.executable, "-m", "masq", "run", *cell])
    # The only run there; its name also says what differs from the method as it is.
    folder = next(path.parent for path in root.glob("*/record.json"))
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
    files = sorted(path.name for path in (undisturbed / "blocks").glob("*.safetensors"))
    numbers = [max(1, int(len(files) * share)) for share in KILLED_AFTER]
    runs = [timed(command, blocks / files[number - 1]) for number in numbers]
    runs.append(timed(command))
    same = all(_same_block(blocks / file, undisturbed / "blocks" / file) for file in files)
    records = [comparable(read_record(folder / "record.json")) for folder in (undisturbed, blocks.parent)]
    for record in records:
        record["config"].pop("output")
    return {
        "step": f"rtn, killed after {' and '.join(map(str, numbers))} of {len(files)} blocks",
        **{key: sum(one[key] for one in runs) for key in ("seconds", "cpu_seconds")},
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in runs),
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


def measure(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """All steps of one model; what they wrote, but for the checkpoint, is deleted as soon as it has served.

    Args:
        options: of the command line.
        keep: is given every step that ended.
    """
    name, folder, threads = options.name, options.folder, options.threads
    checkpoint = folder / label(options)
    if not any(checkpoint.glob("model*.safetensors")):
        command = [sys.executable, "-m", "experiments.bench.random_checkpoint", name, str(checkpoint)]
        written = timed(command + ([f"--blocks={options.blocks}"] if options.blocks else []))
        keep({**written, "step": "write the checkpoint"})
    for method in options.methods:
        root = folder / "runs" / checkpoint.name / method
        step, run = quantized(name, method, checkpoint, root, threads)
        keep(step)
        if method in options.export:
            out = folder / f"exported-{checkpoint.name}"
            for one in exported(run, out, threads):
                keep({**one, "step": f"{one['step']}, {method}"})
            shutil.rmtree(out)
        if options.resume and method == "rtn":
            keep(resumed(name, checkpoint, folder / "killed", run, threads))
            shutil.rmtree(folder / "killed")
        shutil.rmtree(root)


def label(options: argparse.Namespace) -> str:
    """What the model is called in records: by its name, and its blocks where they are not all."""
    return f"{options.name}_{options.blocks}_blocks" if options.blocks else options.name


def render(found: dict[str, Any]) -> str:
    """A Markdown table."""
    rows = []
    for name, steps in found["models"].items():
        for step in steps:
            planned = f"{step['planned_bytes'] / 1e9:.2f}" if "planned_bytes" in step else ""
            verdict = {True: "same bits", False: "other bits", None: ""}[
                step["same_blocks"] and step["same_record"] if "same_blocks" in step else None
            ]
            memory = f"{step['peak_memory_bytes'] / 1e9:.2f}"
            seconds = (f"{step[key]:.0f}" for key in ("cpu_seconds", "seconds"))
            rows.append([name, step["step"], *seconds, memory, planned, verdict])
    headers = ["model", "step", "processor s", "clock s", "peak GB", "planned GB", ""]
    made_by = [step["provenance"] for steps in found["models"].values() for step in steps]
    about = (
        "Random weights, streamed, w4a8, two calibration samples, one epoch of learning; "
        f"{', '.join(sorted({str(one['threads']) for one in made_by}))} thread(s) on "
        f"{', '.join(sorted({one['device_name'] for one in made_by}))}. GB are 10^9 bytes, the largest resident memory "
        "as the system accounts it. Other work ran on the same processor, which lengthens the seconds of the clock. "
        "`python -m experiments.bench.sizes`."
    )
    return f"{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}\n\n{about}\n"


def add(found: dict[str, Any], name: str, step: dict[str, Any]) -> None:
    """Put a step into a record, in the place of an earlier one of its name."""
    steps = found["models"].setdefault(name, [])
    place = next((index for index, one in enumerate(steps) if one["step"] == step["step"]), len(steps))
    steps[place : place + 1] = [step]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help=f"of a model: {', '.join(TASKS)}")
    parser.add_argument("folder", type=Path, help="for the checkpoint and the runs; 20 GB for 3B, 30 GB for 7B")
    parser.add_argument("--methods", nargs="+", default=["rtn", "smoothquant", "masquant"])
    parser.add_argument("--export", nargs="*", default=["rtn", "masquant"], help="methods whose runs are exported")
    parser.add_argument("--blocks", type=int, help="only so many decoder blocks")
    parser.add_argument("--resume", action="store_true", help="also kill a run of rtn twice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/sizes.json"))
    parser.add_argument("--table", type=Path, default=Path("results/tables/sizes.md"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    made_by = provenance(0, {}, threads=options.threads)

    def keep(step: dict[str, Any]) -> None:
        log.info("%s %s", options.name, json.dumps(step))
        found = read_json(options.output) if options.output.exists() else {"models": {}}
        add(found, label(options), {**step, "provenance": made_by})
        atomic_write_json(options.output, found)
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(render(found))

    measure(options, keep)


if __name__ == "__main__":
    main()

"""The recipe run again from a clean checkout: how long stages took, float scores beside those of what is shipped."""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path
from typing import Any

from tabulate import tabulate

from masq.files import atomic_write_bytes, atomic_write_json
from masq.report.record import RunRecord, read_record

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "results" / "card" / "smol_omni-tri-float-none.json"
FOUND = ROOT / "results" / "training" / "rerun.json"
TABLE = ROOT / "results" / "tables" / "recipe_rerun.md"
_STAGE = re.compile(r"^\S+ \S+ (?P<name>.+): (?P<seconds>\d+) s$")
_PACKAGE = "experiments.tiny_models."


def stages(log: str) -> list[dict[str, Any]]:
    """Name and seconds of every stage of ``recipe.log``: of attempts that ended, those of one stage taken together."""
    lines = [found for line in log.splitlines() if (found := _STAGE.match(line))]
    # No folder belongs into a record.
    runs = itertools.groupby(lines, key=lambda line: re.sub(r" (--work|/\S+)", "", line["name"].replace(_PACKAGE, "")))
    found: list[dict[str, Any]] = []
    for name, group in runs:
        # Logs of earlier versions call the polishing of the towers what they call their first training.
        again = " (again)" if any(one["name"] == name for one in found) else ""
        found.append({"name": name + again, "seconds": sum(int(line["seconds"]) for line in group)})
    return found


def summary(work: Path) -> dict[str, Any]:
    """What a finished run of the recipe left in its folder: stages, scores, and where they come from."""
    [path] = (work / "float").glob("*/record.json")
    record = read_record(path)
    kept = ("commit", "dirty", "libraries", "device_name", "threads", "data", "started", "finished")
    return {
        "stages": stages((work / "logs" / "recipe.log").read_text(encoding="utf-8")),
        "scores": record.scores,
        "provenance": {name: record.provenance[name] for name in kept if name in record.provenance},
    }


def render(found: dict[str, Any], shipped: RunRecord) -> str:
    """Two Markdown tables: scores of both weights with the difference in standard errors, and wall time."""
    rows = []
    for task, metrics in shipped.scores.items():
        for name, was in metrics.items():
            now = found["scores"][task][name]
            error = (was["standard_error"] ** 2 + now["standard_error"] ** 2) ** 0.5
            apart = (now["value"] - was["value"]) / error if error else 0.0
            rows.append([task, name, was["n"], f"{was['value']:.3f}", f"{now['value']:.3f}", f"{apart:+.1f}"])
    headings = ["task", "metric", "n", "shipped", "recipe run again", "standard errors apart"]
    scores = tabulate(rows, headings, tablefmt="github", disable_numparse=True)
    times = [[one["name"], f"{one['seconds'] / 60:.0f}"] for one in found["stages"]]
    total = sum(one["seconds"] for one in found["stages"])
    times.append(["in all", f"{total / 60:.0f}"])
    wall = tabulate(times, ["stage", "minutes"], tablefmt="github", disable_numparse=True)
    made = found["provenance"]
    alike = made["data"]["evaluation"] == shipped.provenance["data"]["evaluation"]
    about = (
        f"Float scores of the whole evaluation split. The recipe ran on two threads of {made['device_name']}, torch "
        f"{made['libraries']['torch']}, at commit {made['commit'][:7]}, interrupted and resumed (what an attempt that "
        "was killed took is not counted), while other work ran beside it. It exported "
        f"{'the' if alike else 'another than the'} evaluation split that is shipped; its "
        "weights are not shipped, for every record here is of those that are. "
        "`python -m experiments.tiny_models.rerun WORK` behind `python -m experiments.tiny_models.run --work WORK`."
    )
    return f"{scores}\n\n{wall}\n\n{about}\n"


def main() -> None:
    """Command line: the folder of a finished recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    found = summary(parser.parse_args().work)
    atomic_write_json(FOUND, found)
    table = render(found, read_record(SHIPPED))
    atomic_write_bytes(TABLE, table.encode())
    print(table)


if __name__ == "__main__":
    main()

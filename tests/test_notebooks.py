"""The notebooks run from the committed records, and are committed without their outputs."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "paper_against_ours",
        "what_compensation_recovers",
        "why_shared_smoothing_fails",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["nbformat"] == 4
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_it_runs_and_says_something(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cell by cell in one namespace, as a kernel does; it defines no function or class of its own."""
    monkeypatch.chdir(ROOT)
    drawn = []
    with mpl.rc_context({"backend": "agg"}):
        import matplotlib.pyplot as plt

        monkeypatch.setattr(plt, "show", lambda: drawn.append(len(plt.gcf().axes)))
        namespace: dict[str, object] = {"__name__": "__main__"}
        for cell in code(path):
            assert "def " not in cell
            assert "class " not in cell
            exec(compile(cell, path.name, "exec"), namespace)  # noqa: S102
        plt.close("all")
    assert drawn
    assert all(drawn)
    assert capsys.readouterr().out.strip()

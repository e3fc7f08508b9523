"""Figures of records as SVG text, drawn by matplotlib, in colours that read on light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from masq.report.labels import is_float, labels_of
from masq.report.table import available_columns

if TYPE_CHECKING:
    from masq.report.record import RunRecord

MODALITIES = ("text", "vision", "audio", "joint")
# Okabe and Ito's colours, which people with any colour vision tell apart, without those that vanish on white or black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_INK = "#010203"
"""Stands for the colour of the page's text, which the page knows."""
MAX_LINES = 6


def figures(records: Sequence[RunRecord]) -> dict[str, str]:
    """Every figure that finished records have numbers for: title to SVG."""
    found = {}
    for key, title in (
        ("kl", "KL to the float model by modality, nats per answer token"),
        ("sqnr", "SQNR by modality, dB"),
    ):
        made = bars(records, key)
        if made is not None:
            found[title] = made
    for modality in MODALITIES[:3]:
        made = by_block(records, modality)
        if made is not None:
            found[f"SQNR of block outputs on {modality} tokens of the calibration samples, dB"] = made
    return found


def bars(records: Sequence[RunRecord], key: str) -> str | None:
    """Horizontal bars of ``key`` (kl, sqnr, nll), a group for each quantized record; None without numbers."""
    columns = [column for column in available_columns(records) if column.key.startswith(f"{key}.")]
    rows = [
        (name, [column.read(record)[0] for column in columns])
        for name, record in zip(row_names(records), records, strict=True)
        if not is_float(record)
    ]
    rows = [(name, values) for name, values in rows if any(value is not None for value in values)]
    if not rows or not columns:
        return None
    height = 0.8 / len(columns)
    with drawing(8, 0.6 + 0.17 * len(columns) * len(rows)) as (figure, axes):
        for number, column in enumerate(columns):
            places = [index + (number - (len(columns) - 1) / 2) * height for index in range(len(rows))]
            values = [values[number] or 0.0 for _, values in rows]
            axes.barh(places, values, height, label=column.key.split(".")[1], color=COLOURS[number])
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.25)
        axes.legend(frameon=False, ncols=len(columns), loc="lower left", bbox_to_anchor=(0, 1))
        return svg(figure)


def by_block(records: Sequence[RunRecord], modality: str) -> str | None:
    """SQNR of every block's output on one modality's tokens, a line for each of the first records that have it."""
    lines = []
    for name, record in zip(row_names(records), records, strict=True):
        values = [(block["index"], block.get("sqnr", {}).get(modality)) for block in record.blocks]
        if values and all(value is not None for _, value in values):
            lines.append((name, values))
    if not lines:
        return None
    with drawing(8, 3.2) as (figure, axes):
        for (name, values), colour in zip(_spread(lines, MAX_LINES), COLOURS, strict=False):
            axes.plot(*zip(*values, strict=True), label=name, color=colour, linewidth=1.5)
        axes.set_xlabel("block")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return svg(figure)


def row_names(records: Sequence[RunRecord]) -> list[str]:
    """What tells each record from the others, in words."""
    return [" ".join(texts) for texts in zip(*(values for _, values in labels_of(records)), strict=True)]


def _spread(lines: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of them, evenly spread over all."""
    if len(lines) <= count:
        return list(lines)
    return [lines[round(index * (len(lines) - 1) / (count - 1))] for index in range(count)]


@contextmanager
def drawing(width: float, height: float, panels: int = 1) -> Iterator[tuple[Any, Any]]:
    """A figure without background in the page's ink; no window, no global state.

    Args:
        width: inches.
        height: inches.
        panels: side by side, with one scale for what goes up.

    Yields:
        The figure and its axes, a sequence of them where there are several panels.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink = {
        key: _INK
        for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    }
    settings: dict[Any, Any] = {**ink, "svg.fonttype": "none", "svg.hashsalt": "masq", "font.size": 9}
    with mpl.rc_context({**settings, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
        for one in axes:
            one.patch.set_alpha(0)
        yield figure, axes[0] if panels == 1 else axes


def svg(figure: Any, ink: str = "currentColor") -> str:
    """The figure as an SVG element, by default in the ink and width of the page around it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, ink).strip()

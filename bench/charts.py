"""The charts of the index: SVG files that can be read on light and on dark paper.

Only matplotlib draws (the extra `bench`), and only this module imports it. Text stays text, grey
and without a background; the same figures give the same file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from bench.calls import BenchError

_INK: Final = "#7a7a7a"
"""4.3 : 1 against white and against black."""
_COLOURS: Final = ("#2f81c7", "#d9822b", "#4f9d4f", "#a86bc0", "#8c8c8c", "#c0504d")
_SIZE_INCHES: Final = (7.0, 3.4)
_STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vserver-tools",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Lines:
    """Figures against a number."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Bars:
    """Groups of bars, one for each program in a group; None where there is no figure."""

    title: str
    y_label: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[float | None]]


Chart = Lines | Bars


def check() -> None:
    """Raises BenchError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise BenchError("no matplotlib, which draws the charts: pip install '.[bench]'")


def draw(charts: dict[str, Chart], folder: Path) -> None:
    """Write FOLDER/NAME.svg for each. Raises BenchError without matplotlib."""
    check()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for name, chart in charts.items():
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
            axes = figure.subplots()
            axes.set_title(chart.title, fontsize=11)
            axes.set_ylabel(chart.y_label)
            axes.grid(visible=True, axis="y", color=_INK, alpha=0.25)
            _DRAWN[type(chart)](axes, chart)
            axes.set_ylim(bottom=0)
            axes.legend()
            figure.savefig(
                folder / f"{name}.svg", transparent=True, metadata={"Date": None, "Creator": None}
            )


def _draw_lines(axes: Any, chart: Lines) -> None:
    axes.set_xlabel(chart.x_label)
    for colour, (name, values) in zip(_COLOURS, chart.series.items(), strict=False):
        axes.plot(chart.x, values, label=name, color=colour, marker="o", markersize=3)


def _draw_bars(axes: Any, chart: Bars) -> None:
    width = 0.8 / len(chart.series)
    axes.set_xticks(range(len(chart.groups)), chart.groups)
    for place, (name, values) in enumerate(chart.series.items()):
        middle = (place - (len(chart.series) - 1) / 2) * width
        there = [(at + middle, value) for at, value in enumerate(values) if value is not None]
        axes.bar(
            [at for at, _ in there],
            [value for _, value in there],
            width * 0.9,
            label=name,
            color=_COLOURS[place % len(_COLOURS)],
        )


_DRAWN: Final[dict[type, Callable[[Any, Any], None]]] = {Lines: _draw_lines, Bars: _draw_bars}

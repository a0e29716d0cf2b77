"""One style for all figures: colours safe for the colour-blind; lines and markers that tell apart
in grey.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: PNG files with their captions; each has a PDF beside it.
Figures = dict[Path, str]


@dataclass(frozen=True)
class Drawing:
    """A figure that is not drawn yet.

    Attributes:
        plot: draws it as ``stem``.png and ``stem``.pdf and returns both paths.
        caption: of the figure.
    """

    plot: Callable[[Path], list[Path]]
    caption: str


def drawn(drawings: Mapping[str, Drawing], folder: Path) -> Figures:
    """Draw figures, each under its name."""
    return {drawing.plot(folder / name)[0]: drawing.caption for name, drawing in drawings.items()}


#: Okabe and Ito's colours, safe for the colour-blind.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)), (0, (1, 1)))
HATCHES = ("", "//", "..", "xx", "--", "\\\\", "oo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": "medium",
    "pdf.fonttype": 42,
    "savefig.dpi": 150,
}


def subplots(
    rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any
) -> tuple[Figure, Any]:
    """A figure in the common style, and its axes; ``options`` are those of ``Figure.subplots``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=figsize, layout="constrained")
        return figure, figure.subplots(rows, columns, **options)


def nth_style(i: int, marker: bool = False) -> dict[str, Any]:
    """Colour and line of the i-th of several things, and with ``marker`` its marker."""
    style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
    return style | {"marker": MARKERS[i % len(MARKERS)]} if marker else style


def points_and_mean(
    panel: Axes, x: float, values: Sequence[float], half: float, style: Mapping[str, Any]
) -> None:
    """Values, one a seed say, as points over one place, and a line at their mean, which goes
    ``half`` to each side.
    """
    points = {**style, "linestyle": "none", "markersize": 4, "alpha": 0.6}
    panel.plot([x] * len(values), values, **points)
    panel.plot([x - half, x + half], [statistics.mean(values)] * 2, color=style["color"])


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: 1, 2 and 5 times powers of ten; over many, these
    alone.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as ``stem``.png, of at most 256 colours, and ``stem``.pdf: the same bytes for
    the same figure, whenever it is made.
    """
    from matplotlib import rc_context
    from PIL import Image

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf")]
    with rc_context(STYLE), io.BytesIO() as drawn:
        figure.savefig(drawn, format="png")
        picture = Image.open(drawn).convert("RGB")
        picture.quantize(256, dither=Image.Dither.NONE).save(paths[0], optimize=True)
        figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths

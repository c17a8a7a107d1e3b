"""The figures: accuracy against bytes and energy, and the bits of each layer. Needs the extra `plot`."""
from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitspike.writing import whole_file, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = Mapping[str, Any]  # name, group, bytes, bits, energy_pj, top1

INK, QUIET, GRID = "#1d2433", "#667085", "#e6e9ef"
#: group -> (label, colour, marker); colours that stay apart for colour-blind readers
GROUPS: dict[str, tuple[str, str, str]] = {
    "float": ("full precision", "#475467", "D"), "uniform": ("uniform", "#e07b39", "s"),
    "uniform ends": ("uniform, first and last 8 bits", "#b8860b", "p"), "pow2": ("power of two only", "#8e5bb5", "^"),
    "random": ("random", "#98a2b3", "x"), "front": ("least damage (front)", "#8bb8e8", "o"),
    "searched": ("searched", "#1769c2", "o")}
#: scheme -> colour
SCHEMES = {"uniform": "#1769c2", "lsq": "#1769c2", "max": "#1769c2", "pow2_scale": "#4fa3b8", "pow2": "#8e5bb5",
           "binary": "#e07b39", "full": "#98a2b3"}


def _new(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GRID)
        ax.tick_params(which="both", colors=QUIET, length=0, labelsize=9)
        ax.grid(color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def undominated(points: Sequence[Point], cost: str) -> list[Point]:
    """Those that no other is at least as good as in both accuracy and cost, from cheap to dear.

    >>> rows = [{"bytes": 1, "top1": 50}, {"bytes": 2, "top1": 40}, {"bytes": 3, "top1": 60}]
    >>> [p["bytes"] for p in undominated(rows, "bytes")]
    [1, 3]
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p[cost], -p["top1"])):
        if not front or point["top1"] > front[-1]["top1"]:
            front.append(point)
    return front


def front_figure(points: Sequence[Point], title: str = "accuracy") -> Figure:
    """Accuracy (points' `top1`, percent) against bytes and against energy, both on logarithmic axes; the front is a line.

    points: plain data with name, group (see `GROUPS`), bytes, energy_pj, top1.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = _new(11, 4.6, 2)
    panels = (("bytes", "file, kB", 1e3), ("energy_pj", "energy per image, uJ", 1e6))
    for ax, (cost, label, unit) in zip(axes, panels, strict=True):
        front = undominated(points, cost)
        ax.step([p[cost] / unit for p in front], [p["top1"] for p in front], where="post", color="#8bb8e8", linewidth=2,
                zorder=1)
        for group, (name, colour, marker) in GROUPS.items():
            mine = [p for p in points if p["group"] == group]
            if not mine:
                continue
            big = group == "searched"
            level = {"searched": 4, "front": 2}.get(group, 3)
            ax.scatter([p[cost] / unit for p in mine], [p["top1"] for p in mine], s=90 if big else 42, c=colour, marker=marker,
                       zorder=level, label=name, edgecolors=None if marker == "x" else "white", linewidths=1.3)
            for p in mine:
                if group in ("searched", "float", "uniform", "uniform ends", "pow2"):
                    text = "float" if group == "float" else f"{p['bits']:.3g}"
                    offset, side = ((0, 8), "center") if big else ((8, -3), "left") if group == "pow2" else ((0, -13), "center")
                    ax.annotate(text, (p[cost] / unit, p["top1"]), xytext=offset, textcoords="offset points", ha=side,
                                fontsize=8, color=colour, fontweight="bold" if big else "normal", zorder=5,
                                path_effects=[withStroke(linewidth=2.5, foreground="white")])  # legible over a mark
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(label, color=QUIET, fontsize=10)
        ax.margins(0.08, 0.12)
        ax.set_ylim(top=min(ax.get_ylim()[1], 101.5))
    axes[0].set_ylabel(f"{title}, %", color=QUIET, fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(7, len(labels)), frameon=False, fontsize=9,
                  labelcolor=INK)
    return figure


def bits_figure(layers: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Bits of each layer as bars in the order of the network, coloured by scheme, beside its share of weights and of energy.

    layers: name -> {"kind", "bits"}; sizes: name -> {"weights", "energy_pj"}.
    """
    from matplotlib.patches import Patch

    names = list(layers)
    figure, (ax, shares) = _new(11, 1.2 + 0.3 * len(names), 2)
    rows = range(len(names))
    bits = [layers[n]["bits"] for n in names]
    ax.barh(rows, bits, color=[SCHEMES.get(layers[n]["kind"], QUIET) for n in names], height=0.7)
    for row, b in zip(rows, bits, strict=True):
        ax.annotate(str(b), (b, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    ax.set_yticks(rows, names, fontsize=8, color=INK)
    ax.set_xlabel("bits", color=QUIET)
    for offset, key, colour, label in ((-0.18, "weights", "#475467", "share of weights"), (0.18, "energy_pj", "#8bb8e8",
                                                                                           "share of the layers' energy")):
        values = [float(sizes[n][key]) for n in names]
        total = sum(values) or 1.0
        shares.barh([r + offset for r in rows], [100 * v / total for v in values], height=0.34, color=colour, label=label)
    shares.set_yticks([])
    shares.set_xlabel("%", color=QUIET)
    for one in (ax, shares):
        one.invert_yaxis()
        one.grid(axis="y", visible=False)
    kinds = dict.fromkeys(layers[n]["kind"] for n in names)
    handles = [Patch(color=SCHEMES.get(k, QUIET), label=k) for k in kinds]
    figure.legend(handles=[*handles, *shares.get_legend_handles_labels()[0]], loc="outside upper center",
                  ncols=len(kinds) + 2, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def as_svg(figure: Figure) -> str:
    """The figure as SVG text, the same at every call."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "bitspike", "svg.fonttype": "none"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each as NAME.png and NAME.svg; returns the paths. Errors: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        write_text(folder / f"{name}.svg", as_svg(figure))
        with whole_file(folder / f"{name}.png") as file:
            figure.savefig(file, dpi=160, format="png")
        written += [folder / f"{name}.svg", folder / f"{name}.png"]
    return written

"""Pictures of an ablation: the methods as bars, the sweeps as curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

METHODS_FIGURE = "ablation_methods.png"
SWEEPS_FIGURE = "ablation_sweeps.png"
# One for each set of clips. Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
DPI = 110


def draw_figures(summary: Mapping[str, Any], output: Path) -> list[Path]:
    """Writes both pictures into a folder.

    Args:
        summary (`Mapping`): what `evaluation.ablation.report.summarise` returns.
        output (`Path`)

    Raises:
        ImportError: matplotlib is missing.
    """
    if len(summary["zero_shot"]) > len(COLOURS):
        raise ValueError(f"There are {len(summary['zero_shot'])} sets of clips and colours for {len(COLOURS)}.")
    pyplot = import_pyplot()
    paths = [output / METHODS_FIGURE]
    _draw_methods(pyplot, summary).savefig(paths[0], dpi=DPI)
    if summary["sweeps"]:
        paths.append(output / SWEEPS_FIGURE)
        _draw_sweeps(pyplot, summary["sweeps"]).savefig(paths[1], dpi=DPI)
    pyplot.close("all")
    return paths


def import_pyplot():
    """matplotlib without a display."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Drawing figures needs matplotlib: pip install matplotlib.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw_methods(pyplot, summary: Mapping[str, Any]):
    methods, zero_shot = summary["methods"], summary["zero_shot"]
    names, clip_sets = list(methods), list(zero_shot)
    figure, axes = pyplot.subplots(
        1, len(clip_sets), figsize=(9, 0.38 * len(names) + 1.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, clips, colour in zip(axes[0], clip_sets, COLOURS, strict=False):
        scores = [methods[name][clips]["matched"] for name in names]
        axis.barh(
            names,
            [score["mean"] for score in scores],
            xerr=[score["spread"] or 0 for score in scores],
            color=colour,
            alpha=0.85,
            error_kw={"lw": 1, "capsize": 2},
        )
        axis.axvline(zero_shot[clips]["clap_top1"], color="black", ls="--", lw=1, label="CLAP alone")
        axis.axvline(zero_shot[clips]["chance"], color="grey", ls=":", lw=1, label="chance")
        axis.set(title=f"{clips}: answer matched to the label")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _draw_sweeps(pyplot, sweeps: list[Mapping[str, Any]]):
    """One panel for each sweep, one curve for each set of clips: matched."""
    columns = min(4, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(2.6 * columns, 2.3 * rows), squeeze=False, layout="constrained"
    )
    for axis, sweep in zip(axes.flat, sweeps, strict=False):
        places = range(len(sweep["points"]))
        for colour, clips in zip(COLOURS, sweep["points"][0]["scores"], strict=False):
            scores = [point["scores"][clips]["matched"] for point in sweep["points"]]
            axis.errorbar(
                places,
                [score["mean"] for score in scores],
                yerr=[score["spread"] or 0 for score in scores],
                color=colour,
                marker="o",
                ms=3,
                lw=1.2,
                capsize=2,
                label=clips,
            )
        axis.set_xticks(places, [f"{point['value']:g}" for point in sweep["points"]], rotation=60, fontsize=7)
        seeds = len(sweep["seeds"])
        axis.set_title(f"{sweep['symbol']} ({seeds} seed{'s' if seeds > 1 else ''})", fontsize=9)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(sweeps) :]:
        axis.axis("off")
    axes[0][0].legend(frameon=False, fontsize=7)
    return figure


__all__ = ["METHODS_FIGURE", "SWEEPS_FIGURE", "draw_figures", "import_pyplot"]

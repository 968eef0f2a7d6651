"""Pictures of an ablation: the methods as bars, the sweeps as curves."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
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
    """One panel for each set of clips, one bar for each method."""
    methods, zero_shot = summary["methods"], summary["zero_shot"]
    names = [fill(name, 36) for name in methods]
    figure, axes = pyplot.subplots(
        1, len(zero_shot), figsize=(9, 0.44 * len(names) + 1.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, clips, colour in zip(axes[0], zero_shot, COLOURS, strict=False):
        scores = [own[clips]["matched"] for own in methods.values()]
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
        axis.set_title(f"{clips}: matched", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False, fontsize=8
    )
    return figure


def _draw_sweeps(pyplot, sweeps: list[Mapping[str, Any]]):
    """One column for each sweep, one row for each set of clips: matched. The scales are the sets' own."""
    clip_sets = list(sweeps[0]["points"][0]["scores"])
    figure, axes = pyplot.subplots(
        len(clip_sets),
        len(sweeps),
        figsize=(1.9 * len(sweeps), 1.9 * len(clip_sets) + 0.3),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for column, sweep in zip(axes.T, sweeps, strict=True):
        places = range(len(sweep["points"]))
        for axis, clips, colour in zip(column, clip_sets, COLOURS, strict=False):
            scores = [point["scores"][clips]["matched"] for point in sweep["points"]]
            axis.errorbar(
                places,
                [score["mean"] for score in scores],
                yerr=None if scores[0]["spread"] is None else [score["spread"] for score in scores],
                color=colour,
                marker="o",
                ms=3,
                lw=1.2,
                capsize=2,
            )
            axis.set_xticks(places, [f"{point['value']:g}" for point in sweep["points"]], rotation=90, fontsize=7)
            axis.tick_params(axis="y", labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
        seeds = len(sweep["seeds"])
        column[0].set_title(f"{sweep['symbol']} ({seeds} seed{'s' if seeds > 1 else ''})", fontsize=9)
    for axis, clips in zip(axes[:, 0], clip_sets, strict=True):
        axis.set_ylabel(f"{clips}: matched", fontsize=8)
    return figure


__all__ = ["METHODS_FIGURE", "SWEEPS_FIGURE", "draw_figures", "import_pyplot"]

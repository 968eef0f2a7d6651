"""The gap between the modalities, drawn: the paper's Figure 3, and how far it is in every class.

Needs matplotlib, the extra `figures`.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from sklearn.manifold import TSNE

from evaluation.gap import BridgeGap, Embedded

try:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from PIL import Image  # comes with matplotlib
except ImportError as error:
    raise ImportError("Figures need matplotlib: pip install matplotlib, or the extra `figures`.") from error

# The bridges that the paper speaks of, one change at a time.
PANELS = {
    "raw": "Raw: as CLAP embeds them",
    "noise": "Noise: the texts as in training",
    "memory": "Memory only: audio as its nearest texts",
    "santa": "Santa: audio moved towards texts",
}
# Okabe and Ito's, which the colour-blind tell apart; their greys differ, too.
TEXT_COLOUR, AUDIO_COLOUR, LINE_COLOUR = "#0072B2", "#D55E00", "#B8B8B8"
BAR_COLOURS = {"raw": "#3A3A3A", "noise": "#E69F00", "memory": "#56B4E9", "santa": "#0072B2"}

PERPLEXITY = 30.0
MAX_CLASSES = 16
WIDTH_INCHES, DOTS_PER_INCH = 9.0, 100  # 900 pixels, as wide as a README shows them
PALETTE = 96


def tsne(audio: torch.Tensor, text: torch.Tensor, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Places in the plane, `(pairs, 2)` each, of `(pairs, dim)` embeddings: t-SNE of both together, by cosine.

    Neighbourhoods are to be read, distances between far points are not. The perplexity is 30, or a third of the points
    where there are fewer than 90.
    """
    points = torch.cat([audio, text]).double().numpy()
    plane = TSNE(
        perplexity=min(PERPLEXITY, (len(points) - 1) / 3), metric="cosine", init="pca", random_state=seed
    ).fit_transform(points)
    return plane[: len(audio)], plane[len(audio) :]


def draw_tsne(gaps: Sequence[BridgeGap], embedded: Embedded, path: Path, seed: int = 0) -> None:
    """The pairs of every bridge of `PANELS`, each in a panel: the same clips and texts, a line between the two."""
    shown = [gap for gap in gaps if gap.bridge.name in PANELS]
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(WIDTH_INCHES, 0.7 + 4.5 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for panel, gap in zip(panels, shown, strict=True):
        audio, text = tsne(embedded.audio[gap.bridge.audio], embedded.text[gap.bridge.text], seed)
        panel.add_collection(
            LineCollection(np.stack([audio, text], axis=1), colors=LINE_COLOUR, linewidths=0.4, alpha=0.5, zorder=1)
        )
        panel.scatter(*text.T, s=13, c=TEXT_COLOUR, marker="o", linewidths=0, alpha=0.85, label="text", zorder=2)
        panel.scatter(*audio.T, s=15, c=AUDIO_COLOUR, marker="^", linewidths=0, alpha=0.85, label="audio", zorder=2)
        panel.set_title(f"{PANELS[gap.bridge.name]}\n", fontsize=12, fontweight="bold")
        panel.text(0.5, 1.02, _told(gap), transform=panel.transAxes, ha="center", fontsize=10)
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_color(LINE_COLOUR)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=11, markerscale=2)
    _save(figure, path)


def draw_classes(gaps: Sequence[BridgeGap], path: Path) -> None:
    """Bars of the distance between the means of a class's sounds and texts, for every bridge of `PANELS`.

    Of more than `MAX_CLASSES` classes with enough points, those with the most clips; the figure says so.

    Raises:
        ValueError: no class has enough points.
    """
    shown = {gap.bridge.name: gap for gap in gaps if gap.bridge.name in PANELS}
    raw = shown["raw"]
    if not raw.measured:
        raise ValueError("No class has enough clips and texts to be drawn.")
    most_clips = sorted(raw.measured, key=lambda label: (-raw.classes[label].clips, label))[:MAX_CLASSES]
    labels = sorted(most_clips, key=lambda label: raw.classes[label].between_means)
    figure = Figure(figsize=(WIDTH_INCHES, 1.5 + 0.42 * len(labels)), layout="constrained")
    panel: Axes = figure.subplots()
    height = 0.8 / len(shown)
    for number, (name, gap) in enumerate(shown.items()):
        places = np.arange(len(labels)) + 0.4 - (number + 0.5) * height
        values = [gap.classes[label].between_means for label in labels]
        panel.barh(places, values, height, color=BAR_COLOURS[name], label=PANELS[name])
        for place, value in zip(places, values, strict=True):
            if value == 0:  # or the bar would seem to be missing
                panel.annotate("0", (0, place), (2, 0), textcoords="offset points", va="center", fontsize=7)
    names = [f"{label} ({raw.classes[label].clips})" for label in labels]
    panel.set_yticks(np.arange(len(labels)), names, fontsize=10)
    panel.set_ylim(-0.6, len(labels) - 0.4)
    panel.set_xlabel("distance between the mean of a class's sounds and that of its texts", fontsize=11)
    panel.set_title(_classes_told(len(labels), len(raw.measured)), fontsize=12, fontweight="bold")
    panel.grid(axis="x", color=LINE_COLOUR, linewidth=0.5)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=10)
    _save(figure, path)


def _told(gap: BridgeGap) -> str:
    overall = gap.overall
    return f"cosine of pairs {overall.cosine:.2f}, means {overall.between_means:.2f} apart"


def _classes_told(shown: int, measured: int) -> str:
    which = f"{shown} classes" if shown == measured else f"the {shown} classes with the most clips, of {measured}"
    return f"The gap in {which} (in brackets: clips)"


def _save(figure: Figure, path: Path) -> None:
    """A PNG with a palette, a third of the size of one in full colour."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(PALETTE, dither=Image.Dither.NONE).save(path, optimize=True)


__all__ = ["MAX_CLASSES", "PANELS", "draw_classes", "draw_tsne", "tsne"]

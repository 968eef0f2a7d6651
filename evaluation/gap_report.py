"""The gap between the modalities, from a folder of sounds to a record that can be published, its tables and figures.

`gap.json` holds every number and every pair; the tables are made from it alone, so that a model card or a reader can
make them again.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import training
from configuration_mats import MatsConfig
from evaluation.gap import (
    PAIRS,
    BridgeGap,
    DrawnPairs,
    draw_pairs,
    embed,
    estimator_settings,
    measure,
    read_sounds,
)
from processing_mats import MatsProcessor
from training.clap_data import Descriptions

RECORD_FILE = "gap.json"
REPORT_FILE = "gap.md"
TSNE_FIGURE = "gap_tsne.png"
CLASSES_FIGURE = "gap_classes.png"

BUNDLED_DESCRIPTIONS = Path(training.__file__).parent / "mats_tiny" / "descriptions.yaml"
# The table of classes shows the bridges that change one thing at a time; they come first.
SHOWN_BRIDGES = 4


def report_gap(
    sounds: Path,
    model: str | Path,
    groups: Sequence[str] = (),
    packages: Sequence[str] = (),
    descriptions: Path | None = None,
    pairs: int = PAIRS,
    seed: int = 0,
    texts_per_label: int | None = None,
    clap: str | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Draws pairs of clips and texts, embeds them, and measures the gap of every bridge (Theorem 3.1, Figure 3).

    Args:
        sounds (`Path`): an audiofolder; `groups` and `packages` choose of its clips, see [`read_sounds`].
        model (`str` or `Path`): a MATS checkpoint's folder or Hub id.
        descriptions (`Path`, *optional*): YAML of sentences for each label; by default those of mats-tiny.
        pairs, seed, texts_per_label: see [`draw_pairs`]; the seed is also that of the noise and of the picture.
        clap (`str`, *optional*): a light checkpoint's CLAP, if not where the checkpoint says.
        output (`Path`, *optional*): a folder that receives `gap.json`, `gap.md`, `gap_tsne.png` and, where a class has
            enough points, `gap_classes.png`. It needs matplotlib.

    Returns:
        `dict`: what `gap.json` holds: `settings`, counts of `texts`, `bridges` by name, and the `pairs`. It has names
        and checksums in place of paths.

    Raises:
        FileExistsError: `output` is a file.
        FileNotFoundError, ValueError: as [`read_sounds`], [`draw_pairs`], [`embed`] and [`measure`], or `descriptions`
            is of another form.
        ImportError: there is an `output`, but no matplotlib.
    """
    if output is not None:
        if output.exists() and not output.is_dir():
            raise FileExistsError(f"output is {output}, a file; expected a folder.")
        from evaluation.gap_figures import draw_classes, draw_tsne  # matplotlib is an extra
    sounds = Path(sounds)
    descriptions = BUNDLED_DESCRIPTIONS if descriptions is None else Path(descriptions)
    known = read_sounds(sounds, groups, packages)
    drawn = draw_pairs(known, _read_descriptions(descriptions), pairs, seed, texts_per_label)
    config = MatsConfig.from_pretrained(model)
    processor = MatsProcessor.from_pretrained(model, clap=clap)
    embedded = embed(drawn, processor, config, seed)
    gaps, width = measure(drawn, embedded)
    record = {
        "settings": {
            "model": Path(model).resolve().name if Path(model).is_dir() else str(model),
            "clap_fingerprint": processor.clap.fingerprint,
            "noise_variance": config.noise_variance,
            "renormalize": config.renormalize,
            "santa_settings": processor.santa_settings,
            "santa_memory": repr(processor.santa_memory),
            "long_audio": processor.long_audio,
            "sounds": {"name": sounds.resolve().name, "metadata_sha256": _sha256(sounds / "metadata.csv")},
            "groups": list(groups),
            "packages": list(packages),
            "descriptions": {"name": descriptions.name, "sha256": _sha256(descriptions)},
            "texts_per_label": texts_per_label,
            "clips_to_draw_from": len(known),
            "pairs": pairs,
            "seed": seed,
            "kernel_width": width,
            **estimator_settings(),
        },
        "texts": _count_texts(drawn) | {"cut": embedded.cut},
        "bridges": {gap.bridge.name: _bridge_record(gap) for gap in gaps},
        "pairs": [asdict(pair) | {"audio": os.path.relpath(pair.audio, sounds)} for pair in drawn.pairs],
    }
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
        (output / RECORD_FILE).write_text(text, encoding="utf-8")
        (output / REPORT_FILE).write_text(to_markdown(record), encoding="utf-8")
        draw_tsne(gaps, embedded, output / TSNE_FIGURE, seed)
        if measured_classes(record):
            draw_classes(gaps, output / CLASSES_FIGURE)
    return record


def measured_classes(record: Mapping[str, Any]) -> list[str]:
    """The labels with enough points for a distribution, sorted."""
    classes = record["bridges"]["raw"]["classes"]
    return sorted(label for label, own in classes.items() if own["discrepancy"] is not None)


def tell_pairs(record: Mapping[str, Any]) -> str:
    """What was compared, in a sentence or two."""
    texts, raw = record["texts"], record["bridges"]["raw"]
    cut = f" {texts['cut']} texts were longer than CLAP takes, and were cut." if texts["cut"] else ""
    return (
        f"{raw['overall']['clips']} pairs with {texts['different']} different texts: {texts['caption']} captions, "
        f"{texts['description']} descriptions, {texts['label']} bare labels.{cut} {len(raw['classes'])} classes, "
        f"{len(measured_classes(record))} of them with enough points for a distribution."
    )


def overall_table(record: Mapping[str, Any]) -> str:
    """A row for each bridge, in Markdown."""
    header = ["bridge", "audio", "text", "cosine", "distance", "means", "MMD²", "L1", "mean L1", "largest L1", "in"]
    rows = []
    for name, bridge in record["bridges"].items():
        overall, worst = bridge["overall"], bridge["classes_max_l1"]
        rows.append(
            [name, bridge["audio"], bridge["text"]]
            + [_number(overall[key]) for key in ("cosine", "distance", "between_means")]
            + [_number(overall["mmd2"], 3), _bound(overall["discrepancy"]), _number(bridge["classes_mean_l1"])]
            + [_bound(worst), "" if worst is None else worst["label"]]
        )
    return _table(header, rows)


def to_markdown(record: Mapping[str, Any]) -> str:
    """`gap.md`: what was measured, how to read it, overall and in every class."""
    settings, classes = record["settings"], record["bridges"]["raw"]["classes"]
    measured = measured_classes(record)
    left_out = [
        f"{label} ({own['clips']}, {own['texts']})" for label, own in sorted(classes.items()) if label not in measured
    ]
    santa = ", ".join(f"{key} {value}" for key, value in settings["santa_settings"].items())
    parts = [
        "# The gap between audio and text",
        tell_pairs(record),
        f"Model {settings['model']}, CLAP {settings['clap_fingerprint'][:16]}, noise variance "
        f"{settings['noise_variance']}, Santa: {santa}; seed {settings['seed']}.",
        overall_table(record),
        "All of it where the mapper reads it. cosine, distance: means over pairs. means: distance between the means of "
        "the two sides. MMD²: unbiased, all with one kernel. L1: the theorem's discrepancy, from 0 to 2; a lower "
        "bound, by a classifier in cross-validation, ± its standard error; overall, then its mean and its largest over "
        "the classes. The largest of noisy estimates leans upwards.",
        "## Classes",
    ]
    if measured:
        parts.append(_classes_table(record, measured))
    if left_out:
        parts.append(
            f"Left out, with fewer than {settings['min_points']} clips or texts (clips, texts): {', '.join(left_out)}. "
            f"Of these {RECORD_FILE} has the pairs' cosines and distances."
        )
    return "\n\n".join(parts) + "\n"


def _classes_table(record: Mapping[str, Any], labels: Sequence[str]) -> str:
    """A row for each of these classes."""
    shown = list(record["bridges"].items())[:SHOWN_BRIDGES]
    header = ["class", "clips", "texts", *(f"{what} {name}" for what in ("means", "L1") for name, _ in shown)]
    rows = []
    for label in labels:
        own = [bridge["classes"][label] for _, bridge in shown]
        rows.append(
            [label, str(own[0]["clips"]), str(own[0]["texts"])]
            + [_number(measures["between_means"]) for measures in own]
            + [_bound(measures["discrepancy"]) for measures in own]
        )
    return _table(header, rows)


def _bridge_record(gap: BridgeGap) -> dict[str, Any]:
    """All numbers of a bridge."""
    found = [own.l1 for own in gap.measured.values()]
    return {
        "audio": gap.bridge.audio,
        "text": gap.bridge.text,
        "overall": asdict(gap.overall),
        "classes_mean_l1": sum(found) / len(found) if found else None,
        "classes_max_l1": gap.worst and {"label": gap.worst[0], **asdict(gap.worst[1])},
        "classes": {label: asdict(own) for label, own in gap.classes.items()},
    }


def _count_texts(drawn: DrawnPairs) -> dict[str, int]:
    """How many pairs have a caption, a description or only a label for text, and how many texts are different ones."""
    kinds = Counter(pair.kind for pair in drawn.pairs)
    counts = {kind: kinds[kind] for kind in ("caption", "description", "label")}
    return counts | {"different": len({pair.text for pair in drawn.pairs})}


def _read_descriptions(path: Path) -> Descriptions:
    """As [`Descriptions.from_yaml`], with a `ValueError` for a file of another form."""
    try:
        return Descriptions.from_yaml(path)
    except (KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} holds no `descriptions`, a list of sentences for each label: {error!r}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _bound(discrepancy: Mapping[str, Any] | None) -> str:
    """An L1 distance with its standard error."""
    return "-" if discrepancy is None else f"{discrepancy['l1']:.2f} ± {discrepancy['error']:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown whose columns also line up in a terminal."""
    cells = [header, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


__all__ = [
    "CLASSES_FIGURE",
    "RECORD_FILE",
    "REPORT_FILE",
    "TSNE_FIGURE",
    "measured_classes",
    "overall_table",
    "report_gap",
    "tell_pairs",
    "to_markdown",
]

"""`mats gap`: the distance between audio and text embeddings, and what noise, memory and Santa make of it."""

from pathlib import Path
from typing import Annotated

import typer

from mats_cli.runtime import announced, check_is_mats, fail, quieten, resolve_model, say, to_json
from mats_cli.sounds import Clap, Json, Model

# The paper's, Figure 3.
PAIRS = 350


def gap(
    sounds: Annotated[
        Path,
        typer.Argument(
            help="A folder of sounds with a metadata.csv of file_name, label and optionally caption, group, source.",
            show_default=False,
        ),
    ],
    model: Model = None,
    clap: Clap = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help="Only clips of this group; may be given several times.", show_default="all clips"),
    ] = None,
    packages: Annotated[
        str | None,
        typer.Option(
            help="Only clips whose source begins with one of these words, separated by commas, in a "
            "table that also has caption, group and licence; with --group, the clips of either.",
            show_default="all clips",
        ),
    ] = None,
    descriptions: Annotated[
        Path | None,
        typer.Option(help="A YAML file of descriptions for each label.", show_default="those of mats-tiny"),
    ] = None,
    texts_per_label: Annotated[
        int | None, typer.Option(min=1, help="Use so many descriptions of each label.", show_default="all")
    ] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Random clips, each with a text of its own.")] = PAIRS,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw, the noise and the picture.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="A folder for gap.json, gap.md and two figures (PNG).", show_default="no files"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how far sounds lie from their texts."""
    chosen_packages = [name.strip() for name in (packages or "").split(",") if name.strip()]
    if packages is not None and not chosen_packages:
        raise ValueError(f"--packages is {packages!r}, expected names separated by commas.")
    name = resolve_model(model)
    with announced(f"Measuring the gap of {name} on {pairs} pairs ..."):
        from evaluation import gap_report as report

        quieten()
        check_is_mats(name)
        try:
            record = report.report_gap(
                sounds, name, group or (), chosen_packages, descriptions, pairs, seed, texts_per_label, clap, output
            )
        except ImportError as error:  # no matplotlib
            fail(error)
    if output is not None:
        figures = [report.TSNE_FIGURE]
        if report.measured_classes(record):
            figures.append(report.CLASSES_FIGURE)
        else:
            say(f"No class has enough clips and texts to be drawn: {report.CLASSES_FIGURE} is not written.")
        say(f"Wrote {report.RECORD_FILE}, {report.REPORT_FILE}, {' and '.join(figures)} into {output}")
    if as_json:
        typer.echo(to_json(record))
    else:
        typer.echo(report.tell_pairs(record) + "\n\n" + report.overall_table(record))

"""`mats ablate`: the paper's ablation, trained and measured."""

from pathlib import Path
from typing import Annotated

import typer

from mats_cli.runtime import fail, quieten


def ablate(
    plan: Annotated[
        Path,
        typer.Argument(help="YAML of what to compare, such as evaluation/recipes/mats_tiny.yaml.", show_default=False),
    ],
    sounds: Annotated[
        Path,
        typer.Option(
            help="Audiofolder with a metadata.csv of file_name, label, caption, group, licence, source.",
            show_default=False,
        ),
    ],
    data_dir: Annotated[Path, typer.Option(help="Folder of the training texts.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Receives trainings, scores and pictures.", show_default=False)],
    clap: Annotated[
        str | None, typer.Option(help="A CLAP's own folder, in place of the training recipe's.", show_default=False)
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings side by side.")] = 1,
) -> None:
    """Train and measure the paper's ablation; what is there already is not done again."""
    from evaluation.ablation.figures import draw_figures, import_pyplot
    from evaluation.ablation.report import REPORT_FILE, summarise
    from evaluation.ablation.run import ablate as run

    try:
        import_pyplot()  # hours before the pictures are drawn
    except ImportError as error:
        fail(error)
    quieten()
    done = run(plan, sounds, data_dir, output, clap, jobs=jobs)
    summary = summarise(done.plan, output)
    draw_figures(summary, output)
    typer.echo((output / REPORT_FILE).read_text(encoding="utf-8"))

"""The command `mats`.

Nothing heavy is imported before a verb runs, so that `mats --help` answers at once.
"""

from typing import Annotated

import typer

from mats_cli import ablate, checkpoints, describe, gap, memory, noise, sounds, train
from mats_cli.runtime import OneLineErrors, settings

app = typer.Typer(
    cls=OneLineErrors,
    help="Asks questions about sounds; MATS was trained on text alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def configure(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show logs, warnings and tracebacks.")] = False,
) -> None:
    settings.verbose = verbose


app.command()(sounds.ask)
app.command()(sounds.caption)
app.command()(sounds.classify)
app.command()(sounds.chat)
app.add_typer(memory.app, name="memory")
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train.train)
app.command()(noise.noise)
app.command()(gap.gap)
app.command()(ablate.ablate)
app.command()(describe.describe)
app.command()(checkpoints.convert_msclap)
app.command()(checkpoints.merge)
app.command()(checkpoints.export)

if __name__ == "__main__":
    app()

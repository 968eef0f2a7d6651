"""`mats train`: a recipe, with any of its fields overridden."""

from typing import Annotated

import typer


def train(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, such as training/recipes/mats_tiny.yaml.", show_default=False)
    ] = None,
    help_fields: Annotated[bool, typer.Option("--help-fields", help="Every field of a recipe, and stop.")] = False,
) -> None:
    """Train on text alone.

    Every field of the recipe and of transformers' TrainingArguments can be given as an option, such as --data_dir TEXTS
    --output_dir OUT --max_steps 50 --resume --dry_run.
    """
    from training import train_mats

    if help_fields:
        train_mats.main(["--help"])
    elif recipe is None:
        raise ValueError("Name a recipe, such as training/recipes/mats_tiny.yaml.")
    else:
        train_mats.main([recipe, *context.args])

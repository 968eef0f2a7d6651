"""`mats convert-msclap` and `mats export`: checkpoints in and out."""

from pathlib import Path
from typing import Annotated

import typer

from mats_cli.runtime import announced, quieten, say


def convert_msclap(
    checkpoint: Annotated[
        str, typer.Argument(help="CLAP_weights_2023.pth, or the Hub repo microsoft/msclap.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    tokenizer: Annotated[str, typer.Option(help="GPT-2's tokenizer: a folder or a Hub repo.")] = "gpt2",
) -> None:
    """Convert Microsoft's CLAP 2023 to safetensors."""
    with announced(f"Converting {checkpoint} ..."):
        from modeling_mats.convert_msclap import convert_msclap as convert

        quieten()
        convert(checkpoint, out, tokenizer=tokenizer)
    say(f"Wrote {out}")


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with model and processor.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there already.")] = False,
) -> None:
    """Make a self-contained Hub repo of a checkpoint."""
    from hub_cards.export import export_checkpoint

    with announced(f"Exporting {checkpoint} ..."):
        export_checkpoint(checkpoint, out, force=force)
    say(f"Wrote {out}")

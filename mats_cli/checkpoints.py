"""`mats convert-msclap`, `mats merge` and `mats export`: checkpoints in and out."""

from pathlib import Path
from typing import Annotated

import typer

from mats_cli.runtime import announced, check_is_mats, quieten, resolve_model, say
from mats_cli.sounds import Clap, LanguageModel


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


def merge(
    checkpoint: Annotated[str, typer.Argument(help="A light checkpoint: a folder or a Hub repo.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    language_model: LanguageModel = None,
    clap: Clap = None,
) -> None:
    """Make a whole checkpoint of a light one: the language model with LoRA merged into it, and CLAP."""
    name = resolve_model(checkpoint)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder, so it is left alone.")
    with announced(f"Merging {name} ..."):
        from transformers import PreTrainedConfig

        from modeling_mats import MatsForConditionalGeneration
        from processing_mats import MatsProcessor

        quieten()
        check_is_mats(name)
        if not PreTrainedConfig.get_config_dict(name)[0].get("light"):
            raise ValueError(f"{name} is a whole checkpoint already.")
        # The processor first: what it may lack is told before the language model is loaded.
        processor = MatsProcessor.from_pretrained(name, clap=clap)
        model = MatsForConditionalGeneration.from_pretrained(name, language_model=language_model)
        if model.has_lora:
            model.merge_lora()
        model.save_pretrained(out, light=False)
        processor.save_pretrained(out, light=False)
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

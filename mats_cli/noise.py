"""`mats noise`: the variance of the training noise, from pairs of sound and text."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mats_cli.runtime import announced, check_is_mats, quieten, resolve_model, to_json
from mats_cli.sounds import Json, Model

# The paper's.
PAIRS = 30


def noise(
    pairs_folder: Annotated[
        Path,
        typer.Argument(
            help="A folder of sounds with a metadata.csv of file_name and caption or label, or such a .csv file.",
            show_default=False,
        ),
    ],
    model: Model = None,
    clap: Annotated[
        str | None, typer.Option(help="A CLAP's own folder or Hub repo, in place of a model's.", show_default=False)
    ] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Random pairs in one draw.")] = PAIRS,
    draws: Annotated[int, typer.Option(min=1, help="Draws, to see how far one can be trusted.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Estimate the variance of the training noise."""
    if model is not None and clap is not None:
        raise ValueError("--model and --clap exclude each other: name one of them.")
    name = clap if clap is not None else resolve_model(model)
    with announced(f"Loading the CLAP of {name} ..."):
        from processing_mats import ClapEncoder, MatsProcessor
        from training.noise import estimate_draws, read_pairs

        quieten()
        if clap is None:
            check_is_mats(name)
            encoder = MatsProcessor.from_pretrained(name, load_memory=False).clap
        else:
            encoder = ClapEncoder.from_pretrained(name)
    with announced(f"Encoding up to {pairs * draws} pairs ..."):
        estimates = estimate_draws(pairs_folder, encoder, pairs, draws, seed)
    first, known = estimates[0], len(read_pairs(pairs_folder))
    variances = [estimate.variance for estimate in estimates]
    if as_json:
        others = {"known_pairs": known, "seed": seed, "variances": variances, "clap_fingerprint": encoder.fingerprint}
        typer.echo(to_json(asdict(first) | others))
        return
    error = first.spread / first.pairs**0.5
    typer.echo(f"noise_variance  {first.variance:.4f}")
    typer.echo(f"std             {first.std:.4f} ± {error:.4f}, the mean infinity norm of {first.pairs} pairs")
    typer.echo(f"spread          {first.spread:.4f} from pair to pair")
    if draws > 1:
        typer.echo(f"in {draws} draws      noise_variance from {min(variances):.4f} to {max(variances):.4f}")
        if known < 2 * pairs:
            typer.echo(f"                hardly different ones: there are {known} pairs in all")

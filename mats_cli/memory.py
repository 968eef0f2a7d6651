"""`mats memory build` and `mats memory show`: Santa's memory."""

import csv
import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mats_cli.runtime import announced, check_is_mats, quieten, resolve_model, say, to_json
from mats_cli.sounds import Json, Model, evidence_lines

if TYPE_CHECKING:  # imported where it is used: torch takes seconds
    import torch

    from processing_mats import ClapEncoder, SantaMemory

# The paper's, section 4.1.
MEMORY_SIZE, NUM_CLUSTERS = 5172, 100
TEXTS_AT_A_TIME = 256
SHOWN_TEXTS = 5

app = typer.Typer(help="Build Santa's memory, or look into one.", no_args_is_help=True)


@app.command()
def build(
    texts: Annotated[
        Path, typer.Argument(help="A .txt file with a text on each line, or a .csv file.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="A .safetensors file, or a folder such as the checkpoint's.")],
    model: Model = None,
    column: Annotated[str | None, typer.Option(help="The column of a .csv file that holds the texts.")] = None,
    clusters: Annotated[
        int | None, typer.Option(min=1, show_default="100, fewer for fewer texts", help="Clusters (K).")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="At most so many texts (M), drawn by the seed.")] = MEMORY_SIZE,
    noise_variance: Annotated[
        float | None, typer.Option(min=0, show_default="the model's, as in training", help="Variance of the noise.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, the noise and the clusters.")] = 0,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts too long for CLAP, not refuse them.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a memory that is there already.")] = False,
) -> None:
    """Build a memory from texts, with the CLAP of a model."""
    target = memory_file(out)
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already; --force replaces it.")
    found = read_texts(texts, column)
    chosen = draw(found, size, seed)
    name = resolve_model(model)
    with announced(f"Loading the CLAP of {name} ..."):
        from configuration_mats import MatsConfig
        from processing_mats import MatsProcessor, SantaMemory

        quieten()
        check_is_mats(name)
        config = MatsConfig.from_pretrained(name)
        # Without the checkpoint's old memory, which may be of another CLAP.
        clap = MatsProcessor.from_pretrained(name, load_memory=False).clap
        if clap is None:
            raise ValueError(f"{name} has no CLAP to encode the texts with.")
    embeds = encode(clap, chosen, truncate)
    with announced(f"Clustering {len(chosen)} texts ..."):
        memory = SantaMemory.build(
            chosen,
            embeds,
            clap.fingerprint,
            num_clusters=clusters or default_clusters(len(chosen)),
            noise_variance=config.noise_variance if noise_variance is None else noise_variance,
            renormalize=config.renormalize,
            seed=seed,
        )
    save(memory, target)
    say(f"Wrote {target}: {len(chosen)} of {len(found)} texts in {len(memory.centroids)} clusters.")


@app.command()
def show(
    memory: Annotated[Path, typer.Argument(help="A memory file, or a folder that holds one.", show_default=False)],
    query: Annotated[str | None, typer.Option(help="A sound, to see which texts Santa would lean on.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose CLAP hears the sound.", show_default="the folder, or the bundled model")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a memory holds."""
    from processing_mats import SantaMemory

    quieten()
    loaded = SantaMemory.load(memory_file(memory))
    record = {
        "texts": len(loaded),
        "clusters": len(loaded.centroids),
        "dimensions": loaded.embeddings.shape[1],
        "noise_variance": loaded.noise_variance,
        "seed": loaded.seed,
        "clap_fingerprint": loaded.clap_fingerprint,
    }
    evidence = None
    if query is not None:
        owner = str(memory) if model is None and (memory / "config.json").is_file() else resolve_model(model)
        evidence = lean(loaded, query, owner)
    if as_json:
        typer.echo(to_json(record | ({"query": query, "santa": evidence} if query is not None else {})))
        return
    for key, value in record.items():
        typer.echo(f"{key.replace('_', ' '):16} {value}")
    if evidence is not None:
        typer.echo(f"\n{query}")
        lines = evidence_lines(evidence)
    else:
        sizes = loaded.cluster_offsets.diff()
        typer.echo(f"{'cluster sizes':16} {int(sizes.min())} to {int(sizes.max())}\n")
        lines = [f"  {text}" for text in loaded.texts[:SHOWN_TEXTS]]
        lines += [f"  and {len(loaded) - SHOWN_TEXTS} more"] if len(loaded) > SHOWN_TEXTS else []
    typer.echo("\n".join(lines))


def lean(memory: "SantaMemory", sound: str, model: str) -> list[dict]:
    """The texts that Santa leans on for a sound. A memory of another CLAP is refused by the processor."""
    with announced(f"Loading the CLAP of {model} ..."):
        from processing_mats import MatsProcessor

        processor = MatsProcessor.from_pretrained(model)
    processor.santa_memory = memory
    _, (evidence,) = processor.apply_santa(processor.encode_audio(sound), return_evidence=True)
    return evidence


def memory_file(path: Path) -> Path:
    """The memory that a path means: itself, or the one of a checkpoint folder."""
    return path if path.suffix == ".safetensors" else path / "santa_memory.safetensors"


def read_texts(path: Path, column: str | None) -> list[str]:
    """Texts from the lines of a text file (empty ones are skipped) or from a column of a CSV file."""
    if not path.is_file():
        raise FileNotFoundError(f"No such file of texts: {path}")
    if path.suffix.lower() == ".csv":
        return read_column(path, column)
    if column is not None:
        raise ValueError(f"--column is for .csv files, but the texts are in {path}.")
    texts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text.")
    return texts


def read_column(path: Path, column: str | None) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if column not in columns:
            asked = "--column is missing" if column is None else f"{path} has no column {column!r}"
            raise ValueError(f"{asked}; the columns are {', '.join(columns) or 'none'}.")
        rows = [(reader.line_num, (row[column] or "").strip()) for row in reader]
    if not rows:
        raise ValueError(f"{path} holds no row below its header.")
    if empty := [line for line, text in rows if not text]:
        raise ValueError(f"{path} has rows without a {column!r}, {len(empty)} in all; the first is on line {empty[0]}.")
    return [text for _, text in rows]


def draw(texts: list[str], size: int, seed: int) -> list[str]:
    """At most `size` texts, in their order."""
    if len(texts) <= size:
        return texts
    kept = sorted(random.Random(seed).sample(range(len(texts)), size))
    return [texts[index] for index in kept]


def default_clusters(texts: int) -> int:
    """The paper's number; for fewer texts, clusters as large as the paper's, of which Santa averages the nearest 32."""
    return max(1, min(NUM_CLUSTERS, texts * NUM_CLUSTERS // MEMORY_SIZE))


def encode(clap: "ClapEncoder", texts: list[str], truncate: bool) -> "torch.Tensor":
    """CLAP's embeddings of the texts, under a progress bar."""
    import torch
    from tqdm import tqdm

    with tqdm(total=len(texts), delay=2, unit="text", disable=None) as progress:
        embeds = []
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            part = texts[start : start + TEXTS_AT_A_TIME]
            embeds.append(clap.encode_text(part, truncation=truncate))
            progress.update(len(part))
    return torch.cat(embeds)


def save(memory: "SantaMemory", target: Path) -> None:
    """Writes the memory under any file name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".memory-") as folder:
        os.replace(memory.save_pretrained(folder), target)

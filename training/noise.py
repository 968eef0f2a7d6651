"""The noise variance of Eq. 1, estimated from pairs of sound and text: how far apart CLAP puts what belongs together.

    mats noise path/to/pairs

"Estimated as the infinity norm between audio and text embeddings of 30 random pairs" (MATS, section 4.1), after
NoAudioCaptioning (Kouzelis and Katsouros, 2023) and CapDec (Nukrai et al., 2022): the mean norm is the noise's standard
deviation, its square the variance.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from processing_mats.clap_mats import ClapEncoder
from training.embed import encode_files

# The paper's.
PAIRS = 30

_CAPTION_COLUMN = re.compile(r"caption(_\d+)?")


@dataclass(frozen=True)
class Pair:
    """A clip and the texts that describe it, any of which makes a pair with it."""

    audio: Path
    texts: tuple[str, ...]


@dataclass(frozen=True)
class NoiseEstimate:
    """What one draw of pairs says of the noise.

    Attributes:
        variance (`float`): `std` squared, the model's `noise_variance`.
        std (`float`): mean infinity norm over the pairs.
        spread (`float`): standard deviation of the infinity norm from pair to pair; that of `std`, their mean, is
            smaller by the square root of `pairs`.
        pairs (`int`): pairs drawn.
    """

    variance: float
    std: float
    spread: float
    pairs: int


def estimate_noise(audio_embeds: torch.Tensor, text_embeds: torch.Tensor) -> NoiseEstimate:
    """The estimate from embeddings that belong together row by row.

    Args:
        audio_embeds, text_embeds (`torch.Tensor` of shape `(pairs, dim)`): L2-normalised here, if they are not yet.

    Raises:
        ValueError: the shapes differ, fewer than two pairs, or embeddings without a direction.
    """
    if audio_embeds.ndim != 2 or audio_embeds.shape != text_embeds.shape:
        raise ValueError(
            f"audio_embeds has shape {tuple(audio_embeds.shape)} and text_embeds {tuple(text_embeds.shape)}, expected "
            "(pairs, dim) for both."
        )
    if len(audio_embeds) < 2:
        raise ValueError(f"Got {len(audio_embeds)} pairs, expected at least 2.")
    norms = []
    for name, embeds in (("audio_embeds", audio_embeds), ("text_embeds", text_embeds)):
        lengths = embeds.double().norm(dim=-1)
        if not (lengths.isfinite() & (lengths > 0)).all():
            raise ValueError(f"{name} holds rows that are zero, NaN or infinite.")
        norms.append(F.normalize(embeds.double(), dim=-1))
    distances = (norms[0] - norms[1]).abs().amax(-1)  # (pairs,)
    std = distances.mean().item()
    return NoiseEstimate(variance=std**2, std=std, spread=distances.std().item(), pairs=len(distances))


def read_pairs(folder: Path) -> list[Pair]:
    """Sounds with their texts.

    Args:
        folder (`Path`): a `datasets` audiofolder, that is one with a `metadata.csv`, or a CSV file in its place. Each
            row has a `file_name`, relative to the folder, and texts: `caption`, or `caption_1`, `caption_2` and so on,
            and where these are empty or absent its `label`.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: a column is missing, or a row has no file name or no text.
    """
    folder = Path(folder)
    table = folder if folder.suffix.lower() == ".csv" else folder / "metadata.csv"
    if not table.is_file():
        raise FileNotFoundError(f"No pairs of sound and text: {table} is not there.")
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        captions = [column for column in columns if _CAPTION_COLUMN.fullmatch(column)]
        if "file_name" not in columns or not (captions or "label" in columns):
            raise ValueError(
                f"{table} has the columns {', '.join(columns) or 'none'}; expected file_name, and caption (or "
                "caption_1, caption_2, ...) or label."
            )
        pairs = []
        for row in reader:
            texts = [text for column in captions if (text := (row[column] or "").strip())]
            texts = texts or [text for text in [(row.get("label") or "").strip()] if text]
            name = (row["file_name"] or "").strip()
            if not name or not texts:
                raise ValueError(f"{table}, line {reader.line_num}: no {'text' if name else 'file_name'}.")
            pairs.append(Pair(table.parent / name, tuple(texts)))
    if not pairs:
        raise ValueError(f"{table} holds no row below its header.")
    return pairs


def estimate_from_folder(folder: Path, clap: ClapEncoder, pairs: int = PAIRS, seed: int = 0) -> NoiseEstimate:
    """The estimate from random pairs of a folder (see [`read_pairs`]), as the paper makes it.

    Args:
        clap (`ClapEncoder`): the CLAP whose embeddings the model will see.
        pairs (`int`): drawn without repetition; of several texts of a clip, one.
        seed (`int`): of the draw.

    Raises:
        ValueError: the folder has fewer pairs.
    """
    return estimate_draws(folder, clap, pairs, draws=1, seed=seed)[0]


def estimate_draws(
    folder: Path, clap: ClapEncoder, pairs: int = PAIRS, draws: int = 1, seed: int = 0
) -> list[NoiseEstimate]:
    """Estimates of several draws, the first of which is that of [`estimate_from_folder`].

    How far they lie apart is how far a single one can be trusted, as long as the folder has many more pairs than are
    drawn: of one that hardly has, every draw is much the same.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}, expected at least 1.")
    known = read_pairs(folder)
    if not 2 <= pairs <= len(known):
        raise ValueError(f"pairs is {pairs}, expected from 2 to {len(known)}, as many as {folder} has.")
    drawn: list[list[tuple[Path, str]]] = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        chosen = [known[index] for index in rng.choice(len(known), size=pairs, replace=False)]
        drawn.append([(pair.audio, pair.texts[rng.integers(len(pair.texts))]) for pair in chosen])
    audio = _embed_audio(list(dict.fromkeys(path for draw in drawn for path, _ in draw)), clap)
    texts = list(dict.fromkeys(text for draw in drawn for _, text in draw))
    # Training cuts long texts, too.
    text = dict(zip(texts, clap.encode_text(texts, truncation=True), strict=True))
    return [
        estimate_noise(
            torch.stack([audio[path] for path, _ in draw]), torch.stack([text[sentence] for _, sentence in draw])
        )
        for draw in drawn
    ]


def _embed_audio(paths: Sequence[Path], clap: ClapEncoder) -> dict[Path, torch.Tensor]:
    """Each clip's embedding `(dim,)`."""
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} sounds are not there, such as {missing[0]}.")
    return dict(zip(paths, encode_files(paths, clap), strict=True))


__all__ = ["NoiseEstimate", "Pair", "estimate_draws", "estimate_from_folder", "estimate_noise", "read_pairs"]

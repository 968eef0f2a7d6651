"""Real sounds to evaluate on while a model is trained on text."""

import csv
from pathlib import Path
from typing import Any

import torch

from processing_mats import MatsProcessor
from training.audiotia.templates import CAPTION, CLASSIFY
from training.embed import audio_cache, embed_clips
from training.embedding_cache import Ranks
from training.hard_prompts import RowPrompts


def audio_rows(
    folder: Path,
    processor: MatsProcessor,
    cache_dir: Path,
    ranks: Ranks | None = None,
    prompts: RowPrompts | None = None,
) -> list[dict[str, Any]]:
    """Rows as the collator takes them, whose embeddings are of sounds, moved by Santa where there is a memory.

    Args:
        folder (`Path`): a `datasets` audiofolder: `metadata.csv` with `file_name` and `caption` or `label` or both. A
            clip with a caption is captioned, one with a label classified.
        processor (`MatsProcessor`): with its CLAP and memory.
        cache_dir (`Path`): of the embeddings.
        ranks (`Ranks`, *optional*): which share out the clips.
        prompts (`RowPrompts`, *optional*): of the labels nearest to the sound itself, not to what Santa makes of it.

    Raises:
        FileNotFoundError: no `metadata.csv`, or clips that are not there.
        ValueError: other columns, or rows with neither caption nor label.
    """
    asked = read_questions(folder)
    cache = audio_cache(cache_dir, processor.clap)
    rows = embed_clips([folder / name for name, _, _ in asked], processor.clap, cache, ranks)
    embeds = torch.from_numpy(cache.embeddings(rows))
    instructions = [instruction for _, instruction, _ in asked]
    if prompts is not None:
        instructions = prompts(instructions, embeds, [0] * len(asked))
    return [
        {"text_embeds": embed.numpy(), "instruction": instruction, "answer": answer}
        for embed, instruction, (_, _, answer) in zip(processor.apply_santa(embeds), instructions, asked, strict=True)
    ]


def read_questions(folder: Path) -> list[tuple[str, str, str]]:
    """`(file_name, instruction, answer)` for each caption and label of an audiofolder."""
    metadata = folder / "metadata.csv"
    if not metadata.is_file():
        raise FileNotFoundError(f"{folder} is no audiofolder: it has no metadata.csv.")
    with metadata.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if "file_name" not in columns or not {"caption", "label"} & set(columns):
            raise ValueError(f"{metadata} has the columns {columns}, expected file_name and caption or label.")
        asked = []
        for row in reader:
            found = [
                (row["file_name"], instruction, text)
                for column, instruction in (("caption", CAPTION), ("label", CLASSIFY))
                if (text := (row.get(column) or "").strip())
            ]
            if not found:
                raise ValueError(f"{metadata}, line {reader.line_num}: neither caption nor label.")
            asked += found
    return asked


__all__ = ["audio_rows", "read_questions"]

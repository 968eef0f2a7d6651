"""CLAP text embeddings, computed once and kept in Arrow: CLAP is frozen, so no training step needs it."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import datasets
from datasets import Dataset
from tqdm import tqdm

from processing_mats.clap_mats import ClapEncoder
from training.text_examples import Example


def embed_examples(examples: Sequence[Example], clap: ClapEncoder, cache_dir: Path, batch_size: int = 256) -> Dataset:
    """Examples with a `description` as a dataset with a `text_embeds` column.

    Args:
        examples (sequence of `Example`): their descriptions are what is embedded.
        clap (`ClapEncoder`): its text tower embeds each different description once.
        cache_dir (`Path`): where embeddings are kept, in a folder named by CLAP's weights and the texts.
        batch_size (`int`): texts embedded at a time.

    Returns:
        `Dataset` in the order of the examples: their fields, `text_embeds` (float32, `embed_dim` values) and `length`
        in characters, by which the Trainer can group rows that need little padding.
    """
    rows = [
        asdict(example)
        | {
            "turns": [turn._asdict() for turn in example.turns],
            "length": sum(len(text) for turn in example.turns for text in turn),
        }
        for example in examples
    ]
    if not rows:
        raise ValueError("There are no examples to embed.")
    descriptions = sorted({row["description"] for row in rows})
    table = cached_text_embeddings(descriptions, clap, cache_dir, batch_size)
    index = {text: number for number, text in enumerate(descriptions)}
    dataset = Dataset.from_list(rows)
    numbers = [index[row["description"]] for row in rows]
    return dataset.add_column("text_embeds", table.select(numbers).flatten_indices()["text_embeds"])


def cached_text_embeddings(texts: Sequence[str], clap: ClapEncoder, cache_dir: Path, batch_size: int = 256) -> Dataset:
    """The texts' embeddings as a dataset of `text` and `text_embeds`, from the cache where it has them.

    The cache is keyed by CLAP's fingerprint and the texts. Texts beyond the text tower's length are cut.
    """
    digest = hashlib.sha256(json.dumps([clap.fingerprint, list(texts)]).encode()).hexdigest()
    folder = Path(cache_dir) / f"text-embeds-{digest[:24]}"
    if not folder.exists():
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        features = datasets.Features(
            text=datasets.Value("string"),
            text_embeds=datasets.List(datasets.Value("float32"), length=clap.embed_dim),
        )
        by_length = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        embeds = [None] * len(texts)
        for start in tqdm(range(0, len(texts), batch_size), desc="CLAP text embeddings", unit="batch", delay=2):
            numbers = by_length[start : start + batch_size]
            chunk = clap.encode_text([texts[number] for number in numbers], truncation=True).numpy()
            for number, row in zip(numbers, chunk, strict=True):
                embeds[number] = row
        table = Dataset.from_dict({"text": list(texts), "text_embeds": embeds}, features=features)
        # Only a finished table gets the name that is looked for.
        with tempfile.TemporaryDirectory(dir=cache_dir) as partial:
            table.save_to_disk(os.path.join(partial, "table"))
            os.rename(os.path.join(partial, "table"), folder)
    return Dataset.load_from_disk(str(folder))


__all__ = ["cached_text_embeddings", "embed_examples"]

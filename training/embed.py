"""Descriptions and clips to rows of an [`EmbeddingCache`]."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from processing_mats.audio_mats import load_audio
from processing_mats.clap_mats import ClapEncoder
from training.embedding_cache import KEY_BYTES, EmbeddingCache, Ranks, content_keys

logger = logging.getLogger(__name__)

COLUMN_BATCH = 16_384
LISTED_FILES = 5


def text_cache(folder: Path, clap: ClapEncoder, dtype: str = "float32") -> EmbeddingCache:
    """The cache of CLAP's text embeddings under a folder."""
    return EmbeddingCache(folder, clap.fingerprint, clap.embed_dim, "text", dtype)


def audio_cache(folder: Path, clap: ClapEncoder, dtype: str = "float32") -> EmbeddingCache:
    """The cache of CLAP's audio embeddings under a folder; long clips are averaged over their windows."""
    return EmbeddingCache(folder, clap.fingerprint, clap.embed_dim, "audio-windows", dtype)


def embed_texts(
    texts: Sequence[str],
    clap: ClapEncoder,
    cache: EmbeddingCache,
    ranks: Ranks | None = None,
    truncation: bool = True,
    batch_size: int = 64,
) -> np.ndarray:
    """Rows of the cache `(len(texts),)`; what is missing is encoded. Flat in memory for a column of a `Dataset`.

    Raises:
        ValueError: an empty text, or without `truncation` one that is too long for CLAP's text tower.
    """
    keys, lengths = [], []
    for batch in _batches(texts):
        keys.append(content_keys(batch))
        lengths.append(np.fromiter(map(len, batch), dtype=np.int32, count=len(batch)))

    cut = 0

    def encode(indices: np.ndarray) -> np.ndarray:
        nonlocal cut
        chosen = [texts[int(index)] for index in indices]
        cut += clap.count_long_texts(chosen)
        return clap.encode_text(chosen, batch_size, truncation).numpy()

    rows = cache.add(np.concatenate(keys), np.concatenate(lengths), encode, ranks, "text")
    if cut:
        logger.warning("%d of the texts are longer than CLAP's %d tokens and were cut.", cut, clap.max_text_tokens)
    return rows


def embed_clips(
    paths: Sequence[Path], clap: ClapEncoder, cache: EmbeddingCache, ranks: Ranks | None = None, batch_size: int = 8
) -> np.ndarray:
    """Rows of the cache `(len(paths),)`, by the clips' bytes; what is missing is encoded.

    Raises:
        FileNotFoundError: clips that are not there; told before any is encoded.
    """
    distinct = sorted(set(paths))
    if absent := [path for path in distinct if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(absent)} of {len(distinct)} clips are not there, such as "
            f"{', '.join(str(path) for path in absent[:LISTED_FILES])}."
        )
    keys = np.array([_file_key(path) for path in distinct], dtype=f"V{KEY_BYTES}")
    sizes = np.array([path.stat().st_size for path in distinct])

    def encode(indices: np.ndarray) -> np.ndarray:
        return encode_files([distinct[index] for index in indices], clap, batch_size).numpy()

    rows = dict(zip(distinct, cache.add(keys, sizes, encode, ranks, "clip").tolist(), strict=True))
    return np.array([rows[path] for path in paths])


def encode_files(paths: Sequence[Path], clap: ClapEncoder, batch_size: int = 8) -> torch.Tensor:
    """CLAP's embeddings of clips `(len(paths), embed_dim)`, with no more than a batch of them in memory."""
    embeds = torch.empty(len(paths), clap.embed_dim)
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        waveforms = [load_audio(path, clap.sampling_rate) for path in batch]
        embeds[start : start + len(batch)] = clap.encode_audio(waveforms, batch_size)
    return embeds


def embed_examples(
    examples: Dataset,
    clap: ClapEncoder,
    cache: EmbeddingCache,
    audio_dir: Path | None = None,
    ranks: Ranks | None = None,
    truncation: bool = True,
) -> np.ndarray:
    """Rows of the cache for each example: of its description, or with `audio_dir` of its clip (MATS-Audio)."""
    if audio_dir is None:
        return embed_texts(examples["description"], clap, cache, ranks, truncation)
    names = list(examples["audio"])
    return embed_clips([Path(audio_dir) / name for name in names], clap, cache, ranks)


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), COLUMN_BATCH):
        yield list(texts[start : start + COLUMN_BATCH])


def _file_key(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=KEY_BYTES)).digest()


__all__ = ["audio_cache", "embed_clips", "embed_examples", "embed_texts", "encode_files", "text_cache"]

"""Santa's memory, drawn from the training texts."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from datasets import Dataset

from processing_mats import SantaMemory
from training.embedding_cache import EmbeddingCache
from training.recipe import MemoryArguments


def make_memory(
    arguments: MemoryArguments,
    examples: Dataset,
    indices: np.ndarray,
    cache: EmbeddingCache,
    cache_rows: np.ndarray,
    clap_fingerprint: str,
    noise_variance: float,
    renormalize: bool,
    seed: int,
) -> SantaMemory:
    """Draws different descriptions of the training rows by seed and clusters their embeddings (section 3.3).

    Args:
        arguments (`MemoryArguments`): size (M), clusters (K), shares, noise and precision.
        examples (`Dataset`): with the columns `description` and `source`.
        indices (`np.ndarray`): the rows that were trained on; a memory holds no held-out text.
        cache, cache_rows: where the embedding of each row of `examples` is.
        clap_fingerprint, noise_variance, renormalize: see [`SantaMemory.build`].
        seed (`int`): of the draw, the noise and the clusters.

    Raises:
        ValueError: `memory_shares` names a source that the mixture has not.
    """
    # In the order of the rows, not of the cache, which is another after another history.
    distinct = indices[np.sort(np.unique(cache_rows[indices], return_index=True)[1])]
    examples = examples.select_columns(["description", "source"])
    chosen = draw(arguments, examples, distinct, seed)
    clusters = min(arguments.memory_clusters, len(chosen))
    own_noise = arguments.memory_noise_variance
    return SantaMemory.build(
        list(examples[chosen]["description"]),
        torch.from_numpy(cache.embeddings(cache_rows[chosen])),
        clap_fingerprint,
        num_clusters=clusters,
        noise_variance=noise_variance if own_noise is None else own_noise,
        renormalize=renormalize,
        seed=seed,
        dtype=getattr(torch, arguments.memory_dtype),
    )


def draw(arguments: MemoryArguments, examples: Dataset, candidates: np.ndarray, seed: int) -> np.ndarray:
    """At most `memory_size` of the candidate rows: first each share, then the rest from all that is left."""
    chooser = random.Random(seed)
    shares: Mapping[str, float] = arguments.memory_shares or {}
    size = min(arguments.memory_size, len(candidates))
    chosen: list[int] = []
    if shares:
        sources = np.array(examples[candidates]["source"])
        check_shares(shares, set(sources.tolist()))
        for source, share in shares.items():
            own = candidates[sources == source].tolist()
            chosen += chooser.sample(own, min(len(own), round(share * size)))
    taken = set(chosen)
    rest = [row for row in candidates.tolist() if row not in taken]
    chosen += chooser.sample(rest, size - len(chosen))
    return np.array(sorted(chosen))


def check_shares(shares: Mapping[str, float], sources: set[str]) -> None:
    """Raises `ValueError` for shares of sources that the rows have not."""
    if unknown := sorted(set(shares) - sources):
        raise ValueError(
            f"memory_shares names {', '.join(unknown)}; the rows' sources are {', '.join(sorted(sources))}."
        )


__all__ = ["check_shares", "draw", "make_memory"]

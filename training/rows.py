"""The rows of a training run, in the order in which it sees them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from training.embedding_cache import EmbeddingCache, content_keys
from training.hard_prompts import RowPrompts

# Rows that are sorted by length together are so many batches: large enough that little is padded, small enough that a
# batch stays a random one.
BATCHES_SORTED_TOGETHER = 50


class TrainingOrder:
    """Which row comes at which place, for ever: pass after pass, each in an order of its own.

    A pass is cut to whole batches; which rows are left over is another matter in each.

    It is a function of the seed alone. So a resumed run sees what it would have seen, any number of devices shares out
    the same global batches, and nothing but the current pass is held.

    Args:
        lengths (`np.ndarray` of shape `(rows,)`, *optional*): with them, each batch holds rows of like length.
        rows (`int`): number of rows.
        batch_size (`int`): rows of one step, over all devices.
        seed (`int`)
    """

    def __init__(self, rows: int, batch_size: int, seed: int, lengths: np.ndarray | None = None):
        if rows < 1:
            raise ValueError("There are no rows to train on.")
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.lengths = lengths
        self.rows_in_pass = rows - rows % batch_size if rows >= batch_size else rows
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, places: Sequence[int]) -> np.ndarray:
        """Rows `(len(places),)` at these places, counted from the beginning of the run."""
        epochs, offsets = np.divmod(np.asarray(places), self.rows_in_pass)
        found = np.empty(len(offsets), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = self._of_epoch(int(epoch))[offsets[chosen]]
        return found

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(self.rows)[: self.rows_in_pass]
            if self.lengths is not None:
                order = self._grouped(order, rng)
            self._epoch, self._permutation = epoch, order
        return self._permutation

    def _grouped(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Sorts stretches of the order by length and then shuffles their batches."""
        stretch = self.batch_size * BATCHES_SORTED_TOGETHER
        grouped = []
        for start in range(0, len(order), stretch):
            part = order[start : start + stretch]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            whole = len(part) // self.batch_size * self.batch_size
            batches = part[:whole].reshape(-1, self.batch_size)
            grouped += [batches[rng.permutation(len(batches))].reshape(-1), part[whole:]]
        return np.concatenate(grouped)


class SequentialOrder:
    """The rows as they come, once."""

    def __init__(self, rows: int):
        self.rows = rows

    def __getitem__(self, places: Sequence[int]) -> np.ndarray:
        return np.asarray(places)


class TrainingRows(torch.utils.data.Dataset):
    """What a step needs of each example: `text_embeds`, `instruction`, `answer`, `further_turns`, `noise_seed`.

    The seed is a function of the run's and of the place, so that the noise of a run is the same on any number of
    devices and after any stop.

    Args:
        examples (`Dataset`): with the columns of AudioTIA, memory-mapped.
        cache (`EmbeddingCache`), cache_rows (`np.ndarray` of shape `(len(examples),)`): where each one's embedding is.
        indices (`np.ndarray` of shape `(rows,)`): which examples are taken.
        order, count: which of them comes at which of `count` places; by default each once, as they come.
        seed (`int`): of the run.
        prompts (`RowPrompts`, *optional*): writes labels in front of each first instruction, found by the row's
            embedding and noise, so that they too depend on the place alone.
    """

    COLUMNS = ("instruction", "answer", "further_turns")

    def __init__(
        self,
        examples: Dataset,
        cache: EmbeddingCache,
        cache_rows: np.ndarray,
        indices: np.ndarray,
        order: TrainingOrder | SequentialOrder | None = None,
        count: int | None = None,
        seed: int = 0,
        prompts: RowPrompts | None = None,
    ):
        self.seed = seed
        self.prompts = prompts
        self.examples = examples.select_columns(list(self.COLUMNS))
        self.cache = cache
        self.cache_rows = cache_rows
        self.indices = indices
        self.order = order or SequentialOrder(len(indices))
        self.count = len(indices) if count is None else count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        chosen = self.indices[self.order[places]]
        columns = dict(self.examples[chosen])
        embeds = self.cache.embeddings(self.cache_rows[chosen])
        # torch's generator takes 32 bits of a seed; the factor keeps the runs of small seeds far apart.
        seeds = [(self.seed * 2_654_435_761 + int(place)) % 2**32 for place in places]
        if self.prompts is not None:
            columns["instruction"] = self.prompts(columns["instruction"], torch.from_numpy(embeds), seeds)
        return [
            {
                "text_embeds": embeds[number],
                "noise_seed": seed,
                **{name: columns[name][number] for name in self.COLUMNS},
            }
            for number, seed in enumerate(seeds)
        ]


def lengths_of(examples: Dataset) -> np.ndarray:
    """The column `length` `(rows,)`, without a Python number for each of millions."""
    return examples.with_format("numpy")["length"][:]


def split_rows(
    examples: Dataset, held_out: int, sequential: bool, seed: int, heard: str = "description"
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rows to train on and of those held out.

    Of a staged mixture the first rows are held out: it is written so. Of any other, all rows of whole descriptions (or
    clips: `heard` is the column that takes the sound's place) are, drawn by seed, until there are enough: what is
    evaluated on is never trained on, whatever is asked about it.

    Raises:
        ValueError: nothing would be left to train on.
    """
    count = len(examples)
    if held_out >= count:
        raise ValueError(f"held_out is {held_out}, but the mixture has {count} rows.")
    everything = np.arange(count)
    if not held_out:
        return everything, everything[:0]
    if sequential:
        return everything[held_out:], everything[:held_out]
    salt = str(seed)
    descriptions = examples[heard]
    hashes = np.empty(count, dtype=np.uint64)
    for start in range(0, count, 1 << 14):
        batch = content_keys([f"{salt} {text}" for text in descriptions[start : start + (1 << 14)]])
        hashes[start : start + len(batch)] = np.frombuffer(batch.tobytes(), dtype=np.uint64)[::2]
    limit = np.partition(hashes, held_out - 1)[held_out - 1]
    chosen = hashes <= limit
    if chosen.all():
        raise ValueError(f"Holding out {held_out} rows would take all {count}: too few different descriptions.")
    return everything[~chosen], everything[chosen]


__all__ = ["SequentialOrder", "TrainingOrder", "TrainingRows", "lengths_of", "split_rows"]

"""The rows of a run: read, checked, split and then embedded, so that what is wrong is told before CLAP runs."""

import copy
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from modeling_mats.language_model_mats import is_local_location
from processing_mats import ClapEncoder, MatsProcessor
from training.audiotia.mixture import DataCard, Mixture, build_mixture
from training.bundled import resolve_clap
from training.embed import audio_cache, embed_examples, embed_texts, text_cache
from training.embedding_cache import EmbeddingCache, Ranks, write_atomically
from training.eval_audio import read_questions
from training.hard_prompts import HardPrompts, NearestLabels, RowPrompts, with_hard_prompt
from training.memory import check_shares
from training.noise import PAIRS, read_pairs
from training.recipe import Recipe
from training.rows import split_rows
from training.unusable_rows import find_unusable_rows


@dataclass
class RunData:
    """Rows, and which of them are trained on.

    Attributes:
        examples (`Dataset`): all rows, memory-mapped.
        card (`DataCard`): what the mixture holds.
        key (`str`): what the rows are a function of; see [`Mixture.key`].
        train, held_out (`np.ndarray`): indices of rows.
        left_out (`Counter`): rows that cannot be trained on, by reason.
        cache, cache_rows: where each row's embedding is, once it is embedded.
        hard_prompts (`HardPrompts`, *optional*): labels for the rows' prompts, if the recipe asks for them.
        nearest_labels (`NearestLabels`, *optional*): the same, once they are embedded.
    """

    examples: Dataset
    card: DataCard
    key: str
    train: np.ndarray
    held_out: np.ndarray
    left_out: Counter = field(default_factory=Counter)
    cache: EmbeddingCache | None = None
    cache_rows: np.ndarray | None = None
    hard_prompts: HardPrompts | None = None
    nearest_labels: NearestLabels | None = None

    def texts(self) -> Iterator[str]:
        """Questions and answers of the training rows, from which a new language model's tokenizer learns.

        It is learnt before CLAP can tell which labels are near, so hard prompts name all in turn here.
        """
        in_turn = self.hard_prompts.in_turn() if self.hard_prompts is not None else itertools.repeat(None)
        for row, labels in zip(self.examples.select(self.train), in_turn, strict=False):
            if labels is not None:
                row = {**row, "instruction": with_hard_prompt(row["instruction"], labels)}
            for turn in (row, *row["further_turns"]):
                yield turn["instruction"]
                yield " " + turn["answer"]

    def prompts(self, noise_variance: float) -> RowPrompts | None:
        """Of the embedded labels, for rows that are heard in so much noise; `None` without hard prompts."""
        if self.hard_prompts is None:
            return None
        return RowPrompts(self.nearest_labels, self.hard_prompts.count, noise_variance)


def check_files(recipe: Recipe) -> Mixture:
    """Opens everything that the recipe names, and returns its mixture.

    Raises:
        FileNotFoundError, ValueError: something is missing or of another form.
    """
    arguments = recipe.data
    for name in ("clap", "data_dir"):
        if getattr(arguments, name) is None:
            raise ValueError(f"{name} is missing: give --{name}.")
    clap = resolve_clap(arguments.clap)
    if is_local_location(clap) and not Path(clap).is_dir():
        raise FileNotFoundError(f"No such folder of a CLAP: {clap}")
    if arguments.supervision == "audio" and arguments.audio_dir is None:
        raise ValueError("supervision=audio needs audio_dir, the folder of the clips that the mixture names.")
    mixture = Mixture.load(arguments.mixture, recipe.mixture_dir)
    mixture.check(Path(arguments.data_dir))
    if arguments.eval_audio is not None:
        read_questions(Path(arguments.eval_audio))
    if recipe.model.noise_variance == "auto" and arguments.supervision == "text":
        pairs = read_pairs(Path(recipe.model.noise_pairs))
        if len(pairs) < PAIRS:
            raise ValueError(f"noise_pairs has {len(pairs)} pairs; noise_variance=auto draws {PAIRS}.")
    read_hard_prompts(recipe)
    return mixture


def read_hard_prompts(recipe: Recipe) -> HardPrompts | None:
    """The labels that the recipe names, if it does.

    Raises:
        FileNotFoundError, ValueError: see [`HardPrompts.read`].
    """
    settings = recipe.data.hard_prompts
    return HardPrompts.read(settings, recipe.mixture_dir) if settings is not None else None


def read_rows(recipe: Recipe, mixture: Mixture, cache_dir: Path, ranks: Ranks) -> RunData:
    """Reads the mixture, or finds it read before, writes its data card, and splits off what is held out."""
    arguments, run = recipe.data, recipe.run
    key = mixture.key(Path(arguments.data_dir))
    with run.main_process_first(desc="mixture"):
        built = build_mixture(mixture, Path(arguments.data_dir), cache_dir, key=key)
    if ranks.index == 0:
        card = json.dumps(built.card.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(Path(run.output_dir) / "data_card.json", card.encode())
        write_atomically(Path(run.output_dir) / "data_card.md", built.card.to_markdown().encode())
    examples = built.dataset
    if arguments.max_examples is not None:
        examples = examples.select(range(min(arguments.max_examples, len(examples))))
    heard = "audio" if arguments.supervision == "audio" else "description"
    if heard == "audio" and (unnamed := examples.data.column("audio").null_count):
        raise ValueError(
            f"supervision=audio needs a clip for every row, but {unnamed} of {len(examples)} rows name none. Give "
            "their sources an `audio` pattern in the mixture, or leave them out."
        )
    train, held_out = split_rows(
        examples, arguments.held_out, arguments.data_order == "sequential", run.seed, heard=heard
    )
    return RunData(examples, built.card, key, train, held_out, hard_prompts=read_hard_prompts(recipe))


def leave_out_unusable_rows(data: RunData, processor: MatsProcessor, recipe: Recipe) -> None:
    """Refuses rows that cannot be trained on, or takes them out; see [`find_unusable_rows`].

    With hard prompts every row must have room for the longest: which one it gets depends on its noise.
    """
    positions, kept = processor.max_positions, 0
    if data.hard_prompts is not None:
        data.hard_prompts.check(processor.tokenizer)
        if positions is not None:
            kept = data.hard_prompts.longest(processor.tokenizer)
            processor = copy.copy(processor)
            processor.max_positions = positions - kept
    try:
        found, data.left_out = find_unusable_rows(data.examples, processor, refuse=recipe.data.unusable_rows == "error")
    except ValueError as error:
        if not kept:
            raise
        raise ValueError(
            f"{error} Of the language model's {positions} positions, {kept} are kept for the labels of hard_prompts."
        ) from error
    data.train, data.held_out = np.setdiff1d(data.train, found), np.setdiff1d(data.held_out, found)


def rows_in_a_step(recipe: Recipe) -> int:
    """Over all devices and micro-batches."""
    run = recipe.run
    return run.per_device_train_batch_size * run.gradient_accumulation_steps * run.world_size


def steps_of(recipe: Recipe, data: RunData) -> int:
    """Steps of the run: `max_steps`, or as many as `num_train_epochs` take.

    Raises:
        ValueError: there are no rows, or too few where each is seen once.
    """
    run, batch, rows = recipe.run, rows_in_a_step(recipe), len(data.train)
    if not rows:
        raise ValueError("There are no rows to train on.")
    steps = run.max_steps if run.max_steps > 0 else math.ceil(run.num_train_epochs * rows / batch)
    if recipe.data.data_order == "sequential" and steps * batch > rows:
        raise ValueError(f"data_order=sequential sees each row once: {rows} rows are no {steps} steps of {batch}.")
    return steps


def check_plan(recipe: Recipe, data: RunData) -> None:
    """What can be told of steps, evaluation and memory before anything is embedded.

    Raises:
        ValueError: too few rows, nothing to evaluate on, or shares of sources that the rows have not.
    """
    steps_of(recipe, data)
    if recipe.run.eval_strategy != "no" and not len(data.held_out) and recipe.data.eval_audio is None:
        raise ValueError("eval_strategy is set, but there is nothing to evaluate on: set held_out or eval_audio.")
    if shares := recipe.memory.memory_shares:
        check_shares(shares, set(data.examples.unique("source")))


def embed_rows(recipe: Recipe, data: RunData, clap: ClapEncoder, cache_dir: Path, ranks: Ranks) -> None:
    """Finds or computes the embedding of every row, and of the labels of hard prompts."""
    arguments = recipe.data
    by_audio = arguments.supervision == "audio"
    data.cache = (audio_cache if by_audio else text_cache)(cache_dir, clap, arguments.embeddings_dtype)
    audio_dir = Path(arguments.audio_dir) if by_audio else None
    data.cache_rows = embed_examples(data.examples, clap, data.cache, audio_dir, ranks, arguments.truncate_texts)
    if data.hard_prompts is not None:
        # From the cache, so that all ranks and every resumed run have the same to the last bit.
        labels, cache = data.hard_prompts.labels, text_cache(cache_dir, clap, arguments.embeddings_dtype)
        rows = embed_texts(labels, clap, cache, ranks, arguments.truncate_texts)
        data.nearest_labels = NearestLabels(labels, torch.from_numpy(cache.embeddings(rows)))


__all__ = [
    "RunData",
    "check_files",
    "check_plan",
    "embed_rows",
    "leave_out_unusable_rows",
    "read_hard_prompts",
    "read_rows",
    "rows_in_a_step",
    "steps_of",
]

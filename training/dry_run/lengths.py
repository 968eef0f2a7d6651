"""How long a mixture's rows are: measured where they are on this machine, and else assumed."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from training.audiotia.examples import Example
from training.audiotia.mixture import Mixture
from training.collator import MatsCollator
from training.dry_run.report import RowLengths
from training.language_side import make_processor, train_tokenizer
from training.recipe import Recipe

# Rows that are read and rows of them whose tokens are counted, over all sources.
SCANNED_ROWS, COUNTED_ROWS = 128_000, 4_000
# What a row is taken to hold beside the audio positions where none can be looked at: many times a caption, and more
# than most of the long open-ended answers.
ASSUMED_TEXT_TOKENS = 120
ASSUMED_ANSWER_TOKENS = 80


def measure_lengths(recipe: Recipe) -> tuple[RowLengths, int | None]:
    """Lengths of the mixture's rows and the size of the vocabulary; assumed, and `None`, where they are not here."""
    audio = recipe.model.num_audio_tokens
    assumed = partial(RowLengths, audio + ASSUMED_TEXT_TOKENS, audio + ASSUMED_TEXT_TOKENS, ASSUMED_ANSWER_TOKENS)
    assumption = (
        f"assumed, not measured: {audio} of audio, {ASSUMED_TEXT_TOKENS} of text, {ASSUMED_ANSWER_TOKENS} of them "
        "answer; "
    )
    if recipe.data.data_dir is None:
        return assumed(f"{assumption}no data_dir is given"), None
    mixture = Mixture.load(recipe.data.mixture, recipe.mixture_dir)
    folder = Path(recipe.data.data_dir)
    mixture.check(folder)
    rows = None
    if recipe.run.max_steps <= 0:
        rows = sum(1 for _ in itertools.islice(mixture.examples(folder), recipe.data.max_examples))
        rows = max(rows - recipe.data.held_out, 0)
    # Each by itself: they follow one another, and their lengths differ.
    alone = [replace(mixture, sources=(source,)) for source in mixture.sources]
    scanned, counted = (math.ceil(number / len(alone)) for number in (SCANNED_ROWS, COUNTED_ROWS))
    sources = [spread(itertools.islice(source.examples(folder), scanned), counted) for source in alone]
    sources = [examples for examples in sources if examples]
    if not sources:
        raise ValueError("The mixture has not a single row.")
    name = recipe.model.language_model
    if name is None:
        turns = (turn for examples in sources for example in examples for turn in example.turns)
        texts = (text for turn in turns for text in (turn.instruction, " " + turn.answer))
        tokenizer = train_tokenizer(texts, recipe.model.new_vocab_size)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        except OSError:
            return assumed(f"{assumption}the tokenizer of {name} is not on this machine", rows), None
    processor = make_processor(recipe.model, tokenizer)
    counts = [row_lengths(examples, MatsCollator(processor)) for examples in sources]
    lengths = RowLengths(
        mean=float(np.mean([totals.mean() for totals, _ in counts])),
        longest=max(math.ceil(np.percentile(totals, 99)) for totals, _ in counts),
        answer=max(math.ceil(np.percentile(answers, 99)) for _, answers in counts),
        origin=f"measured on {sum(map(len, sources)):,} rows, spread over the first {scanned:,} of each source",
        rows=rows,
    )
    return lengths, len(processor.tokenizer) if name is not None else None


def spread(examples: Iterable[Example], count: int) -> list[Example]:
    """Some of the examples, in even distances from the first on: all, where there are at most `2 * count`, and else
    between `count` and twice as many."""
    kept, distance = [], 1
    for number, example in enumerate(examples):
        if number % distance == 0:
            kept.append(example)
        if len(kept) > 2 * count:
            kept, distance = kept[::2], 2 * distance
    return kept


def row_lengths(
    examples: Sequence[Example], collator: MatsCollator, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and labelled positions of each example, `(examples,)` both, as the collator makes them."""
    totals, answers = [], []
    for start in range(0, len(examples), batch_size):
        rows = [
            {
                "text_embeds": torch.ones(1),  # of any width: it takes the same positions
                "instruction": example.instruction,
                "answer": example.answer,
                "further_turns": [turn._asdict() for turn in example.further_turns],
            }
            for example in examples[start : start + batch_size]
        ]
        batch = collator(rows)
        totals.append(batch["attention_mask"].sum(1).numpy())
        answers.append((batch["labels"] != -100).sum(1).numpy())
    return np.concatenate(totals), np.concatenate(answers)

"""Rows that cannot be trained on: one of them would end a run at whatever step it came, or spoil it in silence."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from processing_mats import MatsProcessor
from training.collator import conversation
from training.rows import lengths_of

ROWS_AT_A_TIME = 10_000
# Positions of a chat template are counted in its bytes, which are more, and for this many turns.
TURNS_ALLOWED_FOR = 8


def find_unusable_rows(examples: Dataset, processor: MatsProcessor, refuse: bool = True) -> tuple[np.ndarray, Counter]:
    """Rows that take more positions than the language model has, and rows with special tokens in their texts, which
    would be taken for the tokens themselves: an end in the middle of an answer, a sound where there is none.

    Args:
        examples (`Dataset`): with the columns of AudioTIA and `length`, in characters.
        processor (`MatsProcessor`): its `max_positions` is the limit; with `None` no row is too long.
        refuse (`bool`): raise if there are any, rather than leave them to the caller.

    Returns:
        Indices, ascending, and how many there are for each reason.

    Raises:
        ValueError: there are such rows; it quotes the first.
    """
    added = processor.tokenizer.added_tokens_decoder.values()
    tokens = {*processor.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    special = with_special_tokens(examples, sorted(tokens))
    long = np.setdiff1d(too_long(examples, processor), special)
    found = np.union1d(special, long).astype(np.int64)
    reasons = Counter({"special tokens": len(special), "too long": len(long)})
    if refuse and len(found):
        row = examples[int(found[0])]
        parts = []
        if len(special):
            parts.append(f"{len(special)} rows hold special tokens of the language model in their texts")
        if len(long):
            parts.append(
                f"{len(long)} rows take more than the {processor.max_positions} positions of the language model"
            )
        raise ValueError(
            f"{'; '.join(parts)}. The first asks {row['instruction']!r:.60} and answers {row['answer']!r:.60}. "
            "Nothing is cut; --unusable_rows drop leaves them out."
        )
    return found, reasons


def with_special_tokens(examples: Dataset, tokens: list[str]) -> np.ndarray:
    """Indices of rows in whose questions or answers one of the tokens occurs."""
    found = np.zeros(len(examples), dtype=bool)
    for start in range(0, len(examples), ROWS_AT_A_TIME):
        table = examples.with_format("arrow")[start : start + ROWS_AT_A_TIME]
        turns = table["further_turns"].combine_chunks()
        parents, fields = pc.list_parent_indices(turns), pc.list_flatten(turns)
        for token in tokens:
            for name in ("instruction", "answer"):
                found[start : start + len(table)] |= pc.match_substring(table[name], token).to_numpy()
                hits = pc.match_substring(pc.struct_field(fields, name), token)
                found[start + np.unique(parents.filter(hits).to_numpy(zero_copy_only=False)).astype(np.int64)] = True
    return np.flatnonzero(found)


def too_long(examples: Dataset, processor: MatsProcessor) -> np.ndarray:
    """Indices of rows that take more positions than the language model has, audio positions included."""
    if processor.max_positions is None:
        return np.empty(0, dtype=np.int64)
    template = processor.apply_chat_template(conversation({"text_embeds": (), "instruction": "", "answer": ""}))
    beside = TURNS_ALLOWED_FOR * len(template.encode()) + processor.num_audio_tokens
    # A token is at least one byte, and a character at most four: most rows need not be looked at, and of the others
    # most need not be tokenised.
    suspects = np.flatnonzero(4 * lengths_of(examples).astype(np.int64) + beside > processor.max_positions)
    found = [
        index
        for start in range(0, len(suspects), ROWS_AT_A_TIME)
        for index in _long_ones(examples, suspects[start : start + ROWS_AT_A_TIME], processor, beside)
    ]
    return np.array(found, dtype=np.int64)


def _long_ones(examples: Dataset, indices: np.ndarray, processor: MatsProcessor, beside: int) -> list[int]:
    found = []
    for index, row in zip(indices.tolist(), examples.select(indices), strict=True):
        size = sum(len(text.encode()) for turn in _turns(row) for text in (turn["instruction"], turn["answer"]))
        if size + beside <= processor.max_positions:
            continue
        text = processor.apply_chat_template(conversation({**row, "text_embeds": ()}))
        # The sound is one token here.
        if len(processor.tokenizer(text)["input_ids"]) + processor.num_audio_tokens - 1 > processor.max_positions:
            found.append(index)
    return found


def _turns(row: Mapping[str, Any]) -> list[Mapping[str, str]]:
    return [row, *(row.get("further_turns") or ())]


__all__ = ["find_unusable_rows", "too_long", "with_special_tokens"]

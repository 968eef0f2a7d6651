"""Rows that take more positions than the language model has: one of them would end a run at whatever step it came."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from processing_mats import MatsProcessor
from training.collator import conversation
from training.rows import lengths_of

logger = logging.getLogger(__name__)

ROWS_AT_A_TIME = 10_000
# Positions of a chat template are counted in its bytes, which are more, and for this many turns.
TURNS_ALLOWED_FOR = 8


def find_long_rows(examples: Dataset, processor: MatsProcessor, refuse: bool = True) -> np.ndarray:
    """Indices of the rows that are too long, audio positions included.

    Args:
        examples (`Dataset`): with the columns of AudioTIA and `length`, in characters.
        processor (`MatsProcessor`): its `max_positions` is the limit; with `None` no row is too long.
        refuse (`bool`): raise if there are any, rather than leave them to the caller.

    Raises:
        ValueError: there are such rows; it quotes the first.
    """
    none = np.empty(0, dtype=np.int64)
    if processor.max_positions is None:
        return none
    template = processor.apply_chat_template(conversation({"text_embeds": (), "instruction": "", "answer": ""}))
    beside = TURNS_ALLOWED_FOR * len(template.encode()) + processor.num_audio_tokens
    # A token is at least one byte, and a character at most four: most rows need not be looked at, and of the others
    # most need not be tokenised.
    suspects = np.flatnonzero(4 * lengths_of(examples).astype(np.int64) + beside > processor.max_positions)
    long = [
        index
        for start in range(0, len(suspects), ROWS_AT_A_TIME)
        for index in _long_ones(examples, suspects[start : start + ROWS_AT_A_TIME], processor, beside)
    ]
    if not long:
        return none
    message = f"{len(long)} rows take more than the {processor.max_positions} positions of the language model"
    if refuse:
        answer = examples[long[0]]["answer"]
        raise ValueError(
            f"{message}; the first has the answer {answer!r:.60}. Nothing is cut; --long_rows drop leaves them out."
        )
    logger.warning("%s and are left out.", message)
    return np.array(long)


def _long_ones(examples: Dataset, indices: np.ndarray, processor: MatsProcessor, beside: int) -> list[int]:
    found = []
    for index, row in zip(indices.tolist(), examples.select(indices), strict=True):
        size = sum(len(text.encode()) for turn in _turns(row) for text in (turn["instruction"], turn["answer"]))
        if size + beside <= processor.max_positions:
            continue
        text = processor.apply_chat_template(conversation({**row, "text_embeds": ()}))
        ids = processor.tokenizer(text)["input_ids"]
        if len(ids) + processor.num_audio_tokens - 1 > processor.max_positions:
            found.append(index)
    return found


def _turns(row: Mapping[str, Any]) -> list[Mapping[str, str]]:
    return [row, *(row.get("further_turns") or ())]


__all__ = ["find_long_rows"]

"""Batches for the stock `Trainer`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from processing_mats.processing_mats import MatsProcessor


@dataclass
class MatsCollator:
    """Rows of `text_embeds` and `turns` to model inputs with labels on the answers only.

    The prompt is built by the processor's chat template, as at inference. Neither CLAP nor Santa runs: the embeddings
    are cached, and they lie on the text side already.
    """

    processor: MatsProcessor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        for row in rows:
            if missing := {"text_embeds", "turns"} - set(row):
                raise ValueError(
                    f"A training row has the columns {sorted(row)}, but lacks {' and '.join(sorted(missing))}. With a "
                    "Trainer, pass TrainingArguments(remove_unused_columns=False)."
                )
        conversations = [conversation(row["text_embeds"], row["turns"]) for row in rows]
        return dict(self.processor.apply_chat_template(conversations, tokenize=True, return_labels=True, santa=False))


def conversation(embeds: Any, turns: Sequence[Mapping[str, str]]) -> list[dict]:
    """Turns of `instruction` and `answer` about one embedded sound or description, as chat messages."""
    if not turns:
        raise ValueError("A training row has no turns, expected at least one instruction with its answer.")
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": turn["instruction"]}]})
        messages.append({"role": "assistant", "content": turn["answer"]})
    messages[0]["content"].insert(0, {"type": "audio", "audio_embeds": embeds})
    return messages


__all__ = ["MatsCollator", "conversation"]

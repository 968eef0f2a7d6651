"""Batches for the stock `Trainer`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from processing_mats.processing_mats import MatsProcessor


@dataclass
class MatsCollator:
    """Rows of `text_embeds`, `instruction` and `answer` to model inputs with labels on the answers only.

    Rows may have `further_turns`, a list of `{"instruction", "answer"}`, which are learnt from as well, and a
    `noise_seed`, from which the model draws the row's noise. The prompt is built by the processor's chat template, as
    at inference. Neither CLAP nor Santa runs: the embeddings are cached, and they lie on the text side already.
    """

    processor: MatsProcessor

    NEEDED = ("text_embeds", "instruction", "answer")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        for row in rows:
            if missing := [name for name in self.NEEDED if name not in row]:
                raise ValueError(
                    f"A training row has the columns {sorted(row)}, but lacks {' and '.join(missing)}. With a Trainer, "
                    "pass TrainingArguments(remove_unused_columns=False)."
                )
        conversations = [conversation(row) for row in rows]
        batch = dict(self.processor.apply_chat_template(conversations, tokenize=True, return_labels=True, santa=False))
        if all("noise_seed" in row for row in rows):
            batch["noise_seeds"] = torch.tensor([[row["noise_seed"]] for row in rows])
        return batch


def conversation(row: Mapping[str, Any]) -> list[dict]:
    """A row as chat messages: questions about one embedded sound or description, with their answers."""
    messages = []
    for turn in (row, *(row.get("further_turns") or ())):
        messages.append({"role": "user", "content": [{"type": "text", "text": turn["instruction"]}]})
        messages.append({"role": "assistant", "content": turn["answer"]})
    messages[0]["content"].insert(0, {"type": "audio", "audio_embeds": row["text_embeds"]})
    return messages


__all__ = ["MatsCollator", "conversation"]

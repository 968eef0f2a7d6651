"""Batches for the stock `Trainer`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from processing_mats.processing_mats import MatsProcessor


@dataclass
class MatsCollator:
    """Rows of `text_embeds`, `instruction` and `answer` to model inputs with labels on the answers only.

    The prompt is built by the processor's chat template, as at inference. Neither CLAP nor Santa runs: the embeddings
    are cached, and they lie on the text side already.
    """

    processor: MatsProcessor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "audio", "audio_embeds": row["text_embeds"]},
                        {"type": "text", "text": row["instruction"]},
                    ],
                },
                {"role": "assistant", "content": row["answer"]},
            ]
            for row in rows
        ]
        return dict(self.processor.apply_chat_template(conversations, tokenize=True, return_labels=True, santa=False))


__all__ = ["MatsCollator"]

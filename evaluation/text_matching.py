"""Classification of generated answers by text matching: the label whose text lies nearest to the answer's.

The paper's protocol for every classification benchmark (section 4). A text encoder embeds the answer set and the
model's answers; the nearest label is the prediction.
"""

from collections.abc import Callable, Sequence

import torch

NO_MATCH = -1


class TextMatcher:
    """Matches answers to a fixed set of labels.

    Args:
        labels (`Sequence[str]`): the answer set.
        encode (`Callable`): texts to L2-normalised embeddings `(texts, dim)`; a CLAP's or any sentence encoder's.
    """

    def __init__(self, labels: Sequence[str], encode: Callable[[list[str]], torch.Tensor]):
        if not labels:
            raise ValueError("labels is empty, expected at least one.")
        if len(set(labels)) < len(labels):
            raise ValueError("labels holds one label twice.")
        self.labels = list(labels)
        self.encode = encode
        self.label_embeds = encode(self.labels)

    def scores(self, answers: Sequence[str]) -> torch.Tensor:
        """Cosines `(answers, labels)`; 0 throughout for an empty answer."""
        scores = torch.zeros(len(answers), len(self.labels))
        # Small models repeat themselves: each different answer is encoded once.
        different = list(dict.fromkeys(answer for answer in answers if answer.strip()))
        if different:
            rows = dict(zip(different, self.encode(different) @ self.label_embeds.T, strict=True))
            for index, answer in enumerate(answers):
                if answer.strip():
                    scores[index] = rows[answer]
        return scores

    def match(self, answers: Sequence[str]) -> list[int]:
        """Index of the nearest label of each answer; of equally near ones the first; `NO_MATCH` for an empty answer."""
        nearest = self.scores(answers).argmax(1).tolist()
        return [index if answer.strip() else NO_MATCH for index, answer in zip(nearest, answers, strict=True)]


__all__ = ["NO_MATCH", "TextMatcher"]

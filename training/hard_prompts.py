"""Hard prompts: the names of the labels that lie nearest in CLAP's space, written in front of the question.

    Labels: dog bark, rooster, rain. What is making this sound?

PromptAAC's way over the modality gap (Zhang et al., "Zero-Shot Audio Captioning Using Soft and Hard Prompts", 2024),
with which the paper compares Santa. Labels are embedded by CLAP's text tower. In training the nearest ones are
found from the noisy embedding of the text, at inference from the embedding of the sound: names are of no modality.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from transformers import PreTrainedTokenizerBase

from modeling_mats.modeling_mats import MatsNoise
from processing_mats import ClapEncoder

# Similarities that differ by less are equal, and the label that is named first comes first: the last bits of a product
# of matrices depend on how many rows are in it.
DECIMALS = 9
TABLES = (".csv", ".tsv", ".jsonl")


def with_hard_prompt(instruction: str, labels: Sequence[str]) -> str:
    """The instruction behind the names of labels, nearest first; in training and at inference alike.

    Raises:
        ValueError: no labels.
    """
    if not labels:
        raise ValueError("A hard prompt needs at least one label.")
    return f"Labels: {', '.join(labels)}. {instruction}"


class NearestLabels:
    """Finds the labels that lie nearest to embeddings, by cosine.

    Args:
        labels (sequence of `str`): names, each once.
        label_embeds (`torch.Tensor` of shape `(len(labels), dim)`): CLAP's text embeddings of the names.

    Raises:
        ValueError: no labels, one that occurs twice, or embeddings of another shape or without a direction.
    """

    def __init__(self, labels: Sequence[str], label_embeds: torch.Tensor):
        check_labels(labels, "The list of labels")
        if label_embeds.ndim != 2 or len(label_embeds) != len(labels):
            raise ValueError(
                f"label_embeds has shape {tuple(label_embeds.shape)}, expected ({len(labels)}, dim): a row per label."
            )
        self.labels = tuple(labels)
        self._directions = _directions(label_embeds, "label_embeds")  # (labels, dim)

    @classmethod
    def build(cls, labels: Sequence[str], clap: ClapEncoder) -> "NearestLabels":
        """Embeds the names as they are, without a sentence around them."""
        return cls(labels, clap.encode_text(labels))

    def of(self, embeds: torch.Tensor, count: int) -> list[list[str]]:
        """The `count` nearest labels of each embedding, nearest first, whatever is in the batch with it.

        Args:
            embeds (`torch.Tensor` of shape `(rows, dim)`): of sounds or texts, of any length but zero.
            count (`int`): at most the number of labels.

        Raises:
            ValueError: `count` is out of range, or the embeddings are of another shape or without a direction.
        """
        if not 1 <= count <= len(self.labels):
            raise ValueError(f"count is {count}, expected from 1 to {len(self.labels)}, the number of labels.")
        dim = self._directions.shape[1]
        if embeds.ndim != 2 or embeds.shape[1] != dim:
            raise ValueError(f"embeds has shape {tuple(embeds.shape)}, expected (rows, {dim}).")
        cosines = (_directions(embeds, "embeds") @ self._directions.T).round(decimals=DECIMALS)  # (rows, labels)
        order = cosines.argsort(dim=1, descending=True, stable=True)[:, :count]
        return [[self.labels[index] for index in row] for row in order.tolist()]


@dataclass(frozen=True)
class HardPrompts:
    """What a recipe says of its prompts, before CLAP is there.

    Attributes:
        labels (`tuple[str, ...]`): all that may be named.
        count (`int`): how many of them are, in each prompt.
    """

    labels: tuple[str, ...]
    count: int

    @classmethod
    def read(cls, settings: Mapping[str, Any], base_dir: Path) -> "HardPrompts":
        """From the recipe's `hard_prompts`, the labels' file relative to `base_dir`.

        Raises:
            FileNotFoundError, ValueError: see [`read_labels`]; or more are to be named than there are.
        """
        path, count = Path(base_dir) / settings["labels"], settings["count"]
        labels = read_labels(path)
        if not 1 <= count <= len(labels):
            raise ValueError(f"hard_prompts names {count} labels in each prompt, but {path} has {len(labels)}.")
        return cls(tuple(labels), count)

    @property
    def key(self) -> str:
        """A hash of labels and count, by which a resumed run knows that its prompts are the same."""
        return hashlib.sha256(json.dumps([self.labels, self.count]).encode()).hexdigest()[:24]

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises `ValueError` for labels that hold special tokens of the language model, which would be taken for the
        tokens themselves."""
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        tokens = {*tokenizer.all_special_tokens, *added}
        if found := [label for label in self.labels if any(token in label for token in tokens)]:
            raise ValueError(
                f"{len(found)} labels of hard_prompts hold special tokens of the language model, such as {found[0]!r}."
            )

    def longest(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens of the longest possible prompt, that of the labels with the most tokens."""

        def tokens(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        return tokens(with_hard_prompt("", sorted(self.labels, key=lambda label: -tokens(f" {label},"))[: self.count]))

    def in_turn(self) -> Iterator[list[str]]:
        """The labels of one prompt after another, each label as often as any other, for ever."""
        names = itertools.cycle(self.labels)
        while True:
            yield list(itertools.islice(names, self.count))


class RowPrompts:
    """Instructions of a run's rows behind their labels.

    Args:
        nearest (`NearestLabels`), count (`int`): see [`NearestLabels.of`].
        noise_variance (`float`): of the noise in which the labels are found; 0 for rows that are evaluated on.
    """

    def __init__(self, nearest: NearestLabels, count: int, noise_variance: float = 0.0):
        self.nearest = nearest
        self.count = count
        # The model's own: of the same seeds, it makes the direction that the mapper is to see.
        self.noise = MatsNoise(noise_variance, renormalize=False).train()

    def __call__(self, instructions: Sequence[str], embeds: torch.Tensor, noise_seeds: Sequence[int]) -> list[str]:
        """
        Args:
            instructions (sequence of `str`): of the first turns.
            embeds (`torch.Tensor` of shape `(rows, dim)`): CLAP's, without noise.
            noise_seeds (sequence of `int`): the rows' own, by which the model draws its noise as well.
        """
        found = self.nearest.of(self.noise(embeds, torch.tensor(noise_seeds)), self.count)
        return [with_hard_prompt(text, labels) for text, labels in zip(instructions, found, strict=True)]


def read_labels(path: Path) -> list[str]:
    """The labels of a file, in its order.

    Args:
        path (`Path`): a text file with a label on each line; or YAML or JSON, a list of labels or a mapping from them.
            Of a file like `training/mats_tiny/descriptions.yaml` the labels are those it describes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another format, or holds no label, one twice, or one that is no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No such file of labels: {path}")
    kind = path.suffix.lower()
    if kind in TABLES:
        raise ValueError(f"{path} is a table, expected labels as text, one a line, or as YAML or JSON.")
    try:
        content: Any = path.read_text(encoding="utf-8-sig")
        if kind == ".json":
            content = json.loads(content)
        elif kind in (".yaml", ".yml"):
            content = yaml.safe_load(content)
        else:
            content = [line.strip() for line in content.splitlines() if line.strip()]
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("descriptions"), Mapping):
        content = content["descriptions"]
    if content is not None and not isinstance(content, (list, Mapping)):
        raise ValueError(f"{path} holds {content!r:.80}, expected a list of labels or a mapping from them.")
    labels = list(content or ())
    check_labels(labels, str(path))
    return labels


def check_labels(labels: Sequence[Any], where: str) -> None:
    """Raises `ValueError` if there are no labels, one is no text or empty, or one comes twice."""
    if not len(labels):
        raise ValueError(f"{where} holds no label.")
    for label in labels:
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"{where} holds the label {label!r:.80}, expected a text; YAML may want it in quotes.")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"{where} holds the label {twice!r} more than once.")


def _directions(embeds: torch.Tensor, name: str) -> torch.Tensor:
    """`(rows, dim)` in float64 on the CPU, L2-normalised."""
    embeds = embeds.detach().cpu().double()
    lengths = embeds.norm(dim=-1)
    if not (lengths.isfinite() & (lengths > 0)).all():
        raise ValueError(f"{name} holds rows that are zero, NaN or infinite.")
    return F.normalize(embeds, dim=-1)


__all__ = ["HardPrompts", "NearestLabels", "RowPrompts", "check_labels", "read_labels", "with_hard_prompt"]

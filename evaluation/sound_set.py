"""Held-out clips, what they are, and how well answers about them fit."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evaluation.label_folder import OPEN_QUESTION, names_source
from evaluation.metrics.cider_d import cider_d
from evaluation.metrics.ptb import ptb_tokenize
from evaluation.text_matching import TextMatcher
from processing_mats import ClapEncoder
from processing_mats.pipeline_mats import CLASSIFY_INSTRUCTION
from training.audiotia.templates import CAPTION
from training.clap_data import Clip, Descriptions
from training.evaluate_clap import embed_labels


@dataclass(frozen=True)
class SoundSet:
    """Clips with their place among candidate labels.

    Attributes:
        clips: one label each.
        labels: candidate labels; synonyms are one.
        truth: index of each clip's label.
        open (`bool`): whether it is asked what makes the sound, without candidates.
        captions (`bool`): whether the clips' captions are asked for as well.
        unread: places of the clips whose caption is no text that was trained on. A short caption such as "A cow moos."
            easily is, and then a model that knows it by heart is right.
    """

    clips: Sequence[Clip]
    labels: Sequence[str]
    truth: Sequence[int]
    open: bool
    captions: bool
    unread: Sequence[int] = ()

    @classmethod
    def make(cls, clips: Sequence[Clip], descriptions: Descriptions, described: bool, captions: bool) -> "SoundSet":
        """Candidates are the labels of the clips, or with `described` all that have descriptions. The open question is
        for the former: by which words a person would name each of two hundred sources is not written down anywhere.

        Raises:
            ValueError: no clips, a label without descriptions, or captions are wanted and one is missing.
        """
        if not clips:
            raise ValueError("There are no clips to ask about.")
        if captions and (silent := [clip.path.name for clip in clips if not clip.caption]):
            raise ValueError(f"{len(silent)} clips have no caption, the first is {silent[0]}.")
        own = {descriptions.concept(clip.label): clip.label for clip in clips}
        names = {c: own.get(c, c) for c in descriptions.concepts} if described else own
        places = {concept: place for place, concept in enumerate(names)}
        truth = [places[descriptions.concept(clip.label)] for clip in clips]
        return cls(clips, list(names.values()), truth, not described, captions)

    def without_read_captions(self, texts: Iterable[str]) -> "SoundSet":
        """The same with `unread`, given everything that was trained on. Texts are compared by their words."""
        if not self.captions:
            return self
        read = {ptb_tokenize(text) for text in texts}
        return replace(self, unread=[i for i, clip in enumerate(self.clips) if ptb_tokenize(clip.caption) not in read])

    def questions(self) -> list[str]:
        """What is asked about every clip."""
        return [CLASSIFY_INSTRUCTION] + [OPEN_QUESTION] * self.open + [CAPTION] * self.captions

    def score(self, answers: dict[str, Sequence[str]], matcher: TextMatcher) -> dict[str, float]:
        """`matched` (text matching among `labels`), `named` (the open answer holds the source's name), and against the
        one caption of each clip `cider_d_all` and, of the clips with an unread caption alone, `cider_d`; as far as they
        are asked for."""
        predicted = matcher.match(answers[CLASSIFY_INSTRUCTION])
        scores = {"matched": _mean(p == t for p, t in zip(predicted, self.truth, strict=True))}
        if self.open:
            pairs = zip(answers[OPEN_QUESTION], self.clips, strict=True)
            scores["named"] = _mean(names_source(answer, clip.label) for answer, clip in pairs)
        if self.captions:
            given = answers[CAPTION]
            for score, places in (("cider_d", self.unread), ("cider_d_all", range(len(self.clips)))):
                if len(places):
                    references = [[self.clips[place].caption] for place in places]
                    scores[score] = cider_d([given[place] for place in places], references).score
        return scores

    def matcher(self, clap: ClapEncoder) -> TextMatcher:
        """By CLAP's own text tower, as the pipeline's `candidate_labels`."""
        return TextMatcher(self.labels, lambda texts: clap.encode_text(texts, truncation=True))

    def zero_shot(self, embeds: torch.Tensor, clap: ClapEncoder) -> dict[str, float]:
        """CLAP alone, without a language model: whether the right label is the nearest, or among the nearest five."""
        scores = embeds @ embed_labels(clap, self.labels).T
        order = scores.topk(min(5, len(self.labels))).indices.tolist()
        return {
            "clap_top1": _mean(row[0] == t for row, t in zip(order, self.truth, strict=True)),
            "clap_top5": _mean(t in row for row, t in zip(order, self.truth, strict=True)),
            "chance": 1 / len(self.labels),
        }


def check_unheard(clips: Sequence[Clip], sounds: Path, credits: Path) -> None:
    """Raises `ValueError` where a CLAP was trained on one of the clips, by its `credits.csv`."""
    with credits.open(newline="", encoding="utf-8") as file:
        heard = {row["file_name"] for row in csv.DictReader(file)}
    if known := [name for clip in clips if (name := clip.path.relative_to(sounds).as_posix()) in heard]:
        raise ValueError(f"CLAP was trained on {len(known)} of the clips, the first is {known[0]}: {credits} lists it.")


def _mean(values: Iterable[bool]) -> float:
    values = list(values)
    return sum(values) / len(values)


__all__ = ["SoundSet", "check_unheard"]

"""Held-out clips and the scores of answers about them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from evaluation.label_folder import OPEN_QUESTION
from evaluation.sound_set import SoundSet, check_unheard
from evaluation.text_matching import TextMatcher
from processing_mats.pipeline_mats import CLASSIFY_INSTRUCTION
from training.audiotia.templates import CAPTION
from training.clap_data import Clip, Descriptions

SOUNDS = Path("sounds")
TEXTS = {"dog": ["A dog."], "dog bark": ["A bark."], "rain": ["Rain."], "cow": ["A cow."], "harp": ["A harp."]}


def clip(name, label, caption=""):
    return Clip(SOUNDS / name, label, caption, "fold4", "CC0", "pack 1.0")


CLIPS = [
    clip("a.wav", "dog bark", "A dog barks."),
    clip("b.wav", "rain", "Rain falls on a roof."),
    clip("c.wav", "dog", "A dog growls."),
]


@pytest.fixture
def descriptions():
    return Descriptions(TEXTS, [["dog", "dog bark"]])


def hot(texts):
    """A text encoder that only sees which of a few words a text holds."""
    words = ["dog", "rain", "cow", "harp"]
    return F.normalize(torch.tensor([[1e-3 + (word in text.lower()) for word in words] for text in texts]), dim=-1)


def test_candidates_are_the_clips_own_labels_or_all_described(descriptions):
    own = SoundSet.make(CLIPS, descriptions, described=False, captions=False)
    assert len(own.labels) == 2  # dog and its bark are one
    assert own.truth[0] == own.truth[2] != own.truth[1]
    every = SoundSet.make(CLIPS, descriptions, described=True, captions=False)
    assert len(every.labels) == 4
    assert [every.labels[index] for index in every.truth] == ["dog", "rain", "dog"]


def test_what_cannot_be_asked_is_refused(descriptions):
    with pytest.raises(ValueError, match="no clips to ask about"):
        SoundSet.make([], descriptions, described=False, captions=False)
    with pytest.raises(ValueError, match=r"1 clips have no caption, the first is d\.wav"):
        SoundSet.make([*CLIPS, clip("d.wav", "cow")], descriptions, described=False, captions=True)
    with pytest.raises(ValueError, match="'whale' has no descriptions"):
        SoundSet.make([clip("e.wav", "whale")], descriptions, described=False, captions=False)


def test_scores_are_of_the_answers(descriptions):
    sounds = SoundSet.make(CLIPS, descriptions, described=False, captions=True)
    assert sounds.questions() == [CLASSIFY_INSTRUCTION, OPEN_QUESTION, CAPTION]
    right = {
        CLASSIFY_INSTRUCTION: ["dog", "rain", "rain"],  # the third is wrong
        OPEN_QUESTION: ["A barking dog.", "It is raining.", "A cat."],
        CAPTION: [c.caption for c in CLIPS],
    }
    scores = sounds.score(right, TextMatcher(sounds.labels, hot))
    assert scores["matched"] == pytest.approx(2 / 3)
    assert scores["named"] == pytest.approx(2 / 3)
    assert scores["cider_d_all"] > 5
    assert "cider_d" not in scores  # which captions were read is not known
    wrong = {**right, CLASSIFY_INSTRUCTION: ["", "dog", "rain"], CAPTION: ["Nothing."] * 3}
    scores = sounds.score(wrong, TextMatcher(sounds.labels, hot))
    assert scores["matched"] == 0
    assert scores["cider_d_all"] == 0


def test_captions_that_were_trained_on_are_told_apart(descriptions):
    made = SoundSet.make(CLIPS, descriptions, described=False, captions=True)
    sounds = made.without_read_captions(["a dog barks", "Rain falls."])
    assert list(sounds.unread) == [1, 2]  # the words count, not the full stop
    answers = {key: ["A dog barks.", "Nothing.", "Nothing."] for key in sounds.questions()}
    scores = sounds.score(answers, TextMatcher(sounds.labels, hot))
    assert scores["cider_d"] == 0 < scores["cider_d_all"]
    silent = SoundSet.make(CLIPS, descriptions, described=False, captions=False)
    assert silent.without_read_captions(["Rain falls."]) is silent


def test_clap_alone_is_measured_with_its_chance(descriptions):
    class Clap:
        def encode_text(self, texts, truncation=False):
            return hot(texts)

    sounds = SoundSet.make(CLIPS, descriptions, described=True, captions=False)
    found = sounds.zero_shot(hot(["a dog", "a cow in the rain", "a harp"]), Clap())
    assert found["clap_top1"] == pytest.approx(2 / 3)
    assert found["clap_top5"] == 1  # four labels in all
    assert found["chance"] == 1 / 4


def test_clips_that_were_trained_on_are_found_by_the_credits(tmp_path):
    credits = tmp_path / "credits.csv"
    credits.write_text("file_name,label,licence,source\nz.wav,dog,CC0,x\n")
    check_unheard(CLIPS, SOUNDS, credits)
    credits.write_text("file_name,label,licence,source\nb.wav,rain,CC0,x\n")
    with pytest.raises(ValueError, match=r"trained on 1 of the clips, the first is b\.wav"):
        check_unheard(CLIPS, SOUNDS, credits)

"""Drawn examples: what is drawn, from what, and that the answers are true of the descriptions."""

import random
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

from training.audiotia.drawn import ExampleMaker, LabelTexts, count_labels, first_sentence, read_captions
from training.audiotia.mixture import Mixture
from training.music import Composer, Instruments

TINY = Path(__file__).parent.parent / "training" / "mats_tiny"
SHARES = dict.fromkeys(ExampleMaker.TASKS, 1.0)
SHARES_WITHOUT_PIECES = {task: share for task, share in SHARES.items() if task != "piece"}
CAPTIONS = {
    "audiocaps": ["A man speaks while a dog barks", "Rain falls on a roof."],
    "musiccaps": ["A slow piano ballad. It is sad.", "Fast drums."],
}


@pytest.fixture(scope="module")
def labels():
    return LabelTexts.load(TINY / "descriptions.yaml", TINY / "questions.yaml")


@pytest.fixture(scope="module")
def composer(labels):
    return Composer(Instruments.from_yaml(TINY / "instruments.yaml"), labels.sources)


@pytest.fixture(scope="module")
def drawn(labels, composer):
    return list(ExampleMaker(labels, CAPTIONS, {"rain": 50}, SHARES, 3, composer).draw(7500))


class Asked(NamedTuple):
    """One turn of an example, by itself."""

    description: str
    instruction: str
    answer: str
    task: str
    source: str


@pytest.fixture(scope="module")
def examples(drawn):
    single = [example for example in drawn if example.task != "conversation"]
    assert all(len(example.turns) == 1 for example in single)
    return [Asked(e.description, *e.turns[0], e.task, e.source) for e in single]


def labels_of(description, labels):
    return {label for label, texts in labels.descriptions.items() if description in texts}


@pytest.fixture(scope="module")
def pairs_of(labels):
    """Finds the labels of which two descriptions, joined, are a given one."""
    first, second = defaultdict(set), defaultdict(set)
    for label, texts in labels.descriptions.items():
        for text in texts:
            first[text.rstrip(".")].add(label)
            second[text[0].lower() + text[1:]].add(label)

    def find(description):
        joints = re.finditer(" (?:and|while|as) ", description)
        return {
            (one, other)
            for joint in joints
            for one in first[description[: joint.start()]]
            for other in second[description[joint.end() :]]
        }

    return find


def test_every_label_has_a_noun_phrase_and_descriptions(labels):
    for label in labels.descriptions:
        assert sum(len(labels.descriptions[synonym]) for synonym in labels.synonyms(label)) >= 6, label
    assert set(labels.sources) == set(labels.descriptions)
    assert labels.music <= set(labels.descriptions)


def test_each_label_is_in_one_group(labels):
    assert Counter(label for group in labels.groups for label in group) == Counter(list(labels.descriptions))
    assert labels.synonyms("dog") == {"dog", "dog bark"}
    assert labels.synonyms("rooster") == {"rooster"}


def test_all_tasks_are_drawn(drawn):
    counts = Counter(example.task for example in drawn)
    assert set(counts) == set(SHARES)
    assert min(counts.values()) > 500


def test_the_same_seed_draws_the_same(labels, composer):
    def draw(seed):
        return list(ExampleMaker(labels, CAPTIONS, {}, SHARES, seed, composer).draw(200))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_label_answers_name_the_described_label(examples, labels):
    for example in examples:
        if example.task == "label":
            assert example.answer in labels_of(example.description, labels)


def test_yes_and_no_are_true(examples, labels):
    asked = [example for example in examples if example.task == "yes_no"]
    for example in asked:
        truths = labels_of(example.description, labels)
        names = set().union(*(labels.synonyms(label) for label in truths))
        phrases = {labels.sources[label] for label in names}
        in_question = any(f" {phrase}{end}" in example.instruction for phrase in phrases for end in ("?", " in "))
        assert example.answer.startswith("Yes" if in_question else "No"), example
    share = sum(example.answer.startswith("Yes") for example in asked) / len(asked)
    assert 0.4 < share < 0.6


def test_choices_offer_the_truth_once_and_no_synonym_of_it(examples, labels):
    for example in examples:
        if example.task == "choice":
            answer = example.answer.rstrip(".").lower()
            listed = example.instruction.lower()
            for words in ("which of these do you hear: ", "which of these is it: ", "is this ", "choose one: "):
                listed = listed.removeprefix(words)
            options = listed.rstrip("?.").replace(" or ", ", ").split(", ")
            assert options.count(answer) == 1
            truths = labels_of(example.description, labels)
            same = {labels.sources[s].lower() for label in truths for s in labels.synonyms(label)}
            assert not (same - {answer}) & set(options)


def test_labels_clap_has_heard_more_often_come_more_often(examples):
    counts = Counter(example.answer for example in examples if example.task == "label")
    assert counts["rain"] == max(counts.values())


def test_conversations_ask_two_or_three_questions_about_one_description(drawn, labels):
    conversations = [example for example in drawn if example.task == "conversation"]
    assert {len(example.turns) for example in conversations} == {2, 3}
    for example in conversations:
        phrases = {labels.sources[label] for label in labels_of(example.description, labels)}
        for instruction, answer in example.turns:
            if instruction in labels.questions["source"]:
                assert answer.rstrip(".").lower() in {phrase.lower() for phrase in phrases}


def test_pairs_are_named_by_both(examples, labels, pairs_of):
    asked = [example for example in examples if example.task == "two_sources" and example.source == "label pairs"]
    for example in asked:
        answers = set()
        for one, other in pairs_of(example.description):
            both = f"{labels.sources[one]} and {labels.sources[other]}."
            answers |= {f"{one}, {other}", both[0].upper() + both[1:]}
        assert example.answer in answers, example
    assert len(asked) > 500


def test_counts_are_true(examples, labels, pairs_of):
    found = Counter()
    for example in examples:
        if example.task == "count":
            assert example.instruction in labels.questions["count"]
            if example.source == "labels":
                told = {f"One, {labels.sources[label]}." for label in labels_of(example.description, labels)}
            else:
                pairs = pairs_of(example.description)
                told = {
                    f"Two, {labels.sources[one]} and {labels.sources[other]}."
                    for one, other in pairs
                    if other not in labels.synonyms(one)
                }
            assert example.answer in told, example
            found[example.answer.partition(",")[0]] += 1
    assert found.keys() == {"One", "Two"} and found["One"] == pytest.approx(found["Two"], rel=0.2)


class Recorder(Composer):
    """Keeps the pieces that it draws."""

    def draw(self, rng):
        self.pieces = [*getattr(self, "pieces", []), super().draw(rng)]
        return self.pieces[-1]


def test_answers_about_a_piece_are_true(labels, composer):
    recorder = Recorder(composer.instruments, composer.phrases)
    examples = list(ExampleMaker(labels, CAPTIONS, {}, {"piece": 1}, 4, recorder).draw(240))
    forms = Counter()
    for example, piece in zip(examples, recorder.pieces, strict=True):
        ways = {composer.tell(piece, random.Random(seed)) for seed in range(120)}
        assert example.description in ways
        assert (example.task, example.source, example.audio_type) == ("piece", "pieces", "music")
        # An instrument that plays both parts is named once.
        names = sorted(set(piece.labels), key=piece.labels.index)
        phrases = " and ".join(labels.sources[name] for name in names) + "."
        told = {"label": {", ".join(names)}, "source": {phrases[0].upper() + phrases[1:]}}
        told |= {"caption": ways, "music_caption": ways}
        (form,) = [form for form in told if example.instruction in labels.questions[form]]
        assert example.answer in told[form], example
        forms[form] += 1
        forms["in other words"] += form in ("caption", "music_caption") and example.answer != example.description
    assert min(forms[form] for form in ("label", "source", "caption", "music_caption")) > 40
    assert forms["in other words"] > 60


def test_pieces_need_instruments(labels):
    with pytest.raises(ValueError, match="The task piece needs instruments"):
        ExampleMaker(labels, CAPTIONS, {}, {"source": 1, "piece": 0.1}, seed=0)


def test_captions_answer_with_the_caption(examples):
    for example in examples:
        if example.task == "caption" and example.source == "audiocaps":
            assert example.answer.rstrip(".") == example.description.rstrip(".")
            assert example.answer.endswith(".")
        if example.task == "music_caption":
            assert example.answer in {"A slow piano ballad.", "Fast drums."}


def test_unknown_tasks_are_refused(labels):
    with pytest.raises(ValueError, match="Unknown tasks: captions"):
        ExampleMaker(labels, CAPTIONS, {}, {"captions": 1}, seed=0)


def test_labels_without_phrases_are_refused(tmp_path):
    (tmp_path / "d.yaml").write_text("descriptions: {dog: [A dog barks.], cat: [A cat.]}")
    (tmp_path / "q.yaml").write_text("questions: {}\nsources: {dog: a dog}\nmusic: []")
    with pytest.raises(ValueError, match="same labels: cat"):
        LabelTexts.load(tmp_path / "d.yaml", tmp_path / "q.yaml")


def test_captions_are_read_once_each(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text('id,caption\n1,"A dog, barking "\n2,Rain\n3,Rain\n4,\n')
    assert read_captions(path) == ["A dog, barking", "Rain"]
    with pytest.raises(ValueError, match=r"\['id', 'caption'\], expected one called 'text'"):
        read_captions(path, "text")


def test_labels_are_counted(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("label,group\ndog,a\ndog,b\nrain,a\n")
    assert count_labels(path) == {"dog": 2, "rain": 1}
    assert count_labels(path, exclude_groups=["b"]) == {"dog": 1, "rain": 1}


@pytest.mark.parametrize(
    ("text", "first"),
    [("One. Two.", "One."), ("Only one.", "Only one."), ("No stop", "No stop"), ("At 1.5 kHz. Then.", "At 1.5 kHz.")],
)
def test_first_sentence(text, first):
    assert first_sentence(text) == first


def test_music_is_told_from_sound(drawn, labels, pairs_of):
    for example in drawn:
        if example.task == "music_caption" or example.source in ("musiccaps", "pieces"):
            assert example.audio_type == "music"
        elif example.source == "audiocaps":
            assert example.audio_type == "sound"
        elif example.source == "label pairs":
            music = {set(pair) <= labels.music for pair in pairs_of(example.description)}
            assert example.audio_type in {"music" if both else "sound" for both in music}
        else:
            assert example.audio_type in {
                "music" if label in labels.music else "sound" for label in labels_of(example.description, labels)
            }


@pytest.fixture
def source(tmp_path):
    for name, captions in CAPTIONS.items():
        (tmp_path / f"{name}.csv").write_text("caption\n" + "".join(f"{caption}\n" for caption in captions))
    (tmp_path / "credits.csv").write_text("file,label\n" + "a.wav,rain\n" * 50)
    return {
        "reader": "drawn",
        "captions": {name: f"{name}.csv" for name in CAPTIONS},
        "descriptions": str(TINY / "descriptions.yaml"),
        "questions": str(TINY / "questions.yaml"),
        "counts": "credits.csv",
        "instruments": str(TINY / "instruments.yaml"),
        "held_out": 20,
        "stages": [{"count": 30, "shares": {"source": 1}}, {"count": 40, "shares": SHARES}],
    }


def test_held_out_examples_come_first_and_then_the_stages(source, labels, composer, tmp_path):
    mixture = Mixture.load({"sources": [source], "seed": 5}, tmp_path)
    mixture.check(tmp_path)
    examples = list(mixture.examples(tmp_path))
    assert len(examples) == 90
    assert {example.task for example in examples[20:50]} == {"source"}
    # The seeds are part of the recipe of a model that was trained: they stay.
    for start, number, count, shares in [(0, 0, 20, SHARES), (20, 1, 30, {"source": 1}), (50, 2, 40, SHARES)]:
        maker = ExampleMaker(labels, CAPTIONS, {"rain": 50}, shares, 5 * 3 + number, composer)
        assert list(maker.draw(count)) == examples[start : start + count]


def test_without_pieces_no_instruments_are_needed(source, tmp_path):
    source["stages"][1]["shares"] = SHARES_WITHOUT_PIECES

    def draw(source):
        mixture = Mixture.load({"sources": [source], "seed": 5}, tmp_path)
        mixture.check(tmp_path)
        return list(mixture.examples(tmp_path))

    with_instruments = draw(source)
    assert {example.task for example in with_instruments} == set(SHARES_WITHOUT_PIECES)
    del source["instruments"]
    assert draw(source) == with_instruments
    source["stages"][1]["shares"] = SHARES
    with pytest.raises(ValueError, match="The task piece needs instruments"):
        draw(source)


def test_other_instruments_are_another_mixture(source, tmp_path):
    shutil.copy(TINY / "instruments.yaml", tmp_path / "instruments.yaml")
    source["instruments"] = "instruments.yaml"
    mixture = Mixture.load({"sources": [source], "seed": 5}, tmp_path)
    key, examples = mixture.key(tmp_path), list(mixture.examples(tmp_path))
    assert mixture.key(tmp_path) == key
    text = (TINY / "instruments.yaml").read_text(encoding="utf-8")
    (tmp_path / "instruments.yaml").write_text(text.replace("  tuba: {presets: [58], range: [28, 55]}\n", ""))
    assert mixture.key(tmp_path) != key
    assert list(mixture.examples(tmp_path)) != examples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "has no stages"),
        ({"stages": [{"count": 1}]}, "expected count and shares"),
        ({"stages": [{"count": 1, "shares": {"sources": 1}}]}, "Unknown tasks: sources"),
        ({"captions": "audiocaps.csv"}, "expected a mapping of names to files"),
        (
            {"captions": {"audiocaps": "none.csv"}},
            "No such file: .*none.csv .audiocaps of captions of the source 'drawn'",
        ),
        ({"instruments": "none.yaml"}, r"No such file: .*none\.yaml"),
        ({"share": 0.5}, "its stages say how much"),
        ({"path": "audiocaps.csv"}, "unknown options path"),
    ],
)
def test_drawn_sources_are_checked(source, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Mixture.load({"sources": [source | change]}, tmp_path).check(tmp_path)

"""How answers about a labelled folder are judged."""

import pytest

from evaluation.label_folder import Judgement, names_source, read_labels, summarise


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("A rooster crowing.", "rooster"),
        ("A person sneezing.", "person sneeze"),
        ("Ocean waves crash on the beach.", "sea waves"),
        ("It is raining.", "rain"),
        ("A ticking clock.", "clock tick"),
        ("A cuckoo", "cuckoo"),
    ],
)
def test_the_source_is_named(answer, label):
    assert names_source(answer, label)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("A train is passing.", "rain"),
        ("A seagull.", "sea waves"),
        ("A sea lion.", "sea waves"),
        ("Fireworks.", "fire crackling"),
        ("A fire alarm rings.", "fire crackling"),
        ("An alarm clock.", "clock tick"),
        ("A cockatoo.", "rooster"),
        ("A hotdog.", "dog bark"),
        ("", "rain"),
    ],
)
def test_another_source_is_not(answer, label):
    assert not names_source(answer, label)


def test_labels_are_read_by_group(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,label,group\na.ogg,dog,one\nb.ogg,rain,two\n")
    assert read_labels(tmp_path) == [("a.ogg", "dog"), ("b.ogg", "rain")]
    assert read_labels(tmp_path, "two") == [("b.ogg", "rain")]
    with pytest.raises(ValueError, match="no clips of group 'three'"):
        read_labels(tmp_path, "three")


def test_the_three_figures_are_shares_of_clips():
    def judged(named, matched, clap):
        chosen = {True: "dog", False: "rain"}
        return Judgement("a.ogg", "dog", "A dog.", named, "dog", chosen[matched], chosen[clap])

    figures = summarise([judged(True, True, True), judged(False, True, False), judged(False, False, False)])
    assert figures == {"clips": 3, "clap_zero_shot": 1 / 3, "matched": 2 / 3, "named": 1 / 3}

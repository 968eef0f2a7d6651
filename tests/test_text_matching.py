"""Classification by text matching."""

import pytest
import torch

from evaluation.text_matching import NO_MATCH, TextMatcher

DIRECTIONS = {"dog": (1.0, 0.0), "rain": (0.0, 1.0), "a dog barks": (0.9, 0.1), "both": (0.5, 0.5)}


@pytest.fixture
def calls():
    return []


@pytest.fixture
def matcher(calls):
    def encode(texts):
        calls.append(list(texts))
        return torch.tensor([DIRECTIONS[text] for text in texts])

    return TextMatcher(["dog", "rain"], encode)


def test_the_nearest_label_is_the_prediction(matcher):
    assert matcher.match(["a dog barks", "rain", "dog"]) == [0, 1, 0]
    torch.testing.assert_close(matcher.scores(["a dog barks"]), torch.tensor([[0.9, 0.1]]))


def test_of_equally_near_labels_the_first_is_taken(matcher):
    assert matcher.match(["both"]) == [0]


def test_an_empty_answer_matches_nothing(matcher):
    assert matcher.match(["", "  ", "rain"]) == [NO_MATCH, NO_MATCH, 1]
    assert matcher.scores([" "]).abs().sum() == 0
    assert matcher.match([]) == []


def test_each_different_answer_is_encoded_once(matcher, calls):
    matcher.match(["rain", "dog", "rain", "rain"])
    assert calls == [["dog", "rain"], ["rain", "dog"]]


@pytest.mark.parametrize(("labels", "message"), [([], "labels is empty"), (["a", "a"], "holds one label twice")])
def test_labels_that_cannot_be_told_apart_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        TextMatcher(labels, lambda texts: torch.zeros(len(texts), 2))

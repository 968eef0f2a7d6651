"""MMAU's string match, on answers made to try it."""

import pytest

from evaluation.metrics.mmau_string_match import RULE, matches, mmau_string_match

PEOPLE = ("Man", "Woman", "Child", "Robot")
PHRASES = ("A child", "A woman", "An adult man", "A teenager")
NESTED = ("Dog", "Barking dog", "Big barking dog")
DRUMS = ("Snare drum", "Bass drum", "Hi-hat", "Cow-bell")
NUMBERS = ("1", "2", "12", "Two")
KEYS = ("C major", "C minor", "C# major", "A minor")
LETTERED = ("(A) Rain", "(B) Wind", "(C) Fire")

CASES = [
    # the option itself, in any spelling
    ("Man", "Man", PEOPLE, True),
    ("man", "Man", PEOPLE, True),
    ("MAN", "Man", PEOPLE, True),
    ("Man.", "Man", PEOPLE, True),
    ('"Man"', "Man", PEOPLE, True),
    ("  man\n", "Man", PEOPLE, True),
    ("**Man**", "Man", PEOPLE, True),
    ("man man man", "Man", PEOPLE, True),
    # another option, or none
    ("Woman", "Man", PEOPLE, False),
    ("Child", "Man", PEOPLE, False),
    ("A bird", "Man", PEOPLE, False),
    ("Mann", "Man", PEOPLE, False),
    ("men", "Man", PEOPLE, False),
    ("", "Man", PEOPLE, False),
    ("   ", "Man", PEOPLE, False),
    ("?!", "Man", PEOPLE, False),
    # in a sentence
    ("The speaking voice is a man.", "Man", PEOPLE, True),
    ("The answer is: Man", "Man", PEOPLE, True),
    ("It is not a man.", "Man", PEOPLE, True),
    ("A manly voice", "Man", PEOPLE, False),
    ("man's voice", "Man", PEOPLE, True),
    ("man_voice", "Man", PEOPLE, False),
    # several options
    ("Man or woman", "Man", PEOPLE, False),
    ("A man, not a woman", "Man", PEOPLE, False),
    ("A man and a bird", "Man", PEOPLE, True),
    ("Man, Woman, Child, Robot", "Man", PEOPLE, False),
    # options that share words
    ("A woman", "A woman", PHRASES, True),
    ("woman", "A woman", PHRASES, False),
    ("a young woman", "A woman", PHRASES, True),
    ("An adult man", "An adult man", PHRASES, True),
    ("adult man, an", "An adult man", PHRASES, True),
    ("A man, an adult", "An adult man", PHRASES, False),
    ("Snare drum", "Snare drum", DRUMS, True),
    ("the drum is a snare", "Snare drum", DRUMS, True),
    ("snare", "Snare drum", DRUMS, False),
    ("Snare drum and bass drum", "Snare drum", DRUMS, False),
    # options that contain each other
    ("Dog", "Dog", NESTED, True),
    ("Barking dog", "Dog", NESTED, False),
    ("Barking dog", "Barking dog", NESTED, True),
    ("Dog", "Barking dog", NESTED, False),
    ("dog that is barking", "Barking dog", NESTED, True),
    ("Big barking dog", "Barking dog", NESTED, False),
    ("Big barking dog", "Big barking dog", NESTED, True),
    # punctuation inside of options
    ("hi hat", "Hi-hat", DRUMS, True),
    ("hi-hat", "Hi-hat", DRUMS, True),
    ("hihat", "Hi-hat", DRUMS, False),
    ("cowbell", "Cow-bell", DRUMS, False),
    # numbers are words
    ("2", "2", NUMBERS, True),
    ("two", "2", NUMBERS, False),
    ("2 (two)", "2", NUMBERS, False),
    ("12", "2", NUMBERS, False),
    ("1 2", "12", NUMBERS, False),
    # signs are no words
    ("C major", "C major", KEYS, True),
    ("C# major", "C major", KEYS, True),
    ("C major", "C# major", KEYS, True),
    ("A minor", "C minor", KEYS, False),
    # letters of options are words as any other
    ("A", "(A) Rain", LETTERED, False),
    ("Rain", "(A) Rain", LETTERED, False),
    ("(A) Rain", "(A) Rain", LETTERED, True),
    ("a rain", "(A) Rain", LETTERED, True),
    ("(B) Rain", "(A) Rain", LETTERED, False),
    # unlike letters
    ("Caf\u00e9", "caf\u00c9", ("Caf\u00e9", "Bar"), True),
    ("Cafe", "Caf\u00e9", ("Caf\u00e9", "Bar"), False),
    # odd options
    ("Man", "Man", ("Man", "man.", "MAN"), True),
    ("Man", "Man", ("Woman", "Child"), True),
    ("Woman", "Man", ("Woman", "Child"), False),
    ("rain", "?", ("?", "wind"), True),
    ("wind", "?", ("?", "wind"), False),
]


@pytest.mark.parametrize(("answer", "right", "choices", "expected"), CASES)
def test_the_benchmarks_rule(answer, right, choices, expected):
    assert matches(answer, right, choices) is expected


def test_there_are_cases_enough_of_both_kinds():
    assert len(set(CASES)) == len(CASES) > 40
    assert all(sum(case[-1] is expected for case in CASES) > 20 for expected in (True, False))


def test_the_share_of_matches():
    answers, right, choices, expected = zip(*CASES, strict=True)
    scores = mmau_string_match(answers, right, choices)
    assert scores.sentences == expected
    assert scores.score == sum(expected) / len(expected)
    # Twice the right option is not among the options at all, and once it is spelt otherwise.
    assert scores.details == {"rule": RULE, "reference_not_a_choice": 3}


@pytest.mark.parametrize(
    ("answers", "right", "choices", "complaint"),
    [
        ([], [], [], "Got no predictions"),
        (["a"], ["a", "b"], [["a"]], "Got 1 predictions but 2 references"),
        (["a"], ["a"], [], "Got 1 predictions but 0 lists of choices"),
        (["a"], ["a"], [[]], r"choices\[0\] is \[\]; expected a list of at least one option"),
        (["a"], ["a"], ["a"], r"choices\[0\] is 'a'; expected a list"),
        (["a"], ["a"], [["a", 1]], r"choices\[0\]\[1\] is 1 \(int\), expected a string"),
        ([None], ["a"], [["a"]], r"predictions\[0\] is None"),
    ],
)
def test_what_cannot_be_matched_is_refused(answers, right, choices, complaint):
    with pytest.raises(ValueError, match=complaint):
        mmau_string_match(answers, right, choices)

"""Penn Treebank tokens: by example, and against the Java program that coco-caption runs."""

import csv
import random
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from string import ascii_letters

import pytest
from conftest import ROOT

from evaluation.metrics.ptb import ptb_tokenize

EXAMPLES = [ROOT / "tests" / "aac_metrics" / f"example_{number}.csv" for number in (1, 2)]
SPEC = find_spec("pycocoevalcap")
# What coco-caption drops after the Java program.
DROPPED = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}

# Each line was put to the Java program of coco-caption.
ASKED = [
    ("A dog barks, then stops.", "a dog barks then stops"),
    ("rain.The next", "rain.the next"),
    ("the dog's and dogs' and It'S", "the dog 's and dogs and it 's"),
    ("don't CAN'T won\u2019t ain't", "do n't ca n't wo n't ai n't"),
    ("cannot gonna Gimme 'tis", "can not gon na gim me 't is"),
    ("he'll they've we\u2019re I'm I'd've", "he 'll they 've we 're i 'm i 'd 've"),
    ("o'clock y'all get 'em rock'n'roll c'mon", "o'clock y' all get 'em rock 'n' roll c'mon"),
    ("the '90s and 80's", "the '90s and 80 's"),
    ("\u201cquoted\u201d 'single' \"double\" ``tex''", "quoted single double tex"),
    ("dog (small) [loud] {far}", "dog -lrb- small -rrb- -lsb- loud -rsb- -lcb- far -rcb-"),
    ("1,000 1.5 .5 10:30 -5 5% $5 \u00a35", "1,000 1.5 .5 10:30 -5 5 % $ 5 # 5"),
    ("4/4 and/or rock/pop-punk a/b/c/d", "4/4 and/or rock/pop-punk a/b/c / d"),
    ("tick-tock a--b back - and- -forth", "tick-tock a b back and forth"),
    ("1.5s 44.1khz 0.0s-10 8-bit 3x4 2nd", "1.5 s 44.1 khz 0.0s-10 8-bit 3x4 2nd"),
    ("Mr. Smith etc. then vs. no. 5 no. St. x", "mr. smith etc. then vs. no. 5 no st. x"),
    ("the U.S. at 5 a.m. in A. then in c. The", "the u.s. at 5 a.m. in a. then in c the"),
    ("dog., cat.; 5.: end", "dog. cat. 5. end"),
    ("well...then again.... wait..", "well then again wait"),
    ("stop!!! no?! ok! why?", "stop !!! no ?! ok why"),
    ("R&B r&b AT&T a & b &amp;", "r&b r & b at&t a & b &"),
    ("C++ F#m #tag # @home a@b.com", "c++ f# m #tag # @home a@b.com"),
    ("a_b _ 012543.wav www.foo.com", "a_b _ 012543.wav www.foo.com"),
    (":) nice ;-) dog:D", ":-rrb- nice ;--rrb- dog :d"),
    ("na\u00efve caf\u00e9's \u00bd \u2013 \u2014 \u2026 10\u00b0", "na\u00efve caf\u00e9 's 1/2 10 \u00b0"),
    ("\u72ac\u304c \u0441\u043e\u0431\u0430\u043a\u0430", "\u72ac\u304c \u0441\u043e\u0431\u0430\u043a\u0430"),
]


def ask_java(lines: list[str]) -> list[str]:
    """Tokens as coco-caption has them, a line each."""
    jar = Path(SPEC.submodule_search_locations[0], "tokenizer", "stanford-corenlp-3.4.1.jar")
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer"]
    run = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input="\n".join(lines).encode(), capture_output=True, check=True
    )
    answers = run.stdout.decode().split("\n")[: len(lines)]
    return [" ".join(token for token in answer.rstrip().split(" ") if token not in DROPPED) for answer in answers]


with_java = pytest.mark.skipif(
    SPEC is None or shutil.which("java") is None,
    reason="coco-caption's tokeniser is in the package pycocoevalcap and needs Java",
)


@pytest.mark.parametrize(("caption", "tokens"), ASKED, ids=[tokens for _, tokens in ASKED])
def test_tokens(caption, tokens):
    assert " ".join(ptb_tokenize(caption)) == tokens


@pytest.mark.parametrize("caption", ["", " \n\t", ".", "...", "- -- \u2014", "\"''\"", "? !"])
def test_punctuation_alone_is_no_token(caption):
    assert ptb_tokenize(caption) == ()


def test_line_breaks_are_spaces():
    assert ptb_tokenize("A dog\nbarks.\r\nRain\u2028falls") == ("a", "dog", "barks", "rain", "falls")


def test_no_letter_or_digit_is_lost():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(
            rng.choice(ascii_letters + "\u00e9\u00df\u72ac0123456789  ..,,''-/&@#_:;!?$%+*") for _ in range(40)
        )
        tokens = "".join(ptb_tokenize(text))
        assert [c for c in tokens if c.isalnum()] == [c for c in text.lower() if c.isalnum()], text


@with_java
def test_the_examples_are_still_what_java_says():
    assert ask_java([caption for caption, _ in ASKED]) == [tokens for _, tokens in ASKED]


@with_java
def test_as_java_on_captions_of_people_and_machines():
    captions = []
    for path in EXAMPLES:
        with path.open(newline="", encoding="utf-8") as file:
            captions += [text for row in csv.reader(file) for text in row]
    assert len(captions) > 10_000
    assert ask_java(captions) == [" ".join(ptb_tokenize(text)) for text in captions]


@with_java
def test_as_java_on_captions_with_punctuation_and_capitals_thrown_in():
    rng = random.Random(0)
    with EXAMPLES[0].open(newline="", encoding="utf-8") as file:
        captions = [text for row in list(csv.reader(file))[1:] for text in row if text]
    marks = [*".,!?;:/%", "...", " -", " --", "'s", "\u2019s", "n't", " (", ")", '"', " &", " 5"]
    noisy = []
    for text in captions:
        words = [rng.choice((word, word, word.capitalize(), word.upper())) for word in text.split()]
        for _ in range(3):
            words[rng.randrange(len(words))] += rng.choice(marks)
        noisy.append(" ".join(words))
    own = [" ".join(ptb_tokenize(text)) for text in noisy]
    differing = [
        (text, java, ours) for text, java, ours in zip(noisy, ask_java(noisy), own, strict=True) if java != ours
    ]
    assert not differing, f"{len(differing)} of {len(noisy)} differ, such as {differing[:5]}"

"""CIDEr-D, BLEU and ROUGE-L against other implementations, and at the edges."""

import csv
import math
import random

import pytest
from conftest import ROOT

from evaluation.metrics.bleu import bleu
from evaluation.metrics.cider_d import cider_d
from evaluation.metrics.ptb import TOKENIZER, ptb_tokenize
from evaluation.metrics.rouge_l import rouge_l

METRICS = {"cider_d": cider_d, "bleu_4": bleu, "rouge_l": rouge_l}
# What aac-metrics 0.5.4 gives, by its own Java tokeniser.
AAC_METRICS = {
    ("example_1", "cider_d"): 0.40172373459481703,
    ("example_1", "bleu_4"): 0.1449174503141603,
    ("example_1", "rouge_l"): 0.3958084293671707,
    ("example_2", "cider_d"): 0.6342852251812827,
    ("example_2", "bleu_4"): 0.24882238841152565,
    ("example_2", "rouge_l"): 0.46536659397343266,
}


def read_example(name):
    with (ROOT / "tests" / "aac_metrics" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["caption_predicted"] for row in rows], [[row[f"caption_{i}"] for i in range(1, 6)] for row in rows]


def random_captions(seed, samples=60):
    """Predictions near and far from one to five references; there are repetitions and captions without words."""
    rng = random.Random(seed)
    sentence = "a a the dog barks, rain. falls while people's talk don't and Birds (far) 5 4/4 chirp - loudly"
    words = sentence.split()

    def caption():
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, 14)))

    references = [[caption() for _ in range(rng.randint(1, 5))] for _ in range(samples)]
    predictions = [rng.choice([rng.choice(row), caption(), f"{row[0]} {caption()}"]) for row in references]
    predictions[3], predictions[7], references[9][0] = "", "...", "!"
    return predictions, references


def tokenised(predictions, references):
    """As coco-caption's scorers take them."""
    own = {place: [" ".join(ptb_tokenize(text))] for place, text in enumerate(predictions)}
    return {place: [" ".join(ptb_tokenize(text)) for text in row] for place, row in enumerate(references)}, own


@pytest.mark.parametrize(("example", "name"), AAC_METRICS)
def test_as_aac_metrics(example, name):
    scores = METRICS[name](*read_example(example))
    assert scores.name == name
    assert scores.score == pytest.approx(AAC_METRICS[example, name], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_as_pycocoevalcap(seed):
    for module in ("cider.cider", "bleu.bleu", "rouge.rouge"):
        pytest.importorskip(f"pycocoevalcap.{module}", reason="compares with the package pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions = random_captions(seed)
    theirs = {"cider_d": Cider().compute_score(*tokenised(*captions))}
    theirs["rouge_l"] = Rouge().compute_score(*tokenised(*captions))
    corpus, sentences = Bleu(4).compute_score(*tokenised(*captions), verbose=0)
    theirs |= {f"bleu_{longest}": (corpus[longest - 1], sentences[longest - 1]) for longest in range(1, 5)}

    ours = [cider_d(*captions), rouge_l(*captions), *(bleu(*captions, longest=longest) for longest in range(1, 5))]
    assert {scores.name for scores in ours} == theirs.keys()
    for scores in ours:
        score, sentences = theirs[scores.name]
        assert score > 0, scores.name
        assert scores.score == pytest.approx(score, abs=1e-9), scores.name
        assert scores.sentences == pytest.approx(sentences, abs=1e-9), scores.name


@pytest.mark.parametrize("seed", range(3))
def test_bleu_as_sacrebleu(seed):
    sacrebleu = pytest.importorskip("sacrebleu", reason="compares with the package sacrebleu")
    predictions, references = random_captions(seed)
    given, own = tokenised(predictions, references)
    streams = [[row[place] if place < len(row) else None for row in given.values()] for place in range(5)]
    for longest in range(1, 5):
        theirs = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=longest)
        expected = theirs.corpus_score([text for (text,) in own.values()], streams).score / 100
        assert bleu(predictions, references, longest).score == pytest.approx(expected, abs=1e-9)


def test_rouge_l_by_hand():
    # In common: "a dog", 2 of 3 words and 2 of 2. F with beta 1.2: 2.44 * (2/3) * 1 / (1 + 1.44 * 2/3).
    assert rouge_l(["A dog barks."], [["a dog"]]).score == pytest.approx(2.44 * 2 / 3 / 1.96, abs=1e-12)


def test_the_best_precision_and_recall_of_rouge_l_may_be_of_two_references():
    apart = rouge_l(["a dog barks"], [["a dog barks and rain falls on a roof", "dog"]]).score
    assert apart == pytest.approx(1.0)  # all words are in the first, and all of the second are found


def test_cider_d_by_hand():
    # Each n-gram is of one sample of two, so of weight log 2, but "a" of both, so of none. Of "a dog barks" one word
    # and one pair are in "a dog", of two and two, and the lengths differ by one.
    score = cider_d(["a dog barks", "a"], [["a dog"], ["a cat"]]).sentences[0]
    assert score == pytest.approx(10 / 4 * (1 / math.sqrt(2) + 1 / math.sqrt(2)) * math.exp(-1 / 72), abs=1e-12)


def test_a_repeated_word_earns_nothing_more_in_cider_d():
    references = [["a dog barks"], ["rain falls"]]
    once, thrice = (cider_d([text, "x"], references).sentences[0] for text in ("dog", "dog dog dog"))
    assert 0 < thrice < once


def test_bleu_cuts_repetitions_and_penalises_brevity():
    assert bleu(["the the the the"], [["the dog barks loudly"]], 1).score == pytest.approx(1 / 4, abs=1e-8)
    assert bleu(["the dog"], [["the dog barks loudly"]], 1).score == pytest.approx(math.exp(-1), abs=1e-8)
    # The nearest in length counts, of equals the shorter: no penalty.
    assert bleu(["the dog barks"], [["the dog barks now", "the dog"]], 1).score == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
class TestEveryMetric:
    def test_tokens_and_not_spellings_are_compared(self, metric):
        predictions, references = (
            ["a dog barks far away", "rain is falling"],
            [["A dog barks (far) away"], ["it rains"]],
        )
        assert metric(["A DOG barks, far away!", "Rain is falling."], references) == metric(predictions, references)
        assert metric(predictions, references).details == {"tokenizer": TOKENIZER}

    def test_a_perfect_prediction(self, metric):
        captions = ["a dog barks at night", "rain falls on a roof"]
        best = 10 if metric is cider_d else 1
        scores = metric(captions, [[text] for text in captions])
        assert scores.score == pytest.approx(best, abs=1e-8)
        assert scores.sentences == pytest.approx([best] * 2, abs=1e-8)

    @pytest.mark.parametrize("nothing", ["", "   ", "..."])
    def test_an_empty_prediction_scores_0_and_counts(self, metric, nothing):
        references = [["a dog barks at night"], ["rain falls on a roof"]]
        scores = metric(["a dog barks at night", nothing], references)
        assert len(scores.sentences) == 2
        assert scores.sentences[1] == pytest.approx(0, abs=1e-8)
        assert scores.score < metric(["a dog barks at night", "rain falls on a roof"], references).score

    def test_only_empty_predictions(self, metric):
        assert metric(["", ""], [["a dog"], ["rain"]]).score == pytest.approx(0, abs=1e-8)

    def test_a_reference_without_words_does_not_break(self, metric):
        scores = metric(["a dog barks", ""], [["..."], ["a cat", ""]])
        assert all(math.isfinite(score) for score in scores.sentences)

    def test_a_single_sample(self, metric):
        scores = metric(["a dog barks at night"], [["a dog barks at night"]])
        assert len(scores.sentences) == 1
        # CIDEr-D weighs words by how few samples have them: of one sample, all have all.
        assert scores.score == pytest.approx(0 if metric is cider_d else 1, abs=1e-8)

    def test_the_order_of_samples_moves_the_sentences_along(self, metric):
        predictions, references = random_captions(1, samples=12)
        forth, back = metric(predictions, references), metric(predictions[::-1], references[::-1])
        assert back.sentences == pytest.approx(forth.sentences[::-1], abs=1e-12)
        assert back.score == pytest.approx(forth.score, abs=1e-12)

    @pytest.mark.parametrize(
        ("predictions", "references", "complaint"),
        [
            ([], [], "Got no predictions"),
            (["a", "b"], [["a"]], "Got 2 predictions but 1 references"),
            (["a"], [["a"], ["b"]], "Got 1 predictions but 2 references"),
            (["a", "b"], [["a"], []], r"references\[1\] is empty; expected at least one caption"),
            (["a", "b"], [["a"], "b"], r"references\[1\] is the one string 'b'; expected a list"),
            ("a", [["a"]], "predictions is the one string 'a'"),
            (["a"], "a", "references is the one string 'a'"),
            (["a", None], [["a"], ["b"]], r"predictions\[1\] is None \(NoneType\), expected a string"),
            (["a"], [["a", 5]], r"references\[0\]\[1\] is 5 \(int\), expected a string"),
        ],
    )
    def test_what_cannot_be_scored_is_refused(self, metric, predictions, references, complaint):
        with pytest.raises(ValueError, match=complaint):
            metric(predictions, references)


@pytest.mark.parametrize("longest", [0, 5])
def test_bleu_of_other_sizes_is_refused(longest):
    with pytest.raises(ValueError, match=f"longest is {longest}, expected 1 to 4"):
        bleu(["a"], [["a"]], longest)


def test_scores_as_a_dictionary():
    found = rouge_l(["a dog", "x"], [["a dog"], ["y"]]).as_dict()
    assert found == {"rouge_l": 0.5, "sentences": [1.0, 0.0], "tokenizer": TOKENIZER}

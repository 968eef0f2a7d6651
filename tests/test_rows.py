"""The order of rows, what is held out, and what a step gets to see."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import SENTENCES, make_clap, make_model, make_processor
from datasets import Dataset

from modeling_mats.modeling_mats import MatsNoise
from training.audiotia.examples import EXAMPLE_FEATURES, Example
from training.collator import MatsCollator
from training.embed import embed_examples, text_cache
from training.rows import SequentialOrder, TrainingOrder, TrainingRows, split_rows


def dataset_of(descriptions: list[str]) -> Dataset:
    examples = [
        Example(text, f"Question {number}?", f"Answer {number}.", "AQA", "sound", "test")
        for number, text in enumerate(descriptions)
    ]
    rows = [{name: getattr(example, name) for name in EXAMPLE_FEATURES} for example in examples]
    return Dataset.from_list(rows, features=EXAMPLE_FEATURES)


def test_each_pass_sees_a_row_at_most_once_in_an_order_of_its_own():
    order = TrainingOrder(rows=103, batch_size=8, seed=1)
    first, second = order[range(96)], order[range(96, 192)]  # 12 whole batches
    assert len(set(first)) == len(set(second)) == 96
    assert set(first) != set(second)
    assert first.tolist() != second.tolist()
    assert TrainingOrder(103, 8, seed=2)[range(96)].tolist() != first.tolist()


def test_the_order_is_a_function_of_the_place_alone():
    lengths = np.random.default_rng(0).integers(1, 500, 1000)
    order = TrainingOrder(1000, 16, 0, lengths)
    whole = order[range(2500)]
    again = TrainingOrder(1000, 16, 0, lengths)
    places = np.random.default_rng(1).permutation(2500)
    assert again[places].tolist() == whole[places].tolist()


def test_batches_hold_rows_of_like_length_but_come_in_no_order_of_length():
    lengths = np.random.default_rng(0).integers(1, 1000, 8000)
    order = TrainingOrder(8000, 16, 0, lengths)
    batches = lengths[order[range(8000)]].reshape(-1, 16)
    assert np.ptp(batches, axis=1).mean() < 60  # of 1000; of random batches some 880
    assert sorted(order[range(8000)]) == list(range(8000))
    assert abs(np.corrcoef(np.arange(len(batches)), batches.mean(1))[0, 1]) < 0.2


def test_fewer_rows_than_a_batch_come_again_within_it():
    order = TrainingOrder(rows=3, batch_size=8, seed=0)
    assert sorted(order[range(6)]) == [0, 0, 1, 1, 2, 2]


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="no rows"):
        TrainingOrder(0, 8, 0)


def test_a_description_is_either_trained_on_or_held_out():
    texts = [f"Sound {number % 40}." for number in range(200)]
    train, held_out = split_rows(dataset_of(texts), 20, sequential=False, seed=0)
    assert 20 <= len(held_out) < 30
    assert sorted([*train, *held_out]) == list(range(200))
    assert not {texts[i] for i in train} & {texts[i] for i in held_out}
    other = split_rows(dataset_of(texts), 20, sequential=False, seed=1)[1]
    assert other.tolist() != held_out.tolist()


def test_of_a_staged_mixture_the_first_rows_are_held_out():
    train, held_out = split_rows(dataset_of(SENTENCES), 3, sequential=True, seed=0)
    assert held_out.tolist() == [0, 1, 2]
    assert train.tolist() == list(range(3, 10))


def test_something_must_be_left_to_train_on():
    with pytest.raises(ValueError, match="the mixture has 10 rows"):
        split_rows(dataset_of(SENTENCES), 10, sequential=False, seed=0)
    with pytest.raises(ValueError, match="too few different descriptions"):
        split_rows(dataset_of(["The same."] * 10), 2, sequential=False, seed=0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> TrainingRows:
    clap = make_clap()
    examples = dataset_of(SENTENCES)
    cache = text_cache(tmp_path_factory.mktemp("cache"), clap)
    cache_rows = embed_examples(examples, clap, cache)
    taken = np.array([9, 8, 7, 6])
    return TrainingRows(examples, cache, cache_rows, taken, SequentialOrder(4), count=4, seed=3)


def test_a_row_has_the_embedding_of_its_own_description(rows):
    found = rows.__getitems__([3, 0])
    assert [row["instruction"] for row in found] == ["Question 6?", "Question 9?"]
    expected = make_clap().encode_text([SENTENCES[6], SENTENCES[9]])
    torch.testing.assert_close(torch.from_numpy(np.stack([row["text_embeds"] for row in found])), expected)
    assert rows[3]["answer"] == "Answer 6."
    assert len(rows) == 4


def test_the_noise_of_a_row_depends_on_its_place_alone(rows):
    collator, model = MatsCollator(make_processor()), make_model(noise_variance=0.1).train()
    batch = collator(rows.__getitems__([0, 1, 2, 3]))
    half = collator(rows.__getitems__([2, 3]))
    seen = []
    model.mapper.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    model(**batch)
    model(**half)
    assert torch.equal(seen[0][2:], seen[1])
    assert not torch.allclose(seen[0], batch["audio_embeds"].squeeze(1))
    assert not torch.allclose(seen[0][0] - batch["audio_embeds"][0], seen[0][1] - batch["audio_embeds"][1])
    with pytest.raises(ValueError, match=r"noise_seeds has shape \(4, 2\), expected \(4, 1\)"):
        model(**{**batch, "noise_seeds": batch["noise_seeds"].expand(4, 2)})


def test_runs_of_different_seeds_draw_different_noise(rows):
    seeds = [
        TrainingRows(rows.examples, rows.cache, rows.cache_rows, rows.indices, seed=seed)[0]["noise_seed"]
        for seed in range(3)
    ]
    noise = MatsNoise(variance=1.0, renormalize=False).train()
    drawn = noise(torch.zeros(3, 64), torch.tensor(seeds))
    assert torch.corrcoef(drawn).triu(1).abs().max() < 0.5


def test_seeded_noise_has_the_variance_asked_for():
    noise = MatsNoise(variance=0.02, renormalize=False).train()
    added = noise(torch.zeros(200, 512), torch.arange(200))
    assert added.var().item() == pytest.approx(0.02, rel=0.02)
    assert Counter(added.flatten().tolist()).most_common(1)[0][1] < 5
    correlations = torch.corrcoef(added) - torch.eye(200)
    assert correlations.abs().max() < 0.3  # of independent rows of 512, five standard deviations are 0.22
    assert torch.equal(noise.eval()(torch.zeros(2, 512), torch.arange(2)), torch.zeros(2, 512))

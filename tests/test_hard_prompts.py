"""Nearest labels in the prompt: found rightly, the same for the same row, and in every row of a run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import MATS_TINY, ROOT, SENTENCES, make_chat_tokenizer, make_clap, make_model, make_processor, tone
from run_parts import ADAPTED, NEW, arguments, write_parts, write_recipe
from safetensors.torch import load_file
from test_rows import dataset_of
from transformers import AutoTokenizer

from processing_mats import ClapEncoder
from training import train_mats
from training.collator import MatsCollator
from training.embed import embed_examples, encode_files, text_cache
from training.embedding_cache import Ranks
from training.eval_audio import audio_rows
from training.hard_prompts import HardPrompts, NearestLabels, RowPrompts, read_labels, with_hard_prompt
from training.rows import TrainingOrder, TrainingRows
from training.run_folder import CHECKPOINTS

LABELS = ["dog", "rooster", "rain", "helicopter", "waves", "clock", "baby", "sneeze"]


def embeds_of(count: int, seed: int = 0, dim: int = 16) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def labels_in(instruction: str) -> list[str]:
    """What a prompt names, read back."""
    head, _, _ = instruction.partition(". ")
    return head.removeprefix("Labels: ").split(", ")


def test_labels_come_before_the_question():
    assert with_hard_prompt("What is it?", ["dog", "rain"]) == "Labels: dog, rain. What is it?"
    with pytest.raises(ValueError, match="at least one label"):
        with_hard_prompt("What is it?", [])


def test_the_nearest_labels_are_those_of_the_largest_cosine():
    # Of different lengths: a dot product would prefer the long ones.
    nearest = NearestLabels(["x", "y", "z"], torch.tensor([[0.1, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 1.0]]))
    embeds = torch.tensor([[3.0, 1.0, 2.0], [-1.0, 0.2, 0.1], [0.0, 0.0, 0.01]])
    assert nearest.of(embeds, 2) == [["x", "z"], ["y", "z"], ["z", "x"]]  # of equals the first
    assert nearest.of(embeds, 1) == [["x"], ["y"], ["z"]]
    assert nearest.of(embeds, 3)[1] == ["y", "z", "x"]
    assert nearest.of(embeds[:0], 1) == []


def test_what_else_is_in_the_batch_changes_nothing():
    """Each label shares its direction with another, but for the last bits, which a product of matrices may tip."""
    label_embeds = embeds_of(150, dim=64).double()
    nearest = NearestLabels([f"label {n}" for n in range(300)], torch.cat([label_embeds, 3.7 * label_embeds]))
    embeds = embeds_of(64, seed=1, dim=64)
    whole = nearest.of(embeds, 5)
    assert [nearest.of(embed[None], 5)[0] for embed in embeds] == whole
    assert nearest.of(embeds[10:27], 5) == whole[10:27]


def test_names_are_embedded_by_claps_text_tower():
    clap = make_clap()
    nearest = NearestLabels.build(LABELS, clap)
    assert [found[0] for found in nearest.of(clap.encode_text(LABELS), 3)] == LABELS


@pytest.mark.parametrize(
    ("labels", "embeds", "says"),
    [
        ([], torch.empty(0, 4), "holds no label"),
        (["dog", "dog"], torch.ones(2, 4), "'dog' more than once"),
        (["dog", " "], torch.ones(2, 4), "the label ' '"),
        (["dog"], torch.ones(2, 4), r"shape \(2, 4\), expected \(1, dim\)"),
        (["dog", "cat"], torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "label_embeds holds rows that are zero"),
    ],
)
def test_labels_that_cannot_be_found_are_refused(labels, embeds, says):
    with pytest.raises(ValueError, match=says):
        NearestLabels(labels, embeds)


@pytest.mark.parametrize(
    ("embeds", "count", "says"),
    [
        (torch.ones(2, 4), 0, "count is 0, expected from 1 to 3"),
        (torch.ones(2, 4), 4, "count is 4, expected from 1 to 3"),
        (torch.ones(2, 5), 1, r"shape \(2, 5\), expected \(rows, 4\)"),
        (torch.ones(4), 1, r"shape \(4,\), expected"),
        (torch.full((1, 4), float("nan")), 1, "zero, NaN or infinite"),
    ],
)
def test_embeddings_without_a_nearest_label_are_refused(embeds, count, says):
    with pytest.raises(ValueError, match=says):
        NearestLabels(["a", "b", "c"], embeds_of(3, dim=4)).of(embeds, count)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "\ufeffdog\n\n  child speech, kid speaking \n"),
        ("labels.yaml", "dog: [A dog barks.]\nchild speech, kid speaking:\n"),
        ("labels.yml", "- dog\n- child speech, kid speaking\n"),
        ("labels.json", '{"dog": 1, "child speech, kid speaking": 0}'),
    ],
)
def test_labels_are_read_in_the_order_of_their_file(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_labels(tmp_path / name) == ["dog", "child speech, kid speaking"]


def test_of_descriptions_the_labels_are_what_is_described():
    labels = read_labels(ROOT / "training" / "mats_tiny" / "descriptions.yaml")
    assert "rooster" in labels and "synonyms" not in labels and len(labels) > 50


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", "\n \n", "holds no label"),
        ("empty.yaml", "", "holds no label"),
        ("empty.json", "[]", "holds no label"),
        ("twice.txt", "dog\ncat\ndog", "'dog' more than once"),
        ("switch.yaml", "on: [It is turned on.]", "the label True, expected a text"),
        ("numbers.json", "[1, 2]", "the label 1, expected a text"),
        ("text.yaml", "dog", "holds 'dog', expected a list of labels"),
        ("broken.json", '{"dog"', "cannot be read"),
        ("broken.yaml", "a: [", "cannot be read"),
        ("labels.csv", "index,mid,display_name", "is a table"),
    ],
)
def test_files_that_hold_no_labels_are_told(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        read_labels(tmp_path / name)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"labels": "nowhere.txt", "count": 3}, FileNotFoundError, r"No such file of labels: .*nowhere\.txt"),
        ({"labels": "labels.txt", "count": 9}, ValueError, r"names 9 labels in each prompt, but .*labels\.txt has 8"),
    ],
)
def test_settings_that_do_not_fit_their_file_are_told(tmp_path, settings, error, says):
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    with pytest.raises(error, match=says):
        HardPrompts.read(settings, tmp_path)


def test_the_longest_prompt_is_longer_than_any_other():
    tokenizer = AutoTokenizer.from_pretrained(MATS_TINY)
    labels = read_labels(ROOT / "training" / "mats_tiny" / "descriptions.yaml")
    prompts = HardPrompts(tuple(labels), 3)
    longest = prompts.longest(tokenizer)
    chance = np.random.default_rng(0)
    for question in ("What is making this sound?", "describe", "1, 2, 3."):
        alone = len(tokenizer(question)["input_ids"])
        drawn = [with_hard_prompt(question, chance.choice(labels, 3, replace=False).tolist()) for _ in range(300)]
        assert max(len(ids) for ids in tokenizer(drawn)["input_ids"]) <= longest + alone
    assert longest < 3 * max(len(tokenizer(label)["input_ids"]) for label in labels) + 8


# Rows of a run


@pytest.fixture(scope="module")
def make_rows(tmp_path_factory):
    """Of `make_rows(noise_variance, seed)`: forty places over the ten sentences, with prompts of two labels."""
    clap, examples = make_clap(), dataset_of(SENTENCES)
    cache = text_cache(tmp_path_factory.mktemp("cache"), clap)
    where = (examples, cache, embed_examples(examples, clap, cache), np.arange(10))
    nearest = NearestLabels.build(LABELS, clap)

    def make(noise_variance: float = 0.05, seed: int = 0) -> TrainingRows:
        prompts = RowPrompts(nearest, 2, noise_variance)
        return TrainingRows(*where, TrainingOrder(10, 5, seed), count=40, seed=seed, prompts=prompts)

    return make


def prompts_at(rows: TrainingRows, places) -> list[str]:
    return [row["instruction"] for row in rows.__getitems__(list(places))]


def test_a_rows_prompt_depends_on_its_place_alone(make_rows):
    whole = prompts_at(make_rows(), range(40))
    assert all(set(labels_in(prompt)) <= set(LABELS) for prompt in whole)
    rows = make_rows()
    assert [rows[place]["instruction"] for place in range(40)] == whole
    assert prompts_at(make_rows(), range(0, 40, 2)) == whole[::2]  # as one of two ranks
    assert prompts_at(make_rows(), range(25, 40)) == whole[25:]  # as a run that goes on
    assert prompts_at(make_rows(seed=1), range(40)) != whole


def test_noise_blurs_which_labels_are_near(make_rows):
    """The ten rows come four times; a row's labels are each time the same without noise, and others in noise."""
    for noise_variance, differs in ((0.0, False), (0.05, True)):
        seen: dict[str, set[str]] = {}
        for prompt in prompts_at(make_rows(noise_variance), range(40)):
            seen.setdefault(prompt.partition(". ")[2], set()).add(prompt)
        assert len(seen) == 10
        assert any(len(prompts) > 1 for prompts in seen.values()) == differs


def test_the_labels_are_nearest_to_what_the_mapper_is_given(make_rows):
    rows, model = make_rows(0.05).__getitems__(list(range(20))), make_model(noise_variance=0.05).train()
    seen = []
    model.mapper.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, -2).clone()))
    model(**MatsCollator(make_processor(max_positions=None))(rows))
    nearest = NearestLabels.build(LABELS, make_clap())
    assert nearest.of(seen[0], 2) == [labels_in(row["instruction"]) for row in rows]
    clear = torch.from_numpy(np.stack([row["text_embeds"] for row in rows]))
    assert nearest.of(clear, 2) != nearest.of(seen[0], 2)


def test_only_the_first_question_is_prompted_and_nothing_else_changes(make_rows):
    row = make_rows(0.0)[0]
    plain = TrainingRows(*[getattr(make_rows(), name) for name in ("examples", "cache", "cache_rows", "indices")])
    same = next(other for other in map(plain.__getitem__, range(10)) if other["answer"] == row["answer"])
    assert row["instruction"].endswith(f". {same['instruction']}")
    assert row["further_turns"] == same["further_turns"]
    assert np.array_equal(row["text_embeds"], same["text_embeds"])


def test_the_labels_of_a_sound_are_those_before_santa(tmp_path):
    processor = make_processor()
    lines = ["file_name,label"]
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", tone(0.3, 200 + 300 * number), 16000)
        lines.append(f"{number}.wav,thing {number}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    heard = torch.cat([processor.encode_audio(tmp_path / f"{number}.wav") for number in range(3)])
    moved = processor.apply_santa(heard)
    nearest = NearestLabels([f"{kind} {n}" for kind in ("moved", "heard") for n in range(3)], torch.cat([moved, heard]))
    rows = audio_rows(tmp_path, processor, tmp_path / "cache", Ranks(), RowPrompts(nearest, 1))
    assert [labels_in(row["instruction"]) for row in rows] == [["heard 0"], ["heard 1"], ["heard 2"]]
    torch.testing.assert_close(torch.from_numpy(np.stack([row["text_embeds"] for row in rows])), moved)


# Whole runs


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    (folder / "labels.txt").write_text("\n".join(LABELS))
    return folder


FIELDS = {**NEW, "new_vocab_size": 600, "memory_size": 0, "hard_prompts": {"labels": "labels.txt", "count": 2}}


@pytest.fixture
def collated(monkeypatch) -> list[dict]:
    """All rows that come to the collator from here on."""
    seen, call = [], MatsCollator.__call__

    def listen(self, rows):
        seen.extend(rows)
        return call(self, rows)

    monkeypatch.setattr(MatsCollator, "__call__", listen)
    return seen


def test_a_run_trains_on_prompts_and_goes_on_with_the_same(parts, collated, tmp_path):
    recipe, whole = write_recipe(parts, "prompted", **FIELDS, noise_variance=0.5), tmp_path / "whole"
    train_mats.main(arguments(parts, recipe, whole))
    trained, evaluated = collated[:24], collated[24:]
    assert len(evaluated) == 5
    nearest = NearestLabels.build(LABELS, make_clap())
    for rows, noise_variance in ((trained, 0.5), (evaluated, 0.0)):
        embeds, seeds = torch.tensor(np.stack([row["text_embeds"] for row in rows])), [r["noise_seed"] for r in rows]
        questions = [row["instruction"].partition(". ")[2] for row in rows]
        prompts = RowPrompts(nearest, 2, noise_variance)(questions, embeds, seeds)
        assert [row["instruction"] for row in rows] == prompts
    assert len(set(map(str, (labels_in(row["instruction"]) for row in trained)))) > 2
    record = json.loads((whole / "training_record.json").read_text())
    assert record["hard_prompts"] == {"labels": LABELS, "count": 2}
    # Words of the prompts are words of the tokenizer that was learnt.
    tokenizer = AutoTokenizer.from_pretrained(whole)
    words = ["Labels", ":", "Ġhelicopter", ",", "Ġrooster", "."]
    assert tokenizer.tokenize("Labels: helicopter, rooster. ")[: len(words)] == words

    collated.clear()
    out = tmp_path / "out"
    (out / CHECKPOINTS).mkdir(parents=True)
    for name in ("recipe.yaml", "inputs.json"):
        shutil.copy(whole / name, out)
    shutil.copytree(whole / CHECKPOINTS / "checkpoint-2", out / CHECKPOINTS / "checkpoint-2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClapEncoder, "encode_text", no_more)  # the labels' embeddings are cached as well
        train_mats.main(arguments(parts, recipe, out, "--resume", "--cache_dir", str(whole / "cache")))
    assert [row["instruction"] for row in collated[:16]] == [row["instruction"] for row in trained[8:]]
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    with pytest.raises(ValueError, match=r"another recipe: hard_prompts was .*'count': 2.* and is .*'count': 3"):
        more = ["--hard_prompts", json.dumps({"labels": "labels.txt", "count": 3})]
        train_mats.main(arguments(parts, recipe, whole, "--resume", *more))
    (tmp_path / "labels.txt").write_text("\n".join([*LABELS, "moose"]))
    (tmp_path / "mixture.yaml").write_text((parts / "mixture.yaml").read_text())
    moved = shutil.copy(recipe, tmp_path)
    with pytest.raises(ValueError, match="begun with something else: hard_prompts was"):
        train_mats.main(arguments(parts, Path(moved), whole, "--resume"))


def no_more(*args, **kwargs):
    raise AssertionError("a cached text was encoded again")


def test_a_run_without_prompts_knows_nothing_of_them(parts, collated, tmp_path):
    """Not even where it shares its cache with a run that has them."""
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    more = ["--cache_dir", str(tmp_path / "cache"), "--max_steps", "1"]
    train_mats.main(arguments(parts, write_recipe(tmp_path, "with", **FIELDS), tmp_path / "with", *more))
    collated.clear()
    plain = {name: value for name, value in FIELDS.items() if name != "hard_prompts"}
    train_mats.main(arguments(parts, write_recipe(tmp_path, "plain", **plain), tmp_path / "plain", *more))
    assert collated and not any("Labels" in row["instruction"] for row in collated)
    for name in ("training_record.json", "inputs.json", "recipe.yaml"):
        assert "hard_prompts" not in (tmp_path / "plain" / name).read_text()
    assert "Labels" in AutoTokenizer.from_pretrained(tmp_path / "with").vocab
    assert "Labels" not in AutoTokenizer.from_pretrained(tmp_path / "plain").vocab


def test_an_absolute_path_of_labels_is_not_published(parts, tmp_path):
    prompts = {"labels": str(parts / "labels.txt"), "count": 1}
    recipe = write_recipe(tmp_path, "absolute", **{**FIELDS, "hard_prompts": prompts, "max_steps": 1})
    train_mats.main(arguments(parts, recipe, tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "training_record.json").read_text())
    assert record["recipe"]["hard_prompts"] == {"labels": "labels.txt", "count": 1}
    assert str(parts) not in json.dumps(record)


def test_clips_are_prompted_by_the_labels_nearest_to_them(parts, collated, tmp_path):
    """supervision=audio: the embedding is the clip's own, and there is no noise."""
    clap, clips = make_clap(), tmp_path / "clips"
    clips.mkdir()
    for number in range(8):
        soundfile.write(clips / f"clip {number}.wav", tone(0.3, 200 + 100 * number), 16000)
    mixture = {"sources": [{"reader": "clotho", "path": "clotho.csv"}]}
    fields = {"supervision": "audio", "mixture": mixture, "max_steps": 10, "data_order": "sequential", "held_out": 0}
    recipe = write_recipe(tmp_path, "audio", **{**FIELDS, **fields})
    shutil.copy(parts / "labels.txt", tmp_path)
    train_mats.main(arguments(parts, recipe, tmp_path / "out", "--audio_dir", str(clips)))
    heard = encode_files([clips / f"clip {number}.wav" for number in range(8)], clap)
    expected = NearestLabels.build(LABELS, clap).of(heard, 2)
    assert [labels_in(row["instruction"]) for row in collated[:40]] == [labels for labels in expected for _ in range(5)]


def adapted(parts: Path, labels: list[str], count: int, folder: Path, descriptions: list[str]) -> Path:
    """A recipe around a pretrained language model of 128 positions, with these labels and descriptions."""
    (folder / "labels.yaml").write_text(yaml.safe_dump(labels))
    (folder / "own.csv").write_text("caption\n" + "\n".join(descriptions) + "\n")
    source = {"reader": "csv", "path": str(folder / "own.csv"), "columns": {"caption": "caption"}}
    fields = {"language_model": str(parts / "language-model"), "mixture": {"sources": [source]}, "held_out": 0}
    fields |= {"memory_size": 0, "max_steps": 2, "hard_prompts": {"labels": "labels.yaml", "count": count}}
    return write_recipe(folder, "adapted", **{**ADAPTED, **fields})


def test_rows_must_have_room_for_the_longest_prompt(parts, tmp_path):
    """A row that fits by itself, and with the short label that it may get, but not with the long one."""
    tokenizer = make_chat_tokenizer()
    long, short = "the very long name of a label", "dog"
    kept = len(tokenizer(f"Labels: {long}. ")["input_ids"])
    recipe = adapted(parts, [short, long], 1, tmp_path, [*SENTENCES, "Bang! " * 8])
    message = rf"^1 rows take more .* 'Bang! .*Of the language model's 128 positions, {kept} are kept for the labels"
    with pytest.raises(ValueError, match=message):
        train_mats.main(arguments(parts, recipe, tmp_path / "out"))
    train_mats.main(arguments(parts, recipe, tmp_path / "kept", "--unusable_rows", "drop"))
    record = json.loads((tmp_path / "kept" / "training_record.json").read_text())
    assert record["rows"]["left_out"] == {"special tokens": 0, "too long": 1}
    recipe = adapted(parts, [short], 1, tmp_path, [*SENTENCES, "Bang! " * 8])
    train_mats.main(arguments(parts, recipe, tmp_path / "short"))


@pytest.mark.parametrize(
    ("labels", "count", "error", "says"),
    [
        (["dog", "an <|audio|> book", "<|im_end|>"], 1, ValueError, r"2 labels .* special tokens .* 'an <\|audio\|> b"),
        (["dog"], 2, ValueError, "names 2 labels in each prompt"),
        ([], 1, ValueError, "holds no label"),
        (None, 1, FileNotFoundError, r"labels\.yaml"),
    ],
)
def test_what_is_wrong_with_labels_is_told_before_anything_is_encoded(
    parts, tmp_path, monkeypatch, labels, count, error, says
):
    monkeypatch.setattr(ClapEncoder, "encode_text", no_more)
    recipe = adapted(parts, labels or [], count, tmp_path, SENTENCES)
    if labels is None:
        (tmp_path / "labels.yaml").unlink()
    with pytest.raises(error, match=says):
        train_mats.main(arguments(parts, recipe, tmp_path / "out"))

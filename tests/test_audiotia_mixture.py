"""Mixtures: sources, shares, exclusions, the cache of rows, and the data card that tells what became of everything."""

import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pytest
import yaml

from training.audiotia import mixture as mixture_module
from training.audiotia.card import DataCard
from training.audiotia.examples import EXAMPLE_FEATURES, Example, Turn
from training.audiotia.mixture import ROW_FEATURES, Mixture, build_mixture

MIXTURES = Path(__file__).parent.parent / "training" / "recipes" / "mixtures"
CAPTIONS = {"reader": "audiocaps", "path": "a.csv", "licence": "MIT", "url": "https://example.org"}
QUESTIONS = {"reader": "csv", "name": "questions", "path": "q.csv", "audio_type": "speech"}


@pytest.fixture
def data(tmp_path):
    """A data folder with 400 captions of 200 clips, and 3 questions."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = "".join(f"{n},{n // 2:011d},30,Caption {n % 300}\n" for n in range(400))
    (folder / "a.csv").write_text("audiocap_id,youtube_id,start_time,caption\n" + rows)
    (folder / "q.csv").write_text("description,instruction,answer\n" + "Speech.,Who speaks?,A man\n" * 3)
    return folder


def build(data, *sources, seed=0, **kwargs):
    return build_mixture(Mixture.load({"seed": seed, "sources": list(sources)}), data, data.parent / "cache", **kwargs)


# Examples


def test_turns_of_an_example():
    example = Example("d", "q", "a", "AQA", "sound", "s", further_turns=(Turn("more?", "no"),))
    assert example.turns == (("q", "a"), ("more?", "no"))
    assert example.length == 9
    with pytest.raises(ValueError, match="audio_type is 'noise', expected one of sound, music, speech"):
        Example("d", "q", "a", "AQA", "noise", "s")


def test_features_are_the_fields_of_an_example():
    assert list(EXAMPLE_FEATURES) == list(Example.__dataclass_fields__)
    assert list(ROW_FEATURES) == [*EXAMPLE_FEATURES, "length"]


# Loading and checking


def test_a_mixture_is_a_file_or_a_mapping(data, tmp_path):
    content = {"seed": 3, "sources": [CAPTIONS, QUESTIONS]}
    (tmp_path / "mixtures").mkdir()
    (tmp_path / "mixtures" / "m.yaml").write_text(yaml.safe_dump(content))
    loaded = Mixture.load("mixtures/m.yaml", tmp_path)
    assert loaded == Mixture.load(content, tmp_path / "mixtures") == Mixture.load(tmp_path / "mixtures" / "m.yaml")
    assert [source.name for source in loaded.sources] == ["audiocaps", "questions"]
    loaded.check(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a mapping with a list of sources"),
        ({"sources": []}, "expected a mapping with a list of sources"),
        ({"sources": [CAPTIONS], "sead": 1}, "unknown keys sead; known: seed, sources"),
        ({"sources": ["audiocaps"]}, "A source is 'audiocaps', expected a mapping with the key 'reader'"),
        ({"sources": [{"reader": "audiocap"}]}, "no reader 'audiocap'; known: audiocaps, clotho"),
        ({"sources": [CAPTIONS, CAPTIONS]}, "several sources called audiocaps"),
        ({"sources": [{**CAPTIONS, "share": 0}]}, "'audiocaps' has share 0, expected a number above 0"),
        ({"sources": [{**CAPTIONS, "share": "half"}]}, "has share 'half'"),
    ],
)
def test_mixtures_of_another_form_are_told(content, message):
    with pytest.raises(ValueError, match=message):
        Mixture.load(content)


def test_a_missing_mixture_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such mixture: .*none.yaml"):
        Mixture.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": "none.csv"}, FileNotFoundError, r"No such file: .*none.csv \(path of the source 'audiocaps'\)"),
        ({"path": "*.tsv"}, FileNotFoundError, r"No such file: .*\*.tsv"),
        ({"path": []}, ValueError, "is an empty list"),
        ({"path": 3}, ValueError, "has 3 where the name of a file was expected"),
        ({"exclude": "none.txt"}, FileNotFoundError, r"none.txt \(exclude of the source 'audiocaps'\)"),
        ({"exclude": {"file": "a.csv"}}, ValueError, "expected a file, or path with clip and caption"),
        ({"exclude": {"path": "a.csv", "clip": "ytid"}}, ValueError, "missing: 'ytid'"),
        ({"exclude": "q.csv"}, ValueError, "none of which is known to name clips"),
        ({"path": "q.csv"}, ValueError, "'description', 'instruction', 'answer'; expected 'caption'"),
        ({"answers": "each"}, ValueError, "has the unknown options answers; known: .*path, audio, where"),
        ({"audio_type": "noise"}, ValueError, "audio_type is 'noise', expected one of sound, music, speech"),
        ({"where": ["a"]}, ValueError, "expected values by column"),
        ({"encoding": "utf-16"}, ValueError, r"a.csv is not in utf-16 \(.*\): name its encoding"),
        ({"audio": "{}.wav"}, ValueError, "audio pattern '{}.wav' is malformed"),
    ],
)
def test_a_source_is_checked_before_anything_is_read(data, change, error, message):
    with pytest.raises(error, match=message):
        Mixture.load({"sources": [{**CAPTIONS, **change}]}).check(data)


def test_a_source_without_a_path_is_told(data):
    with pytest.raises(ValueError, match="The source 'audiocaps' lacks the option path"):
        Mixture.load({"sources": [{"reader": "audiocaps"}]}).check(data)


def test_all_problems_are_told_at_once(data):
    sources = [{**CAPTIONS, "path": "none.csv"}, QUESTIONS, {"reader": "clotho", "path": "neither.csv"}]
    with pytest.raises(FileNotFoundError, match=r"2 of 3 sources cannot be read:\n.*none.csv.*\n.*neither.csv"):
        Mixture.load({"sources": sources}).check(data)


def test_the_committed_mixtures_are_well_formed(tmp_path):
    for path in MIXTURES.glob("*.yaml"):
        mixture = Mixture.load(path)
        # Nothing but the data is missing: every option is known.
        with pytest.raises(FileNotFoundError):
            mixture.check(tmp_path)
    assert len(Mixture.load(MIXTURES / "audiotia.yaml").sources) == 24


def test_options_of_a_source_can_be_added(data):
    mixture = Mixture.load({"sources": [CAPTIONS, QUESTIONS]})
    more = mixture.with_options("audiocaps", audio="{youtube_id}.flac")
    assert next(more.examples(data)).audio == "00000000000.flac"
    assert next(mixture.examples(data)).audio == "00000000000_30.wav"
    with pytest.raises(ValueError, match="no source 'clotho'; the mixture has audiocaps, questions"):
        mixture.with_options("clotho")


# Rows


def test_rows_come_as_the_sources_do(data):
    rows, card = build(data, CAPTIONS, QUESTIONS, batch_size=7)
    assert rows.features == ROW_FEATURES
    assert rows.cache_files  # memory-mapped
    assert rows["source"] == ["audiocaps"] * 400 + ["questions"] * 3
    assert rows["description"][:2] == ["Caption 0", "Caption 1"]
    assert rows[400] == {
        "description": "Speech.",
        "instruction": "Who speaks?",
        "answer": "A man",
        "task": "AQA",
        "audio_type": "speech",
        "source": "questions",
        "audio": None,
        "further_turns": [],
        "length": 16,
    }
    assert card.rows == 403


def test_conversations_keep_their_turns(data):
    talk = [{"from": s, "value": f"{s} {n}"} for n in range(2) for s in ("human", "gpt")]
    (data / "m.json").write_text(json.dumps([{"audio_name": "1.wav", "conversation": talk, "caption": "Rock."}]))
    rows, _ = build(data, {"reader": "musicqa", "path": "m.json"})
    assert rows[0]["further_turns"] == [{"instruction": "human 1", "answer": "gpt 1"}]
    assert rows[0]["length"] == len("human 0gpt 0human 1gpt 1")


def test_paths_are_lists_and_globs(data):
    rows, _ = build(data, {**CAPTIONS, "path": ["a.csv", "a*.csv"]})
    assert len(rows) == 800


def test_shares_are_drawn_by_seed(data):
    half, card = build(data, {**CAPTIONS, "share": 0.5})
    assert 150 < len(half) < 250
    assert (card.sources[0].read, card.sources[0].taken) == (400, len(half))
    assert half["description"] == build(data, QUESTIONS, {**CAPTIONS, "share": 0.5}).dataset["description"][3:]
    assert half["description"] != build(data, {**CAPTIONS, "share": 0.5}, seed=1).dataset["description"]
    assert (
        build(data, {**CAPTIONS, "share": 0.5}, seed=1).dataset.to_dict()
        == (
            build_mixture(Mixture.load({"sources": [{**CAPTIONS, "share": 0.5}]}), data, data.parent / "other", seed=1)
        ).dataset.to_dict()
    )


def test_shares_above_one_repeat_rows(data):
    rows, card = build(data, {**CAPTIONS, "share": 2.25})
    counts = Counter(Counter(zip(rows["audio"], rows["description"], strict=True)).values())
    assert set(counts) == {2, 3}
    assert 50 < counts[3] < 150
    assert card.distinct_descriptions == 300


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt", "Y00000000003.wav\ntest/00000000005_30.flac\nnot_there.wav\n"),
        ("t.csv", "youtube_id,start\n00000000003,1\n00000000005,2\nnot_there,3\n"),
        ("t.json", json.dumps({"AudioSet": ["Y00000000003.wav", "00000000005"], "FreeSound": ["not_there"]})),
    ],
)
def test_test_clips_stay_out(data, name, content):
    (data / name).write_text(content)
    rows, card = build(data, {**CAPTIONS, "exclude": name})
    assert len(rows) == 396
    assert not {"00000000003_30.wav", "00000000005_30.wav"} & set(rows["audio"])
    source = card.sources[0]
    assert (source.read, source.excluded, source.taken) == (400, 4, 396)
    assert (source.exclusion_names, source.exclusion_names_unmatched) == (3, 1)
    assert source.unmatched_examples == ["not_there.wav" if name == "t.txt" else "not_there"]
    assert "1 of 3 names to exclude are not in the source, such as not_there" in card.to_markdown()


def test_several_exclusion_lists(data):
    (data / "a.txt").write_text("00000000003\n")
    (data / "b.csv").write_text("n,which\n1,00000000004\n")
    rows, _ = build(data, {**CAPTIONS, "exclude": ["a.txt", {"path": "b.csv", "clip": "which"}]})
    assert len(rows) == 396


def test_a_mixture_without_rows_is_an_error(data):
    (data / "t.csv").write_text("youtube_id\n" + "".join(f"{n:011d}\n" for n in range(200)))
    with pytest.raises(ValueError, match=r"not a single row\. audiocaps: not one of 400 rows was taken"):
        build(data, {**CAPTIONS, "exclude": "t.csv"})
    assert os.listdir(data.parent / "cache") == []


def test_label_combinations_are_counted_before_they_are_described(data):
    rows = "filename,category\n1.wav,dog_bark\n2.wav,dog_bark\n3.wav,siren\n"
    (data / "e.csv").write_text(rows)
    mixture = Mixture.load({"sources": [{"reader": "esc50", "path": "e.csv", "descriptions": "none.jsonl"}, CAPTIONS]})
    assert mixture.label_combinations(data, "esc50") == {("dog bark",): 2, ("siren",): 1}
    with pytest.raises(ValueError, match="'audiocaps' is no source with labels; the mixture has esc50"):
        mixture.label_combinations(data, "audiocaps")


# The cache


def test_a_second_run_reads_the_cache(data, monkeypatch):
    first = build(data, CAPTIONS)
    monkeypatch.setattr(mixture_module, "_write", None)
    second = build(data, CAPTIONS)
    assert second.dataset.to_dict() == first.dataset.to_dict()
    assert second.card == first.card


@pytest.mark.parametrize("change", ["option", "seed", "file", "exclude"])
def test_other_content_is_another_cache(data, change):
    (data / "t.txt").write_text("00000000003\n")
    source, seed = {**CAPTIONS, "exclude": "t.txt"}, 0
    build(data, source)
    if change == "option":
        source["audio_type"] = "music"
    elif change == "seed":
        seed = 1
    else:
        path = data / ("a.csv" if change == "file" else "t.txt")
        times = path.stat()
        path.write_text(path.read_text().replace("3", "4"))
        os.utime(path, (times.st_atime, times.st_mtime))  # content counts, not the clock
    build(data, source, seed=seed)
    assert len(os.listdir(data.parent / "cache")) == 2


def test_the_cache_does_not_depend_on_where_the_data_lie(data, tmp_path):
    first = build(data, CAPTIONS).dataset.cache_files
    moved = tmp_path / "moved"
    data.rename(moved)
    assert build(moved, CAPTIONS).dataset.cache_files == first


def test_an_interrupted_run_leaves_nothing_that_is_taken_for_whole(data, monkeypatch):
    def interrupted(*args, write=mixture_module.ArrowWriter.write_batch):
        write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mixture_module.ArrowWriter, "write_batch", interrupted)
        build(data, CAPTIONS, batch_size=100)
    assert os.listdir(data.parent / "cache") == []
    assert len(build(data, CAPTIONS).dataset) == 400


def test_another_process_may_be_faster(data, monkeypatch):
    def rename(source, target, first=os.rename):
        first(source, target)
        raise OSError("Directory not empty")

    monkeypatch.setattr(mixture_module.os, "rename", rename)
    assert len(build(data, CAPTIONS).dataset) == 400


def test_malformed_rows_stop_the_run(data):
    with (data / "a.csv").open("a") as file:
        file.write("1,2,3,4,5,6\n")
    with pytest.raises(ValueError, match="line 402, has 6 fields, expected 4"):
        build(data, CAPTIONS)
    assert os.listdir(data.parent / "cache") == []


# The data card


def test_the_data_card(data):
    (data / "q.csv").write_text("description,instruction,answer\nS.,Who?,A man\n,Who?,A dog\nS.,Who?,\nS.,Why?,So\n")
    card = build(data, {**CAPTIONS, "share": 0.5}, {**QUESTIONS, "where": {"instruction": "who?"}}).card
    taken = card.sources[0].taken
    assert card.to_dict()["totals"] == {"CAP": {"sound": taken}, "AQA": {"speech": 1}}
    assert card.rows == taken + 1
    questions = card.sources[1]
    assert (questions.read, questions.not_selected, questions.incomplete, questions.without_description) == (4, 1, 1, 1)
    assert questions.taken == questions.distinct_descriptions == 1
    assert card.distinct_descriptions == card.sources[0].distinct_descriptions + 1
    assert DataCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    assert str(data) not in json.dumps(card.to_dict())

    markdown = card.to_markdown()
    assert f"| audiocaps | CAP | sound | 400 | 0 | 0 | 0 | 0 | 0.5 | {taken} |" in markdown
    assert "| questions | AQA | speech | 4 | 1 | 1 | 1 | 0 | 1 | 1 | 1 |" in markdown
    assert "| AQA | speech | 1 |" in markdown
    assert "| audiocaps | MIT | https://example.org |" in markdown
    assert "| questions | not stated |  |" in markdown
    assert "1 of 4 rows have no description" in markdown


def test_what_was_left_out_is_warned_of(data, monkeypatch):
    (data / "q.csv").write_text("description,instruction,answer\nS.,Who?,A man\n,Who?,A dog\n")
    warnings = []
    monkeypatch.setattr(mixture_module.logger, "warning", warnings.append)
    build(data, QUESTIONS)
    assert warnings == ["questions: 1 of 2 rows have no description and were left out."]


def test_rows_are_a_plain_dataset(data):
    rows, _ = build(data, CAPTIONS)
    assert isinstance(rows, datasets.Dataset)
    assert rows.shuffle(seed=0).select(range(3))["task"] == ["CAP"] * 3

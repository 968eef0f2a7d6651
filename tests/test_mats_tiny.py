"""The bundled model, end to end on real sound: what a newcomer meets."""

import csv
import filecmp
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MATS_TINY, SOUNDS

from evaluation.label_folder import encode_clips, judge, names_source, read_labels, summarise
from hub_cards.card import write_card
from hub_cards.export import export_checkpoint
from modeling_mats import MatsForConditionalGeneration
from processing_mats import AudioTextToTextPipeline, MatsProcessor, load_audio

QUESTION = "What is making this sound?"


@pytest.fixture(scope="module")
def pipe():
    model = MatsForConditionalGeneration.from_pretrained(MATS_TINY)
    return AudioTextToTextPipeline(model=model, processor=MatsProcessor.from_pretrained(MATS_TINY))


@pytest.fixture(scope="module")
def clips():
    return read_labels(SOUNDS)


@pytest.fixture(scope="module")
def judgements(pipe, clips):
    return judge(pipe, clips, encode_clips(pipe, SOUNDS, clips))


def test_it_is_small_enough_to_carry():
    assert sum(path.stat().st_size for path in MATS_TINY.rglob("*") if path.is_file()) <= 80e6


def test_the_example_clips_were_trained_on_by_nothing(clips):
    with (MATS_TINY / "credits.csv").open(newline="", encoding="utf-8") as file:
        trained_on = {Path(row["file_name"]).name for row in csv.DictReader(file)}
    with (SOUNDS / "metadata.csv").open(newline="", encoding="utf-8") as file:
        originals = {row["original"] for row in csv.DictReader(file)}
    assert len(originals) == 10
    assert not originals & trained_on
    # Freesound ids do not cross the folds of ESC-10, so neither does another take of the same recording.
    ids = {name.split("-")[1] for name in originals}
    assert not {name.split("-")[1] for name in trained_on if name.count("-") == 2 and name[0].isdigit()} & ids


def test_it_names_the_source_of_most_example_sounds(judgements):
    figures = summarise(judgements)
    assert figures["named"] >= 0.7, [(j.label, j.answer) for j in judgements]
    assert figures["matched"] >= 0.7, [(j.label, j.matched) for j in judgements]


def test_it_listens(pipe, clips):
    """The answer follows the sound, not the question."""
    answers = {label: pipe(SOUNDS / name, text=QUESTION)["generated_text"] for name, label in clips}
    assert len(set(answers.values())) >= 6
    by_other_sound = sum(
        names_source(answers[label], other) for label in answers for other in answers if other != label
    )
    by_own_sound = sum(names_source(answers[label], label) for label in answers)
    assert by_own_sound > 3 * by_other_sound


def test_the_instruction_decides_the_form(pipe):
    rooster = SOUNDS / "rooster.ogg"
    label = pipe(rooster, text="Classify events in the audio clip.")["generated_text"]
    yes_no = pipe(rooster, text="Is this music?")["generated_text"]
    assert not label.endswith(".")
    assert yes_no.startswith("No")


def test_answers_do_not_depend_on_batch_order_or_run(pipe, clips):
    rows = [{"audio": SOUNDS / name, "text": question} for name, _ in clips for question in (QUESTION, "Describe.")]
    single = [pipe(row)["generated_text"] for row in rows]
    assert [record["generated_text"] for record in pipe(rows, batch_size=7)] == single
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = pipe([rows[i] for i in order], batch_size=5)
    assert [record["generated_text"] for record in shuffled] == [single[i] for i in order]
    assert [pipe(row)["generated_text"] for row in rows] == single


def test_embeddings_do_not_depend_on_batch_or_company(pipe, clips):
    clap = pipe.processor.clap
    waves = [load_audio(SOUNDS / name, clap.sampling_rate) for name, _ in clips]
    waves += [np.tile(waves[0], 3), waves[1][:2000]]
    alone = torch.cat([clap.encode_audio([wave]) for wave in waves])
    torch.testing.assert_close(clap.encode_audio(waves, batch_size=5), alone, atol=1e-5, rtol=0)


def test_stereo_and_another_rate_are_the_same_sound(pipe):
    import soxr

    clap = pipe.processor.clap
    wave = load_audio(SOUNDS / "rooster.ogg", clap.sampling_rate)
    stereo = np.stack([soxr.resample(wave, clap.sampling_rate, 44100)] * 2)
    one, other = pipe.processor.encode_audio([(wave, clap.sampling_rate), (stereo, 44100)])
    assert torch.dot(one, other) > 0.98


def test_the_evidence_comes_from_the_memory(pipe):
    record = pipe(SOUNDS / "rooster.ogg", text=QUESTION, return_evidence=True)
    assert record["santa"][0]["text"] in pipe.processor.santa_memory.texts
    assert sum(entry["weight"] for entry in record["santa"]) == pytest.approx(1, abs=1e-5)


def test_the_card_is_what_the_records_say(tmp_path):
    for path in [*MATS_TINY.glob("*.json"), *MATS_TINY.glob("*.csv")]:
        shutil.copy(path, tmp_path)
    card = write_card(tmp_path).read_text(encoding="utf-8")
    assert card == (MATS_TINY / "README.md").read_text(encoding="utf-8")
    assert "\npipeline_tag: audio-text-to-text\n" in card
    assert "\nlicense: apache-2.0\n" in card
    for picture in re.findall(r"\]\((\w+\.png)\)", card):
        assert (MATS_TINY / picture).is_file()


def test_it_tells_sounds_that_nothing_was_trained_on():
    """As recorded when it was made; `make mats-tiny` measures it."""
    results = json.loads((MATS_TINY / "results.json").read_text(encoding="utf-8"))
    assert results["esc10"]["settings"]["full"]["matched"] >= 0.8
    packages = results["packages"]
    assert packages["settings"]["full"]["matched"] >= 5 * packages["clap"]["chance"]


def test_its_memory_and_its_records_are_of_its_clap(pipe):
    fingerprint = pipe.processor.clap.fingerprint
    assert pipe.processor.santa_memory.clap_fingerprint == fingerprint
    training = json.loads((MATS_TINY / "training_record.json").read_text(encoding="utf-8"))
    gap = json.loads((MATS_TINY / "gap.json").read_text(encoding="utf-8"))
    assert training["clap_fingerprint"] == gap["settings"]["clap_fingerprint"] == fingerprint


def test_its_code_is_this_packages(tmp_path):
    """After a change of the packages: `mats export hub_cards/mats-tiny hub_cards/mats-tiny --force`."""
    exported = export_checkpoint(MATS_TINY, tmp_path / "again")
    names = sorted(path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(MATS_TINY).as_posix() for path in MATS_TINY.rglob("*") if path.is_file())
    _, different, unreadable = filecmp.cmpfiles(MATS_TINY, exported, names, shallow=False)
    assert not different and not unreadable

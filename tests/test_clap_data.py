"""The clips, texts and batches of the small CLAP, on generated tones, rendered music and the shipped descriptions."""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from test_music import write_soundfont
from torch.utils.data import DataLoader

from processing_mats.feature_extraction_msclap import MsClapFeatureExtractor
from training.clap_data import (
    METADATA_COLUMNS,
    Augmentation,
    Descriptions,
    Music,
    PairedBatches,
    add_noise,
    change_speed,
    equalise,
    fill_window,
    join_texts,
    level,
    mask,
    mix,
    read_clips,
    sampling_weights,
    split_clips,
    write_credits,
)
from training.music import Composer, Instrument, Instruments, Synthesizer

RATE = 8000
DESCRIPTIONS = Path("training/mats_tiny/descriptions.yaml")
ROWS = [
    # file_name, label, group, licence, source, hertz, seconds
    ("a.wav", "low", "tones-fold1", "CC0", "tone-box 1.2 low/a.wav", 200, 1.0),
    ("b.wav", "low", "tones-fold2", "CC BY", "tone-box 1.2 low/b.wav", 210, 0.2),
    ("c.wav", "deep", "other", "GPL-2+/CC-BY-SA-4.0", "basses-data 0.9 c.wav", 190, 3.0),
    ("d.wav", "high", "tones-fold1", "CC0", "tone-box 1.2 high/d.wav", 2000, 1.0),
    ("e.wav", "high", "other", "GPL-2", "whistles 3.0 e.wav", 2100, 1.0),
    ("f.wav", "low", "tones-fold4", "CC0", "tone-box 1.2 low/f.wav", 205, 1.0),
    ("g.wav", "high", "tones-fold4", "CC0", "tone-box 1.2 high/g.wav", 2050, 2.5),
    ("h.wav", "low", "other", "GPL-2", "far-tones 2.4 h.wav", 220, 1.5),
    ("i.wav", "high", "other", "CC0", "far-tones 2.4 i.wav", 1950, 1.0),
]
VALIDATION = {"validation_group": "tones-fold4", "validation_packages": ["far-tones"], "exclude_licences": ["GPL-2"]}
TEXTS = {"low": ["A low tone."], "deep": ["A deep tone."], "high": ["A high tone.", "A shrill tone."]}
INSTRUMENTS = Instruments(
    {"organ": Instrument([0], [57, 69]), "flute": Instrument([0], [57, 69])},
    {"kick drum": [36], "snare drum": [38], "hi-hat": [42]},
    "drum kit",
)
PHRASES = {label: f"an {label}" if label == "organ" else f"a {label}" for label in INSTRUMENTS.labels}
OFF = dict.fromkeys(
    ("mix_probability", "speed", "gain", "equaliser", "noise_probability", "time_masks", "mel_masks"), 0
)


def write_tones(folder: Path) -> Path:
    """An audiofolder of `ROWS`."""
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(METADATA_COLUMNS)
        for name, label, group, licence, source, hertz, seconds in ROWS:
            time = np.arange(int(seconds * RATE)) / RATE
            sf.write(folder / name, 0.5 * np.sin(2 * np.pi * hertz * time), RATE)
            writer.writerow([name, label, f"One {label} tone." if name == "a.wav" else "", group, licence, source])
    return folder


@pytest.fixture
def sounds(tmp_path):
    return write_tones(tmp_path)


@pytest.fixture
def descriptions():
    return Descriptions(TEXTS, [["low", "deep"]])


@pytest.fixture
def extractor():
    return MsClapFeatureExtractor(
        feature_size=16,
        sampling_rate=RATE,
        mel_sampling_rate=RATE,
        window_seconds=1.0,
        fft_window_size=256,
        hop_length=128,
        frequency_max=4000,
    )


@pytest.fixture
def music(tmp_path):
    """Of `INSTRUMENTS`, half of the rows."""
    pytest.importorskip("tinysoundfont")
    synthesizer = Synthesizer(write_soundfont(tmp_path / "sine.sf2"), RATE)
    return Music(Composer(INSTRUMENTS, PHRASES), synthesizer, share=0.5, licence="CC0")


@pytest.fixture
def heard():
    """What one hears of tones and of instruments."""
    return Descriptions(TEXTS | {label: [f"Sound of the {label}."] for label in INSTRUMENTS.labels}, [["low", "deep"]])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def batches(sounds, descriptions, extractor, **kwargs):
    clips, *_ = split_clips(read_clips(sounds), **VALIDATION)
    arguments = {"steps": 3, "batch_size": 16, "seed": 0, "augmentation": Augmentation(), **kwargs}
    return PairedBatches(clips, descriptions, extractor, **arguments)


def credits_of(sounds, path, music=None):
    training, *_ = split_clips(read_clips(sounds), **VALIDATION)
    write_credits(training, sounds, path, music)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_validation_and_excluded_licences_stay_out_of_the_training_rows(sounds):
    # A package is held out whole, whatever its licence; without one it is trained on.
    for packages, expected in ((["far-tones"], ("abcd", "fg", "hi")), ([], ("abcdi", "fg", ""))):
        parts = split_clips(read_clips(sounds), **VALIDATION | {"validation_packages": packages})
        assert tuple("".join(clip.path.stem for clip in part) for part in parts) == expected
    training, group, packages = split_clips(read_clips(sounds), "tones-fold4", ["tone-box"])
    assert not {clip.package for clip in training} & {"tone-box"}
    assert "".join(clip.path.stem for clip in packages) == "abdfg" and set(group) <= set(packages)


def test_a_validation_group_that_no_clip_has_is_an_error(sounds):
    with pytest.raises(ValueError, match=r"No clip is of the group 'fold9'.*tones-fold1"):
        split_clips(read_clips(sounds), "fold9")


def test_validation_packages_that_no_clip_has_are_an_error(sounds):
    with pytest.raises(ValueError, match=r"No clip is of the packages far, tone\."):
        split_clips(read_clips(sounds), "tones-fold4", ["tone", "far-tones", "far"])


def test_a_folder_without_metadata_or_with_other_columns_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no metadata\.csv"):
        read_clips(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,label\nx.wav,tone\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['caption', 'group', 'licence', 'source'\]"):
        read_clips(tmp_path)


def test_credits_name_every_training_clip(sounds, tmp_path):
    rows = credits_of(sounds, tmp_path / "credits.csv")
    assert [row["file_name"] for row in rows] == ["a.wav", "b.wav", "c.wav", "d.wav"]
    assert rows[2] == {
        "file_name": "c.wav",
        "label": "deep",
        "licence": "GPL-2+/CC-BY-SA-4.0",
        "source": "basses-data 0.9 c.wav",
    }


def test_credits_name_every_rendered_instrument(sounds, music, tmp_path):
    clips, rows = credits_of(sounds, tmp_path / "a.csv"), credits_of(sounds, tmp_path / "b.csv", music)
    assert rows[: len(clips)] == clips
    assert [row["label"] for row in rows[len(clips) :]] == INSTRUMENTS.labels
    assert rows[-1] == {
        "file_name": "rendered/drum kit",
        "label": "drum kit",
        "licence": "CC0",
        "source": "rendered from sine.sf2 by TinySoundFont",
    }


def test_synonyms_are_one_concept_and_share_their_texts(descriptions):
    assert descriptions.concept("deep") == descriptions.concept("low") == "low"
    assert descriptions.of("deep") == ["A low tone.", "A deep tone."]
    assert len(descriptions) == 2
    with pytest.raises(ValueError, match="'shrill' has no descriptions"):
        descriptions.of("shrill")
    with pytest.raises(ValueError, match=r"Synonyms without a description: \['basso'\]"):
        Descriptions({"low": ["A low tone."]}, [["low", "basso"]])


def test_shipped_descriptions_are_sentences():
    descriptions = Descriptions.from_yaml(DESCRIPTIONS)
    sentences = [sentence for texts in descriptions.texts.values() for sentence in texts]
    assert len(descriptions) > 150
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in sentences)
    assert all(len(texts) >= 6 for texts in descriptions.texts.values())


def test_no_shipped_sentence_describes_two_labels():
    counts = Counter(text for texts in Descriptions.from_yaml(DESCRIPTIONS).texts.values() for text in texts)
    assert {text for text, count in counts.items() if count > 1} == set()


@pytest.mark.parametrize("samples", [1, 50, 800, 1000, 5000])
def test_a_window_is_always_full_and_finite(samples, rng):
    waveform = rng.standard_normal(samples).astype(np.float32)
    for _ in range(20):
        window = fill_window(add_noise(change_speed(waveform, 0.3, rng), -20, rng), 1000, rng)
        assert window.shape == (1000,) and window.dtype == np.float32
        assert np.isfinite(window).all()


def test_speed_changes_length_and_pitch_together(rng):
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    lengths, pitches = [], []
    for _ in range(20):
        changed = change_speed(tone, 0.25, rng)
        lengths.append(len(changed))
        pitches.append(np.abs(np.fft.rfft(changed)).argmax() / len(changed) * RATE)
    assert min(lengths) >= RATE / 1.25 - 1 and max(lengths) <= RATE * 1.25 + 1
    assert np.allclose(np.multiply(lengths, pitches), 440 * RATE, rtol=0.01)


def test_a_mixture_holds_the_second_at_the_level_asked_for(rng):
    loud, quiet = rng.standard_normal(8000), rng.standard_normal(8000) / 100
    mixture = mix(loud, quiet, decibels=-6.0)
    assert level(mixture - loud) == pytest.approx(level(loud) * 10 ** (-6 / 20), rel=1e-6)
    silence = np.zeros(100)
    assert np.isfinite(mix(silence, silence, 0.0)).all()


def test_masks_and_equaliser_keep_the_shape(rng):
    log_mel = torch.randn(101, 16) * 20 - 40
    masked = mask(log_mel, axis=0, count=2, longest=0.2, rng=rng)
    changed = (masked != log_mel).any(-1)
    assert masked.shape == log_mel.shape and 0 < changed.sum() <= 40
    assert torch.equal(masked[~changed], log_mel[~changed])
    assert equalise(log_mel, 6.0, 9.0, rng).sub(log_mel).abs().max() <= 15.0


def test_a_batch_depends_on_seed_and_step_alone(sounds, descriptions, extractor):
    first, again = (batches(sounds, descriptions, extractor) for _ in range(2))
    again[0]  # what was drawn before does not matter
    assert torch.equal(first[1]["input_features"], again[1]["input_features"])
    assert first[1]["texts"] == again[1]["texts"]
    assert first[1]["texts"] != first[2]["texts"]
    other = batches(sounds, descriptions, extractor, seed=1)
    assert not torch.equal(first[1]["input_features"], other[1]["input_features"])


def test_texts_and_concepts_belong_to_what_is_heard(sounds, descriptions, extractor):
    batch = batches(sounds, descriptions, extractor, augmentation=Augmentation(mix_probability=0.5))[0]
    assert batch["input_features"].shape == (16, 1, 63, 16)
    assert torch.isfinite(batch["input_features"]).all()
    low = torch.tensor([any(word in text.lower() for word in ("low", "deep")) for text in batch["texts"]])
    high = torch.tensor([any(word in text.lower() for word in ("high", "shrill")) for text in batch["texts"]])
    assert torch.equal(batch["concepts"].bool(), torch.stack([low, high], dim=1))


def test_without_augmentation_a_full_window_is_only_turned(sounds, descriptions, extractor):
    data = batches(sounds, descriptions, extractor, augmentation=Augmentation(**OFF))
    peaks = data[0]["input_features"].squeeze(1).mean(1).argmax(-1)  # the loudest mel bin of each clip
    high = data[0]["concepts"][:, 1].bool()
    assert len(set(peaks[high].tolist())) == 1 and len(set(peaks[~high].tolist())) == 1


def concepts_told(text: str) -> set[str]:
    """The tones and the instruments that a text names."""
    words = {"low": "(low|deep) tone", "high": "(high|shrill) tone", "drum kit": "drum (kit|beat)|drums"}
    words |= {label: label for label in INSTRUMENTS.labels if label not in words}
    return {concept for concept, pattern in words.items() if re.search(pattern, text, re.IGNORECASE)}


def concepts_marked(batch: dict, descriptions: Descriptions) -> list[set[str]]:
    return [{descriptions.concepts[place] for place in row.nonzero().flatten()} for row in batch["concepts"]]


def test_pieces_have_their_share_of_the_rows(sounds, heard, extractor, music):
    for share in (0.0, 0.3, 1.0):
        music = Music(music.composer, music.synthesizer, share, music.licence)
        batch = batches(sounds, heard, extractor, batch_size=300, augmentation=Augmentation(**OFF), music=music)[0]
        assert batch["input_features"].shape[0] == len(batch["texts"]) == 300
        pieces = sum(bool(row & set(INSTRUMENTS.labels)) for row in concepts_marked(batch, heard))
        assert pieces / 300 == pytest.approx(share, abs=0.08 if 0 < share < 1 else 0)


@pytest.mark.parametrize("mix_probability", [0.0, 0.5, 1.0])
def test_concepts_are_all_instruments_and_clips_that_are_told(sounds, heard, extractor, music, mix_probability):
    augmentation = Augmentation(mix_probability=mix_probability)
    batch = batches(sounds, heard, extractor, batch_size=100, augmentation=augmentation, music=music)[0]
    assert torch.isfinite(batch["input_features"]).all()
    marked = concepts_marked(batch, heard)
    assert marked == [concepts_told(text) for text in batch["texts"]]
    pieces = [row & set(INSTRUMENTS.labels) for row in marked]
    assert {len(row) for row in pieces} == {0, 1, 2}
    clips = [row - instruments for row, instruments in zip(marked, pieces, strict=True)]
    mixed = sum(bool(piece and clip) for piece, clip in zip(pieces, clips, strict=True))
    assert mixed == 0 if mix_probability == 0 else mixed > 10
    # A second clip may be of the first one's label; to a piece it is always new.
    assert mix_probability < 1 or all(clips)


def test_a_piece_with_a_single_part_is_also_told_as_a_clip_is(sounds, heard, extractor, music):
    music = Music(music.composer, music.synthesizer, 1.0, music.licence)
    batch = batches(sounds, heard, extractor, batch_size=200, augmentation=Augmentation(**OFF), music=music)[0]
    as_clips = [text.startswith("Sound of the ") for text in batch["texts"]]
    alone = [len(row) == 1 for row in concepts_marked(batch, heard)]
    assert all(one for one, as_clip in zip(alone, as_clips, strict=True) if as_clip)
    assert sum(as_clips) / sum(alone) == pytest.approx(0.3, abs=0.1)


def test_a_piece_mixed_with_a_clip_holds_both(sounds, heard, extractor, music):
    music = Music(music.composer, music.synthesizer, 1.0, music.licence)
    augmentation = Augmentation(**{**OFF, "mix_probability": 1.0})
    batch = batches(sounds, heard, extractor, batch_size=40, augmentation=augmentation, music=music)[0]
    peaks = batch["input_features"].squeeze(1).amax(1)  # loudest moment of each mel bin, in dB
    # Pieces sound below 900 Hz, the high clip at 2000 Hz.
    deep, shrill = peaks[:, :7].amax(1), peaks[:, 9:].amax(1)
    high = batch["concepts"][:, heard.concepts.index("high")].bool()
    assert 10 < high.sum() < 30
    assert (deep - shrill)[high].abs().max() < 25
    assert (deep - shrill)[~high].min() > 25


def test_a_batch_with_music_depends_on_seed_and_step_alone(sounds, heard, extractor, music):
    first, again, other = (batches(sounds, heard, extractor, music=music, seed=seed)[1] for seed in (0, 0, 1))
    assert first["texts"] == again["texts"] and torch.equal(first["concepts"], again["concepts"])
    assert first["texts"] != other["texts"]


def test_the_sound_of_a_batch_with_music_depends_on_seed_and_step_alone(sounds, heard, extractor, music):
    first, again = (batches(sounds, heard, extractor, music=music) for _ in range(2))
    again[0]  # what was rendered before does not matter
    assert torch.equal(first[1]["input_features"], again[1]["input_features"])


def test_a_worker_renders_what_the_process_itself_would(sounds, heard, extractor, music):
    def fresh():
        synthesizer = Synthesizer(music.synthesizer.soundfont, RATE)
        return batches(sounds, heard, extractor, music=Music(music.composer, synthesizer, 1.0, music.licence))

    data = fresh()
    for step, batch in enumerate(DataLoader(fresh(), batch_size=None, num_workers=1)):
        expected = data[step]
        assert batch["texts"] == expected["texts"]
        assert torch.equal(batch["input_features"], expected["input_features"])
    assert step == len(data) - 1


def test_music_that_cannot_be_is_refused_before_a_batch(sounds, descriptions, heard, extractor, music):
    with pytest.raises(ValueError, match="'organ' has no descriptions"):
        batches(sounds, descriptions, extractor, music=music)
    other = Music(music.composer, Synthesizer(music.synthesizer.soundfont, 2 * RATE), 0.5, "CC0")
    with pytest.raises(ValueError, match="rendered at 16000 Hz, the feature extractor expects 8000 Hz"):
        batches(sounds, heard, extractor, music=other)
    with pytest.raises(ValueError, match=r"share of music is 1\.5, expected 0 to 1"):
        Music(music.composer, music.synthesizer, 1.5, "CC0")


def test_favoured_groups_get_their_share_and_rare_concepts_are_lifted(sounds, descriptions):
    clips = read_clips(sounds)
    weights = sampling_weights(clips, descriptions, "tones", 0.6)
    share = dict(zip((clip.path.name for clip in clips), weights, strict=True))
    assert sum(weights) == pytest.approx(1)
    assert sum(share[name] for name in ("a.wav", "b.wav", "d.wav", "f.wav", "g.wav")) == pytest.approx(0.6)
    assert share["a.wav"] + share["b.wav"] + share["f.wav"] == pytest.approx(share["d.wav"] + share["g.wav"])


def test_joined_texts_read_as_one_sentence():
    assert join_texts("A dog barks.", "Rain falls.", "{a} while {b}.") == "A dog barks while rain falls."

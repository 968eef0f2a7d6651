"""The clips, texts and batches of the small CLAP, on generated tones and on the shipped descriptions."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from processing_mats.feature_extraction_msclap import MsClapFeatureExtractor
from training.clap_data import (
    METADATA_COLUMNS,
    Augmentation,
    Descriptions,
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

RATE = 8000
DESCRIPTIONS = Path("training/mats_tiny/descriptions.yaml")
ROWS = [
    # file_name, label, group, licence, hertz, seconds
    ("a.wav", "low", "tones-fold1", "CC0", 200, 1.0),
    ("b.wav", "low", "tones-fold2", "CC BY", 210, 0.2),
    ("c.wav", "deep", "other", "GPL-2+/CC-BY-SA-4.0", 190, 3.0),
    ("d.wav", "high", "tones-fold1", "CC0", 2000, 1.0),
    ("e.wav", "high", "other", "GPL-2", 2100, 1.0),
    ("f.wav", "low", "tones-fold4", "CC0", 205, 1.0),
    ("g.wav", "high", "tones-fold4", "CC0", 2050, 2.5),
]


def write_tones(folder: Path) -> Path:
    """An audiofolder of `ROWS`."""
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(METADATA_COLUMNS)
        for name, label, group, licence, hertz, seconds in ROWS:
            time = np.arange(int(seconds * RATE)) / RATE
            sf.write(folder / name, 0.5 * np.sin(2 * np.pi * hertz * time), RATE)
            writer.writerow([name, label, f"One {label} tone." if name == "a.wav" else "", group, licence, "generated"])
    return folder


@pytest.fixture
def sounds(tmp_path):
    return write_tones(tmp_path)


@pytest.fixture
def descriptions():
    texts = {"low": ["A low tone."], "deep": ["A deep tone."], "high": ["A high tone.", "A shrill tone."]}
    return Descriptions(texts, [["low", "deep"]])


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
def rng():
    return np.random.default_rng(0)


def batches(sounds, descriptions, extractor, **kwargs):
    clips, _ = split_clips(read_clips(sounds), "tones-fold4", ["GPL-2"])
    arguments = {"steps": 3, "batch_size": 16, "seed": 0, "augmentation": Augmentation(), **kwargs}
    return PairedBatches(clips, descriptions, extractor, **arguments)


def test_validation_and_excluded_licences_stay_out_of_the_training_rows(sounds):
    training, validation = split_clips(read_clips(sounds), "tones-fold4", ["GPL-2"])
    assert [clip.path.name for clip in training] == ["a.wav", "b.wav", "c.wav", "d.wav"]
    assert [clip.path.name for clip in validation] == ["f.wav", "g.wav"]


def test_a_validation_group_that_no_clip_has_is_an_error(sounds):
    with pytest.raises(ValueError, match=r"No clip is of the group 'fold9'.*tones-fold1"):
        split_clips(read_clips(sounds), "fold9")


def test_a_folder_without_metadata_or_with_other_columns_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no metadata\.csv"):
        read_clips(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,label\nx.wav,tone\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['caption', 'group', 'licence', 'source'\]"):
        read_clips(tmp_path)


def test_credits_name_every_training_clip(sounds, tmp_path):
    training, _ = split_clips(read_clips(sounds), "tones-fold4", ["GPL-2"])
    write_credits(training, sounds, tmp_path / "credits.csv")
    with (tmp_path / "credits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file_name"] for row in rows] == ["a.wav", "b.wav", "c.wav", "d.wav"]
    assert rows[2] == {"file_name": "c.wav", "label": "deep", "licence": "GPL-2+/CC-BY-SA-4.0", "source": "generated"}


def test_synonyms_are_one_concept_and_share_their_texts(descriptions):
    assert descriptions.concept("deep") == descriptions.concept("low") == "low"
    assert descriptions.of("deep") == ["A low tone.", "A deep tone."]
    assert len(descriptions) == 2
    with pytest.raises(ValueError, match="'shrill' has no descriptions"):
        descriptions.of("shrill")
    with pytest.raises(ValueError, match=r"Synonyms without a description: \['basso'\]"):
        Descriptions({"low": ["A low tone."]}, [["low", "basso"]])


def test_shipped_descriptions_are_sentences_without_repeats():
    descriptions = Descriptions.from_yaml(DESCRIPTIONS)
    sentences = [sentence for texts in descriptions.texts.values() for sentence in texts]
    assert len(descriptions) > 150
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in sentences)
    assert all(len(texts) >= 6 for texts in descriptions.texts.values())
    assert len(set(sentences)) == len(sentences), "one sentence describes two labels"


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
    off = dict.fromkeys(
        ("mix_probability", "speed", "gain", "equaliser", "noise_probability", "time_masks", "mel_masks"), 0
    )
    data = batches(sounds, descriptions, extractor, augmentation=Augmentation(**off))
    peaks = data[0]["input_features"].squeeze(1).mean(1).argmax(-1)  # the loudest mel bin of each clip
    high = data[0]["concepts"][:, 1].bool()
    assert len(set(peaks[high].tolist())) == 1 and len(set(peaks[~high].tolist())) == 1


def test_favoured_groups_get_their_share_and_rare_concepts_are_lifted(sounds, descriptions):
    clips = read_clips(sounds)
    weights = sampling_weights(clips, descriptions, "tones", 0.6)
    share = dict(zip((clip.path.name for clip in clips), weights, strict=True))
    assert sum(weights) == pytest.approx(1)
    assert sum(share[name] for name in ("a.wav", "b.wav", "d.wav", "f.wav", "g.wav")) == pytest.approx(0.6)
    assert share["a.wav"] + share["b.wav"] + share["f.wav"] == pytest.approx(share["d.wav"] + share["g.wav"])


def test_joined_texts_read_as_one_sentence():
    assert join_texts("A dog barks.", "Rain falls.", "{a} while {b}.") == "A dog barks while rain falls."

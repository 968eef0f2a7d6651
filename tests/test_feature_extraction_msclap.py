"""The front end of CLAP 2023 against a transcription of its formulas in float64, and against librosa's bank."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peers.msclap_inputs import WAVEFORMS, waveform

from processing_mats import MsClapFeatureExtractor

REFERENCE = Path(__file__).parent / "peers" / "msclap_reference.npz"


def slaney_bank(rate: float, fft_size: int, bins: int, low: float, high: float) -> np.ndarray:
    """Triangles on Slaney's mel scale, each of area 2 / its width in hertz; `(frequency bins, mel bins)`."""
    step = np.log(6.4) / 27  # per mel, beyond 1 kHz; 200/3 Hz per mel below

    def to_mel(hertz):
        return 3 * hertz / 200 if hertz < 1000 else 15 + np.log(hertz / 1000) / step

    def to_hertz(mel):
        return 200 * mel / 3 if mel < 15 else 1000 * np.exp(step * (mel - 15))

    corners = np.array([to_hertz(mel) for mel in np.linspace(to_mel(low), to_mel(high), bins + 2)])
    frequencies = np.arange(fft_size // 2 + 1) * rate / fft_size
    bank = np.zeros((len(frequencies), bins))
    for i, (left, peak, right) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
        bank[:, i] = np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)
    return bank


def log_mel(sound: np.ndarray, bank: np.ndarray, size: int, hop: int) -> np.ndarray:
    """Frame by frame in float64, `(frames, mel bins)` in dB."""
    padded = np.pad(sound.astype(np.float64), size // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    frames = [padded[start : start + size] * window for start in range(0, len(padded) - size + 1, hop)]
    power = np.abs(np.fft.rfft(np.array(frames))) ** 2
    return 10 * np.log10(np.maximum(power @ bank, 1e-10))


@pytest.fixture(scope="module")
def extractor() -> MsClapFeatureExtractor:
    return MsClapFeatureExtractor()


def test_default_bank_is_the_one_msclap_builds_with_librosa(extractor):
    recorded = np.load(REFERENCE)["mel_bank"]
    np.testing.assert_allclose(extractor.mel_filters, recorded, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("rate", "high"), [(32000, 14000), (44100, 8000)])
def test_banks_follow_slaneys_formula(rate, high):
    extractor = MsClapFeatureExtractor(mel_sampling_rate=rate, frequency_max=high)
    np.testing.assert_allclose(extractor.mel_filters, slaney_bank(rate, 1024, 64, 50, high), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", WAVEFORMS)
def test_features_follow_the_formula(extractor, name):
    sound = waveform(name)
    features = extractor(sound, sampling_rate=44100).input_features
    assert features.shape == (1, 1, 965, 64)
    assert features.dtype == torch.float32
    window = np.tile(sound, 4)[:308700]
    expected = log_mel(window, slaney_bank(32000, 1024, 64, 50, 14000), 1024, 320)
    np.testing.assert_allclose(features[0, 0].numpy(), expected, rtol=0, atol=1e-3)  # dB; float32 against float64


def test_features_with_other_settings_follow_the_formula():
    extractor = MsClapFeatureExtractor(
        feature_size=20,
        sampling_rate=16000,
        window_seconds=0.5,
        fft_window_size=512,
        hop_length=160,
        frequency_min=0,
        frequency_max=8000,
        mel_sampling_rate=16000,
    )
    sound = waveform("noise")[:8000]
    features = extractor(sound, sampling_rate=16000).input_features[0, 0].numpy()
    expected = log_mel(sound, slaney_bank(16000, 512, 20, 0, 8000), 512, 160)
    assert features.shape == expected.shape == (51, 20)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-3)


def test_silence_is_the_floor(extractor):
    features = extractor(np.zeros(308700, np.float32), sampling_rate=44100).input_features
    assert torch.equal(features, torch.full_like(features, -100.0))


@pytest.mark.parametrize("samples", [1, 700, 154349, 154350, 154351, 308699, 308700])
def test_a_short_clip_is_repeated_until_the_window_is_full(extractor, samples):
    sound = waveform("noise")[:samples]
    filled = np.array([sound[i % samples] for i in range(308700)], np.float32)
    assert torch.equal(
        extractor(sound, sampling_rate=44100).input_features, extractor(filled, sampling_rate=44100).input_features
    )


def test_kinds_of_input_agree(extractor):
    sounds = [waveform("chirp"), waveform("short")]
    batch = extractor(sounds, sampling_rate=44100).input_features
    assert batch.shape == (2, 1, 965, 64)
    one_by_one = torch.cat([extractor(sound, sampling_rate=44100).input_features for sound in sounds])
    assert torch.equal(batch, one_by_one)
    assert torch.equal(batch, extractor([torch.from_numpy(s) for s in sounds], sampling_rate=44100).input_features)
    assert torch.equal(batch[:1], extractor(np.stack(sounds[:1]), sampling_rate=44100).input_features)
    in_double = extractor(sounds[0].astype(np.float64), sampling_rate=44100).input_features
    assert torch.equal(batch[:1], in_double)
    as_numpy = extractor(sounds, sampling_rate=44100, return_tensors="np").input_features
    assert isinstance(as_numpy, np.ndarray)
    np.testing.assert_array_equal(as_numpy, batch.numpy())


@pytest.mark.parametrize(
    ("sound", "rate", "message"),
    [
        (np.ones(100), None, "sampling_rate is missing; this extractor expects 44100 Hz"),
        (np.ones(100), 48000, "Got audio at 48000 Hz, this extractor expects 44100 Hz"),
        (np.ones(308701), 44100, "Got 308701 samples, the window holds 308700"),
        (np.ones(0), 44100, r"got shape \(0,\)"),
        (np.ones((3, 2, 100)), 44100, r"Expected mono waveforms of shape \(samples,\), got shape \(2, 100\)"),
        ([], 44100, "Got no waveform"),
        ([0.5, 0.25], 44100, r"Expected mono waveforms of shape \(samples,\), got shape \(\)"),
        (np.ones(100, np.int16), 44100, r"Got samples of type torch.int16, expected floats in \[-1, 1\]"),
        (np.array([0.5, np.nan, np.inf]), 44100, "Got 2 samples that are NaN or infinite"),
    ],
)
def test_errors_say_what_came_and_what_was_expected(extractor, sound, rate, message):
    with pytest.raises(ValueError, match=message):
        extractor(sound, sampling_rate=rate)


def test_save_and_load(tmp_path):
    extractor = MsClapFeatureExtractor(mel_sampling_rate=44100, frequency_max=8000, window_seconds=5.0)
    extractor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["feature_extractor_type"] == "MsClapFeatureExtractor"
    assert "mel_filters" not in saved
    loaded = MsClapFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    np.testing.assert_array_equal(loaded.mel_filters, extractor.mel_filters)
    sound = waveform("harmonics")[:200000]
    assert torch.equal(
        loaded(sound, sampling_rate=44100).input_features, extractor(sound, sampling_rate=44100).input_features
    )

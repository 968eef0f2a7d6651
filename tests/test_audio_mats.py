"""Reading sound in every form, and cutting it into windows."""

import http.server
import io
import threading
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import tone
from datasets import Audio, Dataset

from processing_mats import cut_windows, load_audio

RATE = 16000


def measure_tone(waveform: np.ndarray, rate: int = RATE) -> tuple[float, float]:
    """Frequency and amplitude of the strongest component in the middle half second."""
    middle = waveform[len(waveform) // 2 - rate // 4 :][: rate // 2]
    spectrum = np.abs(np.fft.rfft(middle)) * 2 / len(middle)
    return float(np.argmax(spectrum) * rate / len(middle)), float(spectrum.max())


def assert_is_tone(waveform: np.ndarray, hertz: float = 440, amplitude: float = 0.5, rate: int = RATE, tolerance=2e-3):
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert waveform.flags.c_contiguous
    found_hertz, found_amplitude = measure_tone(waveform, rate)
    assert found_hertz == pytest.approx(hertz, abs=1)
    assert found_amplitude == pytest.approx(amplitude, abs=tolerance)


def write(path: Path, waveform: np.ndarray, rate: int = RATE, **kwargs) -> Path:
    sf.write(path, waveform, rate, **kwargs)
    return path


# -- Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "PCM_U8", 5e-3),
        ("a.wav", "PCM_16", 1e-4),
        ("a.wav", "PCM_24", 1e-4),
        ("a.wav", "FLOAT", 1e-4),
        ("a.flac", "PCM_16", 1e-4),
        ("a.ogg", "VORBIS", 2e-2),
        ("a.ogg", "OPUS", 2e-2),
        ("a.mp3", "MPEG_LAYER_III", 2e-2),
    ],
)
def test_every_format_gives_the_tone_that_was_written(tmp_path, name, subtype, tolerance, channels):
    path = write(tmp_path / name, np.stack([tone()] * channels, axis=1), subtype=subtype)
    assert_is_tone(load_audio(path, RATE), tolerance=tolerance)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000])
def test_resampling_keeps_duration_frequency_and_amplitude(tmp_path, rate, channels):
    path = write(tmp_path / "a.wav", np.stack([tone(rate=rate)] * channels, axis=1), rate)
    waveform = load_audio(path, RATE)
    assert abs(len(waveform) - RATE) <= 1
    assert_is_tone(waveform)


def test_resampling_removes_what_the_target_rate_cannot_hold():
    waveform = load_audio(tone(hertz=440, rate=48000) + tone(hertz=15000, rate=48000), RATE, 48000)
    assert_is_tone(waveform)
    spectrum = np.abs(np.fft.rfft(waveform[4000:12000])) * 2 / 8000
    spectrum[215:226] = 0  # 440 Hz and its neighbours
    assert spectrum.max() < 1e-3


def test_the_same_rate_leaves_samples_as_they_are(tmp_path):
    samples = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    assert np.array_equal(load_audio(path, RATE), samples)


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([tone(hertz=440), tone(hertz=1000)], axis=1)
    waveform = load_audio(write(tmp_path / "a.wav", stereo, subtype="FLOAT"), RATE)
    np.testing.assert_allclose(waveform, stereo.mean(axis=1), atol=1e-7)
    assert_is_tone(load_audio(write(tmp_path / "b.wav", np.stack([tone(), 0 * tone()], axis=1)), RATE), amplitude=0.25)


@pytest.mark.parametrize("channels", [3, 6])
def test_surround_sound_is_averaged_too(channels):
    waveforms = np.random.default_rng(0).uniform(-1, 1, (channels, 400)).astype(np.float32)
    np.testing.assert_allclose(load_audio(waveforms, RATE, RATE), waveforms.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    "form",
    [str, Path, Path.as_uri, lambda path: {"path": str(path), "bytes": None}, lambda path: (str(path), RATE)],
    ids=["str", "PathLike", "file URL", "dict", "pair"],
)
def test_a_path_in_any_form_is_read(tmp_path, form):
    path = write(tmp_path / "Ein Hühnerhof, 鶏 100%.wav", tone())
    assert_is_tone(load_audio(form(path), RATE))


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.wav", tone())
    assert_is_tone(load_audio("~/a.wav", RATE))


def test_the_ending_of_a_file_does_not_matter(tmp_path):
    path = write(tmp_path / "a.flac", tone())
    assert_is_tone(load_audio(path.rename(tmp_path / "a.wav"), RATE))


def test_a_stated_sampling_rate_that_agrees_is_fine(tmp_path):
    assert_is_tone(load_audio(write(tmp_path / "a.wav", tone()), RATE, sampling_rate=RATE))


# -- URLs --------------------------------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if not self.path.startswith("/broken"):
            return super().do_GET()
        content = Path(self.directory, "a.wav").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:10000])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server on the loopback with one sound."""
    folder = tmp_path_factory.mktemp("server")
    write(folder / "a.wav", tone())
    write(folder / "a b.ogg", tone())
    (folder / "page.wav").write_text("<html>Not found</html>")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("name", ["a.wav", "a.wav?download=true", "a%20b.ogg"])
def test_a_url_is_read(server, no_proxy, name):
    assert_is_tone(load_audio(f"{server}/{name}", RATE), tolerance=2e-2)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing.wav", OSError, "missing.wav could not be fetched: .*404"),
        ("broken.wav", OSError, "broken.wav broke off after 10000 bytes, 22044 before its end"),
        ("page.wav", ValueError, "page.wav is not an audio file"),
    ],
)
def test_a_url_that_gives_no_sound_is_named(server, no_proxy, name, error, message):
    with pytest.raises(error, match=message):
        load_audio(f"{server}/{name}", RATE)


def test_a_url_that_gives_too_much_is_refused(server, no_proxy, monkeypatch):
    monkeypatch.setattr("processing_mats.audio_mats.MAX_URL_BYTES", 30000)
    with pytest.raises(ValueError, match=r"a\.wav is larger than"):
        load_audio(f"{server}/a.wav", RATE)


def test_a_server_that_is_not_there_is_named(server, no_proxy):
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:9/a\.wav could not be fetched"):
        load_audio("http://127.0.0.1:9/a.wav", RATE)


# -- Waveforms and what `datasets` gives -------------------------------------------------------------------------------


class Decoder:
    """What the value of a `datasets` Audio column looks like: torchcodec's `AudioDecoder`."""

    def __init__(self, data: torch.Tensor, sample_rate: int):
        self.samples = SimpleNamespace(data=data, sample_rate=sample_rate)

    def get_all_samples(self):
        return self.samples


STEREO = np.stack([tone(), tone()])  # (channels, samples)


WAVEFORMS = {
    "array": (tone(), RATE),
    "array (channels, samples)": (STEREO, RATE),
    "array (samples, channels)": (STEREO.T, RATE),
    "array (1, samples)": (tone()[None], RATE),
    "array (samples, 1)": (tone()[:, None], RATE),
    "float64": (tone().astype(np.float64), RATE),
    "float16": (tone().astype(np.float16), RATE),
    "list": (tone().tolist(), RATE),
    "strided view": (tone(rate=2 * RATE)[::2], RATE),
    "read-only": (np.frombuffer(tone().tobytes(), np.float32), RATE),
    "tensor": (torch.from_numpy(tone()), RATE),
    "tensor (channels, samples)": (torch.from_numpy(STEREO), RATE),
    "tensor in bfloat16": (torch.from_numpy(tone()).bfloat16(), RATE),
    "tensor with gradient": (torch.from_numpy(tone()).requires_grad_(), RATE),
    "pair": ((tone(), RATE), None),
    "pair at another rate": ((tone(rate=8000), 8000), None),
    "pair with NumPy's integer": ((tone(), np.int64(RATE)), None),
    "pair with a whole float": ((tone(), float(RATE)), None),
    "pair of tensor and rate": ((torch.from_numpy(tone()), RATE), RATE),
    "datasets value": ({"array": tone(), "sampling_rate": RATE, "path": None}, None),
    "datasets value as list": ({"array": tone().tolist(), "sampling_rate": RATE}, None),
    "dict without rate": ({"array": tone()}, RATE),
    "decoder": (Decoder(torch.from_numpy(STEREO), RATE), None),
    "decoder of mono": (Decoder(torch.from_numpy(tone(rate=44100))[None], 44100), None),
}


@pytest.mark.parametrize(("source", "given"), WAVEFORMS.values(), ids=list(WAVEFORMS))
def test_a_waveform_in_any_form_is_read(source, given):
    assert_is_tone(load_audio(source, RATE, given), tolerance=5e-3)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_integers_are_read_as_pcm(dtype, as_tensor):
    full_scale = -int(np.iinfo(dtype).min)
    pcm = np.array([-full_scale, -full_scale // 2, 0, full_scale // 2, full_scale - 1], dtype)
    source = torch.from_numpy(pcm) if as_tensor else pcm
    expected = [-1, -0.5, 0, 0.5, (full_scale - 1) / full_scale]
    np.testing.assert_allclose(load_audio(source, RATE, RATE), expected, rtol=1e-6)


def test_a_file_and_its_pcm_are_the_same_sound(tmp_path):
    path = write(tmp_path / "a.wav", tone(), subtype="PCM_16")
    pcm, rate = sf.read(path, dtype="int16")
    assert np.array_equal(load_audio((pcm, rate), RATE), load_audio(path, RATE))


@pytest.mark.parametrize("embedded", [False, True], ids=["path", "bytes"])
def test_an_undecoded_audio_column_is_read(tmp_path, embedded):
    path = write(tmp_path / "a.flac", tone())
    column = [{"bytes": path.read_bytes(), "path": None}] if embedded else [str(path)]
    dataset = Dataset.from_dict({"audio": column}).cast_column("audio", Audio(decode=False))
    assert_is_tone(load_audio(dataset[0]["audio"], RATE))


def test_bytes_go_before_the_path_they_came_from(tmp_path):
    path = write(tmp_path / "a.wav", tone())
    assert_is_tone(load_audio({"path": "no/longer/there.wav", "bytes": path.read_bytes()}, RATE))


# -- What cannot be read -----------------------------------------------------------------------------------------------


def wav_bytes(waveform: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, waveform, RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def with_sample(value: float) -> np.ndarray:
    waveform = tone()
    waveform[100] = value
    return waveform


# name: (contents of the file x.wav or None, source or None for that file, sampling rate, error, message)
BAD_AUDIO = {
    "no such file": (None, "nowhere/x.wav", None, FileNotFoundError, "No such audio file: nowhere/x.wav"),
    "no such file URL": (None, "file:///nowhere/x.wav", None, FileNotFoundError, "No such audio file: /nowhere/x.wav"),
    "text named .wav": (b"RIFF? No, a poem.", None, None, ValueError, r"x\.wav is not an audio file"),
    "empty file": (b"", None, None, ValueError, r"x\.wav is an empty file \(0 bytes\)"),
    "no frames": (wav_bytes(tone()[:0]), None, None, ValueError, r"x\.wav has no samples"),
    "no frames in stereo": (wav_bytes(STEREO.T[:0]), None, None, ValueError, r"x\.wav has no samples"),
    "NaN in a file": (wav_bytes(with_sample(np.nan)), None, None, ValueError, r"x\.wav holds 1 samples that are NaN"),
    "infinity in a file": (wav_bytes(with_sample(np.inf)), None, None, ValueError, r"x\.wav holds 1 samples"),
    "a file at another rate": (wav_bytes(tone()), None, 44100, ValueError, r"x\.wav says .* 16000 Hz, but .*44100"),
    "a folder": (None, ".", None, ValueError, "is a folder, expected an audio file"),
    "empty bytes": (None, {"bytes": b"", "path": None}, None, ValueError, "given as bytes is not an audio file"),
    "empty array": (None, tone()[:0], RATE, ValueError, "no samples"),
    "empty list": (None, (np.array([]), RATE), None, ValueError, "no samples"),
    "no samples in two channels": (None, STEREO[:, :0], RATE, ValueError, "no samples"),
    "NaN": (None, with_sample(np.nan), RATE, ValueError, "1 samples that are NaN or infinite, of 16000"),
    "infinity": (None, torch.tensor(with_sample(-np.inf)), RATE, ValueError, "1 samples that are NaN or infinite"),
    "beyond float32": (None, np.array([1e300, 0.0]), RATE, ValueError, "1 samples that are NaN or infinite, of 2"),
    "no rate": (None, tone(), None, ValueError, "came without a sampling rate; pass sampling_rate="),
    "no rate in a dict": (None, {"array": tone()}, None, ValueError, "came without a sampling rate"),
    "rate 0": (None, tone(), 0, ValueError, "The sampling rate is 0, expected a positive"),
    "rate 0 in a pair": (None, (tone(), 0), None, ValueError, "The sampling rate is 0, expected a positive"),
    "negative rate": (None, tone(), -16000, ValueError, "The sampling rate is -16000, expected a positive"),
    "fractional rate": (None, tone(), 44100.5, ValueError, "The sampling rate is 44100.5, expected a whole number"),
    "rate NaN": (None, tone(), float("nan"), ValueError, "The sampling rate is nan, expected a whole number"),
    "infinite rate": (None, tone(), float("inf"), ValueError, "The sampling rate is inf, expected a whole number"),
    "rate as text": (None, tone(), "16000", ValueError, "The sampling rate is '16000', expected a whole number"),
    "rate as bool": (None, tone(), True, ValueError, "The sampling rate is True, expected a whole number"),
    "contradiction in a pair": (None, (tone(), RATE), 8000, ValueError, "is 16000 Hz, but sampling_rate=8000"),
    "contradiction in a dict": (
        None,
        {"array": tone(), "sampling_rate": RATE},
        8000,
        ValueError,
        "is 16000 Hz, but sampling_rate=8000",
    ),
    "contradiction of a decoder": (None, Decoder(torch.ones(1, 9), RATE), 8000, ValueError, "but sampling_rate=8000"),
    "dict with nothing": (None, {"text": "hello"}, None, ValueError, r"got keys \['text'\]"),
    "dict of Nones": (None, {"path": None, "bytes": None}, None, ValueError, r"got keys \['bytes', 'path'\]"),
    "three dimensions": (None, STEREO[None], RATE, ValueError, r"has shape \(1, 2, 16000\), expected"),
    "a number": (None, np.array(1.0), RATE, ValueError, r"has shape \(\)"),
    "ragged list": (None, ([[0.1, 0.2], [0.3]], RATE), None, ValueError, "not a rectangular array"),
    "unsigned bytes": (None, np.zeros(99, np.uint8), RATE, TypeError, "is of type uint8, expected floats"),
    "64-bit integers": (None, np.arange(99), RATE, TypeError, "is of type int64, expected floats"),
    "booleans": (None, np.ones(99, bool), RATE, TypeError, "is of type bool, expected floats"),
    "complex numbers": (None, np.ones(99, np.complex64), RATE, TypeError, "is of type complex64, expected floats"),
    "a triple": (None, (tone(), RATE, 1), None, TypeError, r"is \(waveform, sampling_rate\), got 3 items"),
    "an object": (None, object(), RATE, TypeError, "Cannot read audio from object; expected a path, a URL"),
}


@pytest.mark.parametrize(("content", "source", "rate", "error", "message"), BAD_AUDIO.values(), ids=list(BAD_AUDIO))
def test_bad_audio_is_refused_with_what_came_and_what_was_expected(tmp_path, content, source, rate, error, message):
    if content is not None:
        source = tmp_path / "x.wav"
        source.write_bytes(content)
    with pytest.raises(error, match=message):
        load_audio(source, RATE, rate)


def test_headerless_audio_is_refused_by_name(tmp_path):
    (tmp_path / "x.raw").write_bytes(tone().tobytes())
    with pytest.raises(ValueError, match=r"x\.raw is not an audio file"):
        load_audio(tmp_path / "x.raw", RATE)


def test_audio_too_short_to_resample_is_refused():
    with pytest.raises(ValueError, match="too short to resample from 96000 to 8000 Hz"):
        load_audio(np.ones(1, np.float32), 8000, 96000)


@pytest.mark.parametrize(
    "waveform", [np.zeros(RATE, np.float32), np.zeros(RATE, np.int16), np.stack([tone(), -tone()])]
)
def test_complete_silence_is_read_with_a_warning(waveform):
    with pytest.warns(UserWarning, match="The waveform is completely silent"):
        assert np.array_equal(load_audio(waveform, RATE, RATE), np.zeros(RATE))


def test_a_single_sound_in_silence_is_no_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(np.eye(1, RATE, 5, dtype=np.float32)[0], RATE, RATE)


# -- Windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3, 5, 9, 10])
def test_a_short_waveform_is_repeated_until_the_window_is_full(samples):
    waveform = np.arange(samples, dtype=np.float32)
    (window,) = cut_windows(waveform, 10)
    assert window.tolist() == [i % samples for i in range(10)]


@pytest.mark.parametrize("long_audio", ["windows", "random", "error"])
def test_a_waveform_of_the_exact_length_is_one_window_whatever_the_mode(long_audio):
    waveform = np.arange(10, dtype=np.float32)
    assert np.array_equal(cut_windows(waveform, 10, long_audio), waveform[None])


@pytest.mark.parametrize(("samples", "count"), [(11, 2), (19, 2), (20, 2), (21, 3), (30, 3), (99, 10), (100, 10)])
def test_windows_of_a_long_waveform_cover_every_sample_and_end_with_it(samples, count):
    waveform = np.arange(samples)
    windows = cut_windows(waveform, 10)
    assert windows.shape == (count, 10)
    assert set(windows.ravel().tolist()) == set(range(samples))
    assert (np.diff(windows, axis=1) == 1).all()  # each is one piece of the sound
    assert windows[:-1, 0].tolist() == list(range(0, 10 * (count - 1), 10))
    assert windows[-1, -1] == samples - 1


def test_a_random_crop_is_one_piece_and_the_same_for_the_same_seed():
    waveform = np.arange(1000)
    crops = [cut_windows(waveform, 10, "random", np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])
    assert all(crop.shape == (1, 10) and (np.diff(crop) == 1).all() for crop in crops)


def test_random_crops_reach_both_ends():
    generator = np.random.default_rng(0)
    starts = {int(cut_windows(np.arange(13), 10, "random", generator)[0, 0]) for _ in range(100)}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("samples", "kwargs", "message"),
    [
        (11, {"long_audio": "error"}, "has 11 samples, the window holds 10"),
        (11, {"long_audio": "random"}, "needs a seed"),
        (11, {"long_audio": "crop"}, "long_audio is 'crop', expected one of windows, random, error"),
        (0, {}, "has no samples"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(samples, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cut_windows(np.zeros(samples), 10, **kwargs)

"""Sound in any form a user has it to a mono waveform, and from there to windows of one length.

Reading is by soundfile, resampling by soxr. Nothing is cropped, zero-filled or guessed: what cannot be read raises an
error that names the source.
"""

import http.client
import io
import os
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import soxr
import torch

# A path, a URL, a waveform, (waveform, sampling rate), a `datasets` audio value or decoder.
AudioSource = str | os.PathLike | np.ndarray | torch.Tensor | tuple | list | Mapping | Any

URL_TIMEOUT_SECONDS = 30
MAX_URL_BYTES = 512 * 2**20
LONG_AUDIO = ("windows", "random", "error")
PCM_TYPES = (np.int8, np.int16, np.int32)


def load_audio(source: AudioSource, target_rate: int, sampling_rate: int | None = None) -> np.ndarray:
    """Reads one sound as a mono waveform.

    Args:
        source: One of
            a path (`str` or `os.PathLike`) or an `http(s)://` or `file://` URL;
            a waveform (`np.ndarray`, `torch.Tensor` or list of floats) of shape `(samples,)`, `(channels, samples)` or
            `(samples, channels)`, together with `sampling_rate`; integers are read as PCM;
            a pair `(waveform, sampling_rate)`;
            a `datasets` audio value: `{"array", "sampling_rate"}`, `{"path", "bytes"}`, or a torchcodec `AudioDecoder`.
        target_rate (`int`): Rate of the result, in hertz.
        sampling_rate (`int`, *optional*): Rate of a waveform that does not say its own, in hertz.

    Returns:
        `np.ndarray` of shape `(samples,)`, float32, at `target_rate`; channels are averaged.

    Raises:
        FileNotFoundError: no such file.
        OSError: a URL that cannot be fetched, or not to its end.
        ValueError: not a readable audio file, no samples, NaN or infinity, a sampling rate that is missing, not
            positive, or contradicts the source's own.
        TypeError: a source of another kind.
    """
    waveform, rate, name = _read(source, sampling_rate)
    waveform = _to_mono(waveform, name)
    if len(waveform) == 0:
        raise ValueError(f"{name} has no samples.")
    if not np.isfinite(waveform).all():
        bad = int((~np.isfinite(waveform)).sum())
        raise ValueError(f"{name} holds {bad} samples that are NaN or infinite, of {len(waveform)}.")
    if not waveform.any():
        warnings.warn(f"{name} is completely silent; the answer will not mean much.", UserWarning, stacklevel=2)
    if rate != target_rate:
        waveform = soxr.resample(waveform, rate, target_rate)
        if len(waveform) == 0:
            raise ValueError(f"{name} is too short to resample from {rate} to {target_rate} Hz.")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def cut_windows(
    waveform: np.ndarray,
    window_samples: int,
    long_audio: str = "windows",
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Cuts one waveform into windows of one length.

    A waveform that fits is repeated until the window is full, as msclap does. A longer one gives consecutive windows;
    the last is moved back to end where the sound ends, so that every window is full of sound and every sample is heard.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`).
        window_samples (`int`): Length of a window.
        long_audio (`str`): `"windows"`; `"random"`, the paper's single random crop, which needs a `generator`; or
            `"error"`.
        generator (`np.random.Generator`, *optional*): Source of the random crop.

    Returns:
        `np.ndarray` of shape `(windows, window_samples)`.
    """
    if long_audio not in LONG_AUDIO:
        raise ValueError(f"long_audio is {long_audio!r}, expected one of {', '.join(LONG_AUDIO)}.")
    samples = len(waveform)
    if samples == 0:
        raise ValueError("The audio has no samples.")
    if samples <= window_samples:
        repeats = -(-window_samples // samples)
        return np.tile(waveform, repeats)[None, :window_samples]
    if long_audio == "error":
        raise ValueError(f"The audio has {samples} samples, the window holds {window_samples}.")
    if long_audio == "random":
        if generator is None:
            raise ValueError('long_audio="random" needs a seed, so that the same crop can be drawn again.')
        start = int(generator.integers(samples - window_samples + 1))
        return waveform[None, start : start + window_samples]
    starts = np.arange(0, samples, window_samples)
    starts[-1] = samples - window_samples
    return np.stack([waveform[start : start + window_samples] for start in starts])


def _read(source: AudioSource, sampling_rate: int | None) -> tuple[np.ndarray, int, str]:
    """Any source to `(samples,)` or `(samples, channels)` floats, its rate in hertz, and a name for messages."""
    if isinstance(source, tuple):
        if len(source) != 2:
            raise TypeError(f"An audio tuple is (waveform, sampling_rate), got {len(source)} items.")
        return _read(source[0], _one_rate(source[1], sampling_rate))
    if isinstance(source, Mapping):
        return _read_mapping(source, sampling_rate)
    if isinstance(source, (str, os.PathLike)):
        return _read_path_or_url(source, sampling_rate)
    if isinstance(source, (np.ndarray, torch.Tensor, list)):
        return _from_array(source, sampling_rate)
    if hasattr(source, "get_all_samples"):  # torchcodec's AudioDecoder, the value of a `datasets` Audio column
        samples = source.get_all_samples()
        return _from_array(samples.data, _one_rate(samples.sample_rate, sampling_rate))
    raise TypeError(
        f"Cannot read audio from {type(source).__name__}; expected a path, a URL, a waveform with its sampling rate, "
        'or a `datasets` audio value with "array" and "sampling_rate" or with "path" or "bytes".'
    )


def _read_mapping(source: Mapping, sampling_rate: int | None) -> tuple[np.ndarray, int, str]:
    if source.get("array") is not None:
        return _from_array(source["array"], _one_rate(source.get("sampling_rate"), sampling_rate))
    if source.get("bytes") is not None:
        return _decode(io.BytesIO(source["bytes"]), source.get("path") or "The audio given as bytes", sampling_rate)
    if source.get("path") is not None:
        return _read_path_or_url(source["path"], sampling_rate)
    raise ValueError(
        f'An audio dict needs "array" and "sampling_rate", or "bytes", or "path"; got keys {sorted(source)}.'
    )


def _read_path_or_url(source: str | os.PathLike, sampling_rate: int | None) -> tuple[np.ndarray, int, str]:
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        return _decode(io.BytesIO(_fetch(text)), text, sampling_rate)
    if text.startswith("file://"):
        text = urllib.request.url2pathname(text.removeprefix("file://"))
    path = Path(text).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"No such audio file: {text}")
    if path.is_dir():
        raise ValueError(f"{text} is a folder, expected an audio file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{text} is an empty file (0 bytes).")
    return _decode(path, text, sampling_rate)


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT_SECONDS) as response:
            content = response.read(MAX_URL_BYTES + 1)
            missing = response.length  # of what the server announced; a sized read stops early without an error
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url} could not be fetched: {error}") from error
    if len(content) > MAX_URL_BYTES:
        raise ValueError(f"{url} is larger than {MAX_URL_BYTES // 2**20} MiB.")
    if missing:
        raise OSError(f"{url} broke off after {len(content)} bytes, {missing} before its end.")
    return content


def _decode(file: Path | io.BytesIO, name: str, sampling_rate: int | None) -> tuple[np.ndarray, int, str]:
    try:
        waveform, rate = sf.read(file, dtype="float32")
    except (sf.LibsndfileError, TypeError) as error:  # TypeError: headerless formats, by their ending
        reason = getattr(error, "error_string", error)
        raise ValueError(f"{name} is not an audio file that soundfile can read: {reason}") from error
    return waveform, _one_rate(rate, sampling_rate, name), name


def _from_array(array: Any, sampling_rate: int | None) -> tuple[np.ndarray, int, str]:
    name = "The waveform"
    if sampling_rate is None:
        raise ValueError(f"{name} came without a sampling rate; pass sampling_rate=..., in hertz.")
    if isinstance(array, torch.Tensor):
        array = array.detach().to("cpu", torch.float32 if array.is_floating_point() else array.dtype).numpy()
    try:
        waveform = np.asarray(array)
    except ValueError as error:
        raise ValueError(f"{name} is not a rectangular array of numbers: {error}") from error
    if waveform.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {waveform.shape}, expected (samples,) or (channels, samples).")
    if waveform.dtype in PCM_TYPES:
        waveform = waveform.astype(np.float32) / -float(np.iinfo(waveform.dtype).min)
    elif np.issubdtype(waveform.dtype, np.floating):
        with np.errstate(over="ignore"):  # told as infinite by load_audio
            waveform = waveform.astype(np.float32)
    else:
        raise TypeError(
            f"{name} is of type {waveform.dtype}, expected floats in [-1, 1] or signed PCM of 8, 16 or 32 bits."
        )
    if waveform.ndim == 2 and waveform.shape[0] < waveform.shape[1]:
        waveform = waveform.T  # (channels, samples), as torchaudio and torchcodec give it
    return waveform, _one_rate(sampling_rate, None), name


def _one_rate(own: int | float | None, given: int | None, name: str = "The audio") -> int:
    """The rate a source states and the one the caller gave must agree, be whole and positive."""
    rate = own if own is not None else given
    if rate is None:
        raise ValueError(f"{name} came without a sampling rate; pass sampling_rate=..., in hertz.")
    if isinstance(rate, bool) or not isinstance(rate, (int, float, np.integer, np.floating)) or rate % 1 != 0:
        raise ValueError(f"The sampling rate is {rate!r}, expected a whole number of hertz.")
    if rate <= 0:
        raise ValueError(f"The sampling rate is {rate}, expected a positive number of hertz.")
    if own is not None and given is not None and own != given:
        raise ValueError(f"{name} says its sampling rate is {own} Hz, but sampling_rate={given} was passed.")
    return int(rate)


def _to_mono(waveform: np.ndarray, name: str) -> np.ndarray:
    if waveform.ndim == 1:
        return waveform
    if 0 in waveform.shape:
        raise ValueError(f"{name} has no samples.")
    return waveform.mean(axis=1)


__all__ = ["AudioSource", "cut_windows", "load_audio"]

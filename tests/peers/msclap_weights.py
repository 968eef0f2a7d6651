"""Weights for a CLAP 2023 checkpoint, by a formula of each tensor's name and shape.

Both sides of the comparison build the same 197 million numbers from it: msclap in its own environment
(`msclap_reference.py`) and `tests/test_convert_msclap.py` here, so that nothing large is recorded. Pure numpy; the
numbers come from the raw words of PCG64, which numpy promises never to change.

Some entries of a state dict are no weights but constants (`constant_tensor`). msclap computes those itself; here they
are written out again, and `msclap_reference.py` checks one against the other.
"""

import zlib

import numpy as np


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers in [-1, 1) of the given shape, float32, seeded by the name."""
    count = int(np.prod(shape))
    words = np.random.PCG64(zlib.crc32(name.encode())).random_raw(-(-count // 2)).view(np.uint32)[:count]
    # 24 bits are what float32 holds exactly.
    return ((words >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)).reshape(shape)


def weight_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One weight, float32, scaled so that activations keep their size through twelve layers.

    Args:
        name (`str`): msclap's name of it, such as `caption_encoder.base.h.0.attn.c_attn.weight`.
        shape (`tuple[int, ...]`).
    """
    numbers = noise(name, shape)
    field = name.rsplit(".", 1)[-1]
    if name == "logit_scale":
        return np.asarray(np.log(1 / 0.07) + 0.1 * numbers, dtype=np.float32)
    if field == "running_mean":  # the log-mel values of a clip, in dB
        return -30 + 5 * numbers
    if field == "running_var":
        return 400 + 100 * numbers
    if field == "bias":
        return np.float32(0.1) * numbers
    if field == "relative_position_bias_table":
        return np.float32(0.5) * numbers
    if len(shape) == 1:  # norms
        return 1 + np.float32(0.2) * numbers
    if ".wpe." in name or ".wte." in name:
        return np.float32(0.5) * numbers
    # A uniform number has the standard deviation 1/sqrt(3); GPT-2 stores its matrices as (in, out).
    fan_in = shape[0] if ".base.h." in name else int(np.prod(shape[1:]))
    gain = 2.0 if "qkv" in name or "c_attn" in name else 1.0  # attention that is not almost uniform
    return np.float32(gain * np.sqrt(3 / fan_in)) * numbers


def constant_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """What msclap puts into `name` at construction where it is no weight, or `None` where it is one.

    The mel bank (`logmel_extractor.melW`) is not among them: the recorded one is librosa's.
    """
    field = name.rsplit(".", 1)[-1]
    if ".spectrogram_extractor." in name:
        bins, _, size = shape
        angle = 2 * np.pi * np.outer(np.arange(bins), np.arange(size)) / size
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
        waves = np.cos(angle) if ".conv_real." in name else -np.sin(angle)
        return (waves * hann)[:, None].astype(np.float32)
    if field == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if field == "relative_position_index":
        side = round(shape[0] ** 0.5)
        rows, columns = np.divmod(np.arange(side * side), side)
        down, right = rows[:, None] - rows[None], columns[:, None] - columns[None]
        return (down + side - 1) * (2 * side - 1) + right + side - 1
    if field == "attn_mask":
        windows, length, _ = shape
        side, grid = round(length**0.5), round((windows * length) ** 0.5)
        # Rolling by half a window brings rows (columns) of the far edge into the last window: three bands each way.
        band = np.zeros(grid, np.int64)
        band[grid - side :], band[grid - side // 2 :] = 1, 2
        region = band[:, None] * 3 + band[None]
        region = region.reshape(grid // side, side, grid // side, side).swapaxes(1, 2).reshape(windows, length)
        return np.where(region[:, :, None] == region[:, None], 0, -100).astype(np.float32)
    return None


def fill(shapes: dict[str, tuple[int, ...]], mel_bank: np.ndarray) -> dict[str, np.ndarray]:
    """A whole state dict: `{name: shape}` and the mel bank `(frequency bins, mel bins)` to `{name: array}`."""
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(".melW"):
            tensors[name] = np.array(mel_bank, dtype=np.float32)
            continue
        constant = constant_tensor(name, shape)
        tensors[name] = weight_tensor(name, shape) if constant is None else constant
    return tensors

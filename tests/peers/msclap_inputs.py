"""Waveforms, texts and a tokenizer for the comparison with msclap, all by formula. Pure numpy."""

import json
from pathlib import Path

import numpy as np

from .msclap_weights import noise

SAMPLING_RATE = 44100
WINDOW_SAMPLES = 7 * SAMPLING_RATE
WAVEFORMS = ("chirp", "noise", "harmonics", "clicks", "short")

TEXTS = (
    "rain",
    "a dog barks",
    "A man speaks while birds chirp in the background, then a car passes by.",
    "this is a sound of church bells",
    "Un café bruyant: 3 verres, 2 chaises & de la musique\tde 1985.",
    "a loud engine hums and water drips while people talk and laugh in the background and a bell rings and a dog barks "
    "and a train passes by and music plays and children speak loudly and wind blows and a door closes and rain falls",
)
# msclap pools one token too early for each "!"; see `test_convert_msclap.py`.
QUIRK_TEXT = "a dog barks! and birds chirp"

WORDS = """
a and the of in is by then while this sound dog dogs bark barks bird birds chirp chirps man woman speak speaks talk
people laugh music plays rain falls wind blows water drips car passes engine hums loud loudly bell bells ring rings
church train door closes children background
"""


def waveform(name: str) -> np.ndarray:
    """One of `WAVEFORMS`, mono, `(samples,)` float32 at 44.1 kHz; 7 s, or 2.3 s for `"short"`.

    Each has a floor of noise, since in bins 100 dB under the peak two correct STFTs differ by float rounding.
    """
    samples = round(2.3 * SAMPLING_RATE) if name == "short" else WINDOW_SAMPLES
    time = np.arange(samples) / SAMPLING_RATE
    hiss = noise(f"waveform {name}", (samples,)).astype(np.float64)
    if name == "chirp":  # 100 Hz to 12 kHz
        sound = 0.5 * np.sin(2 * np.pi * (100 * time + 11900 / 14 * time**2))
    elif name == "noise":  # with a swell every second
        sound = 0.3 * hiss * (1 + np.cos(2 * np.pi * time)) / 2
    elif name == "harmonics":
        sound = sum(0.3 / k * np.sin(2 * np.pi * 220 * k * time) for k in range(1, 9)) * np.sin(np.pi * time / 7)
    elif name == "clicks":  # twice a second
        sound = 0.8 * np.exp(-40 * (time % 0.5)) * np.sin(2 * np.pi * 1500 * time)
    elif name == "short":
        sound = 0.4 * np.sign(np.sin(2 * np.pi * 330 * time)) * np.exp(-time)
    else:
        raise ValueError(f"No waveform {name!r}, expected one of {', '.join(WAVEFORMS)}.")
    return (sound + 0.03 * hiss).astype(np.float32)


def write_tokenizer(folder: Path) -> Path:
    """Writes a byte-level BPE tokenizer in GPT-2's format, as the Hub's `gpt2` cannot be had offline.

    It has GPT-2's 256 byte symbols in GPT-2's order (so `!` is id 0), `<|endoftext|>` last, and merges that spell each
    of `WORDS`, with and without a leading space, from left to right. The folder's name must hold "gpt" for msclap.
    """
    # GPT-2 writes the printable bytes as themselves and the others as the characters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + rank) for rank in range(len(others))]
    space = symbols[len(printable) + others.index(ord(" "))]

    merges = {}  # a dict keeps the order and drops repetitions
    for word in WORDS.split():
        for spelling in (space + word, word):
            for end in range(1, len(spelling)):
                merges[spelling[:end], spelling[end]] = None
    tokens = [*symbols, *dict.fromkeys(left + right for left, right in merges), "<|endoftext|>"]

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2Model"]}))
    return folder

"""Pairs of sound and text for training the small CLAP: reading the clips, describing and augmenting them.

The sounds are a `datasets` audiofolder: a folder with a `metadata.csv` of `file_name, label, caption, group, licence,
source`. A batch is a function of the seed and the number of the step alone, so that a resumed training sees exactly the
batches that it would have seen.
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
import yaml
from torch.utils.data import Dataset

from processing_mats.audio_mats import load_audio
from processing_mats.feature_extraction_msclap import MsClapFeatureExtractor

METADATA_COLUMNS = ("file_name", "label", "caption", "group", "licence", "source")


@dataclass(frozen=True)
class Clip:
    """One row of `metadata.csv`. `caption` may be empty; `licence` and `source` are kept for the credits."""

    path: Path
    label: str
    caption: str
    group: str
    licence: str
    source: str


def read_clips(sounds: Path) -> list[Clip]:
    """All clips of an audiofolder, in the order of its `metadata.csv`."""
    metadata = Path(sounds) / "metadata.csv"
    if not metadata.exists():
        raise FileNotFoundError(f"{sounds} is not a folder of sounds: it has no metadata.csv.")
    with metadata.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(METADATA_COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{metadata} lacks the columns {sorted(missing)}; it has {reader.fieldnames}.")
        return [
            Clip(Path(sounds) / row["file_name"], **{name: row[name].strip() for name in METADATA_COLUMNS[1:]})
            for row in reader
        ]


def split_clips(
    clips: Sequence[Clip], validation_group: str, exclude_licences: Sequence[str] = ()
) -> tuple[list[Clip], list[Clip]]:
    """Training and validation clips.

    Every clip of `validation_group` is held out. A licence is excluded by its exact name: a clip under "GPL-2 or
    CC BY-SA" is used under the latter.
    """
    validation = [clip for clip in clips if clip.group == validation_group]
    if not validation:
        raise ValueError(f"No clip is of the group {validation_group!r}; groups: {sorted({c.group for c in clips})}.")
    kept = [clip for clip in clips if clip.group != validation_group and clip.licence not in exclude_licences]
    return kept, validation


def write_credits(clips: Sequence[Clip], sounds: Path, path: Path) -> None:
    """The attribution file: every clip that was trained on, with its licence and where it came from."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "licence", "source"])
        for clip in clips:
            writer.writerow([clip.path.relative_to(sounds).as_posix(), clip.label, clip.licence, clip.source])


class Descriptions:
    """What one may say of each label, and which labels name the same source.

    Args:
        texts (`dict[str, list[str]]`): Sentences for every label.
        synonyms (`list[list[str]]`): Labels that name one source, such as "dog" and "dog bark". They share their texts.
    """

    def __init__(self, texts: dict[str, list[str]], synonyms: Sequence[Sequence[str]] = ()):
        first = {label: names[0] for names in synonyms for label in names}
        unknown = set(first) - set(texts)
        if unknown:
            raise ValueError(f"Synonyms without a description: {sorted(unknown)}.")
        self.concept_of = {label: first.get(label, label) for label in texts}
        self.concepts = list(dict.fromkeys(self.concept_of.values()))
        self.texts: dict[str, list[str]] = {concept: [] for concept in self.concepts}
        for label, sentences in texts.items():
            self.texts[self.concept_of[label]] += sentences

    @classmethod
    def from_yaml(cls, path: Path) -> "Descriptions":
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return cls(content["descriptions"], content.get("synonyms", ()))

    def of(self, label: str) -> list[str]:
        """The sentences of a label and of its synonyms."""
        return self.texts[self.concept(label)]

    def concept(self, label: str) -> str:
        """The name under which a label and its synonyms are one."""
        if label not in self.concept_of:
            raise ValueError(f"The label {label!r} has no descriptions.")
        return self.concept_of[label]

    def __len__(self) -> int:
        return len(self.concepts)


@dataclass(frozen=True)
class Augmentation:
    """Strengths of what is done to a clip at random. Levels are in dB, lengths in parts of the whole."""

    mix_probability: float = 0.25  # two clips at once, with joined texts
    mix_level: float = 6.0  # the second is up to so much louder or softer
    speed: float = 0.2  # faster and higher, or slower and lower, by up to this part
    gain: float = 9.0
    equaliser: float = 6.0  # largest boost or cut of a smooth random curve over the mel bins
    noise_probability: float = 0.3
    noise_level: tuple[float, float] = (-50.0, -20.0)  # white noise, relative to the clip's own level
    time_masks: int = 2
    time_mask: float = 0.1  # longest mask, of the window
    mel_masks: int = 2
    mel_mask: float = 0.12  # widest mask, of the mel bins


def change_speed(waveform: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Plays `(samples,)` faster or slower, pitch included, by a factor between `1 / (1 + amount)` and `1 + amount`."""
    factor = np.exp(rng.uniform(-1, 1) * np.log1p(amount))
    if len(waveform) < 64:  # too short to resample
        return waveform
    # Cubic interpolation is enough here: what it aliases is one more variation.
    return soxr.resample(waveform, 1.0, 1.0 / factor, quality="QQ").astype(np.float32)


def fill_window(waveform: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """One window of `samples` out of `(length,)`: a random crop of a longer clip; a shorter one is repeated, as at
    inference, from a random start."""
    if len(waveform) > samples:
        start = rng.integers(len(waveform) - samples + 1)
        return waveform[start : start + samples]
    waveform = np.roll(waveform, rng.integers(len(waveform)))
    return np.tile(waveform, -(-samples // len(waveform)))[:samples]


def level(waveform: np.ndarray) -> float:
    """Root mean square, never quite zero."""
    return float(np.sqrt(np.mean(np.square(waveform)) + 1e-12))


def add_noise(waveform: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """White noise, `decibels` relative to the waveform's own level."""
    noise = rng.standard_normal(len(waveform), dtype=np.float32)
    return waveform + noise * level(waveform) * 10 ** (decibels / 20)


def mix(first: np.ndarray, second: np.ndarray, decibels: float) -> np.ndarray:
    """Both at once; the second is brought to the first's level and then raised by `decibels`."""
    return first + second * (level(first) / level(second)) * 10 ** (decibels / 20)


def equalise(log_mel: torch.Tensor, amount: float, gain: float, rng: np.random.Generator) -> torch.Tensor:
    """Adds a smooth random curve over the mel bins and one random gain, both in dB, to `(frames, mel bins)`."""
    bins = log_mel.shape[-1]
    knots = rng.uniform(-amount, amount, size=5)
    curve = np.interp(np.linspace(0, 4, bins), np.arange(5), knots) + rng.uniform(-gain, gain)
    return log_mel + torch.from_numpy(curve.astype(np.float32))


def mask(log_mel: torch.Tensor, axis: int, count: int, longest: float, rng: np.random.Generator) -> torch.Tensor:
    """Covers `count` random stretches of one axis of `(frames, mel bins)` with the spectrogram's mean."""
    log_mel = log_mel.clone()
    size = log_mel.shape[axis]
    fill = log_mel.mean()
    for _ in range(count):
        width = int(rng.integers(int(longest * size) + 1))
        start = int(rng.integers(size - width + 1))
        log_mel.narrow(axis, start, width).fill_(fill)
    return log_mel


def sampling_weights(
    clips: Sequence[Clip], descriptions: Descriptions, favoured_groups: str, favoured_share: float
) -> np.ndarray:
    """Probability of each clip `(clips,)`.

    The clips whose group begins with `favoured_groups` make up `favoured_share` of the draws, each concept among them
    equally often. Among the others a concept is drawn in proportion to the square root of its number of clips, so that
    thirty drum hits do not crowd out the one accordion.
    """
    favoured = np.array([clip.group.startswith(favoured_groups) for clip in clips])
    concepts = [
        (is_favoured, descriptions.concept(clip.label)) for is_favoured, clip in zip(favoured, clips, strict=True)
    ]
    counts = Counter(concepts)
    weights = np.array([1 / counts[key] if key[0] else counts[key] ** -0.5 for key in concepts])
    for part, share in ((favoured, favoured_share), (~favoured, 1 - favoured_share)):
        if part.any():
            weights[part] *= share / weights[part].sum()
    return weights / weights.sum()


class PairedBatches(Dataset):
    """Batches of augmented sound with texts that describe it; item `i` is the batch of step `i`.

    Each item is a dict of
        `input_features` (`torch.Tensor` of shape `(batch, 1, frames, mel bins)`): log-mel spectrograms in dB;
        `texts` (`list[str]`): one for each;
        `concepts` (`torch.Tensor` of shape `(batch, concepts)`): 1 where a concept is heard. Mixed clips have two.
    """

    JOINTS = ("{a} and {b}.", "{a} while {b}.", "{a}, and {b}.", "{a} as {b}.", "{a} with {b} in the background.")

    def __init__(
        self,
        clips: Sequence[Clip],
        descriptions: Descriptions,
        extractor: MsClapFeatureExtractor,
        steps: int,
        batch_size: int,
        seed: int,
        augmentation: Augmentation,
        favoured_groups: str = "",
        favoured_share: float = 0.5,
    ):
        self.clips = list(clips)
        self.descriptions = descriptions
        self.extractor = extractor
        self.steps = steps
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = augmentation
        self.weights = sampling_weights(clips, descriptions, favoured_groups, favoured_share)
        self.concept_index = {concept: index for index, concept in enumerate(descriptions.concepts)}
        self.waveforms = [load_audio(clip.path, extractor.sampling_rate) for clip in self.clips]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict:
        rng = np.random.default_rng([self.seed, step])
        drawn = rng.choice(len(self.clips), size=(self.batch_size, 2), p=self.weights)
        windows, texts = [], []
        concepts = torch.zeros(self.batch_size, len(self.descriptions))
        for row, (first, second) in enumerate(drawn):
            window, text = self._window(first, rng), self._text(first, rng)
            heard = [first]
            if rng.random() < self.augmentation.mix_probability:
                other = self._window(second, rng)
                window = mix(window, other, rng.uniform(-1, 1) * self.augmentation.mix_level)
                text = join_texts(text, self._text(second, rng), rng.choice(self.JOINTS))
                heard.append(second)
            windows.append(window)
            texts.append(text)
            for index in heard:
                concepts[row, self.concept_index[self.descriptions.concept(self.clips[index].label)]] = 1
        features = self.extractor.log_mel(torch.from_numpy(np.stack(windows)))
        features = torch.stack([self._mask(log_mel, rng) for log_mel in features])
        return {"input_features": features.unsqueeze(1), "texts": texts, "concepts": concepts}

    def _window(self, index: int, rng: np.random.Generator) -> np.ndarray:
        waveform = change_speed(self.waveforms[index], self.augmentation.speed, rng)
        waveform = fill_window(waveform, self.extractor.window_samples, rng)
        if rng.random() < self.augmentation.noise_probability:
            waveform = add_noise(waveform, rng.uniform(*self.augmentation.noise_level), rng)
        return waveform

    def _text(self, index: int, rng: np.random.Generator) -> str:
        clip = self.clips[index]
        if clip.caption and rng.random() < 0.5:
            return clip.caption
        return str(rng.choice(self.descriptions.of(clip.label)))

    def _mask(self, log_mel: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        amounts = self.augmentation
        log_mel = equalise(log_mel, amounts.equaliser, amounts.gain, rng)
        log_mel = mask(log_mel, 0, amounts.time_masks, amounts.time_mask, rng)
        return mask(log_mel, 1, amounts.mel_masks, amounts.mel_mask, rng)


def join_texts(first: str, second: str, joint: str) -> str:
    """ "A dog barks." and "Rain falls." to "A dog barks while rain falls." """
    second = second.rstrip(".")
    return joint.format(a=first.rstrip("."), b=second[:1].lower() + second[1:])

"""Pairs of sound and text for training the small CLAP: reading the clips, describing and augmenting them.

The sounds are a `datasets` audiofolder: a folder with a `metadata.csv` of `file_name, label, caption, group, licence,
source`. A batch is a function of the seed and the number of the step alone, so that a resumed training sees exactly the
batches that it would have seen.
"""

import csv
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr
import torch
import yaml
from torch.utils.data import Dataset

from processing_mats.audio_mats import load_audio
from processing_mats.feature_extraction_msclap import MsClapFeatureExtractor
from training.music import Composer, Synthesizer

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

    @property
    def package(self) -> str:
        """The first word of the source: the package, repository or site that the clip came in."""
        return self.source.partition(" ")[0]


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
    clips: Sequence[Clip],
    validation_group: str,
    validation_packages: Sequence[str] = (),
    exclude_licences: Sequence[str] = (),
) -> tuple[list[Clip], list[Clip], list[Clip]]:
    """Clips for training, clips of the validation group, and clips of the validation packages.

    Clips of one package are alike in recording and processing, so a package is held out whole. A licence is excluded
    by its exact name: a clip under "GPL-2 or CC BY-SA" is used under the latter.
    """
    group = [clip for clip in clips if clip.group == validation_group]
    if not group:
        raise ValueError(f"No clip is of the group {validation_group!r}; groups: {sorted({c.group for c in clips})}.")
    if missing := sorted(set(validation_packages) - {clip.package for clip in clips}):
        raise ValueError(f"No clip is of the packages {', '.join(missing)}.")
    packages = [clip for clip in clips if clip.package in validation_packages]
    held_out = {id(clip) for clip in (*group, *packages)}
    kept = [clip for clip in clips if id(clip) not in held_out and clip.licence not in exclude_licences]
    return kept, group, packages


def validation_sets(group: list[Clip], packages: list[Clip]) -> dict[str, list[Clip]]:
    """What `split_clips` held out, by name; an empty set is none."""
    return {name: clips for name, clips in (("group", group), ("packages", packages)) if clips}


def write_credits(clips: Sequence[Clip], sounds: Path, path: Path, music: "Music | None" = None) -> None:
    """The attribution file: every clip that was trained on, with its licence and where it came from, and every
    instrument that was rendered, under `rendered/`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "licence", "source"])
        for clip in clips:
            writer.writerow([clip.path.relative_to(sounds).as_posix(), clip.label, clip.licence, clip.source])
        for label in music.composer.instruments.labels if music is not None else ():
            source = f"rendered from {music.synthesizer.soundfont.name} by TinySoundFont"
            writer.writerow([f"rendered/{label}", label, music.licence, source])


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


@dataclass(frozen=True)
class Music:
    """Rendered pieces among the clips.

    Args:
        composer (`Composer`)
        synthesizer (`Synthesizer`): at the sampling rate of the feature extractor.
        share (`float`): part of the rows that are pieces, from 0 to 1.
        licence (`str`): of the soundfont.
    """

    composer: Composer
    synthesizer: Synthesizer
    share: float
    licence: str

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"The share of music is {self.share}, expected 0 to 1.")


class Heard(NamedTuple):
    """One window of sound, a text about it, and the labels of what is heard."""

    window: np.ndarray
    text: str
    labels: list[str]


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
        music: Music | None = None,
    ):
        if music is not None:
            if music.synthesizer.sampling_rate != extractor.sampling_rate:
                raise ValueError(
                    f"Music is rendered at {music.synthesizer.sampling_rate} Hz, the feature extractor expects "
                    f"{extractor.sampling_rate} Hz."
                )
            for label in music.composer.instruments.labels:
                descriptions.concept(label)  # raises here rather than at the instrument's first piece
        self.music = music
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
            is_music = self.music is not None and rng.random() < self.music.share
            heard = self._piece(rng) if is_music else self._clip(first, rng)
            if rng.random() < self.augmentation.mix_probability:
                heard = self._mixed(heard, self._clip(second, rng), rng)
            windows.append(heard.window)
            texts.append(heard.text)
            for label in heard.labels:
                concepts[row, self.concept_index[self.descriptions.concept(label)]] = 1
        features = self.extractor.log_mel(torch.from_numpy(np.stack(windows)))
        features = torch.stack([self._mask(log_mel, rng) for log_mel in features])
        return {"input_features": features.unsqueeze(1), "texts": texts, "concepts": concepts}

    def _clip(self, index: int, rng: np.random.Generator) -> Heard:
        clip = self.clips[index]
        described = not clip.caption or rng.random() >= 0.5
        text = str(rng.choice(self.descriptions.of(clip.label))) if described else clip.caption
        return Heard(self._window(self.waveforms[index], rng), text, [clip.label])

    def _piece(self, rng: np.random.Generator) -> Heard:
        drawer = random.Random(int(rng.integers(2**63)))
        piece = self.music.composer.draw(drawer)
        if len(piece.parts) == 1 and drawer.random() < 0.3:
            text = drawer.choice(self.descriptions.of(piece.labels[0]))  # as of any clip of the label
        else:
            text = self.music.composer.tell(piece, drawer)
        waveform = self.music.synthesizer.render(piece, self.extractor.window_samples)
        return Heard(self._window(waveform, rng), text, piece.labels)

    def _mixed(self, first: Heard, second: Heard, rng: np.random.Generator) -> Heard:
        window = mix(first.window, second.window, rng.uniform(-1, 1) * self.augmentation.mix_level)
        text = join_texts(first.text, second.text, rng.choice(self.JOINTS))
        return Heard(window, text, [*first.labels, *second.labels])

    def _window(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        waveform = change_speed(waveform, self.augmentation.speed, rng)
        waveform = fill_window(waveform, self.extractor.window_samples, rng)
        if rng.random() < self.augmentation.noise_probability:
            waveform = add_noise(waveform, rng.uniform(*self.augmentation.noise_level), rng)
        return waveform

    def _mask(self, log_mel: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        amounts = self.augmentation
        log_mel = equalise(log_mel, amounts.equaliser, amounts.gain, rng)
        log_mel = mask(log_mel, 0, amounts.time_masks, amounts.time_mask, rng)
        return mask(log_mel, 1, amounts.mel_masks, amounts.mel_mask, rng)


def join_texts(first: str, second: str, joint: str) -> str:
    """ "A dog barks." and "Rain falls." to "A dog barks while rain falls." """
    second = second.rstrip(".")
    return joint.format(a=first.rstrip("."), b=second[:1].lower() + second[1:])

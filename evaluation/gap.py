"""The gap between the two modalities (Theorem 3.1): how far CLAP's audio embeddings lie from its text embeddings.

    mats gap path/to/sounds --pairs 350 --output gap

MATS hears on the strength of one bound: its risk on audio is at most that on text, plus the largest discrepancy, over
classes, between the embeddings of a class's sounds and of its texts. So the gap is measured overall and per class, for
every *bridge*: a choice of what stands on the audio side (CLAP's embedding, the memory alone, Santa) and on the text
side (CLAP's embedding, the same with the training noise).

Everything is compared where the mapper reads it: behind [`MatsNoise`], which in a model with `renormalize` makes every
embedding a unit vector. Santa's output, a mixture of unit vectors, is shorter; it is compared after that, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configuration_mats import MatsConfig
from evaluation.label_folder import read_labels
from evaluation.two_samples import (
    FOLDS,
    SVM_COST,
    Discrepancy,
    distance_between_means,
    l1_discrepancy,
    median_distance,
    mmd2,
    pair_distances,
)
from modeling_mats.modeling_mats import MatsNoise
from processing_mats import MatsProcessor
from training.clap_data import Descriptions, read_clips
from training.noise import read_pairs

PAIRS = 350  # the paper's, Figure 3
# A class with fewer clips or texts says nothing of its distributions.
MIN_POINTS = 6
LISTED_FILES = 5

AUDIO_SIDES = ("clap", "memory", "santa")
TEXT_SIDES = ("clean", "noisy")


@dataclass(frozen=True)
class Bridge:
    """What is compared: one of `AUDIO_SIDES` with one of `TEXT_SIDES`."""

    name: str
    audio: str
    text: str


# The first four change one thing at a time. A model trained with noise meets the noisy ones.
BRIDGES = (
    Bridge("raw", "clap", "clean"),
    Bridge("noise", "clap", "noisy"),
    Bridge("memory", "memory", "clean"),
    Bridge("santa", "santa", "clean"),
    Bridge("memory+noise", "memory", "noisy"),
    Bridge("santa+noise", "santa", "noisy"),
)


# -- Pairs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledSound:
    """A clip, what it is, and what was written about it, which may be nothing."""

    audio: Path
    label: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class LabelledPair:
    """A clip with one text; `kind` says where that comes from: `caption`, `description` or `label`."""

    audio: Path
    label: str
    text: str
    kind: str


@dataclass(frozen=True)
class DrawnPairs:
    """
    pairs: no clip is in two of them.
    class_texts: for each label of the pairs, the different texts that stand for the class: captions of its clips here,
        descriptions of the label, and where there is neither, its name.
    """

    pairs: list[LabelledPair]
    class_texts: dict[str, list[str]]


def read_sounds(folder: Path, groups: Sequence[str] = (), packages: Sequence[str] = ()) -> list[LabelledSound]:
    """The sounds of a `datasets` audiofolder, in the order of its `metadata.csv`.

    Args:
        folder (`Path`): its table has `file_name`, `label` and optionally `caption` (or `caption_1`, ...).
        groups, packages (sequences of `str`): only clips whose `group` is one of the former, or whose `source` begins
            with one of the latter; for packages the table has every column of [`read_clips`]. By default all clips.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: a column is missing, a clip has no label or is there twice, a group or package has no clip.
    """
    folder = Path(folder)
    table = folder / "metadata.csv"
    pairs = read_pairs(folder)
    try:
        rows = read_labels(folder)
    except KeyError as error:
        raise ValueError(f"{table} has no column {error}.") from error
    sounds = {}
    for pair, (name, label) in zip(pairs, rows, strict=True):
        label = label.strip()
        if not label:
            raise ValueError(f"{name} has no label in {table}.")
        if pair.audio in sounds:
            raise ValueError(f"{table} has {name} twice; several captions of a clip go into caption_1, caption_2, ...")
        sounds[pair.audio] = LabelledSound(pair.audio, label, () if pair.texts == (label,) else pair.texts)
    if not groups and not packages:
        return list(sounds.values())
    chosen = {folder / name.strip() for group in groups for name, _ in read_labels(folder, group)}
    if packages:
        package_of = {clip.path: clip.package for clip in read_clips(folder)}
        if unknown := sorted(set(packages) - set(package_of.values())):
            raise ValueError(
                f"No clip of {table} is of the packages {', '.join(unknown)}; packages: "
                f"{', '.join(sorted(set(package_of.values())))}."
            )
        chosen |= {path for path, package in package_of.items() if package in packages}
    return [sound for path, sound in sounds.items() if path in chosen]


def draw_pairs(
    sounds: Sequence[LabelledSound],
    descriptions: Descriptions,
    pairs: int = PAIRS,
    seed: int = 0,
    texts_per_label: int | None = None,
) -> DrawnPairs:
    """Random clips, each with a text: one of its captions, else a description of its label, else "The sound of LABEL."

    The descriptions of a label are dealt out in random order, so that none comes twice before each has come once.

    Args:
        texts_per_label (`int`, *optional*): use so many of the descriptions of a label, drawn by the seed; by default
            all.

    Raises:
        ValueError: more pairs than there are sounds, or fewer than two; or `texts_per_label` is below 1.
    """
    if not 2 <= pairs <= len(sounds):
        raise ValueError(
            f"pairs is {pairs}, expected from 2 to {len(sounds)}, as many clips as there are to draw from."
        )
    if texts_per_label is not None and texts_per_label < 1:
        raise ValueError(f"texts_per_label is {texts_per_label}, expected at least 1.")
    rng = np.random.default_rng(seed)
    chosen = [sounds[index] for index in rng.choice(len(sounds), size=pairs, replace=False)]
    dealt: dict[str, list[str]] = {}
    for label in sorted({sound.label for sound in chosen}):
        known = list(dict.fromkeys(descriptions.of(label))) if label in descriptions.concept_of else []
        dealt[label] = [known[index] for index in rng.permutation(len(known))][:texts_per_label]
    drawn, met = [], dict.fromkeys(dealt, 0)
    for sound in chosen:
        own = dealt[sound.label]
        if sound.captions:
            text, kind = sound.captions[rng.integers(len(sound.captions))], "caption"
        elif own:
            text, kind = own[met[sound.label] % len(own)], "description"
            met[sound.label] += 1
        else:
            text, kind = f"The sound of {sound.label}.", "label"
        drawn.append(LabelledPair(sound.audio, sound.label, text, kind))
    texts = {label: [pair.text for pair in drawn if pair.label == label] + own for label, own in dealt.items()}
    return DrawnPairs(drawn, {label: list(dict.fromkeys(own)) for label, own in texts.items()})


# -- Embeddings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedded:
    """Embeddings of pairs as the mapper reads them.

    audio: `(pairs, dim)` for each of `AUDIO_SIDES`.
    text: `(pairs, dim)` for each of `TEXT_SIDES`.
    class_text: for each of those and each label, `(texts, dim)`.
    cut: how many texts were longer than CLAP's text tower takes, and were cut as in training.
    """

    audio: dict[str, torch.Tensor]
    text: dict[str, torch.Tensor]
    class_text: dict[str, dict[str, torch.Tensor]]
    cut: int


def embed(drawn: DrawnPairs, processor: MatsProcessor, config: MatsConfig, seed: int = 0) -> Embedded:
    """Encodes clips and texts, and puts up both sides of every bridge.

    Args:
        processor (`MatsProcessor`): with its CLAP and memory, whose `santa_settings` are what it ships with.
        config (`MatsConfig`): the model's `noise_variance` and `renormalize`.
        seed (`int`): of the noise, drawn anew for every text of a pair and of a class; and of the crops, with
            `long_audio="random"`.

    Raises:
        FileNotFoundError: clips that are not there; told before any is encoded.
        ValueError: a clip that cannot be read, which the message names, or no memory.
    """
    if processor.santa_memory is None:
        raise ValueError(
            "The processor has no Santa memory, and what that does to the gap is to be measured; `mats memory build` "
            "makes one."
        )
    noise = MatsNoise(config.noise_variance, config.renormalize)
    embeds = _encode_clips([pair.audio for pair in drawn.pairs], processor, seed)
    moved = {
        "clap": embeds,
        "memory": processor.apply_santa(embeds, {"use_audio": False, "use_memory": True}),
        "santa": processor.apply_santa(embeds),
    }
    texts = list(dict.fromkeys(text for own in drawn.class_texts.values() for text in own))
    row = {text: index for index, text in enumerate(texts)}
    text_embeds = processor.encode_text(texts, truncation=True)
    rng = np.random.default_rng([seed, 1])  # another stream than that of the draw

    def both_sides(wanted: Sequence[str]) -> dict[str, torch.Tensor]:
        own = text_embeds[[row[text] for text in wanted]]
        seeds = torch.from_numpy(rng.integers(2**62, size=len(wanted)))
        return {"clean": noise.eval()(own), "noisy": noise.train()(own, seeds)}

    of_classes = {label: both_sides(own) for label, own in drawn.class_texts.items()}
    return Embedded(
        audio={side: noise.eval()(own) for side, own in moved.items()},
        text=both_sides([pair.text for pair in drawn.pairs]),
        class_text={side: {label: own[side] for label, own in of_classes.items()} for side in TEXT_SIDES},
        cut=processor.clap.count_long_texts(texts),
    )


def _encode_clips(paths: Sequence[Path], processor: MatsProcessor, seed: int) -> torch.Tensor:
    """CLAP embeddings `(len(paths), dim)`, one clip at a time in memory."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} sounds are not there, such as {', '.join(missing[:LISTED_FILES])}."
        )
    embeds = []
    for path in tqdm(paths, desc="CLAP", delay=2, disable=None):
        try:
            embeds.append(processor.encode_audio(path, seed=seed))
        except (ValueError, OSError) as error:
            if str(path) in str(error):
                raise
            raise ValueError(f"{path}: {error}") from error
    return torch.cat(embeds)


# -- The gap -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """What is measured of one bridge, overall or in one class.

    Attributes:
        clips, texts (`int`): different ones.
        cosine, distance (`float`): means over pairs.
        between_means (`float`, *optional*): see [`distance_between_means`].
        mmd2 (`float`, *optional*): see [`mmd2`].
        discrepancy ([`Discrepancy`], *optional*): see [`l1_discrepancy`].

    The last three are `None` where there are fewer than `MIN_POINTS` clips or texts.
    """

    clips: int
    texts: int
    cosine: float
    distance: float
    between_means: float | None = None
    mmd2: float | None = None
    discrepancy: Discrepancy | None = None


@dataclass(frozen=True)
class BridgeGap:
    """The gap that a bridge leaves: over all pairs, and in each class by its label."""

    bridge: Bridge
    overall: Measures
    classes: dict[str, Measures]

    @property
    def measured(self) -> dict[str, Discrepancy]:
        """The classes with enough points, by their label."""
        return {label: own.discrepancy for label, own in self.classes.items() if own.discrepancy is not None}

    @property
    def worst(self) -> tuple[str, Discrepancy] | None:
        """The class with the largest discrepancy, which the theorem speaks of, and of equal ones the surest; `None` if
        none has enough points."""
        return max(self.measured.items(), key=lambda item: (item[1].l1, -item[1].error), default=None)


def measure(
    drawn: DrawnPairs, embedded: Embedded, bridges: Sequence[Bridge] = BRIDGES
) -> tuple[list[BridgeGap], float]:
    """The gap of every bridge, and the kernel width that all share so that their numbers can be compared.

    Overall, the texts of the pairs are compared with their clips, so that both sides hold every class equally often; in
    a class, its clips with all its texts, each once. The width is the median distance between raw embeddings.

    Raises:
        ValueError: as [`l1_discrepancy`]: all pairs share one text.
    """
    labels = np.array([pair.label for pair in drawn.pairs])
    texts = [pair.text for pair in drawn.pairs]
    width = median_distance(embedded.audio["clap"], embedded.text["clean"])
    gaps = []
    for bridge in bridges:
        audio, text = embedded.audio[bridge.audio], embedded.text[bridge.text]
        overall = Measures(
            len(audio),
            len(set(texts)),
            *pair_distances(audio, text),
            between_means=distance_between_means(audio, text, paired=True),
            mmd2=mmd2(audio, text, width, paired=True),
            discrepancy=l1_discrepancy(audio, text, b_groups=texts, bandwidth=width),
        )
        classes = {
            label: _measure_class(audio[labels == label], text[labels == label], of_class, width)
            for label, of_class in embedded.class_text[bridge.text].items()
        }
        gaps.append(BridgeGap(bridge, overall, classes))
    return gaps, width


def _measure_class(audio: torch.Tensor, text: torch.Tensor, of_class: torch.Tensor, width: float) -> Measures:
    """`audio` and `text` `(pairs, dim)` belong together row by row; `of_class` `(texts, dim)` are all its texts."""
    of_pairs = (len(audio), len(of_class), *pair_distances(audio, text))
    if min(len(audio), len(of_class)) < MIN_POINTS:
        return Measures(*of_pairs)
    return Measures(
        *of_pairs,
        between_means=distance_between_means(audio, of_class),
        mmd2=mmd2(audio, of_class, width),
        discrepancy=l1_discrepancy(audio, of_class, bandwidth=width),
    )


def estimator_settings() -> dict[str, int | float]:
    """The constants behind [`measure`], for the record."""
    return {"min_points": MIN_POINTS, "folds": FOLDS, "svm_cost": SVM_COST}


__all__ = [
    "BRIDGES",
    "MIN_POINTS",
    "PAIRS",
    "Bridge",
    "BridgeGap",
    "DrawnPairs",
    "Embedded",
    "LabelledPair",
    "LabelledSound",
    "Measures",
    "draw_pairs",
    "embed",
    "estimator_settings",
    "measure",
    "read_sounds",
]

"""How well a CLAP hears: zero-shot classification of held-out clips, and how far sound lies from text.

    python -m training.evaluate_clap CLAP training/recipes/mats_tiny_clap.yaml --sounds DIR

Clips go the way of inference, through `load_audio` and `ClapEncoder`.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from processing_mats.audio_mats import load_audio
from processing_mats.clap_mats import ClapEncoder
from training.clap_data import Clip, Descriptions, read_clips, split_clips, validation_sets

# Prompts of zero-shot classification. None of them is a sentence of the training texts.
PROMPTS = ("{}", "The sound of {}.", "This is a sound of {}.", "A recording of {}.", "{} can be heard.")


def embed_labels(clap: ClapEncoder, labels: Sequence[str]) -> torch.Tensor:
    """One embedding for each label, the normalised mean over `PROMPTS`: `(labels, projection_dim)`."""
    texts = [prompt.format(label) for label in labels for prompt in PROMPTS]
    embeds = clap.encode_text(texts, truncation=True).view(len(labels), len(PROMPTS), -1)
    return F.normalize(embeds.mean(1), dim=-1)


def evaluate_clap(clap: ClapEncoder, clips: Sequence[Clip], descriptions: Descriptions) -> dict:
    """Zero-shot accuracy and the gap between the modalities on held-out clips.

    Returns:
        `dict`: `zero_shot`, accuracy among the labels of `clips`; `zero_shot_all`, accuracy among all concepts that are
        described, and `zero_shot_all_top5`, whether the right one is among the nearest five; `cosine`, mean cosine
        between a clip and the descriptions of its label; `cosine_centroid`, between a clip and their normalised mean;
        `cosine_other`, between a clip and the descriptions of the other labels of `clips`; `confusions`, what was taken
        for what, among the labels of `clips` and among all concepts. Labels of one concept count as one.
    """
    audio = clap.encode_audio([load_audio(clip.path, clap.sampling_rate) for clip in clips])
    # The name of a held-out label stands for its concept, so that the two lists differ in the distractors alone.
    own_names = {descriptions.concept(label): label for label in sorted({clip.label for clip in clips})}
    labels = list(own_names.values())
    truth = [own_names[descriptions.concept(clip.label)] for clip in clips]
    among_own = [labels[index] for index in (audio @ embed_labels(clap, labels).T).argmax(-1)]
    names = [own_names.get(concept, concept) for concept in descriptions.concepts]
    nearest = (audio @ embed_labels(clap, names).T).topk(min(5, len(names))).indices
    nearest = [[names[index] for index in row] for row in nearest.tolist()]
    among_all = [row[0] for row in nearest]

    described = {label: clap.encode_text(descriptions.of(label), truncation=True) for label in labels}
    cosines = torch.stack([audio @ described[label].mean(0) for label in labels], dim=1)  # (clips, labels)
    own = F.one_hot(torch.tensor([labels.index(label) for label in truth]), len(labels)).bool()
    centroids = F.normalize(torch.stack([described[label].mean(0) for label in labels]), dim=-1)
    return {
        "zero_shot": accuracy(among_own, truth),
        "zero_shot_all": accuracy(among_all, truth),
        "zero_shot_all_top5": sum(label in row for label, row in zip(truth, nearest, strict=True)) / len(clips),
        "labels": len(labels),
        "labels_all": len(names),
        "cosine": cosines[own].mean().item(),
        "cosine_other": cosines[~own].mean().item(),
        "cosine_centroid": (audio @ centroids.T)[own].mean().item(),
        "confusions": confusions(among_own, truth),
        "confusions_all": confusions(among_all, truth),
    }


def accuracy(predictions: Sequence[str], truth: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(predictions, truth, strict=True)) / len(truth)


def confusions(predictions: Sequence[str], truth: Sequence[str]) -> dict[str, int]:
    """ "truth -> prediction" to how often, for the wrong ones, most frequent first."""
    pairs = Counter(f"{b} -> {a}" for a, b in zip(predictions, truth, strict=True) if a != b)
    return dict(pairs.most_common())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measures a CLAP on the validation clips of its recipe.")
    parser.add_argument("clap", type=Path, help="folder of the CLAP")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--sounds", type=Path, required=True, help="audiofolder with a metadata.csv")
    options = parser.parse_args(argv)
    recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
    clap = ClapEncoder.from_pretrained(options.clap)
    descriptions = Descriptions.from_yaml(options.recipe.parent / recipe["descriptions"])
    held_out = split_clips(read_clips(options.sounds), recipe["validation_group"], recipe["validation_packages"])[1:]
    results = {name: evaluate_clap(clap, clips, descriptions) for name, clips in validation_sets(*held_out).items()}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])

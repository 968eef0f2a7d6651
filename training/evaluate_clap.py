"""How well a CLAP hears: zero-shot classification of held-out clips, and how far sound lies from text.

    python -m training.evaluate_clap CLAP training/recipes/mats_tiny_clap.yaml --sounds DIR

Clips go the way of inference: `load_audio`, `cut_windows`, the feature extractor, `get_audio_features`; the normalised
embeddings of a clip's windows are averaged and normalised again.
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
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_mats.modeling_msclap import MsClapModel
from processing_mats.audio_mats import cut_windows, load_audio
from processing_mats.feature_extraction_msclap import MsClapFeatureExtractor
from training.clap_data import Clip, Descriptions, read_clips, split_clips

# Prompts of zero-shot classification. None of them is a sentence of the training texts.
PROMPTS = ("{}", "The sound of {}.", "This is a sound of {}.", "A recording of {}.", "{} can be heard.")


@torch.no_grad()
def embed_clips(model: MsClapModel, extractor: MsClapFeatureExtractor, clips: Sequence[Clip]) -> torch.Tensor:
    """Normalised embeddings `(clips, projection_dim)`, as at inference."""
    model.eval()
    embeddings = []
    for clip in clips:
        windows = cut_windows(load_audio(clip.path, extractor.sampling_rate), extractor.window_samples)
        features = extractor(windows, sampling_rate=extractor.sampling_rate)["input_features"]
        embeds = model.get_audio_features(features.to(model.device)).pooler_output.float()
        embeddings.append(F.normalize(embeds.mean(0), dim=-1))
    return torch.stack(embeddings)


@torch.no_grad()
def embed_texts(
    model: MsClapModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 64
) -> torch.Tensor:
    """Normalised embeddings `(texts, projection_dim)`."""
    model.eval()
    embeddings = []
    for start in range(0, len(texts), batch_size):
        batch = [text + model.config.text_suffix for text in texts[start : start + batch_size]]
        tokens = tokenizer(
            batch, padding=True, truncation=True, max_length=model.config.max_text_tokens, return_tensors="pt"
        ).to(model.device)
        embeds = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        embeddings.append(embeds.float())
    return torch.cat(embeddings)


def embed_labels(model: MsClapModel, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> torch.Tensor:
    """One embedding for each label, the normalised mean over `PROMPTS`: `(labels, projection_dim)`."""
    texts = [prompt.format(label) for label in labels for prompt in PROMPTS]
    embeds = embed_texts(model, tokenizer, texts).view(len(labels), len(PROMPTS), -1)
    return F.normalize(embeds.mean(1), dim=-1)


def evaluate_clap(
    model: MsClapModel,
    extractor: MsClapFeatureExtractor,
    tokenizer: PreTrainedTokenizerBase,
    clips: Sequence[Clip],
    descriptions: Descriptions,
) -> dict:
    """Zero-shot accuracy and the gap between the modalities on held-out clips.

    Returns:
        `dict`: `zero_shot`, accuracy among the labels of `clips`; `zero_shot_all`, accuracy among all concepts that are
        described; `cosine`, mean cosine between a clip and the descriptions of its label; `cosine_centroid`, between a
        clip and their normalised mean; `cosine_other`, between a clip and the descriptions of the other labels of
        `clips`; `confusions`, what was taken for what, among the labels of `clips` and among all concepts.
    """
    audio = embed_clips(model, extractor, clips)
    labels = sorted({clip.label for clip in clips})
    truth = [clip.label for clip in clips]
    among_own = [labels[index] for index in (audio @ embed_labels(model, tokenizer, labels).T).argmax(-1)]
    # The name of a held-out label stands for its concept, so that the two lists differ in the distractors alone.
    own_names = {descriptions.concept(label): label for label in labels}
    names = [own_names.get(concept, concept) for concept in descriptions.concepts]
    among_all = [names[index] for index in (audio @ embed_labels(model, tokenizer, names).T).argmax(-1)]

    described = {label: embed_texts(model, tokenizer, descriptions.of(label)) for label in labels}
    cosines = torch.stack([audio @ described[label].mean(0) for label in labels], dim=1)  # (clips, labels)
    own = F.one_hot(torch.tensor([labels.index(label) for label in truth]), len(labels)).bool()
    centroids = F.normalize(torch.stack([described[label].mean(0) for label in labels]), dim=-1)
    return {
        "zero_shot": accuracy(among_own, truth),
        "zero_shot_all": accuracy(among_all, truth),
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
    result = evaluate_clap(
        MsClapModel.from_pretrained(options.clap, dtype=torch.float32),
        MsClapFeatureExtractor.from_pretrained(options.clap),
        AutoTokenizer.from_pretrained(options.clap),
        split_clips(read_clips(options.sounds), recipe["validation_group"])[1],
        Descriptions.from_yaml(options.recipe.parent / recipe["descriptions"]),
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])

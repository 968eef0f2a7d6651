"""Trains the small CLAP of mats-tiny on real sounds.

    python -m training.train_clap training/recipes/mats_tiny_clap.yaml --sounds DIR --soundfont FILE --output_dir OUT

The text tower is a frozen sentence encoder and its projection the identity, so the shared space is the sentence
encoder's own and texts far from the training sounds keep their meaning. The audio tower learns to answer a sound with
the place of its descriptions: a contrastive term tells the sources apart, a cosine term closes the modality gap.

Batches are prepared in a process of their own; on two shared cores OMP_NUM_THREADS=1 trained as fast as 2.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import yaml
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, Trainer, TrainingArguments, set_seed

from configuration_mats.configuration_msclap import MsClapConfig
from modeling_mats.modeling_msclap import MsClapModel, MsClapProjection
from processing_mats.clap_mats import ClapEncoder
from processing_mats.feature_extraction_msclap import MsClapFeatureExtractor
from training.audiotia.drawn import read_sources
from training.clap_data import (
    Augmentation,
    Descriptions,
    Music,
    PairedBatches,
    read_clips,
    split_clips,
    validation_sets,
    write_credits,
)
from training.evaluate_clap import evaluate_clap
from training.music import Composer, Instruments, Synthesizer
from training.wheels import MINILM, resolve_text_model


def start_as_identity(projection: MsClapProjection) -> None:
    """Makes the projection pass its input on, up to the layer norm, which leaves cosines of centred vectors alone."""
    nn.init.eye_(projection.linear1.weight)
    nn.init.zeros_(projection.linear2.weight)


def build_model(text_model: str, model_kwargs: dict) -> MsClapModel:
    """A CLAP with a new audio tower and a frozen, pretrained text tower."""
    folder = resolve_text_model(text_model)
    # The text tower is never trained, so its dropout would only blur the targets.
    text_config = AutoConfig.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = MsClapModel(MsClapConfig(text_config=text_config, **model_kwargs))
    model.text_model = AutoModel.from_pretrained(folder, config=text_config, dtype=torch.float32)
    # The checkpoint says what the tower is, not where it lay on this machine.
    model.config.text_config._name_or_path = model.text_model.config._name_or_path = (
        text_model if text_model == MINILM else Path(text_model).name
    )
    start_as_identity(model.text_projection)
    model.text_model.requires_grad_(False)
    model.text_projection.requires_grad_(False)
    return model


def overlap(concepts: torch.Tensor) -> torch.Tensor:
    """How much of what is heard in one clip is heard in another: Jaccard index of the rows of `(batch, concepts)`,
    `(batch, batch)`, each row summing to 1.

    Two clips of one label, or of synonyms, are no negatives of each other; a mixture is half a positive of each part.
    """
    both = concepts @ concepts.T
    counts = concepts.sum(-1)
    jaccard = both / (counts[:, None] + counts[None] - both)
    return jaccard / jaccard.sum(-1, keepdim=True)


def clap_loss(
    audio_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    concepts: torch.Tensor,
    logit_scale: torch.Tensor,
    cosine_weight: float,
) -> torch.Tensor:
    """Symmetric contrastive loss with soft targets, plus one minus the cosine of the pairs.

    Args:
        audio_embeds, text_embeds (`torch.Tensor` of shape `(batch, projection_dim)`): L2-normalised pairs.
        concepts (`torch.Tensor` of shape `(batch, concepts)`): 1 where a concept is heard.
        logit_scale (`torch.Tensor`, scalar): factor on the cosines.
        cosine_weight (`float`): weight of the second term, which the contrastive term alone leaves near zero cosine.
    """
    logits = logit_scale * audio_embeds @ text_embeds.T
    targets = overlap(concepts)
    contrastive = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    cosine = (audio_embeds * text_embeds).sum(-1).mean()
    return contrastive + cosine_weight * (1 - cosine)


class ClapTrainer(Trainer):
    """The stock Trainer with CLAP's loss; evaluation is `evaluate_clap` on each set of validation clips."""

    def __init__(self, *args, descriptions, extractor, tokenizer, cosine_weight, max_logit_scale, **kwargs):
        super().__init__(*args, data_collator=self.collate, **kwargs)
        self.descriptions = descriptions
        self.extractor = extractor
        self.tokenizer = tokenizer
        self.cosine_weight = cosine_weight
        self.max_logit_scale = max_logit_scale

    def collate(self, items: list[dict]) -> dict:
        """An item of `PairedBatches` is a batch already; its texts become tokens."""
        (batch,) = items
        texts = [text + self.model.config.text_suffix for text in batch.pop("texts")]
        max_length = self.model.config.max_text_tokens
        return {
            **batch,
            **self.tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"),
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            text_embeds = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output.float()
        audio_embeds = model.get_audio_features(inputs["input_features"]).pooler_output.float()
        scale = model.logit_scale.exp().clamp(max=self.max_logit_scale)
        loss = clap_loss(audio_embeds, text_embeds, inputs["concepts"], scale, self.cosine_weight)
        return (loss, {"audio_embeds": audio_embeds, "text_embeds": text_embeds}) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        clap = ClapEncoder(self.model, self.extractor, self.tokenizer)
        metrics = {}
        for name, clips in (self.eval_dataset if eval_dataset is None else eval_dataset).items():
            result = evaluate_clap(clap, clips, self.descriptions)
            metrics |= {f"{metric_key_prefix}_{name}_{k}": v for k, v in result.items() if isinstance(v, float)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def train(
    recipe_path: Path,
    sounds: Path,
    output_dir: Path,
    soundfont: Path | None = None,
    resume: bool = False,
    **overrides,
) -> dict:
    """Runs a recipe and writes the finished CLAP into `output_dir`.

    Args:
        recipe_path (`Path`): A YAML such as `training/recipes/mats_tiny_clap.yaml`.
        sounds (`Path`): The audiofolder.
        output_dir (`Path`): Receives the model, its feature extractor and tokenizer, `credits.csv`,
            `training_log.json` and, in `checkpoints/`, what `resume` continues from.
        soundfont (`Path`, *optional*): General MIDI soundfont (`.sf2`), for recipes with rendered music.
        resume (`bool`): whether to continue from the last checkpoint.
        overrides: `TrainingArguments` in place of the recipe's.

    Returns:
        `dict`: what `training_log.json` holds.
    """
    start = time.monotonic()
    recipe = yaml.safe_load(recipe_path.read_text(encoding="utf-8"))
    descriptions = Descriptions.from_yaml(recipe_path.parent / recipe["descriptions"])
    training_clips, *held_out = split_clips(
        read_clips(sounds), recipe["validation_group"], recipe["validation_packages"], recipe["exclude_licences"]
    )
    validation = validation_sets(*held_out)
    args = TrainingArguments(
        output_dir=str(output_dir / "checkpoints"),
        per_device_train_batch_size=1,  # an item of PairedBatches is a batch
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        **{**recipe["trainer"], **overrides},
    )
    set_seed(args.seed)
    extractor = MsClapFeatureExtractor(**recipe["feature_extractor"])
    tokenizer = AutoTokenizer.from_pretrained(resolve_text_model(recipe["text_model"]), padding_side="right")
    music = make_music(recipe.get("music"), recipe_path.parent, soundfont, extractor.sampling_rate)
    model = build_model(recipe["text_model"], recipe["model"])
    batches = PairedBatches(
        training_clips,
        descriptions,
        extractor,
        steps=args.max_steps,
        seed=args.seed,
        augmentation=Augmentation(**recipe["augmentation"]),
        music=music,
        **recipe["batches"],
    )
    trainer = ClapTrainer(
        model,
        args,
        train_dataset=batches,
        eval_dataset=validation,
        descriptions=descriptions,
        extractor=extractor,
        tokenizer=tokenizer,
        **recipe["loss"],
    )
    trainer.train(resume_from_checkpoint=resume or None)

    save_clap(model, extractor, tokenizer, output_dir)
    write_credits(training_clips, sounds, output_dir / "credits.csv", music)
    saved = ClapEncoder.from_pretrained(output_dir)
    options = ["--sounds DIR", "--soundfont FILE"] if music is not None else ["--sounds DIR"]
    log = {
        "result": {name: evaluate_clap(saved, clips, descriptions) for name, clips in validation.items()},
        "recipe": recipe,
        "overrides": overrides,
        "clips": {"training": len(training_clips), **{name: len(clips) for name, clips in validation.items()}},
        "parameters": {name: count(part) for name, part in model.named_children()},
        "seconds": round(time.monotonic() - start),
        "command": " ".join(["python -m training.train_clap", recipe_path.name, *options, "--output_dir OUT"]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "history": trainer.state.log_history,
    }
    (output_dir / "training_log.json").write_text(json.dumps(log, indent=1), encoding="utf-8")
    return log


def make_music(settings: dict | None, folder: Path, soundfont: Path | None, sampling_rate: int) -> Music | None:
    """Rendered music as a recipe's `music` asks for it: `instruments` and `phrases` (files, relative to `folder`),
    `share` and `licence`.

    Raises:
        ValueError: music without a soundfont, a soundfont without music, or one that lacks presets.
    """
    if (settings is None) != (soundfont is None):
        given = "a soundfont was given" if soundfont is not None else "no soundfont was given"
        raise ValueError(f"The recipe {'has no' if settings is None else 'asks for'} rendered music, but {given}.")
    if settings is None:
        return None
    instruments = Instruments.from_yaml(folder / settings["instruments"])
    synthesizer = Synthesizer(soundfont, sampling_rate)
    synthesizer.check(instruments)
    composer = Composer(instruments, read_sources(folder / settings["phrases"]))
    return Music(composer, synthesizer, settings["share"], settings["licence"])


def save_clap(model: MsClapModel, extractor: MsClapFeatureExtractor, tokenizer, output_dir: Path) -> None:
    """Writes a complete CLAP checkpoint in half precision, which halves its size and leaves the results as they are."""
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(100))
    model.half().save_pretrained(output_dir)
    extractor.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains a small CLAP on real sounds.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--sounds", type=Path, required=True, help="audiofolder with a metadata.csv")
    parser.add_argument("--soundfont", type=Path, help="General MIDI soundfont (.sf2), if the recipe has music")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUT/checkpoints")
    options = parser.parse_args(argv)
    log = train(options.recipe, options.sounds, options.output_dir, options.soundfont, options.resume)
    print(json.dumps(log["result"], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])

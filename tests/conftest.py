"""Small real parts for the tests: a CLAP, a language model and tokenizers, all with random weights but otherwise whole.

What a trained model does is tested on `hub_cards/mats-tiny`.
"""

from pathlib import Path
from string import ascii_letters

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerFast

from configuration_mats import MatsConfig, MsClapConfig
from modeling_mats import MatsForConditionalGeneration, MsClapModel
from processing_mats import ClapEncoder, MatsProcessor, MsClapFeatureExtractor, SantaMemory

ROOT = Path(__file__).parent.parent
MATS_TINY = ROOT / "hub_cards" / "mats-tiny"
SOUNDS = ROOT / "examples" / "sounds"

SENTENCES = [
    "A dog barks twice in the distance.",
    "A rooster crows in the morning.",
    "Rain falls on a tin roof.",
    "A helicopter flies overhead.",
    "Waves roll onto the beach.",
    "A clock ticks steadily.",
    "A baby cries loudly.",
    "Someone sneezes.",
    "A fire crackles in the hearth.",
    "A chainsaw cuts through wood.",
]

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(end_token: str = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2's, with 300 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[end_token], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end_token, bos_token=end_token)


def make_clap(seed: int = 0) -> ClapEncoder:
    """A CLAP with a 1 s window at 16 kHz and 16 dimensions."""
    torch.manual_seed(seed)
    config = MsClapConfig(
        audio_config={
            "spec_size": 64,
            "num_mel_bins": 16,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "window_size": 4,
            "depths": [1, 1],
            "num_attention_heads": [1, 2],
            "patch_embeds_hidden_size": 8,
            "hidden_size": 16,
        },
        text_config={"vocab_size": 300, "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 96},
        projection_dim=16,
    )
    extractor = MsClapFeatureExtractor(
        feature_size=16,
        sampling_rate=16000,
        window_seconds=1.0,
        hop_length=100,
        fft_window_size=400,
        frequency_max=8000,
        mel_sampling_rate=16000,
    )
    return ClapEncoder(MsClapModel(config), extractor, make_tokenizer())


def make_laion_clap(enable_fusion: bool = False) -> ClapEncoder:
    """transformers' own `ClapModel`, small, with random weights."""
    torch.manual_seed(0)
    config = ClapConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 96,
        },
        audio_config={
            "patch_embeds_hidden_size": 8,
            "hidden_size": 16,
            "depths": [1, 1],
            "num_attention_heads": [1, 2],
            "spec_size": 64,
            "num_mel_bins": 16,
            "window_size": 4,
            "num_hidden_layers": 2,
            "enable_fusion": enable_fusion,
        },
        projection_dim=16,
    )
    extractor = ClapFeatureExtractor(
        feature_size=16, sampling_rate=16000, max_length_s=1, hop_length=100, fft_window_size=400
    )
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 94
    return ClapEncoder(ClapModel(config), extractor, tokenizer)


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    """With the template and the special tokens of SmolLM2: it begins with a system turn of its own."""
    tokenizer = make_tokenizer("<|im_end|>")
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "pad_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def make_processor(
    clap: ClapEncoder | None = None,
    with_memory: bool = True,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **kwargs,
) -> MatsProcessor:
    settings = {"num_audio_tokens": 4, "max_positions": 128, **kwargs}
    processor = MatsProcessor(tokenizer or make_tokenizer(), **settings)
    processor.clap = clap or make_clap()
    if with_memory:
        processor.santa_memory = SantaMemory.build(
            SENTENCES, processor.encode_text(SENTENCES), processor.clap.fingerprint, num_clusters=3, noise_variance=1e-3
        )
    return processor


def make_model(kind: str = "gpt2", **kwargs) -> MatsForConditionalGeneration:
    torch.manual_seed(0)
    text_config = {
        "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 128},
        "llama": {
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
        },
    }[kind]
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    settings = {
        "audio_embed_dim": 16,
        "num_audio_tokens": 4,
        "audio_token_id": 300,
        "mapper_clap_tokens": 3,
        "mapper_hidden_size": 32,
        "mapper_num_layers": 2,
        "mapper_num_heads": 4,
        "mapper_intermediate_size": 64,
    }
    config = MatsConfig(text_config={**text_config, **special, "vocab_size": 301}, **{**settings, **kwargs})
    return MatsForConditionalGeneration(config).eval()


def make_talker(kind: str) -> MatsForConditionalGeneration:
    """A model with large weights, that says something else for every sound and does not stop by itself."""
    model = make_model(kind, initializer_range=0.2)
    for name, weight in model.language_model.named_parameters():
        if weight.ndim > 1 and "wpe" not in name:
            weight.data *= 10
    model.generation_config.eos_token_id = None
    return model


def make_speaker() -> MatsForConditionalGeneration:
    """A talker with sharp ears, which tells even the near embeddings of `make_clap` apart, and writes letters only.

    What it says means nothing, but it is another thing for every sound, question, number of audios and memory: a test
    that compares answers can fail.
    """
    model = make_talker("gpt2")
    model.mapper.out_proj.weight.data *= 10
    tokens = make_processor(with_memory=False).tokenizer
    letters = {*ascii_letters, " "}
    model.generation_config.suppress_tokens = [i for i in range(len(tokens)) if not set(tokens.decode([i])) <= letters]
    model.generation_config.no_repeat_ngram_size = 2
    return model


def tone(seconds: float = 1.0, hertz: float = 440.0, rate: int = 16000) -> np.ndarray:
    """A sine of amplitude 0.5."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture(scope="session")
def processor() -> MatsProcessor:
    """Shared and read only; take `make_processor()` to change one."""
    return make_processor()


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def model(request) -> MatsForConditionalGeneration:
    """Shared and read only; take `make_model()` to change one."""
    return make_model(request.param)

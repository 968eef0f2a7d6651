"""MatsConfig: the paper's defaults, any language model inside, and refusals."""

import pytest
from transformers import AutoConfig, GPT2Config, LlamaConfig, Qwen2Config

from configuration_mats import MatsConfig


def test_the_defaults_are_the_papers():
    config = MatsConfig()
    assert config.text_config.model_type == "gpt2"
    assert config.audio_embed_dim == 1024
    assert (config.num_audio_tokens, config.mapper_clap_tokens) == (40, 40)
    assert (config.mapper_num_layers, config.mapper_num_heads) == (8, 8)
    assert config.noise_variance == 0.015
    assert config.renormalize is True
    assert config.audio_token_id == 50257 == config.text_config.vocab_size - 1


@pytest.mark.parametrize(
    "text_config",
    [
        GPT2Config(n_embd=48, n_head=3),
        LlamaConfig(hidden_size=48, num_attention_heads=3),
        Qwen2Config(hidden_size=48, num_attention_heads=3).to_dict(),
        {"model_type": "opt", "hidden_size": 48, "num_attention_heads": 3},
    ],
    ids=lambda config: config["model_type"] if isinstance(config, dict) else config.model_type,
)
def test_any_language_model_survives_saving_and_loading(text_config, tmp_path):
    config = MatsConfig(
        text_config=text_config, audio_token_id=9, num_audio_tokens=7, noise_variance=0.5, renormalize=False
    )
    config.save_pretrained(tmp_path)
    loaded = MatsConfig.from_pretrained(tmp_path)
    given = text_config if isinstance(text_config, dict) else text_config.to_dict()
    assert loaded.text_config.model_type == given["model_type"]
    assert loaded.text_config.hidden_size == 48
    assert loaded.get_text_config() is loaded.text_config
    assert (loaded.num_audio_tokens, loaded.noise_variance, loaded.renormalize) == (7, 0.5, False)
    assert loaded.to_dict() == config.to_dict()


def test_auto_config_knows_it(tmp_path):
    MatsConfig(mapper_num_layers=3).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MatsConfig
    assert config.mapper_num_layers == 3
    assert AutoConfig.for_model("mats", audio_embed_dim=5).audio_embed_dim == 5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"mapper_hidden_size": 100, "mapper_num_heads": 8},
            r"mapper_hidden_size \(100\) must be a multiple of mapper_num_heads \(8\)",
        ),
        ({"num_audio_tokens": 0}, r"num_audio_tokens \(0\) and mapper_clap_tokens \(40\) must be at least 1"),
        ({"mapper_clap_tokens": 0}, r"mapper_clap_tokens \(0\) must be at least 1"),
        ({"noise_variance": -0.1}, "it cannot be negative: -0.1"),
        ({"num_audio_tokens": "many"}, "num_audio_tokens"),
        ({"audio_token_id": 50258}, "audio_token_id is 50258, but text_config.vocab_size is 50258"),
        ({"audio_token_id": -1}, "audio_token_id is -1, but text_config.vocab_size is 50258"),
        (
            {"text_config": {"model_type": "llama", "vocab_size": 300}},
            "audio_token_id is 50257, but text_config.vocab_size is 300",
        ),
    ],
)
def test_contradictions_are_refused(kwargs, message):
    with pytest.raises(Exception, match=message) as caught:
        MatsConfig(**kwargs)
    assert "Error" in type(caught.value).__name__

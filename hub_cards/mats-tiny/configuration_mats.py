"""Configuration of MATS."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class MatsConfig(PreTrainedConfig):
    r"""Configuration of [`MatsForConditionalGeneration`]: a mapper in front of any causal language model. The defaults
    are the paper's (Wang et al., ICML 2025, section 4.1) with GPT-2.

    CLAP and Santa are not part of the model; they belong to [`MatsProcessor`].

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The language model, any that `AutoModelForCausalLM` knows. By default GPT-2 with one row more, for the
            placeholder.
        language_model_name_or_path (`str`, *optional*):
            Hub repo or folder whose weights the language model has, as long as LoRA is not merged into them. A light
            checkpoint fetches them there; a path that begins with `.` counts from the checkpoint's folder.
        language_model_revision (`str`, *optional*):
            Commit of that repo.
        light (`bool`, defaults to `False`):
            Whether the checkpoint lacks the language model's own weights.
        lora (`dict`, *optional*):
            Fields of `peft.LoraConfig` for the LoRA in the language model, where there is one.
        audio_embed_dim (`int`, defaults to 1024):
            Width of CLAP's embedding.
        num_audio_tokens (`int`, defaults to 40):
            Positions that one audio takes in the prompt; the number of the mapper's learnable queries.
        audio_token_id (`int`, defaults to 50257):
            Id of the placeholder `<|audio|>`, a row of the language model's embedding table.
        mapper_clap_tokens (`int`, defaults to 40):
            Tokens into which the embedding is spread before the mapper's Transformer.
        mapper_hidden_size (`int`, defaults to 768), mapper_num_layers (`int`, defaults to 8),
        mapper_num_heads (`int`, defaults to 8), mapper_intermediate_size (`int`, defaults to 1536),
        mapper_dropout (`float`, defaults to 0.0):
            The mapper's Transformer.
        noise_variance (`float`, defaults to 0.015):
            *Variance* per dimension of the Gaussian noise on the embedding, in training mode only (Eq. 1). 0 is none.
        renormalize (`bool`, defaults to `True`):
            Whether the mapper sees unit vectors: the embedding is L2-normalised after noise (training) and after Santa
            (inference). `False` takes Eq. 1 literally.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the mapper's initial weights.
    """

    model_type = "mats"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2", init_kwargs={"vocab_size": 50258})
    }

    text_config: dict | PreTrainedConfig | None = None
    language_model_name_or_path: str | None = None
    language_model_revision: str | None = None
    light: bool = False
    lora: dict | None = None
    audio_embed_dim: int = 1024
    num_audio_tokens: int = 40
    audio_token_id: int = 50257
    mapper_clap_tokens: int = 40
    mapper_hidden_size: int = 768
    mapper_num_layers: int = 8
    mapper_num_heads: int = 8
    mapper_intermediate_size: int = 1536
    mapper_dropout: float | int = 0.0
    noise_variance: float | int = 0.015
    renormalize: bool = True
    initializer_range: float = 0.02

    def validate_audio_token_id(self):
        rows = getattr(self.text_config, "vocab_size", None)
        if rows is not None and not 0 <= self.audio_token_id < rows:
            raise ValueError(f"audio_token_id is {self.audio_token_id}, but text_config.vocab_size is {rows}.")

    def validate_mapper(self):
        if self.mapper_hidden_size % self.mapper_num_heads:
            raise ValueError(
                f"mapper_hidden_size ({self.mapper_hidden_size}) must be a multiple of "
                f"mapper_num_heads ({self.mapper_num_heads})."
            )
        if self.num_audio_tokens < 1 or self.mapper_clap_tokens < 1:
            raise ValueError(
                f"num_audio_tokens ({self.num_audio_tokens}) and mapper_clap_tokens ({self.mapper_clap_tokens}) "
                "must be at least 1."
            )
        if self.noise_variance < 0:
            raise ValueError(f"noise_variance is a variance, it cannot be negative: {self.noise_variance}.")

    def to_diff_dict(self) -> dict[str, Any]:
        # The file of a whole checkpoint says nothing of what only light ones have.
        content = super().to_diff_dict()
        for key, default in {"language_model_revision": None, "light": False, "lora": None}.items():
            if content.get(key) == default:
                content.pop(key, None)
        content["text_config"].pop("_name_or_path", None)  # where it lay on the machine that loaded it
        if self.light:
            # How the language model was quantised in training is no part of it; whoever loads it says so anew.
            content["text_config"].pop("quantization_config", None)
        return content


__all__ = ["MatsConfig"]

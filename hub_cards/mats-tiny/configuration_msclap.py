"""Configuration of Microsoft's CLAP 2023 and of models of the same family."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

TEXT_POOLINGS = ("last_token", "first_token", "mean")


@strict
class MsClapConfig(PreTrainedConfig):
    r"""Configuration of [`MsClapModel`]. The defaults are those of CLAP 2023 (Elizalde et al., 2023), the checkpoint
    that the package `msclap` calls "2023".

    Args:
        audio_config (`ClapAudioConfig` or `dict`, *optional*):
            The HTSAT audio tower.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The text tower: any encoder or decoder that `AutoModel` knows. GPT-2 by default.
        projection_dim (`int`, defaults to 1024):
            Width of the space that audio and text share.
        projection_dropout (`float`, defaults to 0.5):
            Dropout on the second branch of both projections, in training only.
        text_pooling (`str`, defaults to `"last_token"`):
            How token states become one vector: `"last_token"` (decoders), `"first_token"` (BERT's `[CLS]`) or `"mean"`
            over the attended tokens (sentence encoders).
        text_suffix (`str`, defaults to `" <|endoftext|>"`):
            Appended to every text before tokenisation. CLAP 2023 was trained with GPT-2's end token.
        max_text_tokens (`int`, defaults to 77):
            Longest text, in tokens and with the suffix; CLAP 2023 saw no longer one in training.
        logit_scale_init_value (`float`, defaults to 14.2857):
            Initial value of the logit scale, 1 / 0.07 as in CLIP.

    Example:

    ```python
    >>> from configuration_mats import MsClapConfig
    >>> from modeling_mats import MsClapModel
    >>> model = MsClapModel(MsClapConfig(audio_config={"depths": [2, 2, 2, 2]}, text_config={"n_layer": 2}))
    ```
    """

    model_type = "msclap"
    sub_configs_defaults = {
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="clap_audio_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="gpt2"),
    }

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 1024
    projection_dropout: float | int = 0.5
    text_pooling: str = "last_token"
    text_suffix: str = " <|endoftext|>"
    max_text_tokens: int = 77
    logit_scale_init_value: float | int = 1 / 0.07

    def validate_text_pooling(self):
        if self.text_pooling not in TEXT_POOLINGS:
            raise ValueError(f"text_pooling is {self.text_pooling!r}, expected one of {', '.join(TEXT_POOLINGS)}.")


__all__ = ["MsClapConfig"]

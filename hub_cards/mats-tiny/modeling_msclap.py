"""CLAP 2023 (Microsoft) on transformers' own HTSAT and text models.

The towers are `ClapAudioModel` and whatever `AutoModel` builds from `config.text_config`; what is written here is the
pooling of the text states, msclap's projection, and the contrastive head. `convert_msclap.py` fills it from an msclap
checkpoint.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, ClapAudioModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_msclap import MsClapConfig


@dataclass
class MsClapOutput(ModelOutput):
    """
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*): symmetric contrastive loss, with `return_loss=True`.
    logits_per_audio (`torch.FloatTensor` of shape `(audio_batch, text_batch)`): scaled cosines.
    logits_per_text (`torch.FloatTensor` of shape `(text_batch, audio_batch)`): the same, transposed.
    audio_embeds (`torch.FloatTensor` of shape `(audio_batch, projection_dim)`): L2-normalised.
    text_embeds (`torch.FloatTensor` of shape `(text_batch, projection_dim)`): L2-normalised.
    """

    loss: torch.FloatTensor | None = None
    logits_per_audio: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    audio_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None


class MsClapProjection(nn.Module):
    """msclap's projection, `LN(l1(x) + dropout(l2(gelu(l1(x)))))`, without biases.

    It differs from transformers' `ClapProjectionLayer`, which has biases and neither residual nor norm.
    """

    def __init__(self, hidden_size: int, projection_dim: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(hidden_size, projection_dim, bias=False)
        self.linear2 = nn.Linear(projection_dim, projection_dim, bias=False)
        self.layer_norm = nn.LayerNorm(projection_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.linear1(hidden_states)
        return self.layer_norm(residual + self.dropout(self.linear2(F.gelu(residual))))


def pool_text(hidden_states: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Token states `(batch, length, hidden)` to one vector each `(batch, hidden)`; works with either padding side."""
    if pooling == "mean":
        weights = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
        return (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    if pooling == "last_token":
        index = (positions * attention_mask).argmax(-1)
    else:
        index = attention_mask.argmax(-1)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), index]


class MsClapPreTrainedModel(PreTrainedModel):
    config_class = MsClapConfig
    base_model_prefix = "msclap"
    main_input_name = "input_features"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # The towers are PreTrainedModels and initialise themselves; the projections follow msclap's defaults.
        if isinstance(module, MsClapModel):
            init.constant_(module.logit_scale, math.log(self.config.logit_scale_init_value))
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class MsClapModel(MsClapPreTrainedModel):
    """CLAP 2023: an HTSAT audio tower and a text tower, each projected into one space.

    ```python
    >>> from modeling_mats import MsClapModel
    >>> from processing_mats import MsClapFeatureExtractor
    >>> clap = MsClapModel.from_pretrained("path/to/clap")
    >>> extractor = MsClapFeatureExtractor.from_pretrained("path/to/clap")
    >>> embedding = clap.get_audio_features(**extractor(waveform, sampling_rate=44100)).pooler_output
    ```
    """

    def __init__(self, config: MsClapConfig):
        super().__init__(config)
        self.audio_model = ClapAudioModel._from_config(config.audio_config)
        self.text_model = AutoModel.from_config(config.text_config)
        self.audio_projection = MsClapProjection(
            config.audio_config.hidden_size, config.projection_dim, config.projection_dropout
        )
        self.text_projection = MsClapProjection(
            config.text_config.hidden_size, config.projection_dim, config.projection_dropout
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale_init_value)))
        self.post_init()

    @can_return_tuple
    def get_audio_features(
        self, input_features: torch.Tensor, normalize: bool = True, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Args:
            input_features (`torch.Tensor` of shape `(batch, 1, frames, mel_bins)`):
                Log-mel spectrograms in dB from [`MsClapFeatureExtractor`].
            normalize (`bool`, defaults to `True`): divide the embedding by its L2 norm.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` of shape `(batch, projection_dim)` is the embedding.
        """
        outputs = self.audio_model(input_features=input_features, **kwargs)
        embeds = self.audio_projection(outputs.pooler_output)
        outputs.pooler_output = F.normalize(embeds, dim=-1) if normalize else embeds
        return outputs

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        normalize: bool = True,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Token ids of the texts with `config.text_suffix` appended.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens, 0 for padding; all ones if absent. Pooling reads this mask, never a pad id, because
                msclap's GPT-2 tokenizer pads with `!`, an ordinary character.
            normalize (`bool`, defaults to `True`): divide the embedding by its L2 norm.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` of shape `(batch, projection_dim)` is the embedding.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        pooled = pool_text(outputs.last_hidden_state, attention_mask, self.config.text_pooling)
        embeds = self.text_projection(pooled)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=F.normalize(embeds, dim=-1) if normalize else embeds,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs,
    ) -> tuple | MsClapOutput:
        """Embeds both batches and compares every audio with every text; `return_loss` wants them paired row by row."""
        audio_embeds = self.get_audio_features(input_features, return_dict=True).pooler_output
        text_embeds = self.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output
        logits_per_audio = self.logit_scale.exp() * audio_embeds @ text_embeds.t()
        loss = None
        if return_loss:
            if len(audio_embeds) != len(text_embeds):
                raise ValueError(
                    f"The contrastive loss needs pairs, got {len(audio_embeds)} audios and {len(text_embeds)} texts."
                )
            target = torch.arange(len(audio_embeds), device=audio_embeds.device)
            loss = (F.cross_entropy(logits_per_audio, target) + F.cross_entropy(logits_per_audio.t(), target)) / 2
        return MsClapOutput(
            loss=loss,
            logits_per_audio=logits_per_audio,
            logits_per_text=logits_per_audio.t(),
            audio_embeds=audio_embeds,
            text_embeds=text_embeds,
        )


__all__ = ["MsClapModel", "MsClapPreTrainedModel"]

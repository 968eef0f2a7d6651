"""MATS: a mapper that turns a CLAP embedding into a prefix, in front of any causal language model.

The model starts at `audio_embeds`: CLAP's text embeddings in training, its audio embeddings moved by Santa at
inference. Both come from `MatsProcessor`, so nothing here knows what a waveform is.
"""

import inspect
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_mats import MatsConfig
from .checkpoint_mats import MatsCheckpointMixin
from .language_model_mats import find_commit, grow_embeddings
from .lora_mats import MatsLoraMixin, inject_lora


@dataclass
class MatsCausalLMOutputWithPast(ModelOutput):
    """
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*): cross-entropy over the labelled positions (Eq. 2).
    logits (`torch.FloatTensor` of shape `(batch, length, vocab)`): next-token scores. In training mode with labels only
        the positions that predict a label are computed, and the shape is `(labelled positions, vocab)`.
    past_key_values (`Cache`, *optional*): the language model's cache.
    hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*): the language model's.
    audio_hidden_states (`torch.FloatTensor` of shape `(audios, num_audio_tokens, hidden)`, *optional*): mapper output.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    audio_hidden_states: torch.FloatTensor | None = None


class MatsNoise(nn.Module):
    """Adds N(0, variance) to the embeddings in training mode, as dropout would (Eq. 1), then normalises them.

    The noise stands for the distance between the two modalities, so that a model which only ever saw text embeddings
    meets audio embeddings as one more sample of a known cloud.
    """

    def __init__(self, variance: float, renormalize: bool):
        super().__init__()
        self.variance = variance
        self.renormalize = renormalize

    def forward(self, embeds: torch.Tensor, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """`(audios, dim)` to the same. With `seeds` `(audios,)` each row's noise is a function of its seed alone."""
        if self.training and self.variance > 0:
            noise = torch.randn_like(embeds) if seeds is None else self._seeded(embeds, seeds)
            embeds = embeds + noise * self.variance**0.5
        return F.normalize(embeds, dim=-1) if self.renormalize else embeds

    @staticmethod
    def _seeded(embeds: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        # On the CPU, so that every device draws the same.
        generator = torch.Generator()
        rows = [torch.randn(embeds.shape[1], generator=generator.manual_seed(seed)) for seed in seeds.tolist()]
        return torch.stack(rows).to(embeds)

    def extra_repr(self) -> str:
        return f"variance={self.variance}, renormalize={self.renormalize}"


class MatsMapperLayer(nn.Module):
    """Pre-norm Transformer layer; every position attends to every other."""

    def __init__(self, config: MatsConfig):
        super().__init__()
        width = config.mapper_hidden_size
        self.num_heads = config.mapper_num_heads
        self.dropout = config.mapper_dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, config.mapper_intermediate_size)
        self.down_proj = nn.Linear(config.mapper_intermediate_size, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden_states.shape
        qkv = self.qkv_proj(self.attention_norm(hidden_states))
        query, key, value = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        attended = self.out_proj(attended.transpose(1, 2).reshape(batch, length, width))
        hidden_states = hidden_states + F.dropout(attended, self.dropout, self.training)
        fed = self.down_proj(F.gelu(self.up_proj(self.mlp_norm(hidden_states))))
        return hidden_states + F.dropout(fed, self.dropout, self.training)


class MatsMapper(nn.Module):
    """f_map of Eq. 1: one CLAP embedding to `num_audio_tokens` embeddings of the language model's width.

    The embedding is spread over `mapper_clap_tokens` tokens, the learnable queries are appended, a Transformer attends
    over both, and a linear layer reads the queries' outputs.
    """

    def __init__(self, config: MatsConfig):
        super().__init__()
        width = config.mapper_hidden_size
        self.clap_tokens = config.mapper_clap_tokens
        self.queries = nn.Parameter(torch.empty(config.num_audio_tokens, width))
        self.clap_proj = nn.Linear(config.audio_embed_dim, config.mapper_clap_tokens * width)
        self.layers = nn.ModuleList([MatsMapperLayer(config) for _ in range(config.mapper_num_layers)])
        self.norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """`(audios, audio_embed_dim)` to `(audios, num_audio_tokens, hidden_size of the language model)`."""
        tokens = self.clap_proj(embeds).view(len(embeds), self.clap_tokens, -1)
        queries = self.queries.expand(len(embeds), -1, -1)
        hidden_states = torch.cat([tokens, queries], dim=1)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.out_proj(self.norm(hidden_states[:, self.clap_tokens :]))


class MatsPreTrainedModel(PreTrainedModel):
    config_class = MatsConfig
    base_model_prefix = "mats"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MatsMapper"]
    _skip_keys_device_placement = "past_key_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # The language model is a PreTrainedModel and initialises itself.
        if isinstance(module, MatsMapper):
            init.normal_(module.queries, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class MatsForConditionalGeneration(MatsCheckpointMixin, MatsLoraMixin, MatsPreTrainedModel, GenerationMixin):
    """The mapper and a causal language model: text and CLAP embeddings in, text out.

    ```python
    >>> from modeling_mats import MatsForConditionalGeneration
    >>> from processing_mats import MatsProcessor
    >>> model = MatsForConditionalGeneration.from_pretrained("hub_cards/mats-tiny")
    >>> processor = MatsProcessor.from_pretrained("hub_cards/mats-tiny")
    >>> inputs = processor(text="What is making this sound?", audio="rooster.ogg")
    >>> answer = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    >>> processor.batch_decode(answer, skip_special_tokens=True)
    ```
    """

    def __init__(self, config: MatsConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.noise = MatsNoise(config.noise_variance, config.renormalize)
        self.mapper = MatsMapper(config)
        if language_model is None:  # only one that is loaded apart is given
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        self._has_cache = "past_key_values" in inspect.signature(language_model.forward).parameters
        if language_model._is_stateful and not self._has_cache:
            raise ValueError(
                f"{type(language_model).__name__} keeps a recurrent state in place of past_key_values; MATS needs a "
                "language model with attention."
            )
        self.post_init()
        if config.lora is not None:  # last: post_init would draw other weights for it
            inject_lora(language_model, config.lora)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the language model, which is by far most of MATS; the mapper may be in another."""
        return self.language_model.dtype

    @classmethod
    def from_language_model(
        cls, language_model: str | os.PathLike | PreTrainedModel, audio_token_id: int, vocab_size: int, **config_kwargs
    ) -> "MatsForConditionalGeneration":
        """A new MATS around a pretrained language model: its weights are kept, the mapper is fresh.

        Args:
            language_model (`str`, `os.PathLike` or `PreTrainedModel`):
                A Hub repo, a folder, or a loaded causal language model, quantised or not.
            audio_token_id (`int`):
                Id of `<|audio|>` in the tokenizer that will be used.
            vocab_size (`int`):
                Length of that tokenizer. Where the embedding table is smaller, it grows; the new rows are the mean of
                the old ones. They are never read (the mapper's output takes the placeholder's positions) nor generated.
            **config_kwargs:
                Further fields of [`MatsConfig`]. `language_model_revision` is found out for a Hub repo, but cannot be
                for a language model that is loaded.
        """
        revision = None
        if isinstance(language_model, PreTrainedModel):
            name = language_model.config._name_or_path or None
        else:
            name = os.fspath(language_model)
            revision = find_commit(name)
            language_model = AutoModelForCausalLM.from_pretrained(name, revision=revision)
        rows = language_model.get_input_embeddings().num_embeddings
        if audio_token_id >= max(rows, vocab_size):
            raise ValueError(f"audio_token_id is {audio_token_id}, but there are {max(rows, vocab_size)} tokens.")
        grow_embeddings(language_model, vocab_size)
        config = MatsConfig(
            text_config=language_model.config,
            audio_token_id=audio_token_id,
            # A new configuration sets these on its parts, too.
            attn_implementation=language_model.config._attn_implementation,
            experts_implementation=language_model.config._experts_implementation,
            **{"language_model_name_or_path": name, "language_model_revision": revision, **config_kwargs},
        )
        return cls._around(language_model, config)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.language_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def freeze_language_model(self) -> None:
        """Leaves only the mapper to train, as the paper does before LoRA is added."""
        self.language_model.requires_grad_(False)

    def get_audio_features(
        self,
        audio_embeds: torch.Tensor,
        audio_embeds_mask: torch.Tensor | None = None,
        noise_seeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """CLAP embeddings `(batch, audios, audio_embed_dim)` to prefixes `(real audios, num_audio_tokens, hidden)`.

        `audio_embeds_mask` of shape `(batch, audios)` is 1 for real audios and 0 for padding; `noise_seeds`, of the
        same shape, are for training.
        """
        if audio_embeds.ndim != 3 or audio_embeds.shape[-1] != self.config.audio_embed_dim:
            raise ValueError(
                f"audio_embeds has shape {tuple(audio_embeds.shape)}, expected (batch, audios, "
                f"{self.config.audio_embed_dim})."
            )
        if noise_seeds is not None and noise_seeds.shape != audio_embeds.shape[:2]:
            raise ValueError(
                f"noise_seeds has shape {tuple(noise_seeds.shape)}, expected {tuple(audio_embeds.shape[:2])} as "
                "audio_embeds."
            )
        if audio_embeds_mask is None:
            flat = audio_embeds.flatten(0, 1)
            seeds = None if noise_seeds is None else noise_seeds.flatten()
        else:
            if audio_embeds_mask.shape != audio_embeds.shape[:2]:
                raise ValueError(
                    f"audio_embeds_mask has shape {tuple(audio_embeds_mask.shape)}, expected "
                    f"{tuple(audio_embeds.shape[:2])} as audio_embeds."
                )
            flat = audio_embeds[audio_embeds_mask.bool()]
            seeds = None if noise_seeds is None else noise_seeds[audio_embeds_mask.bool()]
        # The noise is drawn in the embeddings' own precision; bf16 would round it away next to large entries.
        return self.mapper(self.noise(flat, seeds).to(self.mapper.clap_proj.weight.dtype))

    def _check_placeholders(
        self, placeholders: torch.Tensor, audio_embeds: torch.Tensor | None, audio_embeds_mask: torch.Tensor | None
    ) -> None:
        """Each row of `placeholders` `(batch, length)` must hold `num_audio_tokens` for each of its audios."""
        found = placeholders.sum(1)
        if audio_embeds is None:
            audios = torch.zeros_like(found)
        elif audio_embeds_mask is None:
            audios = found.new_full(audio_embeds.shape[:1], audio_embeds.shape[1])
        else:
            audios = audio_embeds_mask.to(found.device).long().sum(1)
        expected = audios * self.config.num_audio_tokens
        if len(audios) != len(found) or not torch.equal(found, expected):
            raise ValueError(
                f"The prompts hold {found.tolist()} audio positions, but audio_embeds has {audios.tolist()} audios of "
                f"{self.config.num_audio_tokens} positions each."
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        audio_embeds: torch.FloatTensor | None = None,
        audio_embeds_mask: torch.Tensor | None = None,
        noise_seeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> tuple | MatsCausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Tokens; each audio has `num_audio_tokens` positions of `config.audio_token_id`.
            attention_mask (`torch.Tensor` of shape `(batch, length)`): 1 for tokens, 0 for padding on either side.
            audio_embeds (`torch.FloatTensor` of shape `(batch, audios, audio_embed_dim)`):
                CLAP embeddings, L2-normalised, in the order of their placeholders.
            audio_embeds_mask (`torch.Tensor` of shape `(batch, audios)`): 1 for real audios, 0 for padding.
            noise_seeds (`torch.LongTensor` of shape `(batch, audios)`, *optional*):
                Seeds of the training noise, one for each audio: with them the noise depends neither on the batch nor on
                the number of devices. By default it is drawn from the device's generator.
            labels (`torch.LongTensor` of shape `(batch, length)`): -100 everywhere but on the answer (Eq. 2).
            logits_to_keep (`int` or `torch.Tensor`): as in transformers' causal language models.

        Raises:
            ValueError: placeholders and audios do not match, or no label is left to train on.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("Pass input_ids or inputs_embeds.")
            inputs_embeds = self.get_input_embeddings()(input_ids)

        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        audio_hidden_states = None
        if input_ids is not None:
            placeholders = input_ids == self.config.audio_token_id
            # Decoding steps hold one new token each and no audio; only prompts are worth the check.
            if not torch.compiler.is_compiling() and (audio_embeds is not None or past_length == 0):
                self._check_placeholders(placeholders, audio_embeds, audio_embeds_mask)
            if audio_embeds is not None:
                audio_hidden_states = self.get_audio_features(audio_embeds, audio_embeds_mask, noise_seeds)
                inputs_embeds = inputs_embeds.masked_scatter(
                    placeholders.unsqueeze(-1), audio_hidden_states.to(inputs_embeds.device, inputs_embeds.dtype)
                )
        elif audio_embeds is not None:
            raise ValueError("audio_embeds need input_ids, where their placeholders are; got inputs_embeds alone.")

        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            # Left padding must not shift absolute positions (GPT-2). The mask also covers what is cached.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past_length:]

        shift_labels = None
        if labels is not None:
            shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
            if self.training:
                # The head is the widest layer: it runs only on positions that predict a label.
                logits_to_keep = shift_labels != -100
                shift_labels = shift_labels[logits_to_keep]
                if not torch.compiler.is_compiling() and shift_labels.numel() == 0:
                    raise ValueError("labels are -100 everywhere: there is no answer to train on.")

        if use_cache is None and self.training:
            use_cache = False  # of which a training step has no use
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **{key: value for key, value in kwargs.items() if key != "num_items_in_batch"},
        )
        loss = None
        if shift_labels is not None:
            loss = self.loss_function(
                logits=outputs.logits,
                labels=None,
                shift_labels=shift_labels.contiguous(),
                vocab_size=outputs.logits.shape[-1],
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return MatsCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            past_key_values=getattr(outputs, "past_key_values", None),
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
            audio_hidden_states=audio_hidden_states,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        *args,
        inputs_embeds=None,
        audio_embeds=None,
        audio_embeds_mask=None,
        is_first_iteration=False,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        # With a cache the audio positions are computed once; without one each step sees the whole prompt again.
        if is_first_iteration or not kwargs.get("use_cache", True):
            model_inputs["audio_embeds"] = audio_embeds
            model_inputs["audio_embeds_mask"] = audio_embeds_mask
        return model_inputs

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        """`GenerationMixin.generate`, which checks the prompt first and never generates the placeholder.

        Raises:
            ValueError: placeholders and audios do not match, or prompt and answer may take more positions than the
                language model has (`max_new_tokens` or `max_length`).
        """
        effective = generation_config if generation_config is not None else self.generation_config
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None:
            self._check_placeholders(
                input_ids == self.config.audio_token_id, kwargs.get("audio_embeds"), kwargs.get("audio_embeds_mask")
            )
        suppressed = kwargs.pop("suppress_tokens", None) or getattr(effective, "suppress_tokens", None) or []
        kwargs["suppress_tokens"] = sorted({*suppressed, self.config.audio_token_id})
        if not self._has_cache:
            kwargs["use_cache"] = False
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        positions = getattr(self.config.text_config, "max_position_embeddings", None)
        # Learnt positions end there: GPT-2 would raise an IndexError in the middle of its answer. The last token is not
        # fed back, so it needs none.
        if positions is not None and generation_config.max_length - 1 > positions:
            limit = "max_length" if generation_config.max_new_tokens is None else "max_new_tokens"
            raise ValueError(
                f"The prompt has {input_ids_length} positions, audio included; the language model has {positions}, too "
                f"few for an answer where {limit} is {getattr(generation_config, limit)}."
            )


__all__ = ["MatsForConditionalGeneration", "MatsMapper", "MatsNoise", "MatsPreTrainedModel"]

"""The model without weights, and its parameters."""

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from configuration_mats import MatsConfig
from modeling_mats import MatsForConditionalGeneration
from modeling_mats.lora_mats import is_lora_name, resolve_lora
from training.dry_run.report import Part, Setup
from training.recipe import ModelArguments

# Names under which the architectures keep the dropout within the attention.
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def build_model(
    arguments: ModelArguments, text_config: PreTrainedConfig, embed_dim: int, setup: Setup
) -> MatsForConditionalGeneration:
    """MATS as it starts into training, on the meta device: adapters put in, precisions and `requires_grad` as then."""
    text_config = copy.deepcopy(text_config)
    if not setup.on_cpu:
        # The trace runs the CPU's kernels, whose fused attention falls back to an unfused one where there is dropout.
        # Those of GPUs have dropout built in.
        for name in ATTENTION_DROPOUTS:
            if hasattr(text_config, name):
                setattr(text_config, name, 0.0)
    # Of the implementations only eager keeps other tensors; the fused ones that need a GPU are traced as sdpa.
    eager = {"attn_implementation": "eager"} if arguments.attn_implementation == "eager" else {}
    config = MatsConfig(
        text_config=text_config,
        audio_token_id=text_config.vocab_size - 1,
        audio_embed_dim=embed_dim,
        **arguments.mapper_config,
        **eager,
    )
    with torch.device("meta"):
        model = MatsForConditionalGeneration(config)
        if not arguments.train_language_model:
            model.freeze_language_model()
            if arguments.lora_r:
                _add_lora(arguments, model.language_model)
        stored = setup.weights if arguments.language_model is not None else torch.float32
        for name, parameter in model.language_model.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if is_lora_name(name) else stored)
    return model


def _add_lora(arguments: ModelArguments, language_model: PreTrainedModel) -> None:
    # As add_lora does it, which has no use for a model without weights and refuses one.
    from peft import LoraConfig

    settings = {"r": arguments.lora_r, "lora_alpha": arguments.lora_alpha, "lora_dropout": arguments.lora_dropout}
    settings = resolve_lora(language_model, arguments.lora_targets or "auto", settings)
    transposed = any(isinstance(module, Conv1D) for module in language_model.modules())
    language_model.add_adapter(LoraConfig(**settings, fan_in_fan_out=transposed))


def fill_with_fakes(model: nn.Module) -> None:
    """Within a `FakeTensorMode`: tensors of the meta device become ones that pretend to be on the CPU, where the trace
    runs; tied ones stay tied."""
    # Keyed by identity; the originals are kept so that none is freed and its identity taken over by another.
    fakes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    fakes[id(tensor)] = (tensor, fake)
                tensors[name] = fakes[id(tensor)][1]


def count_clap(clap: PreTrainedModel) -> list[Part]:
    """CLAP's parts; it is frozen."""
    audio, text = (sum(p.numel() for p in tower.parameters()) for tower in (clap.audio_model, clap.text_model))
    rest = sum(p.numel() for p in clap.parameters()) - audio - text
    return [Part("CLAP's audio tower", audio), Part("CLAP's text tower", text), Part("CLAP's projections", rest)]


def count_model(model: MatsForConditionalGeneration) -> list[Part]:
    """The parts of the model itself; parameters that are shared count once."""
    groups: dict[str, list[nn.Parameter]] = {"mapper": [], "language model": [], "LoRA adapters": []}
    for name, parameter in model.named_parameters():
        group = "mapper" if name.startswith("mapper.") else "LoRA adapters" if is_lora_name(name) else "language model"
        groups[group].append(parameter)
    return [
        Part(name, sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))
        for name, parameters in groups.items()
        if parameters
    ]

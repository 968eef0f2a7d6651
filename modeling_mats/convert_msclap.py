"""Microsoft's CLAP 2023 checkpoint (`CLAP_weights_2023.pth`) to a folder that `MsClapModel.from_pretrained` reads.

    mats convert-msclap microsoft/msclap path/to/clap

The source file is a pickle. It is opened with `weights_only=True`, which builds tensors and plain containers and calls
nothing else, and it is read here only; what is written is safetensors and JSON.
"""

import json
import logging
import math
import os
import pickle
import re
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoTokenizer, ClapAudioConfig, GPT2Config, PreTrainedTokenizerBase
from transformers.audio_utils import mel_filter_bank

from configuration_mats.configuration_msclap import MsClapConfig
from modeling_mats.modeling_msclap import MsClapModel

logger = logging.getLogger(__name__)

HUB_REPO = "microsoft/msclap"
HUB_FILE = "CLAP_weights_2023.pth"

# The mel banks that a CLAP 2023 checkpoint may carry. msclap's YAML asks for the second, its code builds the first and
# applies it to 44.1 kHz audio (microsoft/CLAP issue #38).
MEL_BANKS = (
    {"mel_sampling_rate": 32000, "frequency_min": 50, "frequency_max": 14000},
    {"mel_sampling_rate": 44100, "frequency_min": 50, "frequency_max": 8000},
)
# What no checkpoint says: msclap's YAML for CLAP 2023.
WAVEFORM_SETTINGS = {"sampling_rate": 44100, "window_seconds": 7.0, "hop_length": 320}

AUDIO = "audio_encoder.base.htsat."
TEXT = "caption_encoder.base."
MEL_KEY = AUDIO + "logmel_extractor.melW"
STFT_KEYS = tuple(f"{AUDIO}spectrogram_extractor.stft.conv_{part}.weight" for part in ("real", "imag"))

# Keys of an msclap checkpoint that no part of MsClapModel needs, and why.
UNUSED_KEYS = (
    re.escape(MEL_KEY),  # becomes the feature extractor's settings
    *map(re.escape, STFT_KEYS),  # compared with the feature extractor's transform
    r".*\.attn_mask",  # recomputed from the grid at run time
    r"audio_encoder\.base\.htsat\.(tscam_conv|head)\.(weight|bias)",  # AudioSet's classifier
    r"caption_encoder\.base\.h\.\d+\.attn\.(bias|masked_bias)",  # causal masks that transformers used to save
)
RENAMES = (
    (r"^audio_encoder\.base\.htsat\.", "audio_model.audio_encoder."),
    (r"^audio_encoder\.projection\.", "audio_projection."),
    (r"^caption_encoder\.base\.", "text_model."),
    (r"^caption_encoder\.projection\.", "text_projection."),
)
AUDIO_RENAMES = (
    (".bn0.", ".batch_norm."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".attn.", ".attention.self."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
GPT2_HEAD_WIDTH = 64  # of every published GPT-2; the number of heads leaves no trace in the shapes
SHOWN_KEYS = 20


def convert_msclap(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    tokenizer: str | os.PathLike = "gpt2",
    text_heads: int | None = None,
) -> MsClapModel:
    """Converts an msclap 2023 checkpoint to a complete CLAP folder: model, feature extractor settings, tokenizer.

    Nothing is written unless every key of the checkpoint is accounted for and every weight of the model is found.

    Args:
        checkpoint (`str` or `os.PathLike`):
            A local `.pth` file, `{"model": state_dict}`, or the Hub repo `"microsoft/msclap"`.
        output_dir (`str` or `os.PathLike`):
            Folder for config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.
        tokenizer (`str` or `os.PathLike`, defaults to `"gpt2"`):
            The text tower's tokenizer, a Hub repo or a folder. It is saved right-padded, with the end token as padding
            where it has none.
        text_heads (`int`, *optional*):
            Attention heads of the text tower; its width divided by 64 if not given.

    Returns:
        `MsClapModel`: the converted model, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such checkpoint file.
        ValueError: the file is no PyTorch checkpoint, or holds objects beyond tensors, or no CLAP 2023; a key is
            missing, unexpected or of the wrong shape; its mel bank is unknown; the tokenizer does not fit.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise NotADirectoryError(f"{output_dir} is a file, expected a folder to write to.")
    state = load_checkpoint(checkpoint)
    config, weights, preprocessor = convert_state_dict(state, text_heads)
    text_tokenizer = AutoTokenizer.from_pretrained(tokenizer, padding_side="right")
    _check_tokenizer(text_tokenizer, config)

    config.text_config.bos_token_id = config.text_config.eos_token_id = text_tokenizer.eos_token_id
    if text_tokenizer.pad_token is None:
        text_tokenizer.pad_token = text_tokenizer.eos_token
    model = MsClapModel.from_pretrained(None, config=config, state_dict=weights).eval()

    model.save_pretrained(output_dir)
    text_tokenizer.save_pretrained(output_dir)
    (output_dir / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2, sort_keys=True) + "\n")
    return model


def load_checkpoint(checkpoint: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Reads the state dict of an msclap `.pth` file, or of the Hub repo `"microsoft/msclap"`, without running it."""
    if os.fspath(checkpoint) == HUB_REPO and not Path(checkpoint).exists():
        checkpoint = hf_hub_download(HUB_REPO, HUB_FILE)
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f'No such checkpoint: {path}. Expected a .pth file, or "{HUB_REPO}".')
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected msclap's .pth file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # torch's own message suggests weights_only=False, which would run what the file holds; hence `from None`.
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe is None:
            raise ValueError(f"{path} is not a PyTorch checkpoint that can be read as plain tensors.") from None
        raise ValueError(
            f"{path} was refused: it holds {unsafe.group(1)}, expected tensors only. Loading such a file can run code."
        ) from None
    # What is no pickle at all fails in many ways, down to a KeyError of the unpickler's for an unknown opcode.
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a PyTorch checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        found = f"keys {_listed(map(str, content))}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f'{path} holds {found}, expected msclap\'s {{"model": state_dict}}.')
    state = content["model"]
    others = [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{path} holds values that are no tensors: {_listed(others)}.")
    return state


def convert_state_dict(
    state: dict[str, torch.Tensor], text_heads: int | None = None
) -> tuple[MsClapConfig, dict[str, torch.Tensor], dict]:
    """Maps msclap's state dict to `MsClapModel`'s; the architecture is read from the shapes.

    Args:
        state (`dict[str, torch.Tensor]`): msclap's state dict.
        text_heads (`int`, *optional*): Attention heads of the text tower; its width divided by 64 if not given.

    Returns:
        The configuration, the weights by `MsClapModel`'s names, and the content of preprocessor_config.json.

    Raises:
        ValueError: with the keys that are missing, unexpected or of the wrong shape, or an unknown mel bank.
    """
    config = MsClapConfig(
        audio_config=_audio_config(state),
        text_config=_text_config(state, text_heads),
        projection_dim=_shape(state, "audio_encoder.projection.linear1.weight")[0],
    )
    preprocessor = _preprocessor_settings(state)

    weights, sources = {}, {}
    for key, tensor in state.items():
        if any(re.fullmatch(pattern, key) for pattern in UNUSED_KEYS):
            continue
        for name, part in _map_tensor(key, tensor):
            weights[name], sources[name] = part, key

    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in MsClapModel(config).state_dict().items()}
    problems = []
    if missing := sorted(expected.keys() - weights.keys()):
        problems.append(f"missing, by MsClapModel's names: {_listed(missing)}")
    if unexpected := sorted({sources[name] for name in weights.keys() - expected.keys()}):
        problems.append(f"unexpected, by msclap's names: {_listed(unexpected)}")
    wrong = [
        f"{sources[name]} {tuple(weights[name].shape)} instead of {tuple(expected[name])}"
        for name in sorted(expected.keys() & weights.keys())
        if weights[name].shape != expected[name]
    ]
    if wrong:
        problems.append(f"of another shape: {_listed(wrong)}")
    if problems:
        raise ValueError("The checkpoint is no CLAP 2023. Keys " + "; ".join(problems) + ".")
    return config, weights, preprocessor


def recognise_mel_bank(bank: torch.Tensor) -> dict:
    """Finds which of `MEL_BANKS` a checkpoint carries.

    Args:
        bank (`torch.Tensor` of shape `(frequency bins, mel bins)`): `logmel_extractor.melW`.

    Returns:
        `dict`: one of `MEL_BANKS`, settings of `MsClapFeatureExtractor`.

    Raises:
        ValueError: it is none of them.
    """
    differences = []
    for settings in MEL_BANKS:
        candidate = mel_filter_bank(
            num_frequency_bins=bank.shape[0],
            num_mel_filters=bank.shape[1],
            min_frequency=settings["frequency_min"],
            max_frequency=settings["frequency_max"],
            sampling_rate=settings["mel_sampling_rate"],
            norm="slaney",
            mel_scale="slaney",
        )
        difference = np.abs(candidate - bank.double().numpy()).max()
        if difference < 1e-6:  # filters peak near 0.03
            return settings
        differences.append(f"sr={settings['mel_sampling_rate']}, fmax={settings['frequency_max']}: {difference:.1e}")
    raise ValueError(
        f"{MEL_KEY}, of shape {tuple(bank.shape)}, is none of the mel banks that CLAP 2023 is known with "
        f"(largest differences: {'; '.join(differences)})."
    )


def _map_tensor(key: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """One entry of msclap's state dict to its entries in `MsClapModel`'s."""
    name = key
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    if not key.startswith(AUDIO):
        return [(name, tensor)]
    if ".attn.qkv." in name:
        names = [name.replace(".attn.qkv.", f".attention.self.{part}.") for part in ("query", "key", "value")]
        return list(zip(names, tensor.chunk(3), strict=False))
    for old, new in AUDIO_RENAMES:
        name = name.replace(old, new)
    return [(name, tensor)]


def _audio_config(state: dict[str, torch.Tensor]) -> ClapAudioConfig:
    layers = _count(state, AUDIO + r"layers\.(\d+)\.")
    depths = [_count(state, AUDIO + rf"layers\.{layer}\.blocks\.(\d+)\.") for layer in range(layers)]
    width, channels, patch, _ = _shape(state, AUDIO + "patch_embed.proj.weight", 4)
    tables = [
        _shape(state, f"{AUDIO}layers.{layer}.blocks.0.attn.relative_position_bias_table", 2) for layer in range(layers)
    ]
    window = (math.isqrt(tables[0][0]) + 1) // 2
    # One mask per window of the first stage's grid, which is square.
    windows_per_side = math.isqrt(_shape(state, AUDIO + "layers.0.blocks.1.attn_mask", 3)[0])
    return ClapAudioConfig(
        num_mel_bins=_shape(state, MEL_KEY, 2)[1],
        spec_size=windows_per_side * window * patch,
        window_size=window,
        patch_size=patch,
        patch_stride=[patch, patch],
        patch_embed_input_channels=channels,
        patch_embeds_hidden_size=width,
        hidden_size=_shape(state, AUDIO + "norm.weight", 1)[0],
        depths=depths,
        num_hidden_layers=layers,
        num_attention_heads=[heads for _, heads in tables],
        mlp_ratio=_shape(state, AUDIO + "layers.0.blocks.0.mlp.fc1.weight", 2)[0] / width,
        qkv_bias=AUDIO + "layers.0.blocks.0.attn.qkv.bias" in state,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        enable_fusion=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
    )


def _text_config(state: dict[str, torch.Tensor], heads: int | None) -> GPT2Config:
    vocab_size, width = _shape(state, TEXT + "wte.weight", 2)
    if heads is None and width % GPT2_HEAD_WIDTH:
        raise ValueError(
            f"The text tower is {width} wide, no multiple of GPT-2's head width {GPT2_HEAD_WIDTH}; pass text_heads."
        )
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=_shape(state, TEXT + "wpe.weight", 2)[0],
        n_embd=width,
        n_layer=_count(state, TEXT + r"h\.(\d+)\."),
        n_head=heads or width // GPT2_HEAD_WIDTH,
        n_inner=_shape(state, TEXT + "h.0.mlp.c_fc.weight", 2)[1],
    )


def _preprocessor_settings(state: dict[str, torch.Tensor]) -> dict:
    """The content of preprocessor_config.json, for `MsClapFeatureExtractor`, which lives in a higher package."""
    bank = recognise_mel_bank(state[MEL_KEY])
    bins, mel_bins = state[MEL_KEY].shape
    window_size = 2 * (bins - 1)
    # The STFT is msclap's Hann window times cosines and sines, kept as convolution kernels.
    expected = torch.fft.fft(torch.eye(window_size, dtype=torch.float64))[:bins]
    expected = expected * torch.hann_window(window_size, dtype=torch.float64)
    for key, kernel in zip(STFT_KEYS, (expected.real, expected.imag), strict=True):
        if _shape(state, key) != (bins, 1, window_size) or (state[key][:, 0] - kernel).abs().max() > 1e-5:
            raise ValueError(
                f"{key} {tuple(state[key].shape)} is not the STFT with a Hann window of {window_size} samples that "
                "CLAP 2023 has."
            )
    logger.info("The checkpoint's mel bank is that of sr=%(mel_sampling_rate)d, fmax=%(frequency_max)d.", bank)
    return {
        "feature_extractor_type": "MsClapFeatureExtractor",
        "feature_size": mel_bins,
        "fft_window_size": window_size,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        **WAVEFORM_SETTINGS,
        **bank,
    }


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: MsClapConfig):
    end = config.text_suffix.strip()
    if tokenizer.convert_tokens_to_ids(end) is None or tokenizer.eos_token != end:
        raise ValueError(f"The tokenizer's end token is {tokenizer.eos_token!r}, CLAP 2023 needs GPT-2's {end!r}.")
    vocab_size = config.text_config.vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, the checkpoint embeds {vocab_size}.")
    if len(tokenizer) < vocab_size:
        logger.warning(
            "The tokenizer has %d tokens, the checkpoint embeds %d: is it the right one?", len(tokenizer), vocab_size
        )


def _shape(state: dict[str, torch.Tensor], key: str, dimensions: int | None = None) -> tuple[int, ...]:
    """Shape of an entry that the architecture is read from."""
    if key not in state:
        raise ValueError(f"The checkpoint is no CLAP 2023: it lacks {key}. It holds {_listed(state)}.")
    shape = tuple(state[key].shape)
    if dimensions is not None and len(shape) != dimensions:
        raise ValueError(f"{key} has shape {shape}, expected {dimensions} dimensions.")
    return shape


def _count(state: dict[str, torch.Tensor], pattern: str) -> int:
    """One more than the largest number that the pattern's group takes among the keys."""
    numbers = [int(match.group(1)) for key in state if (match := re.match(pattern, key))]
    return max(numbers, default=-1) + 1


def _listed(keys) -> str:
    keys = list(keys)
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return ", ".join(keys[:SHOWN_KEYS]) + more


__all__ = ["convert_msclap", "convert_state_dict", "load_checkpoint", "recognise_mel_bank"]

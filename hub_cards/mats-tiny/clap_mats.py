"""CLAP as MATS uses it: sounds and texts in, L2-normalised embeddings out."""

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .configuration_msclap import MsClapConfig
from .modeling_msclap import MsClapModel
from .audio_mats import cut_windows
from .feature_extraction_msclap import MsClapFeatureExtractor

CLAP_SUBFOLDER = "clap"


class ClapEncoder:
    """A CLAP model with its feature extractor and tokenizer: [`MsClapModel`] or transformers' own `ClapModel` (LAION).

    The embeddings depend neither on the batch nor on chance: windows are cut here, before the feature extractor, whose
    own cropping (LAION's is random) therefore never acts.

    Args:
        model (`PreTrainedModel`): left as it is, so that a model in training can be asked in between.
        feature_extractor, tokenizer: the model's.
        storage_dtype (`torch.dtype`, *optional*): precision of the files, if it is not the model's.
    """

    def __init__(self, model: PreTrainedModel, feature_extractor, tokenizer, storage_dtype: torch.dtype | None = None):
        self.model = model
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer
        self.storage_dtype = storage_dtype or model.dtype
        if model.dtype == torch.float16 != self.storage_dtype:
            raise ValueError(
                f"This CLAP is stored in {self.storage_dtype}, and float16 would change its identity: load it in "
                "float32 or bfloat16."
            )
        self._fingerprint: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str = "",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        **hub_kwargs,
    ) -> "ClapEncoder":
        """Loads a complete CLAP folder or Hub repo (config, weights, preprocessor, tokenizer), frozen.

        `dtype` is float32 whatever the file holds: halves save space on disk, but embeddings are compared to a memory.
        `save_pretrained` writes the precision that was read.
        """
        name = os.fspath(pretrained_model_name_or_path)
        where = {"subfolder": subfolder, **hub_kwargs}
        config_dict, _ = PreTrainedConfig.get_config_dict(name, **where)
        if config_dict.get("model_type") == MsClapConfig.model_type:
            config = MsClapConfig.from_pretrained(name, **where)
            model = MsClapModel.from_pretrained(name, config=config, dtype=dtype, **where)
            extractor = MsClapFeatureExtractor.from_pretrained(name, **where)
        else:
            config = AutoConfig.from_pretrained(name, **where)
            model = AutoModel.from_pretrained(name, config=config, dtype=dtype, **where)
            for method in ("get_audio_features", "get_text_features"):
                if not hasattr(model, method):
                    raise ValueError(f"{name} is a {type(model).__name__}, which is no CLAP: it has no {method}.")
            extractor = AutoFeatureExtractor.from_pretrained(name, **where)
        stored = getattr(torch, str(config_dict.get("dtype") or "float32"))
        # The configuration is handed over so that a type which only this package knows is not looked up by name.
        tokenizer = AutoTokenizer.from_pretrained(name, config=config.text_config, **where)
        for tower in config.sub_configs:
            getattr(config, tower).dtype = None  # the towers follow the whole; loading wrote its own precision there
        model.requires_grad_(False)
        return cls(model.to(device) if device is not None else model, extractor, tokenizer, stored)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes a folder that `from_pretrained` reads."""
        stored = self.model
        if stored.dtype != self.storage_dtype:
            stored = copy.deepcopy(stored).to(self.storage_dtype)
        stored.save_pretrained(save_directory)
        self.feature_extractor.save_pretrained(save_directory)
        if (backend := getattr(self.tokenizer, "backend_tokenizer", None)) is not None:
            # What the last call left behind is no part of the tokenizer; the same CLAP should be the same files.
            backend.no_truncation()
            backend.no_padding()
        self.tokenizer.save_pretrained(save_directory)

    @property
    def sampling_rate(self) -> int:
        """Rate of the waveforms that `encode_audio` takes, in hertz."""
        return self.feature_extractor.sampling_rate

    @property
    def window_samples(self) -> int:
        """Length of the window that the audio tower sees, in samples."""
        if isinstance(self.feature_extractor, MsClapFeatureExtractor):
            return self.feature_extractor.window_samples
        return self.feature_extractor.nb_max_samples

    @property
    def embed_dim(self) -> int:
        """Width of the embeddings."""
        return self.model.config.projection_dim

    @property
    def max_text_tokens(self) -> int:
        """Longest text, in tokens, special tokens and suffix included."""
        if (own := getattr(self.model.config, "max_text_tokens", None)) is not None:
            return own
        positions = self.model.config.text_config.max_position_embeddings
        # RoBERTa's positions start behind its padding id.
        return min(positions - 2, self.tokenizer.model_max_length)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every weight, by name, shape and value; of a model in training, at the first call.

        Values are rounded as they are stored and then to bfloat16, so that a CLAP has one identity, loaded in float32
        or in bfloat16.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                if tensor.is_floating_point():
                    tensor = tensor.to(self.storage_dtype).to(torch.bfloat16).view(torch.int16)
                digest.update(tensor.cpu().contiguous().numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @contextmanager
    def _at_inference(self) -> Iterator[None]:
        """In evaluation mode and without gradients; afterwards every module is in its own mode again."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    def encode_audio(
        self,
        waveforms: Sequence[np.ndarray],
        batch_size: int = 8,
        long_audio: str = "windows",
        seed: int | None = None,
    ) -> torch.Tensor:
        """
        Args:
            waveforms (sequence of `np.ndarray` of shape `(samples,)`): mono, at `sampling_rate`; see `load_audio`.
            batch_size (`int`): windows encoded at a time.
            long_audio (`str`): what becomes of audio beyond the window; see `cut_windows`.
            seed (`int`, *optional*): of the crops with `long_audio="random"`.

        Returns:
            `torch.FloatTensor` of shape `(len(waveforms), embed_dim)`, L2-normalised; the mean over a sound's windows,
            normalised again.
        """
        generator = np.random.default_rng(seed) if seed is not None else None
        windows = [cut_windows(waveform, self.window_samples, long_audio, generator) for waveform in waveforms]
        flat = [window for group in windows for window in group]
        with self._at_inference():
            embeds = [self._encode_windows(flat[i : i + batch_size]) for i in range(0, len(flat), batch_size)]
        if not embeds:
            return torch.empty(0, self.embed_dim)
        groups = torch.cat(embeds).split([len(group) for group in windows])
        return F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)

    def _encode_windows(self, windows: list[np.ndarray]) -> torch.Tensor:
        own = {}
        if not isinstance(self.feature_extractor, MsClapFeatureExtractor):
            own["truncation"] = "fusion" if self.model.config.audio_config.enable_fusion else "rand_trunc"
        features = self.feature_extractor(windows, sampling_rate=self.sampling_rate, return_tensors="pt", **own)
        if "is_longer" in features:
            # No window is longer than the model's; transformers' extractor flags one at random where none is.
            features["is_longer"] = torch.zeros(len(windows), 1, dtype=torch.bool)
        features = {key: self._to_model(value) for key, value in features.items()}
        return self.model.get_audio_features(**features).pooler_output.float().cpu()

    def _to_model(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.model.device)
        return tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor

    def encode_text(self, texts: Sequence[str], batch_size: int = 64, truncation: bool = False) -> torch.Tensor:
        """
        Args:
            texts (sequence of `str`).
            batch_size (`int`): texts encoded at a time, sorted by length, so that little is padded.
            truncation (`bool`): cut texts that are longer than the tower takes, instead of refusing them.

        Returns:
            `torch.FloatTensor` of shape `(len(texts), embed_dim)`, L2-normalised.

        Raises:
            ValueError: an empty text, or one longer than `max_text_tokens` without `truncation`.
        """
        suffix = getattr(self.model.config, "text_suffix", "")
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"Text {index} is {text!r}, expected a non-empty string.")
        if not texts:
            return torch.empty(0, self.embed_dim)
        limit = self.max_text_tokens
        ids = self.tokenizer([text + suffix for text in texts])["input_ids"]
        too_long = [index for index, row in enumerate(ids) if len(row) > limit]
        if too_long and not truncation:
            index = too_long[0]
            raise ValueError(
                f"{len(too_long)} texts are longer than the {limit} tokens of CLAP's text tower; the first, number "
                f"{index}, has {len(ids[index])}: {texts[index][:80]!r}... Pass truncation=True to cut them."
            )
        for index in too_long:
            ids[index] = self._truncated(texts[index], suffix, limit)
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        embeds = torch.empty(len(ids), self.embed_dim)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self._pad([ids[row] for row in rows])
            with self._at_inference():
                embeds[rows] = self.model.get_text_features(**batch).pooler_output.float().cpu()
        return embeds

    def count_long_texts(self, texts: Sequence[str]) -> int:
        """How many of the texts `encode_text` would cut, or refuse."""
        suffix = getattr(self.model.config, "text_suffix", "")
        limit = self.max_text_tokens
        return sum(len(row) > limit for row in self.tokenizer([text + suffix for text in texts])["input_ids"])

    def _truncated(self, text: str, suffix: str, limit: int) -> list[int]:
        """The text cut at a token's end, so that suffix and special tokens stay within the limit."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for kept in range(min(limit, len(offsets)), 0, -1):
            ids = self.tokenizer(text[: offsets[kept - 1][1]] + suffix)["input_ids"]
            if len(ids) <= limit:
                return ids
        raise ValueError(f"A limit of {limit} tokens leaves no room for text beside the suffix {suffix!r}.")

    def _pad(self, ids: list[list[int]]) -> dict[str, torch.Tensor]:
        # By hand and with a mask: msclap's tokenizer has no padding token of its own, and none is needed.
        length = max(map(len, ids))
        filler = self.tokenizer.pad_token_id or 0
        return {
            "input_ids": torch.tensor([row + [filler] * (length - len(row)) for row in ids]).to(self.model.device),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids]).to(
                self.model.device
            ),
        }


__all__ = ["CLAP_SUBFOLDER", "ClapEncoder"]

"""MatsProcessor: sounds and text to model inputs. It runs CLAP, then Santa, so that the model starts at embeddings."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Number
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import cached_file, logging

from .language_model_mats import is_local_location, read_location, written_location
from .audio_mats import AudioSource, load_audio
from .chat_mats import DEFAULT_CHAT_TEMPLATE, answer_spans, is_conversation, split_audio_parts
from .clap_mats import CLAP_SUBFOLDER, ClapEncoder
from .santa_mats import SANTA_FILE_NAME, SantaMemory, check_santa_settings

logger = logging.get_logger(__name__)

AUDIO_TOKEN = "<|audio|>"
# The paper's, section 4.1.
DEFAULT_SANTA_SETTINGS = {
    "weight": 0.3,
    "temperature": 0.1,
    "top_k": 32,
    "use_kmeans": True,
    "use_memory": True,
    "use_audio": True,
}
# What a light checkpoint has in place of `clap/`.
LIGHT_FIELDS = ("clap_name_or_path", "clap_subfolder", "clap_fingerprint")


class MatsProcessor(ProcessorMixin):
    r"""Makes the inputs of [`MatsForConditionalGeneration`] from sounds (or descriptions in their place) and text.

    ```python
    >>> from processing_mats import MatsProcessor
    >>> processor = MatsProcessor.from_pretrained("hub_cards/mats-tiny")
    >>> inputs = processor(text="What is making this sound?", audio="rooster.ogg")
    >>> inputs["audio_embeds"].shape
    torch.Size([1, 1, 384])
    ```

    A prompt marks where its audios go by `<|audio|>`; one without gets them in front (Eq. 1). Each placeholder takes
    `num_audio_tokens` positions.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The language model's. `<|audio|>` is added where it is missing, and an end token serves for padding where
            there is none. Padding is on the left, as generation wants it.
        chat_template (`str`, *optional*):
            Jinja template of a conversation whose audios are already placeholders in the text. Default: the
            tokenizer's, or for a base model without one, prompt, space, answer, end token.
        num_audio_tokens (`int`, defaults to 40):
            Positions of one audio; the model's `config.num_audio_tokens`.
        max_positions (`int`, *optional*):
            Positions of the language model. Longer prompts are refused before any audio is read.
        long_audio (`str`, defaults to `"windows"`):
            What becomes of audio beyond CLAP's window: the mean over consecutive windows; `"random"`, the paper's
            random crop, which needs a seed; or `"error"`.
        santa_settings (`dict`, *optional*):
            Defaults of Santa (`weight`, `temperature`, `top_k`, `use_kmeans`, `use_memory`, `use_audio`); see
            [`SantaMemory`]. What is not named is the paper's.
        clap_name_or_path (`str`, *optional*):
            Folder or Hub repo of the CLAP, for light checkpoints, which have no `clap/` of their own; a path that
            begins with `.` counts from the checkpoint's folder.
        clap_subfolder (`str`, *optional*):
            Subfolder of that; `clap` where it is a whole MATS checkpoint.
        clap_fingerprint (`str`, *optional*):
            `ClapEncoder.fingerprint` of the CLAP that belongs to the checkpoint. Another is refused.

    `clap` (a [`ClapEncoder`]) and `santa_memory` (a [`SantaMemory`]) are attributes; `from_pretrained` loads them from
    `clap/` and `santa_memory.safetensors`, `save_pretrained` writes them there.
    """

    def __init__(
        self,
        tokenizer,
        chat_template: str | None = None,
        num_audio_tokens: int = 40,
        max_positions: int | None = None,
        long_audio: str = "windows",
        santa_settings: dict | None = None,
        clap_name_or_path: str | None = None,
        clap_subfolder: str | None = None,
        clap_fingerprint: str | None = None,
    ):
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if AUDIO_TOKEN not in tokenizer.get_added_vocab():
            tokenizer.add_tokens([AUDIO_TOKEN], special_tokens=True)
        self.audio_token = AUDIO_TOKEN
        self.audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        self.num_audio_tokens = num_audio_tokens
        self.max_positions = max_positions
        self.long_audio = long_audio
        self.santa_settings = _merged_santa_settings(DEFAULT_SANTA_SETTINGS, santa_settings or {})
        self.clap_name_or_path = clap_name_or_path
        self.clap_subfolder = clap_subfolder
        self.clap_fingerprint = clap_fingerprint
        self.clap: ClapEncoder | None = None
        self._santa_memory: SantaMemory | None = None
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE)

    # -- CLAP and memory -----------------------------------------------------------------------------------------------

    @property
    def santa_memory(self) -> SantaMemory | None:
        """The memory, or `None`. Setting one that another CLAP made raises `ValueError`."""
        return self._santa_memory

    @santa_memory.setter
    def santa_memory(self, memory: SantaMemory | None) -> None:
        if memory is not None:
            fingerprint = self._require_clap("A Santa memory").fingerprint
            if memory.clap_fingerprint != fingerprint:
                raise ValueError(
                    f"This Santa memory was made by the CLAP {memory.clap_fingerprint[:16]}, but the processor's is "
                    f"{fingerprint[:16]}. Embeddings of different CLAPs cannot be compared: build the memory anew."
                )
        self._santa_memory = memory

    def _require_clap(self, purpose: str) -> ClapEncoder:
        if self.clap is None:
            raise ValueError(f"{purpose} needs CLAP, and this processor has none; set processor.clap to a ClapEncoder.")
        return self.clap

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        load_clap: bool = True,
        load_memory: bool = True,
        clap: str | os.PathLike | ClapEncoder | None = None,
        clap_dtype: torch.dtype = torch.float32,
        clap_device: str | torch.device | None = None,
        **kwargs,
    ) -> "MatsProcessor":
        """Loads tokenizer and settings, CLAP and the memory, where the checkpoint has them.

        CLAP is in `clap/`, or for a light checkpoint, where that says.

        Args:
            load_clap (`bool`): `False` leaves CLAP and memory out, for training from cached embeddings.
            load_memory (`bool`): `False` leaves the memory out, for building another.
            clap (`str`, `os.PathLike` or `ClapEncoder`, *optional*):
                For light checkpoints: the CLAP's folder or Hub repo where it is not the one that the checkpoint names,
                or the CLAP itself.
            clap_dtype (`torch.dtype`), clap_device (`str` or `torch.device`):
                Of the CLAP that is loaded; float32 on the CPU by default. bfloat16 has the same fingerprint, float16 is
                refused.
            **kwargs: as `ProcessorMixin.from_pretrained`.

        Raises:
            OSError: the checkpoint, or the CLAP that it names, is not to be found.
            ValueError: the CLAP is not the checkpoint's, or the memory is of another CLAP.
        """
        # AutoProcessor and pipelines pass what is meant for the model.
        for for_the_model in ("dtype", "torch_dtype", "device_map"):
            kwargs.pop(for_the_model, None)
        if clap is not None and not load_clap:
            raise ValueError("clap=... was given, but load_clap=False leaves CLAP out.")
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        name = os.fspath(pretrained_model_name_or_path)
        folder = kwargs.get("subfolder", "")
        if processor.clap_name_or_path is not None:
            processor.clap_name_or_path = read_location(processor.clap_name_or_path, os.path.join(name, folder))
        if not load_clap:
            return processor
        hub_kwargs = {
            key: kwargs[key]
            for key in ("cache_dir", "force_download", "local_files_only", "token", "revision")
            if key in kwargs
        }
        loading = {"dtype": clap_dtype, "device": clap_device}
        subfolder = os.path.join(folder, CLAP_SUBFOLDER)
        if _checkpoint_file(name, "config.json", subfolder=subfolder, **hub_kwargs) is not None:
            if clap is not None:
                raise ValueError(
                    f"{name} has a CLAP of its own, in {CLAP_SUBFOLDER}/; clap=... is for light checkpoints."
                )
            processor.clap = ClapEncoder.from_pretrained(name, subfolder=subfolder, **loading, **hub_kwargs)
        elif clap is not None or processor.clap_name_or_path is not None:
            hub_kwargs_of_clap = {key: value for key, value in hub_kwargs.items() if key != "revision"}
            processor._load_light_clap(name, clap, **loading, **hub_kwargs_of_clap)
        if not load_memory:
            return processor
        memory = _checkpoint_file(name, SANTA_FILE_NAME, subfolder=folder, **hub_kwargs)
        if memory is not None:
            processor.santa_memory = SantaMemory.load(memory)
        return processor

    def _load_light_clap(self, checkpoint: str, clap: str | os.PathLike | ClapEncoder | None, **loading) -> None:
        """Loads the CLAP that is not in the checkpoint, and refuses another."""
        where = checkpoint
        if not isinstance(clap, ClapEncoder):
            where = self.clap_name_or_path if clap is None else os.fspath(clap)
            subfolder = (self.clap_subfolder or "") if where == self.clap_name_or_path else ""
            try:
                if is_local_location(where) and not os.path.isdir(where):
                    raise FileNotFoundError(f"no such folder: {where}")
                clap = ClapEncoder.from_pretrained(where, subfolder=subfolder, **loading)
            except OSError as error:
                raise OSError(
                    f"{checkpoint} is a light checkpoint, and its CLAP, {where}, could not be loaded: {error} Where it "
                    "lies elsewhere, say so with clap=... (--clap)."
                ) from error
        if self.clap_fingerprint is not None and clap.fingerprint != self.clap_fingerprint:
            raise ValueError(
                f"{checkpoint} belongs to the CLAP {self.clap_fingerprint[:16]}, but {where} is "
                f"{clap.fingerprint[:16]}. Embeddings of different CLAPs cannot be compared."
            )
        self.clap = clap

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, light: bool | None = None, **kwargs
    ) -> list[str]:
        """Writes tokenizer, settings, CLAP and the memory, and with `push_to_hub` also uploads them.

        Args:
            save_directory (`str` or `os.PathLike`): also names the Hub repo, unless `repo_id` does.
            light (`bool`, *optional*):
                `True` writes where CLAP is (`clap_name_or_path`, which must be set) and its fingerprint in place of
                `clap/`. A CLAP in a local folder is named as seen from `save_directory`. Default: as loaded.
            **kwargs: as `push_to_hub`.

        Returns:
            `list[str]`: `processor_config.json`, the files of `clap/` and the memory.

        Raises:
            ValueError: light, but nothing says where CLAP is, or which it is.
            FileExistsError: light, but the folder has a `clap/`, which would be loaded.
        """
        folder = Path(save_directory)
        light = self.clap_fingerprint is not None if light is None else light
        fields = self._light_fields(folder, push_to_hub) if light else dict.fromkeys(LIGHT_FIELDS)
        if not light and self.clap is None and self.clap_name_or_path is not None:
            raise ValueError(f"A whole checkpoint has its CLAP, which was not loaded from {self.clap_name_or_path}.")
        with self._settings_replaced(fields):
            files = super().save_pretrained(str(folder))
        if self.clap is not None and not light:
            self.clap.save_pretrained(folder / CLAP_SUBFOLDER)
            files += sorted(map(str, (folder / CLAP_SUBFOLDER).iterdir()))
        if self.santa_memory is not None:
            files.append(str(self.santa_memory.save_pretrained(folder)))
        if push_to_hub:
            # The mixin would upload what it writes itself, without CLAP and memory; this saves once more, into a folder
            # of its own.
            with self._settings_replaced(fields):
                self.push_to_hub(kwargs.pop("repo_id", folder.resolve().name), **kwargs)
        return files

    def _light_fields(self, folder: Path, push_to_hub: bool) -> dict[str, str | None]:
        """What a light checkpoint in a folder says of its CLAP."""
        name, fingerprint = self.clap_name_or_path, self.clap_fingerprint
        if name is None:
            raise ValueError("A light checkpoint says where its CLAP is: set processor.clap_name_or_path.")
        if push_to_hub:
            self._check_can_be_found(name)
        if (folder / CLAP_SUBFOLDER).exists():
            raise FileExistsError(f"{folder} has a {CLAP_SUBFOLDER}/ already, which would be loaded; remove it first.")
        if self.clap is not None and fingerprint not in (None, self.clap.fingerprint):
            raise ValueError(
                f"processor.clap is the CLAP {self.clap.fingerprint[:16]}, but {name} is said to be "
                f"{fingerprint[:16]}; set clap_name_or_path to where this one is, and clap_fingerprint to None."
            )
        fingerprint = fingerprint or self._require_clap("Saving light").fingerprint
        return dict(zip(LIGHT_FIELDS, (written_location(name, folder), self.clap_subfolder, fingerprint), strict=True))

    @contextmanager
    def _settings_replaced(self, fields: dict) -> Iterator[None]:
        before = {name: getattr(self, name) for name in fields}
        self.__dict__.update(fields)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def push_to_hub(self, *args, **kwargs) -> str:
        """`ProcessorMixin.push_to_hub`, with CLAP and memory; light where `save_pretrained` is."""
        if self.clap_fingerprint is not None:
            self._check_can_be_found(self.clap_name_or_path)
        return super().push_to_hub(*args, **kwargs)

    @staticmethod
    def _check_can_be_found(name: str | None) -> None:
        if name is not None and is_local_location(name):
            raise ValueError(
                f"The CLAP is {name}, a folder of this machine, which nobody finds from the Hub; set "
                "processor.clap_name_or_path to its Hub repo, or save whole."
            )

    def to_dict(self) -> dict[str, Any]:
        # The mixin deep-copies every attribute; CLAP and the memory have files of their own.
        settings = object.__new__(type(self))
        settings.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("clap", "_santa_memory")})
        content = super(MatsProcessor, settings).to_dict()
        return {key: value for key, value in content.items() if key not in LIGHT_FIELDS or value is not None}

    # -- Embeddings ----------------------------------------------------------------------------------------------------

    def encode_audio(
        self,
        audio: AudioSource | Sequence[AudioSource],
        sampling_rate: int | None = None,
        batch_size: int = 8,
        seed: int | None = None,
    ) -> torch.Tensor:
        """CLAP's audio embeddings, before Santa, to be asked about many times as `audio_embeds=`.

        Args:
            audio: one sound or a list of them; see [`load_audio`] for what a sound can be.
            sampling_rate (`int`, *optional*): of waveforms that do not say their own, in hertz.
            batch_size (`int`): windows that CLAP encodes at a time.
            seed (`int`, *optional*): of the crops with `long_audio="random"`.

        Returns:
            `torch.FloatTensor` of shape `(audios, audio_embed_dim)`, L2-normalised.
        """
        clap = self._require_clap("Encoding audio")
        sources = audio if is_list_of_audio(audio) else [audio]
        # Every source is read before any is encoded: a bad one is told before heavy work.
        waveforms = [load_audio(source, clap.sampling_rate, sampling_rate) for source in sources]
        return clap.encode_audio(waveforms, batch_size, self.long_audio, seed)

    def encode_text(self, text: str | Sequence[str], batch_size: int = 64, truncation: bool = False) -> torch.Tensor:
        """CLAP's text embeddings `(texts, audio_embed_dim)`, L2-normalised: what training uses in place of audio."""
        clap = self._require_clap("Encoding text")
        return clap.encode_text([text] if isinstance(text, str) else list(text), batch_size, truncation)

    def apply_santa(
        self, audio_embeds: torch.Tensor, santa: bool | Mapping | None = None, return_evidence: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, list[list[dict]] | None]:
        """Moves CLAP audio embeddings `(audios, dim)` towards the memory (Eq. 6 and 7).

        Args:
            audio_embeds (`torch.Tensor`): from `encode_audio`.
            santa (`bool` or mapping, *optional*): `None` uses the memory if there is one, `True` insists, `False`
                leaves the embeddings alone, a mapping overrides single `santa_settings`.
            return_evidence (`bool`): also return, for each audio, the texts Santa leaned on with their weights, or
                `None` where Santa did not act.
        """
        settings = self._resolve_santa(santa)
        if settings is None:
            return (audio_embeds, None) if return_evidence else audio_embeds
        output = self.santa_memory(audio_embeds, **settings)
        return (output.embeds, self.santa_memory.explain(output)) if return_evidence else output.embeds

    def _resolve_santa(self, santa: bool | Mapping | None) -> dict | None:
        """The settings with which Santa is to act, or `None` where it is not to."""
        if santa is not None and not isinstance(santa, (bool, Mapping)):
            raise TypeError(f"santa is {type(santa).__name__}, expected None, a bool or a mapping of settings.")
        settings = _merged_santa_settings(self.santa_settings, santa if isinstance(santa, Mapping) else {})
        if santa is False or (santa is None and self.santa_memory is None):
            return None
        if self.santa_memory is None:
            raise ValueError("Santa was asked for, but this processor has no memory.")
        return settings if settings["use_memory"] else None

    def match_labels(self, answers: Sequence[str], labels: Sequence[str]) -> torch.Tensor:
        """Cosines `(answers, labels)` by CLAP's text tower: the paper's classification by text matching.

        An empty answer matches nothing: its cosines are 0.
        """
        if not labels:
            raise ValueError("labels is empty, expected at least one.")
        label_embeds = self.encode_text(labels)
        scores = torch.zeros(len(answers), len(labels))
        said = [index for index, answer in enumerate(answers) if answer.strip()]
        if said:
            scores[said] = self.encode_text([answers[index] for index in said], truncation=True) @ label_embeds.T
        return scores

    # -- Model inputs --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: AudioSource | Sequence | None = None,
        *,
        audio_embeds: torch.Tensor | np.ndarray | Sequence | None = None,
        descriptions: str | Sequence[str] | None = None,
        answers: str | Sequence[str] | None = None,
        sampling_rate: int | None = None,
        santa: bool | Mapping | None = None,
        return_evidence: bool = False,
        seed: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        return_tensors: str = "pt",
        **unknown,
    ) -> BatchFeature:
        """
        Args:
            text (`str` or list of `str`):
                Prompts. `<|audio|>` marks the places of the audios; without it they come first.
            audio:
                Sounds: paths, URLs, waveforms, `datasets` values (see [`load_audio`]). For one prompt, one sound or a
                list; for several prompts a list, in the order of the placeholders, or a list of lists.
            audio_embeds (tensor or array of shape `(audios, audio_embed_dim)`, one row of it, or a list of rows):
                Sounds already encoded by `encode_audio`, in place of `audio`. Santa still acts on them.
            descriptions (`str` or list of `str`):
                Texts in place of audio, as in training. They lie on the text side already, so Santa leaves them.
            answers (`str` or list of `str`, *optional*):
                One a prompt, for training: appended with a space before and the end token behind, and `labels` are
                returned, -100 everywhere else.
            sampling_rate (`int`, *optional*): of waveforms that do not say their own, in hertz.
            santa (`bool` or mapping, *optional*): see `apply_santa`.
            return_evidence (`bool`):
                Also return `santa`: for each prompt, for each of its audios, the texts Santa leaned on with their
                weights, or `None` where Santa did not act. It is for the reader; take it out before the model.
            seed (`int`, *optional*): of the crops with `long_audio="random"`.
            padding, max_length, pad_to_multiple_of, padding_side, add_special_tokens:
                As for tokenizers; lengths count audio positions. `max_length` belongs to `padding="max_length"`;
                prompts are never cut.

        Returns:
            `BatchFeature` of tensors: `input_ids` and `attention_mask` of shape `(batch, length)`; where there is
            audio, `audio_embeds` of shape `(batch, audios, audio_embed_dim)` and `audio_embeds_mask` of shape
            `(batch, audios)`; with `answers`, `labels` of shape `(batch, length)`.

        Raises:
            TypeError: an unknown keyword.
            ValueError: placeholders and audios that do not match, a prompt longer than the language model's positions,
                audio that cannot be used.
        """
        if unknown:
            raise TypeError(f"MatsProcessor got unknown keywords: {', '.join(sorted(unknown))}.")
        if text is None:
            raise ValueError("text is missing: a sound without a question has no answer.")
        texts = [text] if isinstance(text, str) else list(text)
        for index, prompt in enumerate(texts):
            if not isinstance(prompt, str):
                raise TypeError(f"text[{index}] is {type(prompt).__name__}, expected str.")
        if not texts:
            raise ValueError("text is an empty list, expected at least one prompt.")
        kind, items = _one_kind(audio=audio, audio_embeds=audio_embeds, descriptions=descriptions)
        texts, items = self._place_audios(texts, items, kind)

        spans = None
        if answers is not None:
            answers = [answers] if isinstance(answers, str) else list(answers)
            if len(answers) != len(texts):
                raise ValueError(f"Got {len(texts)} prompts but {len(answers)} answers; they must match 1:1.")
            ends = [f" {answer}{self.tokenizer.eos_token}" for answer in answers]
            spans = [[(len(prompt), len(prompt) + len(end))] for prompt, end in zip(texts, ends, strict=True)]
            texts = [prompt + end for prompt, end in zip(texts, ends, strict=True)]
        return self._model_inputs(
            texts,
            kind,
            items,
            spans,
            sampling_rate=sampling_rate,
            santa=santa,
            return_evidence=return_evidence,
            seed=seed,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            add_special_tokens=add_special_tokens,
            return_tensors=return_tensors,
        )

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_labels: bool = False,
        sampling_rate: int | None = None,
        santa: bool | Mapping | None = None,
        return_evidence: bool = False,
        seed: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str = "pt",
        **template_kwargs,
    ) -> str | list[str] | BatchFeature | torch.Tensor:
        """Renders conversations, and with `tokenize=True` makes model inputs of them.

        A message is `{"role", "content"}`; content is a string or a list of parts `{"type": "text", "text"}` and
        `{"type": "audio", ...}` where the sound is under `"audio"`, `"path"` or `"url"` (with `"sampling_rate"` for a
        bare waveform), already encoded under `"audio_embeds"`, or described under `"description"`.

        Args:
            conversation: one conversation or a list of them; several turns and several audios are fine.
            add_generation_prompt (`bool`): end with what opens the assistant's turn.
            return_labels (`bool`): also return `labels`: every assistant turn with its end token, -100 elsewhere.
            return_dict (`bool`): `False` returns `input_ids` alone.
            **template_kwargs: variables that the template names.
            Others: as for `__call__`.

        Raises:
            TypeError: a keyword that is none of these.
            ValueError: as `__call__`, and conversations of another form.
        """
        # Pipelines of transformers put keywords of `__call__` under `processor_kwargs`.
        unknown = {*(template_kwargs.pop("processor_kwargs", None) or ()), *template_kwargs}
        unknown -= _names_in_template(self.chat_template) | _names_in_template(chat_template or "")
        if unknown:
            raise TypeError(f"MatsProcessor.apply_chat_template got unknown keywords: {', '.join(sorted(unknown))}.")
        if return_labels and not tokenize:
            raise ValueError("return_labels=True needs tokenize=True: labels are tokens.")
        conversations = [conversation] if is_conversation(conversation) else list(conversation)
        plain, sounds = zip(*(split_audio_parts(turns, self.audio_token) for turns in conversations), strict=True)

        def render(turns: list[dict], generation_prompt: bool = False, continue_final: bool = False) -> str:
            return super(MatsProcessor, self).apply_chat_template(
                turns,
                chat_template=chat_template,
                add_generation_prompt=generation_prompt,
                continue_final_message=continue_final,
                tokenize=False,
                **template_kwargs,
            )

        texts = [render(turns, add_generation_prompt, continue_final_message) for turns in plain]
        if not tokenize:
            return texts[0] if is_conversation(conversation) else texts
        kinds = {kind for items in sounds for kind, _ in items}
        if len(kinds) > 1:
            raise ValueError(f"One call takes audios of one kind, got {' and '.join(sorted(kinds))}.")
        bos = self.tokenizer.bos_token
        inputs = self._model_inputs(
            texts,
            kinds.pop() if kinds else None,
            [[item for _, item in items] for items in sounds],
            [answer_spans(turns, text, render) for turns, text in zip(plain, texts, strict=True)]
            if return_labels
            else None,
            sampling_rate=sampling_rate,
            santa=santa,
            return_evidence=return_evidence,
            seed=seed,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            add_special_tokens=bos is None or not texts[0].startswith(bos),
            return_tensors=return_tensors,
        )
        return inputs if return_dict else inputs["input_ids"]

    def _place_audios(
        self, texts: list[str], items: list | None, kind: str | None
    ) -> tuple[list[str], list[list] | None]:
        """Puts missing placeholders in front and deals the audios out to the prompts, in order."""
        if items is None:
            return texts, [[] for _ in texts]
        nested = [_is_nested(item, kind) for item in items]
        if any(nested) and not all(nested):
            raise ValueError(f"{kind} is a list of audios or a list of one list for each prompt, got a mixture.")
        if any(nested):
            if len(items) != len(texts):
                raise ValueError(f"Got {len(texts)} prompts but {len(items)} lists of audio; they must match 1:1.")
            groups = [list(group) for group in items]
            texts = [
                self.audio_token * len(group) + prompt if self.audio_token not in prompt else prompt
                for prompt, group in zip(texts, groups, strict=True)
            ]
            return texts, groups
        if len(texts) == 1:
            prompt = texts[0]
            return [prompt if self.audio_token in prompt else self.audio_token * len(items) + prompt], [list(items)]
        texts = [prompt if self.audio_token in prompt else self.audio_token + prompt for prompt in texts]
        counts = [prompt.count(self.audio_token) for prompt in texts]
        if sum(counts) != len(items):
            raise ValueError(
                f"Got {len(items)} audios for {len(texts)} prompts with places for {counts}, {sum(counts)} in all."
            )
        ends = np.cumsum(counts)
        return texts, [list(items[end - count : end]) for count, end in zip(counts, ends, strict=True)]

    def _model_inputs(
        self,
        texts: list[str],
        kind: str | None,
        items: Sequence[list],
        spans: list[list[tuple[int, int]]] | None,
        *,
        sampling_rate: int | None,
        santa: bool | Mapping | None,
        return_evidence: bool,
        seed: int | None,
        padding: bool | str,
        max_length: int | None,
        pad_to_multiple_of: int | None,
        padding_side: str | None,
        add_special_tokens: bool,
        return_tensors: str,
    ) -> BatchFeature:
        """Texts with their placeholders, the audios of each, and character spans of the answers, to tensors."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; only 'pt' is supported.")
        if max_length is not None and padding != "max_length":
            raise ValueError("max_length needs padding='max_length'; prompts are never cut.")
        for index, (prompt, own) in enumerate(zip(texts, items, strict=True)):
            if (places := prompt.count(self.audio_token)) != len(own):
                raise ValueError(f"Prompt {index} has {places} {self.audio_token} placeholders but {len(own)} audios.")
        ids, answer_masks = self._tokenize(texts, spans, add_special_tokens)
        longest = max(map(len, ids))
        if self.max_positions is not None and longest > self.max_positions:
            raise ValueError(
                f"The longest prompt has {longest} positions, audio included; the language model has "
                f"{self.max_positions}."
            )
        if max_length is not None and longest > max_length:
            raise ValueError(f"The longest prompt has {longest} positions, audio included; max_length is {max_length}.")
        padded = self.tokenizer.pad(
            {"input_ids": ids},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors="pt",
        )
        # Everything cheap has been checked; now CLAP runs.
        flat = [item for own in items for item in own]
        embeds, evidence = self._embed(kind, flat, sampling_rate, santa, seed) if flat else (None, None)

        data = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
        if embeds is not None:
            width = max(map(len, items))
            data["audio_embeds"] = embeds.new_zeros(len(texts), width, embeds.shape[-1])
            data["audio_embeds_mask"] = torch.tensor([[i < len(own) for i in range(width)] for own in items]).long()
            data["audio_embeds"][data["audio_embeds_mask"].bool()] = embeds
        if return_evidence:
            ends = np.cumsum([len(own) for own in items])
            data["santa"] = [evidence and evidence[end - len(own) : end] for own, end in zip(items, ends, strict=True)]
        if answer_masks is not None:
            # By position, never by token id: GPT-2 pads with its end token, which an answer must learn.
            is_answer = torch.zeros_like(data["input_ids"], dtype=torch.bool)
            is_answer[data["attention_mask"].bool()] = torch.tensor([m for mask in answer_masks for m in mask])
            data["labels"] = data["input_ids"].masked_fill(~is_answer, -100)
        return BatchFeature(data)

    def _tokenize(
        self, texts: list[str], spans: list[list[tuple[int, int]]] | None, add_special_tokens: bool
    ) -> tuple[list[list[int]], list[list[bool]] | None]:
        """Token ids with each placeholder `num_audio_tokens` times, and which of them lie in an answer."""
        encoded = self.tokenizer(texts, add_special_tokens=add_special_tokens, return_offsets_mapping=spans is not None)
        repeats = [
            np.where(np.equal(row, self.audio_token_id), self.num_audio_tokens, 1) for row in encoded["input_ids"]
        ]
        ids = [np.repeat(row, times).tolist() for row, times in zip(encoded["input_ids"], repeats, strict=True)]
        if spans is None:
            return ids, None
        masks = []
        for offsets, times, own in zip(encoded["offset_mapping"], repeats, spans, strict=True):
            # A token belongs to the answer in which it ends; its beginning may be trimmed of a space.
            inside = [any(start < end_of_token <= end for start, end in own) for _, end_of_token in offsets]
            masks.append(np.repeat(inside, times).tolist())
        return ids, masks

    def _embed(
        self, kind: str, items: list, sampling_rate: int | None, santa: bool | Mapping | None, seed: int | None
    ) -> tuple[torch.Tensor, list[list[dict]] | None]:
        """Audios of one kind to `(audios, audio_embed_dim)`, ready for the model, and Santa's evidence for each."""
        if kind == "descriptions":
            if santa:
                raise ValueError("Santa moves audio embeddings towards text; descriptions are there already.")
            return self.encode_text(items), None
        self._resolve_santa(santa)  # raises before CLAP runs
        if kind == "audio":
            embeds = self.encode_audio(items, sampling_rate, seed=seed)
        else:
            embeds = self._stack_embeds(items)
        return self.apply_santa(embeds, santa, return_evidence=True)

    def _stack_embeds(self, items: list) -> torch.Tensor:
        """Embeddings from the caller to `(audios, audio_embed_dim)`, checked."""
        rows = [torch.as_tensor(item, dtype=torch.float32) for item in items]
        width = self.clap.embed_dim if self.clap is not None else rows[0].numel()
        for row in rows:
            if row.shape != (width,):
                raise ValueError(f"audio_embeds hold one of shape {tuple(row.shape)}, expected ({width},).")
        embeds = torch.stack(rows)
        if not torch.isfinite(embeds).all():
            raise ValueError("audio_embeds hold NaN or infinite values.")
        if not embeds.any(-1).all():
            raise ValueError("audio_embeds hold a vector of zeros, which has no direction.")
        return embeds

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "audio_embeds", "audio_embeds_mask"]


def _checkpoint_file(name: str, filename: str, **hub_kwargs) -> str | None:
    """Path of a checkpoint's file, local or from the Hub, or `None` where the checkpoint has none."""
    return cached_file(
        name,
        filename,
        _raise_exceptions_for_missing_entries=False,
        **hub_kwargs,
    )


def _merged_santa_settings(defaults: Mapping, overrides: Mapping) -> dict:
    if unknown := sorted(set(overrides) - set(DEFAULT_SANTA_SETTINGS)):
        raise ValueError(f"Unknown Santa settings: {', '.join(unknown)}; expected {', '.join(DEFAULT_SANTA_SETTINGS)}.")
    merged = {**defaults, **overrides}
    check_santa_settings(merged["weight"], merged["temperature"], merged["top_k"])
    return merged


def _names_in_template(chat_template: str | dict[str, str]) -> set[str]:
    """Every name that a Jinja template (or several) mentions, among them the variables that it takes."""
    if isinstance(chat_template, dict):
        return set().union(*map(_names_in_template, chat_template.values()))
    return {value for _, kind, value in jinja2.Environment().lex(chat_template) if kind == "name"}


def is_list_of_audio(audio: Any) -> bool:
    """A list is a batch of sounds, unless it is one waveform of plain numbers."""
    return isinstance(audio, list) and not (audio and isinstance(audio[0], Number))


def _is_nested(item: Any, kind: str) -> bool:
    """Whether an item of a batch is itself a list of audios, for one prompt."""
    if kind == "audio_embeds" and not isinstance(item, list):
        return isinstance(item, tuple) or getattr(item, "ndim", 1) > 1
    return is_list_of_audio(item)


def _one_kind(**given: Any) -> tuple[str | None, list | None]:
    """Of audio, audio_embeds and descriptions at most one may be given; returns its name and a list of items."""
    present = {kind: value for kind, value in given.items() if value is not None}
    if len(present) > 1:
        raise ValueError(f"Got {' and '.join(present)}; pass one of them.")
    if not present:
        return None, None
    ((kind, value),) = present.items()
    if kind == "descriptions":
        items = [value] if isinstance(value, str) else list(value)
    else:
        items = list(value) if _is_nested(value, kind) else [value]
    if all(_is_nested(item, kind) and len(item) == 0 for item in items):
        raise ValueError(f"{kind} is an empty list, expected at least one; leave it out for text alone.")
    return kind, items


__all__ = ["AUDIO_TOKEN", "MatsProcessor", "is_list_of_audio"]

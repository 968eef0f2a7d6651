"""`pipeline("audio-text-to-text")`: sounds and questions in, answers out."""

import inspect
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import GenerationConfig, Pipeline

from .audio_mats import AudioSource
from .chat_mats import is_conversation
from .processing_mats import MatsProcessor, is_list_of_audio

# The paper's instruction for classification (AudioTIA); used where candidate labels come without a question.
CLASSIFY_INSTRUCTION = "Classify events in the audio clip."
# Arguments of `generate` that are no fields of GenerationConfig.
GENERATE_ARGUMENTS = {
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "assistant_model",
}
AUDIO_VALUE_KEYS = {"array", "bytes", "path"}


class AudioTextToTextPipeline(Pipeline):
    """Answers questions about sounds with [`MatsForConditionalGeneration`] and [`MatsProcessor`].

    ```python
    >>> from transformers import pipeline
    >>> pipe = pipeline("audio-text-to-text", model="hub_cards/mats-tiny", trust_remote_code=True)
    >>> pipe("rooster.ogg", text="What is making this sound?")
    {'generated_text': 'A rooster is crowing.'}
    >>> pipe("rooster.ogg", candidate_labels=["dog", "rooster", "rain"])["label"]
    'rooster'
    ```
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=64)

    processor: MatsProcessor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The base class collates by tokenizer; a feature extractor beside it would have to agree on the padding side.
        self.tokenizer = self.processor.tokenizer
        self.feature_extractor = None
        # The base class keeps generation parameters for every call, but does not look into generate_kwargs.
        if twice := sorted(set(self._forward_params) & set(self._generate_kwargs)):
            raise ValueError(f"Given twice, directly and in generate_kwargs: {', '.join(twice)}.")
        for name in {"generation_config", *GenerationConfig().to_dict()} & set(self._forward_params):
            self._generate_kwargs[name] = self._forward_params.pop(name)

    def _sanitize_parameters(
        self,
        text: str | None = None,
        candidate_labels: Sequence[str] | str | None = None,
        return_evidence: bool | None = None,
        santa: bool | Mapping | None = None,
        sampling_rate: int | None = None,
        seed: int | None = None,
        generate_kwargs: dict | None = None,
        **generation,
    ) -> tuple[dict, dict, dict]:
        known = GENERATE_ARGUMENTS | set(GenerationConfig().to_dict())
        if unknown := sorted(set(generation) - known):
            raise TypeError(f"The audio-text-to-text pipeline got unknown keywords: {', '.join(unknown)}.")
        if twice := sorted(set(generation) & set(generate_kwargs or {})):
            raise ValueError(f"Given twice, directly and in generate_kwargs: {', '.join(twice)}.")
        postprocess = {}
        if candidate_labels is not None:
            labels = _check_labels(candidate_labels)
            try:
                postprocess = {"candidate_labels": labels, "label_embeds": self.processor.encode_text(labels)}
            except ValueError as error:
                raise ValueError(f"candidate_labels cannot be encoded: {error}") from error
        preprocess = {
            "text": text,
            "default_text": CLASSIFY_INSTRUCTION if candidate_labels is not None else None,
            "return_evidence": return_evidence,
            "santa": santa,
            "sampling_rate": sampling_rate,
            "seed": seed,
        }
        return (
            {key: value for key, value in preprocess.items() if value is not None},
            {**generation, **(generate_kwargs or {})},
            postprocess,
        )

    def __call__(
        self,
        inputs: Any = None,
        *,
        audio: AudioSource | list[AudioSource] | None = None,
        text: str | list[str] | None = None,
        **kwargs,
    ) -> dict | list[dict] | Iterable[dict]:
        """
        Args:
            inputs:
                One of: a sound (see [`load_audio`]); a dict with `"audio"` (and `"sampling_rate"` for a bare waveform)
                or `"audio_embeds"`, and `"text"`; a conversation with audio parts, or a dict with it under
                `"messages"`; a list of any of these; a generator, a `torch` dataset or a `datasets` dataset of them,
                whose results are an iterator.
            audio: The same as `inputs`, by name.
            text (`str` or list of `str`):
                The question. One for all inputs, or one each; with several questions and a single sound, the sound is
                encoded once and asked about as often. An input that brings a question of its own takes no other; the
                `text` that a pipeline was made with is for inputs without one.
            candidate_labels (list of `str`, *optional*):
                Classify by text matching: the label nearest to the answer in CLAP's text space. Without `text` the
                paper's instruction is used, "Classify events in the audio clip."
            return_evidence (`bool`, *optional*):
                Also return the memory texts that Santa leaned on, with their weights.
            santa (`bool` or mapping, *optional*): see [`MatsProcessor.apply_santa`].
            sampling_rate (`int`, *optional*): of waveforms that do not say their own, in hertz.
            seed (`int`, *optional*): of the crops with the processor's `long_audio="random"`.
            batch_size, num_workers: as in every pipeline.
            max_new_tokens and every other generation parameter: directly or in `generate_kwargs`.

        Returns:
            For each input a dict (a list of them with `num_return_sequences` above 1):
            `generated_text` (`str`); with `candidate_labels`, `label` (`str`) and `scores` (`dict` of label to cosine);
            with `return_evidence`, `santa` (list of `{"text", "weight"}`, heaviest first; a list of such lists where
            the prompt has several audios; `None` where Santa did not act).
        """
        if (inputs is None) == (audio is None):
            raise ValueError("Pass the sounds once: as first argument or as audio=.")
        rows = self._as_rows(inputs if inputs is not None else audio, text)
        return [] if isinstance(rows, list) and not rows else super().__call__(rows, **kwargs)

    def _as_rows(self, inputs: Any, text: str | Sequence[str] | None) -> dict | list[dict] | Iterable[dict] | Dataset:
        """Inputs of any form, each with the question asked about it: one row, a list of them, or a lazy source."""
        texts = list(text) if isinstance(text, (list, tuple)) else None
        if _is_one_input(inputs):
            if texts is None:
                return {"row": inputs, "text": text}
            encoded = {}  # by the first of the rows, for all of them
            return [{"row": inputs, "text": question, "encoded": encoded} for question in texts]
        if texts is not None and isinstance(inputs, Sized) and len(inputs) != len(texts):
            raise ValueError(f"Got {len(inputs)} sounds but {len(texts)} texts; they must match 1:1.")
        if isinstance(inputs, Dataset) and isinstance(inputs, Sized) and not isinstance(inputs, IterableDataset):
            return _RowDataset(inputs, text if texts is None else texts)
        pairs = zip(inputs, repeat(text) if texts is None else texts, strict=texts is not None)
        rows = ({"row": row, "text": question} for row, question in pairs)
        return list(rows) if isinstance(inputs, list) else rows

    def preprocess(
        self,
        inputs: dict,
        text: str | None = None,
        default_text: str | None = None,
        return_evidence: bool = False,
        santa: bool | Mapping | None = None,
        sampling_rate: int | None = None,
        seed: int | None = None,
    ) -> dict[str, Any]:
        messages = self._conversation_of(inputs["row"])
        if messages is None:
            sounds, own_text = self._sounds_and_text(inputs["row"])
            if own_text is not None and inputs.get("text") is not None:
                raise ValueError(f"text was given twice: {own_text!r:.50} with the sound, and {inputs['text']!r:.50}.")
            if (encoded := inputs.get("encoded")) is not None:
                if not encoded:
                    encoded["sounds"] = self._encode_sounds(sounds, sampling_rate, seed)
                sounds = encoded["sounds"]
            given = (own_text, inputs.get("text"), text, default_text)
            messages = self._ask(sounds, next((question for question in given if question is not None), None))
        elif inputs.get("text") is not None:
            raise ValueError("A conversation brings its own text, so text=... cannot be given with it.")
        prefill = messages[-1]["role"] == "assistant"
        model_inputs = self.processor.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=not prefill,
            continue_final_message=prefill,
            sampling_rate=sampling_rate,
            santa=santa,
            return_evidence=return_evidence,
            seed=seed,
        )
        if "audio_embeds" not in model_inputs:
            # One place that the mask leaves out: in a batch, prompts with and without audio have the same keys.
            model_inputs["audio_embeds"] = torch.zeros(1, 1, self.model.config.audio_embed_dim)
            model_inputs["audio_embeds_mask"] = torch.zeros(1, 1, dtype=torch.long)
        if return_evidence:
            (evidence,) = model_inputs["santa"]
            model_inputs["santa"] = evidence[0] if evidence is not None and len(evidence) == 1 else evidence
        return dict(model_inputs)

    def _conversation_of(self, row: Any) -> list[dict] | None:
        """The conversation that a row is, or has under `"messages"`."""
        if is_conversation(row):
            return row
        if not isinstance(row, Mapping) or row.get("messages") is None:
            return None
        if beside := [key for key in ("audio", "audio_embeds", "text") if row.get(key) is not None]:
            raise ValueError(f"A dict with 'messages' has everything in them, but this one also has {beside}.")
        return row["messages"]

    def _sounds_and_text(self, row: Any) -> tuple[list[dict], str | None]:
        """A row's sounds, as what the audio parts of a conversation hold, and the question that it brings."""
        if not isinstance(row, Mapping):
            return [{"audio": row}], None
        audio, embeds, text = row.get("audio"), row.get("audio_embeds"), row.get("text")
        if audio is not None and embeds is not None:
            raise ValueError("A dict has both 'audio' and 'audio_embeds'; pass one of them.")
        if embeds is not None:
            return [{"audio_embeds": embed} for embed in (embeds if np.ndim(embeds) == 2 else [embeds])], text
        if audio is not None:
            rate = {"sampling_rate": row["sampling_rate"]} if row.get("sampling_rate") is not None else {}
            return [{"audio": sound, **rate} for sound in (audio if is_list_of_audio(audio) else [audio])], text
        if AUDIO_VALUE_KEYS & set(row):
            return [{"audio": row}], text
        raise ValueError(f"A dict needs 'audio' and 'text' (or 'messages'); got keys {sorted(row)}.")

    def _encode_sounds(self, sounds: list[dict], sampling_rate: int | None, seed: int | None) -> list[dict]:
        """The same sounds as `audio_embeds`."""
        if not sounds or "audio_embeds" in sounds[0]:
            return sounds
        sources = [(s["audio"], s["sampling_rate"]) if "sampling_rate" in s else s["audio"] for s in sounds]
        return [{"audio_embeds": embed} for embed in self.processor.encode_audio(sources, sampling_rate, seed=seed)]

    def _ask(self, sounds: list[dict], text: str | None) -> list[dict]:
        """A conversation of one turn: the sounds where the text has placeholders for them, or in front of it."""
        if text is None:
            raise ValueError("A sound came without a question: pass text=... (or candidate_labels=...).")
        parts = [{"type": "audio", **sound} for sound in sounds]
        pieces = text.split(self.processor.audio_token)
        if len(pieces) == 1:
            return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        if len(pieces) - 1 != len(parts):
            raise ValueError(f"The text has {len(pieces) - 1} placeholders but {len(parts)} audios came with it.")
        content = [{"type": "text", "text": pieces[0]}]
        for part, piece in zip(parts, pieces[1:], strict=True):
            content += [part, {"type": "text", "text": piece}]
        return [{"role": "user", "content": content}]

    def _forward(self, model_inputs: dict, **generate_kwargs) -> dict[str, Any]:
        passed_on = {"santa": model_inputs.pop("santa")} if "santa" in model_inputs else {}
        if not model_inputs["audio_embeds_mask"].any():
            model_inputs = {key: value for key, value in model_inputs.items() if not key.startswith("audio_embeds")}
        # generate looks for stop_strings by the tokenizer, and leaves it alone otherwise.
        generate_kwargs = {"tokenizer": self.tokenizer, **self._prepare_generate_kwargs(generate_kwargs)}
        sequences = self.model.generate(**model_inputs, **generate_kwargs)
        batch, prompt_length = model_inputs["input_ids"].shape
        answers = sequences[:, prompt_length:]
        return {"answers": answers.reshape(batch, -1, answers.shape[-1]), **passed_on}

    def postprocess(
        self,
        model_outputs: dict,
        candidate_labels: Sequence[str] | None = None,
        label_embeds: torch.Tensor | None = None,
    ) -> dict | list[dict]:
        texts = self.processor.batch_decode(model_outputs["answers"][0], skip_special_tokens=True)
        records = [{"generated_text": text.strip()} for text in texts]
        if candidate_labels is not None:
            for record in records:
                # As MatsProcessor.match_labels, with the labels encoded before; an empty answer matches nothing.
                scores = torch.zeros(len(label_embeds))
                if record["generated_text"]:
                    scores = (self.processor.encode_text(record["generated_text"], truncation=True) @ label_embeds.T)[0]
                record["scores"] = dict(zip(candidate_labels, scores.tolist(), strict=True))
                record["label"] = max(record["scores"], key=record["scores"].get)
        if "santa" in model_outputs:
            for record in records:
                record["santa"] = model_outputs["santa"]
        return records[0] if len(records) == 1 else records

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Saves model and processor; for a pipeline that came as remote code, its own file as well."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)
        if type(self).__module__.startswith("transformers_modules"):
            shutil.copy(inspect.getfile(type(self)), save_directory)


class _RowDataset(Dataset):
    """What `AudioTextToTextPipeline._as_rows` makes of a dataset with a length: its items are read when their turn is.

    `text` is the question about all of them, or a list of one each.
    """

    def __init__(self, dataset: Dataset, text: str | list[str] | None):
        self.dataset = dataset
        self.text = text

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        text = self.text[index] if isinstance(self.text, list) else self.text
        return {"row": self.dataset[index], "text": text}


def _is_one_input(inputs: Any) -> bool:
    """Whether inputs are a single sound, row or conversation."""
    if isinstance(inputs, list):
        return is_conversation(inputs) or not is_list_of_audio(inputs)
    if isinstance(inputs, (str, tuple, Mapping)) or not isinstance(inputs, (Iterable, Dataset)):
        return True
    return hasattr(inputs, "ndim") or hasattr(inputs, "get_all_samples")  # an array, a tensor or a decoder


def _check_labels(labels: Sequence[str] | str) -> list[str]:
    """Labels as a list; a string has them separated by commas."""
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(",") if label.strip()]
    labels = list(labels)
    if not labels:
        raise ValueError("candidate_labels is empty, expected at least one label.")
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"candidate_labels[{index}] is {label!r}, expected a non-empty string.")
    return labels


__all__ = ["AudioTextToTextPipeline"]

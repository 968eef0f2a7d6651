"""`pipeline("audio-text-to-text")`: sounds and questions in, answers out."""

import inspect
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import GenerationConfig, Pipeline

from processing_mats.audio_mats import AudioSource
from processing_mats.chat_mats import is_conversation
from processing_mats.processing_mats import MatsProcessor, is_list_of_audio

# The paper's instruction for classification (AudioTIA); used where candidate labels come without a question.
CLASSIFY_INSTRUCTION = "Classify events in the audio clip."
# Arguments of `generate` that are no fields of GenerationConfig.
GENERATE_ARGUMENTS = {"generation_config", "logits_processor", "stopping_criteria", "streamer", "assistant_model"}
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
        if isinstance(candidate_labels, str):
            candidate_labels = [label.strip() for label in candidate_labels.split(",") if label.strip()]
        if candidate_labels is not None and not candidate_labels:
            raise ValueError("candidate_labels is empty, expected at least one label.")
        preprocess = {
            "text": text,
            "default_text": CLASSIFY_INSTRUCTION if candidate_labels is not None else None,
            "return_evidence": return_evidence,
            "santa": santa,
            "sampling_rate": sampling_rate,
            "seed": seed,
        }
        postprocess = {"candidate_labels": candidate_labels}
        return (
            {key: value for key, value in preprocess.items() if value is not None},
            {"generate_kwargs": {**generation, **(generate_kwargs or {})}},
            {key: value for key, value in postprocess.items() if value is not None},
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
                One of: a sound (see [`load_audio`]); a dict with `"audio"` (or `"audio_embeds"`) and `"text"`; a
                conversation with audio parts; a list of any of these; a generator or a `datasets` dataset of them,
                whose results are an iterator.
            audio: The same as `inputs`, by name.
            text (`str` or list of `str`):
                The question. One for all inputs, or one each; with several questions and a single sound, the sound is
                encoded once and asked about as often.
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
        inputs = inputs if inputs is not None else audio
        if isinstance(text, (list, tuple)):
            return super().__call__(self._pair_up(inputs, list(text), kwargs), **kwargs)
        if text is not None:
            kwargs["text"] = text
        if isinstance(inputs, tuple) or not isinstance(inputs, Iterable) or isinstance(inputs, (str, Mapping)):
            return super().__call__({"row": inputs}, **kwargs)
        if isinstance(inputs, list):
            if is_conversation(inputs) or not is_list_of_audio(inputs):
                return super().__call__({"row": inputs}, **kwargs)
            return super().__call__([{"row": row} for row in inputs], **kwargs)
        if hasattr(inputs, "ndim") or hasattr(inputs, "get_all_samples"):  # an array, a tensor or a decoder
            return super().__call__({"row": inputs}, **kwargs)
        return super().__call__(({"row": row} for row in inputs), **kwargs)

    def _pair_up(self, inputs: Any, texts: list[str], kwargs: dict) -> list[dict]:
        """Sounds and questions one to one, or one sound, encoded once, for all questions."""
        if not is_list_of_audio(inputs):
            embeds = self.processor.encode_audio(inputs, kwargs.get("sampling_rate"), seed=kwargs.get("seed"))
            return [{"row": {"audio_embeds": embeds, "text": text}} for text in texts]
        if len(inputs) != len(texts):
            raise ValueError(f"Got {len(inputs)} sounds but {len(texts)} texts; they must match 1:1.")
        return [{"row": {"audio": sound, "text": text}} for sound, text in zip(inputs, texts, strict=True)]

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
        messages = self._as_conversation(inputs["row"], text, default_text)
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
        if return_evidence:
            (evidence,) = model_inputs["santa"]
            model_inputs["santa"] = evidence[0] if evidence is not None and len(evidence) == 1 else evidence
        return dict(model_inputs)

    def _as_conversation(self, row: Any, text: str | None, default_text: str | None = None) -> list[dict]:
        """One input of any form as a conversation with audio parts; `default_text` is for one without a question."""
        if is_conversation(row):
            return row
        if isinstance(row, Mapping) and not AUDIO_VALUE_KEYS & set(row):
            if "messages" in row:
                return row["messages"]
            if "audio" not in row and "audio_embeds" not in row:
                raise ValueError(f"A dict needs 'audio' and 'text' (or 'messages'); got keys {sorted(row)}.")
            text = text if text is not None else row.get("text")
            if row.get("audio_embeds") is not None:
                embeds = row["audio_embeds"]
                sounds = [{"audio_embeds": row} for row in (embeds if np.ndim(embeds) == 2 else [embeds])]
            else:
                sounds = [{"audio": s} for s in (row["audio"] if is_list_of_audio(row["audio"]) else [row["audio"]])]
        else:
            sounds = [{"audio": row}]
        text = text if text is not None else default_text
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

    def _forward(self, model_inputs: dict, generate_kwargs: dict | None = None) -> dict[str, Any]:
        passed_on = {"santa": model_inputs.pop("santa")} if "santa" in model_inputs else {}
        sequences = self.model.generate(**model_inputs, **self._prepare_generate_kwargs(generate_kwargs or {}))
        batch, prompt_length = model_inputs["input_ids"].shape
        answers = sequences[:, prompt_length:]
        return {"answers": answers.reshape(batch, -1, answers.shape[-1]), **passed_on}

    def postprocess(self, model_outputs: dict, candidate_labels: Sequence[str] | None = None) -> dict | list[dict]:
        texts = self.processor.batch_decode(model_outputs["answers"][0], skip_special_tokens=True)
        records = [{"generated_text": text.strip()} for text in texts]
        if candidate_labels is not None:
            scores = self.processor.match_labels([record["generated_text"] for record in records], candidate_labels)
            for record, row in zip(records, scores.tolist(), strict=True):
                record["scores"] = dict(zip(candidate_labels, row, strict=True))
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


__all__ = ["AudioTextToTextPipeline"]

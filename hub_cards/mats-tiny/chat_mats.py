"""Conversations with audio parts, for chat templates that only know text."""

from collections.abc import Callable
from typing import Any

# For base models: prompt, space, answer, end token. The first turn reads as Eq. 1 and as a plain prompt does, so that a
# model trained on single questions can be asked either way.
DEFAULT_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- ' ' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

AUDIO_KEYS = ("audio", "path", "url")


def is_conversation(value: Any) -> bool:
    """Whether a value is one conversation: a non-empty list of messages with a role."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def split_audio_parts(conversation: list[dict], audio_token: str) -> tuple[list[dict], list[tuple[str, Any]]]:
    """Turns content lists into strings with a placeholder for each audio.

    Returns:
        The conversation with string contents, and its audios in order as pairs of kind (`"audio"`, `"audio_embeds"` or
        `"descriptions"`) and value.
    """
    if not is_conversation(conversation):
        raise ValueError(f"A conversation is a list of messages with role and content, got {conversation!r:.100}.")
    plain, sounds = [], []
    for index, message in enumerate(conversation):
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f"Message {index} is {message!r:.100}, expected a dict with role and content.")
        content = message.get("content")
        if isinstance(content, str):
            plain.append(message)
            continue
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"A message's content is a string or a list of parts, got {type(content).__name__}.")
        text = ""
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                text += part["text"]
            elif kind == "audio":
                text += audio_token
                sounds.append(_audio_of(part))
            else:
                raise ValueError(
                    f"A part is {part!r:.100}, expected {{'type': 'text', 'text': ...}} or {{'type': 'audio', ...}}."
                )
        plain.append({**message, "content": text})
    return plain, sounds


def _audio_of(part: dict) -> tuple[str, Any]:
    if part.get("audio_embeds") is not None:
        return "audio_embeds", part["audio_embeds"]
    if part.get("description") is not None:
        return "descriptions", part["description"]
    for key in AUDIO_KEYS:
        if part.get(key) is not None:
            source = part[key]
            return "audio", (source, part["sampling_rate"]) if part.get("sampling_rate") is not None else source
    raise ValueError(
        f"An audio part holds its sound under 'audio', 'path', 'url', 'audio_embeds' or 'description'; got keys "
        f"{sorted(part)}."
    )


def answer_spans(conversation: list[dict], text: str, render: Callable[..., str]) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns in a rendered conversation, end tokens included.

    They are found by rendering ever more of the conversation, so that any template will do; one whose text for the
    first turns changes when later ones follow cannot be used for training and raises `ValueError`, as does a
    conversation that opens with the assistant.
    """
    spans = []
    for index, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise ValueError("The conversation opens with the assistant; there is no prompt to learn its answer from.")
        before = render(conversation[:index], generation_prompt=True)
        after = render(conversation[: index + 1]).rstrip()
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                "The chat template does not render a conversation's beginning the same way alone and as part of the "
                "whole, so the answers cannot be located in it."
            )
        spans.append((len(before), len(after)))
    return spans


__all__ = ["DEFAULT_CHAT_TEMPLATE", "answer_spans", "is_conversation", "split_audio_parts"]

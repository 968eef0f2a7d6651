"""The paper's four templates (Table S10): how labels, captions and questions become instruction and answer."""

from collections.abc import Sequence

from training.audiotia.examples import Turn

CLASSIFY = "Classify events in the audio clip."
CAPTION = "Generate audio caption."
MUSIC_CAPTION = "Generate music caption."


def classification(labels: Sequence[str]) -> Turn:
    """CLS: the labels, as "label a, label b"."""
    return Turn(CLASSIFY, ", ".join(labels))


def captioning(caption: str, audio_type: str) -> Turn:
    """CAP: the caption itself; music is asked for by its own instruction."""
    return Turn(MUSIC_CAPTION if audio_type == "music" else CAPTION, caption)


def question(text: str, answer: str) -> Turn:
    """AQA: the question and the answer as they are."""
    return Turn(text, answer)


__all__ = ["CAPTION", "CLASSIFY", "MUSIC_CAPTION", "captioning", "classification", "question"]

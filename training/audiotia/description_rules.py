"""What is kept of a chat model's replies: whether a description names its labels, and why one is refused."""

import re
from collections.abc import Sequence
from itertools import pairwise

from training.audiotia.labels import spaced

_WORD = re.compile(r"[^\W_]+(?:'[^\W\d_]+)?")
_BETWEEN_NAMES = re.compile(r"[,;/()\[\]]|_and_|\bor\b", re.IGNORECASE)
_FUNCTION_WORDS = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "the", "to", "with"])
_ENDINGS = ("ing", "er", "ed", "en")
# Forms that no suffix explains, of words that labels of sound use.
_IRREGULAR = {
    "teeth": "tooth",
    "feet": "foot",
    "mice": "mouse",
    "geese": "goose",
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "laughter": "laugh",
    "applause": "applaud",
    "broke": "break",
    "broken": "break",
    "rang": "ring",
    "rung": "ring",
    "sang": "sing",
    "sung": "sing",
    "song": "sing",
    "spoke": "speak",
    "spoken": "speak",
    "speech": "speak",
    "blew": "blow",
    "blown": "blow",
    "ran": "run",
    "flew": "fly",
    "flown": "fly",
    "flight": "fly",
    "struck": "strike",
    "shook": "shake",
    "shot": "shoot",
}


def stem(word: str) -> str:
    """What the inflections of an English word share: bark of barks, barked and barking; cri of cry, cries and crying.

    Far cruder than Porter's stemmer and made for one purpose: to tell whether a description names a label. Where it
    errs, it errs towards finding the label.
    """
    word = word.lower().split("'")[0]
    word = _cut(_IRREGULAR.get(word, word), ("es", "s"))
    while (rest := _cut(word := re.sub(r"([bdgmnprt])\1$", r"\1", word), _ENDINGS)) != word:  # run-n-ing
        word = rest
    if len(word) > 3:
        word = word.removesuffix("e")  # sneez-e, sneez-ing
    if word.endswith("y"):
        word = word[:-1] + "i"  # cr-y, cr-ies
    return word[:-1] if word.endswith("i") and len(word) > 4 else word  # squeak-y


def _cut(word: str, endings: Sequence[str]) -> str:
    """The word without the first of the endings that leaves three letters and a vowel."""
    for ending in endings:
        rest = word.removesuffix(ending)
        if rest != word and not word.endswith("ss") and len(rest) >= 3 and re.search("[aeiouy]", rest):
            return rest
    return word


def names_of(label: str) -> list[list[str]]:
    """The names that a label gives for one thing, each as its words: "Bark, woof" has two.

    Names are separated by commas, semicolons, slashes, "or" and brackets, and by `_and_`, which is how FSD50K writes
    AudioSet's commas. Function words do not count, unless there is nothing else.
    """
    names = []
    for part in _BETWEEN_NAMES.split(label):
        words = _WORD.findall(part.lower())
        if words:
            names.append([word for word in words if word not in _FUNCTION_WORDS] or words)
    return names


def mentions(description: str, label: str) -> bool:
    """Whether a description names a label: all words of one of its names occur, in any order and inflection.

    One word may be written as two and two as one: "chain saw" names the label chainsaw.
    """
    words = _WORD.findall(description)
    stems = {stem(word) for word in words} | {stem(first + second) for first, second in pairwise(words)}
    return any(stem("".join(name)) in stems or stems.issuperset(map(stem, name)) for name in names_of(label))


def normalise(description: str) -> str:
    """What two descriptions share that differ in case and punctuation alone."""
    return " ".join(_WORD.findall(description.lower()))


# Replies

# Quotation marks and dashes that chat models like, and what CLAP's tokenizers have seen more of.
_PLAIN = str.maketrans({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-", 0x2022: "-"})
_THINKING = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
_ITEM = re.compile(r"^(?:[-*]\s|\(?\d{1,3}[.):](?!\d)|\(?[a-z][.)]\s)\s*")
_NEXT_ITEM = re.compile(r'(?<=[.!?"])[ \t]*(?=\d{1,3}[.)]\s)')  # "1. A dog barks. 2. A dog howls."
_HEADING = re.compile(r"^(?:\*\*[^*]+\*\*\s*[:-]|[\w ,'-]{1,40}:)\s*")  # "Caption: A dog barks."
_REFUSAL = re.compile(
    r"^(?:sorry\b|i'?m sorry|i am sorry|i apologi[sz]e|unfortunately,|i can(?:not|'t)\b|i(?: am|'m) unable)"
    r"|\bas an? (?:ai|artificial)\b|\blanguage model\b",
    re.IGNORECASE,
)


def parse_reply(text: str) -> list[str]:
    """The descriptions in a reply: the items of its list, or its lines where there is no list.

    Thinking, code fences, headings, quotation marks and lines that lead in ("Here are five:") are left out.
    """
    text = _THINKING.sub("", text.translate(_PLAIN))
    lines = [line.strip() for part in text.splitlines() for line in _NEXT_ITEM.split(part)]
    lines = [line for line in lines if line and not line.startswith("```")]
    items = [_ITEM.sub("", line) for line in lines if _ITEM.match(line)]
    found = [" ".join(_HEADING.sub("", line).strip(" \t*\"'").split()) for line in items or lines]
    return [line for line in found if line and not line.endswith(":")]


def refuse(
    description: str, labels: Sequence[str], max_words: int, seen: set[str], examples: set[str] = frozenset()
) -> str | None:
    """Why a description is not kept, or None if it is good.

    Args:
        description (`str`): What the chat model wrote.
        labels (`Sequence[str]`): What shall be heard in it; each must be named, see `mentions`.
        max_words (`int`): The most words.
        seen, examples (`set[str]`): Normalised descriptions that it must not repeat.

    Returns:
        `str`, *optional*: `"refusal"` (the chat model declined), `"too long"`, `"label missing"`, `"label alone"` (no
        more than a label or one word), `"copy of an example"` or `"duplicate"`.
    """
    words = len(description.split())
    if _REFUSAL.search(description):
        return "refusal"
    if words > max_words:
        return "too long"
    if not all(mentions(description, label) for label in labels):
        return "label missing"
    normal = normalise(description)
    if words < 2 or any(normal == normalise(spaced(label)) for label in labels):
        return "label alone"
    if normal in examples:
        return "copy of an example"
    if normal in seen:
        return "duplicate"
    return None


__all__ = ["mentions", "names_of", "normalise", "parse_reply", "refuse", "stem"]

"""Descriptions for classification: a chat model writes what one may hear of a label.

    mats describe labels.json --model HuggingFaceTB/SmolLM2-135M-Instruct --count 10 --out descriptions.jsonl
    mats describe labels.json --base-url http://localhost:8000/v1 --model NAME --count 10 --out descriptions.jsonl

Data sets for classification have labels but no descriptions, which are what MATS is trained on. The paper has a
language model write them from the list of labels and a few example descriptions (Figure S4). Here any chat model does
it: one that transformers loads (`LocalChatModel`), or one behind an OpenAI-compatible endpoint (`EndpointChatModel`).

What comes back is judged before it is kept: see `refuse` for the reasons, `mentions` for whether a label is named.
"""

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from training.audiotia.chat_models import ChatModel, Conversation
from training.audiotia.description_rules import names_of, normalise, parse_reply, refuse
from training.audiotia.labels import read_labels as read_label_list
from training.audiotia.labels import spaced
from training.audiotia.tables import read_records, read_table, require_columns

logger = logging.getLogger(__name__)

# After the idea of the paper's Figure S4: the labels, and a few descriptions to go by. The wording is ours. The
# examples are turns of a conversation, which small chat models follow far better than a list of them in one prompt.
RULES = """\
You write captions of sound recordings. A caption is one English sentence of at most {max_words} words; it says what \
can be heard, nothing else, and contains the words that it is asked for. Vary the source, the place and the way it \
sounds. Answer with a numbered list and nothing more."""
REQUEST = "Write {count} of a recording in which one hears: {labels}."
REQUEST_WITHOUT_LABELS = "Write {count} of a recording."
EXAMPLES_SHOWN = 4


class Described(NamedTuple):
    """A description and the labels that are heard in it: a line of the output, and an example to go by."""

    labels: tuple[str, ...]
    description: str

    def to_json(self) -> str:
        return json.dumps({"labels": self.labels, "description": self.description}, ensure_ascii=False)


# What is shown to the chat model where no examples are given.
EXAMPLES = [
    Described(("dog", "bird"), "A dog barks twice while birds sing in the background."),
    Described(("rain",), "Heavy rain falls on a tin roof."),
    Described(("door",), "An old wooden door creaks open and slams shut."),
    Described(("engine",), "A small engine idles, then revs up and drives away."),
    Described(("clock",), "A clock ticks steadily in a quiet room."),
    Described(("violin",), "A violin plays a slow, sad melody."),
]


@dataclass
class Report:
    """What `write_descriptions` did.

    Attributes:
        found (`int`): Descriptions of these labels that were there already.
        accepted (`int`): Descriptions that were added.
        refused (`Counter`): How many were refused, by reason.
        prompts (`int`): How often the chat model was asked.
        short (`dict`): The labels that have too few, with what they have.
    """

    found: int = 0
    accepted: int = 0
    refused: Counter = field(default_factory=Counter)
    prompts: int = 0
    short: dict[tuple[str, ...], int] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.refused.most_common())
        return (
            f"accepted {self.accepted}, from prompts: {self.prompts}, there before: {self.found}; "
            f"refused {self.refused.total()}{f' ({reasons})' if reasons else ''}; "
            f"labels with too few: {len(self.short)}."
        )


def write_descriptions(
    labels: Iterable[str | Sequence[str]],
    chat: ChatModel,
    count_per_label: int,
    output: Path,
    examples: Sequence[Described] = EXAMPLES,
    seed: int = 0,
    max_words: int = 25,
    per_prompt: int = 10,
    patience: int = 5,
    resume: bool = False,
) -> Report:
    """Has a chat model write descriptions and appends those that are good, line by line, to a JSONL file.

    Each line is `{"labels": ["dog"], "description": "A dog barks in the yard."}`. A run that was killed goes on with
    `resume`: half a last line is cut off, and only what is missing is asked for. The seed repeats a run that starts
    from the same file, as far as the chat model repeats itself.

    Args:
        labels (`Iterable`): Labels, or combinations of labels that are heard together.
        chat (`ChatModel`): What writes.
        count_per_label (`int`): Descriptions for each label or combination.
        output (`Path`): The JSONL file.
        examples (`Sequence[Described]`): Descriptions to go by; each prompt shows a few, drawn by the seed.
        seed (`int`): Of the examples drawn and of the sampling.
        max_words (`int`): Longer descriptions are refused.
        per_prompt (`int`): At most so many descriptions are asked for at once.
        patience (`int`): A label is given up after so many prompts in a row that brought nothing new.
        resume (`bool`): Whether to go on with a file that is there.

    Returns:
        `Report`: with the labels that have too few, of which a warning tells as well.

    Raises:
        ValueError: no labels or examples, a label without a word, a number that makes no sense, or a line in the file
            that is not of its format.
        FileExistsError: the file is there, and `resume` is not set.
    """
    wanted = list(dict.fromkeys((entry,) if isinstance(entry, str) else tuple(entry) for entry in labels))
    check(wanted, examples, count_per_label, max_words, per_prompt, patience)
    output = Path(output)
    if output.exists() and not resume:
        raise FileExistsError(f"{output} exists already; resume goes on with it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    if output.exists():
        cut_half_line(output)
        lines = read_described(output)

    have = Counter(line.labels for line in lines)
    seen = {normalise(line.description) for line in lines}
    shown = {normalise(example.description) for example in examples}
    report = Report(found=sum(have[entry] for entry in wanted))
    fruitless = Counter()  # prompts in a row
    missing = sum(max(0, count_per_label - have[entry]) for entry in wanted)
    with (
        output.open("a", encoding="utf-8") as file,
        tqdm(total=missing, delay=2, unit="description", disable=None) as progress,
    ):
        while waiting := [e for e in wanted if have[e] < count_per_label and fruitless[e] < patience]:
            for start in range(0, len(waiting), chat.batch_size):
                batch = waiting[start : start + chat.batch_size]
                # What is there is part of the seed, or a resumed run would get again what it has.
                draw = random.Random(f"{seed} {len(seen)} {report.prompts}")
                conversations = [
                    make_conversation(entry, examples, min(per_prompt, count_per_label - have[entry]), max_words, draw)
                    for entry in batch
                ]
                replies = chat.reply(conversations, seed=draw.getrandbits(31))
                report.prompts += len(batch)
                for entry, reply in zip(batch, replies, strict=True):
                    before = have[entry]
                    candidates = parse_reply(reply.text)
                    if not candidates:
                        report.refused["empty reply"] += 1
                    elif not reply.complete:
                        report.refused["cut off"] += 1
                        candidates.pop()
                    for description in candidates:
                        if have[entry] == count_per_label:
                            break
                        if reason := refuse(description, entry, max_words, seen, shown):
                            report.refused[reason] += 1
                            continue
                        file.write(Described(entry, description).to_json() + "\n")
                        file.flush()
                        seen.add(normalise(description))
                        have[entry] += 1
                        progress.update()
                    report.accepted += have[entry] - before
                    fruitless[entry] = 0 if have[entry] > before else fruitless[entry] + 1
    report.short = {entry: have[entry] for entry in wanted if have[entry] < count_per_label}
    if report.short:
        told = ", ".join(f"{' + '.join(entry)} ({count})" for entry, count in report.short.items())
        logger.warning("Fewer than %d descriptions for %d labels: %s", count_per_label, len(report.short), told)
    return report


def check(
    wanted: list[tuple[str, ...]],
    examples: Sequence[Described],
    count_per_label: int,
    max_words: int,
    per_prompt: int,
    patience: int,
) -> None:
    """Refuses what cannot work, before anything heavy runs."""
    if not wanted:
        raise ValueError("There are no labels to describe.")
    for entry in wanted:
        for label in entry or ("",):
            if not names_of(label):
                raise ValueError(f"The label {label!r} has no word by which a description could name it.")
    if not examples:
        raise ValueError("There are no example descriptions to go by.")
    for name, value, least in (
        ("count_per_label", count_per_label, 1),
        ("max_words", max_words, 2),
        ("per_prompt", per_prompt, 1),
        ("patience", patience, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}.")


def make_conversation(
    labels: Sequence[str], examples: Sequence[Described], count: int, max_words: int, draw: random.Random
) -> Conversation:
    """Asks for `count` descriptions of labels, after a few examples that `draw` chooses as if they had been replies."""
    conversation = []
    for example in draw.sample(list(examples), min(EXAMPLES_SHOWN, len(examples))):
        conversation.append({"role": "user", "content": request(example.labels, 1)})
        conversation.append({"role": "assistant", "content": f"1. {example.description}"})
    conversation.append({"role": "user", "content": request(labels, count)})
    # Not a system message, which some chat templates refuse.
    conversation[0]["content"] = f"{RULES.format(max_words=max_words)}\n\n{conversation[0]['content']}"
    return conversation


def request(labels: Sequence[str], count: int) -> str:
    """What the chat model is asked for. AudioSet's labels have commas in them, so semicolons stand between labels."""
    captions = "1 caption" if count == 1 else f"{count} different captions"
    template = REQUEST if labels else REQUEST_WITHOUT_LABELS
    return template.format(count=captions, labels="; ".join(map(spaced, labels)))


# Files


def cut_half_line(path: Path) -> None:
    """Cuts off what stands behind the last end of line, where a writer was killed."""
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


def read_described(path: Path) -> list[Described]:
    """Descriptions with their labels from a JSONL file, or without labels from the lines of a .txt file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the first record that is not of the format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No such file of descriptions: {path}")
    if path.suffix.lower() == ".txt":
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [Described((), line.strip()) for line in lines if line.strip()]
    found = []
    for number, record in enumerate(read_records(path), 1):
        match record:
            case {"labels": list(labels), "description": str(description)} if all(map(is_text, labels)):
                found.append(Described(tuple(labels), description))
            case _:
                expected = '{"labels": ["..."], "description": "..."}'
                raise ValueError(f"{path}, record {number}, is {record!r:.80}, expected {expected}.")
    return found


def read_labels(path: Path, column: str | None = None) -> list[tuple[str, ...]]:
    """Labels, or combinations of labels that are heard together, each once.

    Args:
        path (`Path`): A .json file with `{label: index}`, a list of labels or a list of lists of labels; a .csv file;
            or a text file with a label on each line.
        column (`str`, *optional*): The column of a .csv file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another format, has no such column, or holds no label.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No such file of labels: {path}")
    kind = path.suffix.lower()
    if (column is not None) != (kind == ".csv"):
        raise ValueError(f"{path}: a column is to be named for a .csv file and for no other, got {column!r}.")
    if kind == ".csv":
        rows = list(read_table(path))
        require_columns(path, rows[0] if rows else (), [column])
        entries = [(row[column].strip(),) for row in rows]
    elif kind == ".json" and is_list_of_combinations(content := json.loads(path.read_text(encoding="utf-8-sig"))):
        entries = [tuple(combination) for combination in content]
    else:
        entries = [(label,) for label in read_label_list(path)]
    labels = list(dict.fromkeys(entry for entry in entries if any(entry)))
    if not labels:
        raise ValueError(f"{path} holds no label.")
    return labels


def is_list_of_combinations(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(e, list) and e and all(map(is_text, e)) for e in content)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


__all__ = [
    "EXAMPLES",
    "Described",
    "Report",
    "make_conversation",
    "read_described",
    "read_labels",
    "write_descriptions",
]

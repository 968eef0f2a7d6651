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
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError
from huggingface_hub.utils import httpx
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from training.audiotia.labels import read_labels as read_label_list
from training.audiotia.labels import spaced
from training.audiotia.tables import read_records, read_table, require_columns
from training.wheels import resolve_language_model

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

TOKEN_VARIABLE = "MATS_CHAT_TOKEN"
RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT = 60.0  # seconds


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


# Chat models


Conversation = list[dict[str, str]]  # of `role` and `content`, as chat templates take it


class Reply(NamedTuple):
    """What a chat model answered."""

    text: str
    complete: bool  # whether it ended by itself, not at the limit of tokens


class ChatModel(Protocol):
    """What writes the descriptions.

    Attributes:
        batch_size (`int`): how many conversations it likes to go on with at once.
    """

    batch_size: int

    def reply(self, conversations: Sequence[Conversation], seed: int) -> list[Reply]:
        """Goes on with each conversation; the seed makes the sampling repeatable."""
        ...


class LocalChatModel:
    """A chat model of transformers.

    Args:
        model (`PreTrainedModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        batch_size (`int`): How many conversations go through the model together.
        max_tokens (`int`): Where a reply is cut off.
        temperature, top_p (`float`): Of the sampling.

    Raises:
        ValueError: the tokenizer has no chat template.

    Example:
        chat = LocalChatModel.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        write_descriptions(["dog", "rain"], chat, count_per_label=10, output=Path("descriptions.jsonl"))
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 8,
        max_tokens: int = 512,
        temperature: float = 0.8,
        top_p: float = 0.95,
    ):
        if tokenizer.chat_template is None:
            raise ValueError(f"{tokenizer.name_or_path} is no chat model: its tokenizer has no chat template.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.batch_size = batch_size
        self.sampling = {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": 0}

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> "LocalChatModel":
        """Loads a folder or a Hub repo, or what stands in for it (`training/wheels.py`), onto the accelerators.

        Args:
            name (`str`): The folder or repo.
            kwargs: As for the class.
        """
        folder = resolve_language_model(name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        device_map = "auto" if torch.accelerator.is_available() else None
        return cls(AutoModelForCausalLM.from_pretrained(folder, device_map=device_map), tokenizer, **kwargs)

    @torch.inference_mode()
    def reply(self, conversations: Sequence[Conversation], seed: int) -> list[Reply]:
        inputs = self.tokenizer.apply_chat_template(
            list(conversations), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        with torch.random.fork_rng():  # the caller's random numbers stay as they are
            torch.manual_seed(seed)
            output = self.model.generate(
                **inputs, do_sample=True, pad_token_id=self.tokenizer.pad_token_id, **self.sampling
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=new.device)
        complete = torch.isin(new, ends).any(-1).tolist()
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [Reply(text, end) for text, end in zip(texts, complete, strict=True)]


class EndpointChatModel:
    """A chat model behind an OpenAI-compatible endpoint: vLLM, TGI, llama.cpp, `transformers serve`, or a provider's.

    A busy or failing server is asked again, after waits that double unless it says how long to wait.

    Args:
        base_url (`str`): The endpoint's, such as `http://localhost:8000/v1`.
        model (`str`): The name that the endpoint knows the model by.
        token (`str`, *optional*): Sent as the bearer token; by default what the environment variable `MATS_CHAT_TOKEN`
            holds. Without either the user's own Hub token is *not* sent, which `InferenceClient` would do.
        batch_size (`int`): Requests at the same time.
        max_tokens (`int`), temperature, top_p (`float`): Of each request; models that think need room for it.
        timeout (`float`): Seconds for one request.
        attempts (`int`): How often a request is made before it is given up.
        first_wait (`float`): Seconds before the second attempt.
        extra_body (`dict`, *optional*): What the endpoint understands beyond that. `transformers serve` samples only
            where the model's generation config says so: `{"generation_config": '{"do_sample": true}'}`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        token: str | None = None,
        batch_size: int = 4,
        max_tokens: int = 4096,
        temperature: float = 0.8,
        top_p: float = 0.95,
        timeout: float = 300.0,
        attempts: int = 6,
        first_wait: float = 1.0,
        extra_body: dict | None = None,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"The endpoint is {base_url!r}, expected a URL such as http://localhost:8000/v1.")
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}, expected at least 1.")
        # Servers without authentication ignore the word; None would make the client send the user's Hub token there.
        token = token or os.environ.get(TOKEN_VARIABLE) or "EMPTY"
        self.client = InferenceClient(base_url=base_url, token=token, timeout=timeout)
        self.base_url = base_url
        self.model = model
        self.batch_size = batch_size
        self.attempts = attempts
        self.first_wait = first_wait
        self.parameters = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "extra_body": extra_body,
        }

    def reply(self, conversations: Sequence[Conversation], seed: int) -> list[Reply]:
        """Goes on with the conversations, `batch_size` at a time.

        Raises:
            ConnectionError: the endpoint could not be reached, or stayed busy, in all attempts.
            HfHubHTTPError: it refused the request (an `OSError`, with what the server said).
        """
        with ThreadPoolExecutor(self.batch_size) as pool:
            return list(pool.map(self.ask, conversations, range(seed, seed + len(conversations))))

    def ask(self, conversation: Conversation, seed: int) -> Reply:
        """Goes on with one conversation; raises as `reply` does."""
        attempt = 1
        while True:
            try:
                output = self.client.chat_completion(conversation, model=self.model, seed=seed, **self.parameters)
                choice = output.choices[0]
                return Reply(choice.message.content or "", choice.finish_reason != "length")
            except (HfHubHTTPError, InferenceTimeoutError, httpx.TransportError) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code not in RETRIED_STATUS:
                    raise
                # The first line only: what a server says may be a page of HTML.
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                if attempt == self.attempts:
                    raise ConnectionError(f"{self.base_url}: no answer in {attempt} attempts: {reason}") from error
                wait = min(asked_wait(error) or self.first_wait * 2 ** (attempt - 1), LONGEST_WAIT)
                logger.warning("%s: %s; asking again in %.1f s.", self.base_url, reason, wait)
            # Requests that failed together do not come back together.
            time.sleep(wait * random.uniform(1.0, 1.25))
            attempt += 1


def asked_wait(error: Exception) -> float | None:
    """The seconds to wait that a busy server asks for by `Retry-After`, if it does so."""
    response = getattr(error, "response", None)
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (AttributeError, KeyError, ValueError):  # a timeout; no such header; a date
        return None


# Labels and whether a description names them

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


# Writing


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
            f"{self.accepted} descriptions from {self.prompts} prompts, {self.found} there before; "
            f"refused {self.refused.total()}{f' ({reasons})' if reasons else ''}; "
            f"{len(self.short)} labels have too few."
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
        logger.warning("%d labels have fewer than %d descriptions: %s", len(report.short), count_per_label, told)
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
    "ChatModel",
    "Conversation",
    "Described",
    "EndpointChatModel",
    "LocalChatModel",
    "Reply",
    "Report",
    "mentions",
    "parse_reply",
    "read_described",
    "read_labels",
    "refuse",
    "write_descriptions",
]

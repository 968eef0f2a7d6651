"""`mats ask`, `caption`, `classify` and `chat`: the pipeline, from the command line."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mats_cli.runtime import Source, is_mendable, load_pipeline, one_line, say, to_json

# The paper's (AudioTIA); that of classification is the pipeline's own default.
CAPTION_INSTRUCTION = "Generate audio caption."
SHOWN_EVIDENCE = 5

Audio = Annotated[str, typer.Argument(help="An audio file or a URL.", show_default=False)]
Audios = Annotated[list[str], typer.Argument(help="Audio files or URLs.", show_default=False)]
Model = Annotated[
    str | None, typer.Option(help="A checkpoint folder or a Hub repo.", show_default="the bundled mats-tiny")
]
LanguageModel = Annotated[
    str | None,
    typer.Option(help="A light checkpoint's language model.", show_default="where the checkpoint says"),
]
Clap = Annotated[str | None, typer.Option(help="A light checkpoint's CLAP.", show_default="where the checkpoint says")]
NoSanta = Annotated[bool, typer.Option("--no-santa", help="Leave the audio embedding where CLAP puts it.")]
Explain = Annotated[bool, typer.Option("--explain", help="Also show the memory texts that Santa leaned on.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.", show_default="the model's")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sounds answered at a time.")]


@dataclass(frozen=True)
class Display:
    """How answers are shown."""

    explain: bool
    as_json: bool
    name_sounds: bool = False  # in front of each answer; JSON always does

    def __call__(self, audio: str, record: dict) -> str:
        """One result of the pipeline as text, or as a JSON object on one line."""
        evidence = record.get("santa") or []
        if self.as_json:
            result = {"audio": audio, "answer": record["generated_text"]}
            result |= {key: record[key] for key in ("label", "scores") if key in record}
            return to_json(result | ({"santa": evidence} if self.explain else {}))
        lines = [record.get("label", record["generated_text"])]
        if self.name_sounds:
            lines[0] = f"{audio}: {lines[0]}"
        return "\n".join(lines + (evidence_lines(evidence) if self.explain else []))


def evidence_lines(evidence: list[dict]) -> list[str]:
    """The heaviest texts of Santa's evidence, with their weights."""
    if not evidence:
        return ["  Santa did not act."]
    lines = [f"  {row['weight']:.3f}  {row['text']}" for row in evidence[:SHOWN_EVIDENCE]]
    left_out = len(evidence) - SHOWN_EVIDENCE
    return lines + ([f"         and {left_out} more"] if left_out > 0 else [])


def ask(
    audio: Audio,
    question: Annotated[str, typer.Argument(help="What to ask about the sound.", show_default=False)],
    model: Model = None,
    language_model: LanguageModel = None,
    clap: Clap = None,
    no_santa: NoSanta = False,
    explain: Explain = False,
    as_json: Json = False,
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Answer one question about a sound."""
    options = pipeline_options(no_santa, explain, max_new_tokens)
    answer_all([audio], question, Source(model, language_model, clap), 1, Display(explain, as_json), options)


def caption(
    audio: Audios,
    model: Model = None,
    language_model: LanguageModel = None,
    clap: Clap = None,
    question: Annotated[str, typer.Option(help="The instruction.")] = CAPTION_INSTRUCTION,
    no_santa: NoSanta = False,
    explain: Explain = False,
    as_json: Json = False,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 8,
) -> None:
    """Describe sounds in a sentence each."""
    options = pipeline_options(no_santa, explain, max_new_tokens)
    answer_all(
        audio,
        question,
        Source(model, language_model, clap),
        batch_size,
        Display(explain, as_json, len(audio) > 1),
        options,
    )


def classify(
    audio: Audios,
    labels: Annotated[
        str, typer.Option(help='Candidates, separated by commas: "dog, car horn, rain".', show_default=False)
    ],
    model: Model = None,
    language_model: LanguageModel = None,
    clap: Clap = None,
    question: Annotated[str | None, typer.Option(help="The instruction.", show_default="the paper's")] = None,
    no_santa: NoSanta = False,
    explain: Explain = False,
    as_json: Json = False,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 8,
) -> None:
    """Name sounds by the label that is nearest to the answer."""
    candidates = [label.strip() for label in labels.split(",") if label.strip()]
    if not candidates:
        raise ValueError(f"--labels is {labels!r}, expected labels separated by commas.")
    options = pipeline_options(no_santa, explain, max_new_tokens) | {"candidate_labels": candidates}
    answer_all(
        audio,
        question,
        Source(model, language_model, clap),
        batch_size,
        Display(explain, as_json, len(audio) > 1),
        options,
    )


def chat(
    audio: Audio,
    model: Model = None,
    language_model: LanguageModel = None,
    clap: Clap = None,
    no_santa: NoSanta = False,
    explain: Explain = False,
    as_json: Json = False,
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Talk about one sound; a question a line, Ctrl-D ends."""
    check_not_all_missing([audio])
    pipe = load_pipeline(model, language_model, clap)
    from transformers import TextStreamer

    options = pipeline_options(no_santa, explain, max_new_tokens)
    if not as_json:
        options["streamer"] = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    display = Display(explain, as_json)
    # Encoded once; every turn reads the same embedding.
    content = [{"type": "audio", "audio_embeds": pipe.processor.encode_audio(audio)[0]}]
    conversation = []
    for question in read_questions():
        conversation.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        content = []
        record = pipe(conversation, **options)
        conversation.append({"role": "assistant", "content": record["generated_text"]})
        if as_json:
            typer.echo(display(audio, record))
        elif explain and len(conversation) == 2:  # the sound stays, and so does what Santa makes of it
            typer.echo("\n".join(evidence_lines(record["santa"] or [])))


def read_questions() -> Iterator[str]:
    """Lines of stdin that hold something, behind a prompt where a person types them."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def pipeline_options(no_santa: bool, explain: bool, max_new_tokens: int | None) -> dict:
    """The pipeline's keywords for options that all verbs share; what is not asked for is left to its defaults."""
    options = {}
    if no_santa:
        options["santa"] = False
    if explain:
        options["return_evidence"] = True
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    return options


def answer_all(
    audio: list[str],
    question: str | None,
    source: Source,
    batch_size: int,
    display: Display,
    options: dict,
) -> None:
    """Asks one question about every sound and prints the answers as they come.

    A sound that cannot be read does not hold up the others: it is told at the end, and the exit code is 1.
    """
    check_not_all_missing(audio)
    pipe = load_pipeline(*source)
    from tqdm import tqdm

    unreadable: dict[str, Exception] = {}
    with tqdm(total=len(audio), delay=2, unit="sound", disable=None) as progress:
        for start in range(0, len(audio), batch_size):
            batch = audio[start : start + batch_size]
            embeds = {}
            for path in batch:
                try:
                    embeds[path] = pipe.processor.encode_audio(path)
                except Exception as error:
                    if len(audio) == 1 or not is_mendable(error):
                        raise
                    unreadable[path] = error
            heard = [path for path in batch if path in embeds]
            rows = [{"audio_embeds": embeds[path]} for path in heard]
            records = pipe(rows, text=question, batch_size=batch_size, **options) if rows else []
            for path, record in zip(heard, records, strict=True):
                progress.write(display(path, record))
            progress.update(len(batch))
    for path, error in unreadable.items():
        say(f"Error: {path}: {one_line(error)}")
    if unreadable:
        raise typer.Exit(1)


def check_not_all_missing(audio: list[str]) -> None:
    """Before a model is loaded: a mistyped name should not cost a minute."""
    missing = [path for path in audio if "://" not in path and not Path(path).expanduser().exists()]
    if len(missing) == len(audio):
        raise FileNotFoundError(f"No such audio file: {', '.join(missing)}")

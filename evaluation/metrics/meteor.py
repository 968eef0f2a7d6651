"""METEOR 1.5 through its Java program, as coco-caption runs it.

Denkowski and Lavie, "Meteor Universal: Language Specific Translation Evaluation for Any Target Language", WMT 2014.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from evaluation.metrics.captions import tokenize_captions
from evaluation.metrics.java import LOCALE_OPTIONS, Unavailable, failure, require_java, unavailable
from evaluation.metrics.ptb import TOKENIZER
from evaluation.metrics.scores import Scores

JAR = "meteor-1.5.jar"
NEEDED = (JAR, "data/paraphrase-en.gz")
ADVICE = (
    f"METEOR needs Java and a folder with {NEEDED[0]} and {NEEDED[1]}: name the folder of the package pycocoevalcap "
    "1.2, installed or unpacked."
)


def meteor(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    jars: str | os.PathLike | None = None,
    memory: str = "2G",
) -> Scores:
    """METEOR, from 0 to 1, or `None` where Java or a jar is missing, with one line that says how to get it.

    The corpus is scored by the program's summed counts, not by the mean of its sentences.

    Args:
        predictions: one caption a sample.
        references: at least one caption a sample.
        jars: folder with `meteor-1.5.jar` and `data/paraphrase-en.gz`, or with a folder `meteor` that has them.
        memory: the most that Java may take, as `-Xmx` has it.

    Raises:
        ValueError: as `tokenize_captions`.
        NotADirectoryError: `jars` does not exist.
        RuntimeError: the Java program failed.
    """
    predicted, referred = tokenize_captions(predictions, references)
    try:
        java, folder = require_java(jars, "meteor", NEEDED, ADVICE)
    except Unavailable as why:
        return unavailable("meteor", why)
    command = [java.path, *LOCALE_OPTIONS, f"-Xmx{memory}", "-jar", str(folder / JAR)]
    with _dialogue([*command, "-", "-", "-stdio", "-l", "en", "-norm"]) as ask:
        counts = []
        for tokens, captions in zip(predicted, referred, strict=True):
            (count,) = ask(" ||| ".join(["SCORE", *map(" ".join, captions), " ".join(tokens)]), 1)
            counts.append(count)
        *sentences, score = map(float, ask(" ||| ".join(["EVAL", *counts]), len(counts) + 1))
    return Scores("meteor", score, tuple(sentences), {"tokenizer": TOKENIZER})


@contextmanager
def _dialogue(command: Sequence[str]) -> Iterator[Callable[[str, int], list[str]]]:
    """Runs a program that answers each line with a known number of lines."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        )

        def ask(line: str, answers: int) -> list[str]:
            try:
                process.stdin.write(f"{line}\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it ended early, so that there is no answer either
            lines = [process.stdout.readline().strip() for _ in range(answers)]
            if not all(lines):
                process.wait()
                errors.seek(0)
                raise failure("METEOR", errors.read())
            return lines

        try:
            yield ask
        finally:
            process.kill()
            process.communicate()

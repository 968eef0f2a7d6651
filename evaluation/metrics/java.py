"""Metrics that exist as Java programs only, out of a folder of jars that the user names."""

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.metrics.ptb import TOKENIZER
from evaluation.metrics.scores import Scores

logger = logging.getLogger(__name__)

# Java before 18 takes the machine's encoding, and reads and writes numbers as its country does.
LOCALE_OPTIONS = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")
_VERSION = re.compile(r'version "(?:1\.)?(\d+)')


class Unavailable(Exception):
    """Java or a jar is missing; the message is one line that says how to get it."""


@dataclass(frozen=True)
class Java:
    """A Java program and its major version, 8 for "1.8.0"."""

    path: str
    version: int


def find_java() -> Java | None:
    """Java of `JAVA_HOME`, else of the path; `None` where there is none that runs."""
    home = os.environ.get("JAVA_HOME")
    path = shutil.which("java", path=os.path.join(home, "bin")) if home else None
    path = path or shutil.which("java")
    if path is None:
        return None
    said = subprocess.run([path, "-version"], capture_output=True, text=True, check=False)
    found = _VERSION.search(said.stderr)
    return Java(path, int(found[1])) if said.returncode == 0 and found else None


def require_java(jars: str | os.PathLike | None, program: str, needed: Sequence[str], advice: str) -> tuple[Java, Path]:
    """Java, and the folder with all that is needed: `jars`, or in it the folder named as the program.

    Raises:
        Unavailable: there is no Java, no folder is named, or it lacks a file.
        NotADirectoryError: a folder is named that does not exist.
    """
    if jars is None:
        raise Unavailable(f"No folder of jars is named. {advice}")
    folder = Path(jars).resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"{jars} is no folder, expected one with {', '.join(needed)}.")
    if (folder / program).is_dir():
        folder /= program
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise Unavailable(f"{folder} has no {', '.join(missing)}. {advice}")
    java = find_java()
    if java is None:
        raise Unavailable(f"There is no Java. {advice}")
    return java, folder


def unavailable(name: str, why: Unavailable) -> Scores:
    """No score, never 0, and in the details and the log the line that says why."""
    logger.warning("%s is not computed. %s", name, why)
    return Scores(name, None, (), {"tokenizer": TOKENIZER, "unavailable": str(why)})


def failure(name: str, stderr: str) -> RuntimeError:
    """What a Java program said last before it failed."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    return RuntimeError(f"{name}'s Java program failed:\n" + "\n".join(lines[-12:]))

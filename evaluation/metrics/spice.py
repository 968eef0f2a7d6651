"""SPICE 1.0 through its Java program, as coco-caption runs it.

Anderson et al., "SPICE: Semantic Propositional Image Caption Evaluation", ECCV 2016.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from evaluation.metrics.captions import tokenize_captions
from evaluation.metrics.java import LOCALE_OPTIONS, Java, Unavailable, failure, require_java, unavailable
from evaluation.metrics.ptb import TOKENIZER
from evaluation.metrics.scores import Scores, mean

JAR = "spice-1.0.jar"
MAIN_CLASS = "edu.anu.spice.SpiceScorer"
NEEDED = (JAR, "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar")
ADVICE = (
    "SPICE needs Java and a folder of jars: name the folder of the package pycocoevalcap 1.2, installed or unpacked, "
    "and put into its spice/lib/ stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar, out of "
    "stanford-corenlp-full-2015-12-09.zip from nlp.stanford.edu/software."
)
# The program writes its result by a JavaScript engine, after hours of work, and Java has had none since version 15.
LAST_WITH_JAVASCRIPT = 14
ENGINE = "nashorn-core-*.jar"
ENGINE_ADVICE = (
    f"SPICE writes its result by the JavaScript engine of Java up to {LAST_WITH_JAVASCRIPT}; for a later Java put the "
    "jars nashorn-core, asm, asm-analysis, asm-commons, asm-tree and asm-util (of org.openjdk.nashorn and org.ow2.asm, "
    "from Maven) in lib/."
)
# Its serialiser looks into classes that Java has closed since version 9.
OPENED = ("java.lang", "java.util", "java.math", "java.net", "java.text", "java.util.concurrent")


def spice(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    jars: str | os.PathLike | None = None,
    memory: str = "8G",
    cache: str | os.PathLike | None = None,
) -> Scores:
    """SPICE, from 0 to 1, or `None` where Java or a jar is missing, with one line that says how to get it.

    Args:
        predictions: one caption a sample.
        references: at least one caption a sample.
        jars: folder with `spice-1.0.jar` and `lib/`, or with a folder `spice` that has them.
        memory: the most that Java may take, as `-Xmx` has it.
        cache: folder for parsed references, which are parsed anew without one. Two runs must not share it at a time.

    Raises:
        ValueError: as `tokenize_captions`.
        NotADirectoryError: `jars` does not exist.
        RuntimeError: the Java program failed, or left samples out.
    """
    predicted, referred = tokenize_captions(predictions, references)
    try:
        java, jar_folder = require_java(jars, "spice", NEEDED, ADVICE)
        _require_javascript(java, jar_folder)
    except Unavailable as why:
        return unavailable("spice", why)
    samples = [
        {"image_id": place, "test": " ".join(tokens), "refs": [" ".join(caption) for caption in captions]}
        for place, (tokens, captions) in enumerate(zip(predicted, referred, strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "captions.json"), Path(folder, "result.json")
        given.write_text(json.dumps(samples), encoding="utf-8")
        command = [*spice_command(java, jar_folder, memory), str(given), "-out", str(result), "-silent"]
        if cache is not None:
            Path(cache).mkdir(parents=True, exist_ok=True)
            command += ["-cache", str(Path(cache).resolve())]
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if run.returncode != 0 or not result.is_file():
            raise failure("SPICE", run.stderr)
        found = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(result.read_text("utf-8"))}
    if found.keys() != set(range(len(samples))):
        raise RuntimeError(f"SPICE scored {len(found)} of {len(samples)} captions.")
    sentences = tuple(float(found[place]) for place in range(len(samples)))
    return Scores("spice", mean(sentences), sentences, {"tokenizer": TOKENIZER})


def spice_command(java: Java, jars: Path, memory: str) -> list[str]:
    """The command line up to SPICE's own arguments.

    All of `lib/` is on the class path, and not just what the jar names, for the sake of the JavaScript engine.
    """
    opened = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED] if java.version >= 9 else []
    class_path = os.pathsep.join([str(jars / JAR), str(jars / "lib" / "*")])
    return [java.path, *LOCALE_OPTIONS, *opened, f"-Xmx{memory}", "-cp", class_path, MAIN_CLASS]


def _require_javascript(java: Java, jars: Path) -> None:
    if java.version > LAST_WITH_JAVASCRIPT and not any((jars / "lib").glob(ENGINE)):
        raise Unavailable(f"Java is of version {java.version} and {jars / 'lib'} has no {ENGINE}. {ENGINE_ADVICE}")

"""METEOR and SPICE by Java: what is called and how, with stand-ins for the programs, and METEOR by its own program.

SPICE's own program needs the models of CoreNLP, which no package has.
"""

import json
import logging
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from evaluation.metrics.cider_d import cider_d
from evaluation.metrics.java import Java, find_java
from evaluation.metrics.meteor import NEEDED as METEOR_FILES
from evaluation.metrics.meteor import meteor
from evaluation.metrics.ptb import TOKENIZER
from evaluation.metrics.spice import NEEDED as SPICE_FILES
from evaluation.metrics.spice import OPENED, spice, spice_command
from evaluation.metrics.spider import spider

PREDICTIONS = ["A dog barks!", "", "A caf\u00e9 (far) away.", "Rain"]
REFERENCES = [["A dog is barking.", "Barking dog"], ["Wind"], ["The caf\u00e9"], ["It rains", "Rain."]]

# Scores each caption by its number, in reverse, and writes down how it was called.
SPICE_STANDIN = """
package edu.anu.spice;
import java.lang.management.ManagementFactory;
import java.nio.file.*;
import java.util.*;
public class SpiceScorer {
    public static void main(String[] args) throws Exception {
        List<String> arguments = Arrays.asList(args);
        String given = new String(Files.readAllBytes(Paths.get(args[0])), "UTF-8");
        Files.write(Paths.get(System.getenv("STANDIN_LOG")), Arrays.asList(
            String.join("\\t", args),
            String.join("\\t", ManagementFactory.getRuntimeMXBean().getInputArguments()),
            String.join(" ", System.getProperty("file.encoding"), System.getProperty("user.language")),
            given));
        Class.forName("standin.Engine");  // of another jar in lib/
        for (String name : new String[] {
                "java.lang.String", "java.util.ArrayList", "java.math.BigInteger", "java.net.URI",
                "java.text.DecimalFormat", "java.util.concurrent.ConcurrentHashMap"}) {
            Class.forName(name).getDeclaredFields()[0].setAccessible(true);
        }
        if (System.getenv("STANDIN_FAILS") != null) throw new IllegalStateException("no parse of that");
        int captions = given.split("image_id", -1).length - 1;
        if (System.getenv("STANDIN_FORGETS") != null) captions--;
        StringBuilder result = new StringBuilder("[");
        for (int i = captions - 1; i >= 0; i--)
            result.append("{\\"image_id\\": " + i + ", \\"scores\\": {\\"All\\": {\\"f\\": 0." + i + "}}}")
                .append(i > 0 ? "," : "]");
        Files.write(Paths.get(args[arguments.indexOf("-out") + 1]), result.toString().getBytes("UTF-8"));
    }
}
"""
ENGINE_STANDIN = "package standin; public class Engine {}"
# Counts characters, so that letters beyond ASCII show whether they came through.
METEOR_STANDIN = """
import java.io.*;
import java.nio.file.*;
import java.util.*;
public class Meteor {
    public static void main(String[] args) throws Exception {
        List<String> log = new ArrayList<>();
        log.add(String.join(" ", args));
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
        String line;
        while ((line = in.readLine()) != null) {
            log.add(line);
            Files.write(Paths.get(System.getenv("STANDIN_LOG")), log, java.nio.charset.StandardCharsets.UTF_8);
            if (System.getenv("STANDIN_FAILS") != null) throw new IllegalStateException("no paraphrase of that");
            if (line.startsWith("SCORE")) { System.out.println(line.length()); continue; }
            String[] counts = line.split(" \\\\|\\\\|\\\\| ");
            for (int i = 1; i < counts.length; i++) System.out.println(String.format("%.3f", i / 8.0));
            System.out.println("0.625");
        }
    }
}
"""

needs_compiler = pytest.mark.skipif(
    shutil.which("javac") is None or shutil.which("jar") is None, reason="compiles a stand-in with javac"
)


def compile_jar(folder: Path, jar: Path, name: str, source: str) -> None:
    """A jar of one class, which is its main class."""
    path = folder / f"{name.replace('.', '/')}.java"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    jar.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["javac", "-d", folder / "classes", path], check=True)
    subprocess.run(["jar", "cfe", jar, name, "-C", folder / "classes", "."], check=True)
    shutil.rmtree(folder / "classes")


@pytest.fixture(scope="module")
def jars(tmp_path_factory):
    """A folder of stand-ins, with a blank in its name."""
    sources, folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("of stand-ins")
    compile_jar(sources, folder / "spice-1.0.jar", "edu.anu.spice.SpiceScorer", SPICE_STANDIN)
    compile_jar(sources, folder / "lib" / "nashorn-core-15.4.jar", "standin.Engine", ENGINE_STANDIN)
    compile_jar(sources, folder / "meteor-1.5.jar", "Meteor", METEOR_STANDIN)
    for name in (*SPICE_FILES, *METEOR_FILES):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def log(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    monkeypatch.setenv("STANDIN_LOG", str(path))
    return path


def pretend_java(folder: Path, monkeypatch, version: str) -> None:
    """A `java` that says only its version, and no other."""
    folder.mkdir()
    (folder / "java").write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025' >&2\n")
    (folder / "java").chmod(0o755)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(folder))


@needs_compiler
class TestSpice:
    def test_scores_are_put_in_order(self, jars, log):
        scores = spice(PREDICTIONS, REFERENCES, jars)
        assert scores.name == "spice"
        assert scores.sentences == (0.0, 0.1, 0.2, 0.3)
        assert scores.score == pytest.approx(0.15)
        assert scores.details == {"tokenizer": TOKENIZER}

    def test_java_gets_what_spice_needs(self, jars, log, tmp_path):
        spice(PREDICTIONS, REFERENCES, jars, memory="300m", cache=tmp_path / "new" / "cache")
        own, options, encoding, captions = log.read_text(encoding="utf-8").splitlines()
        given, *own = own.split("\t")
        assert not Path(given).exists()  # of a temporary folder, which is gone
        assert own == ["-out", own[1], "-silent", "-cache", str(tmp_path / "new" / "cache")]
        assert (tmp_path / "new" / "cache").is_dir()
        opened = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED]
        assert set(options.split("\t")) >= {"-Xmx300m", *(opened if find_java().version >= 9 else [])}
        assert encoding == "UTF-8 en"
        assert json.loads(captions) == [
            {"image_id": 0, "test": "a dog barks", "refs": ["a dog is barking", "barking dog"]},
            {"image_id": 1, "test": "", "refs": ["wind"]},
            {"image_id": 2, "test": "a caf\u00e9 -lrb- far -rrb- away", "refs": ["the caf\u00e9"]},
            {"image_id": 3, "test": "rain", "refs": ["it rains", "rain"]},
        ]

    def test_a_failure_says_what_java_said(self, jars, log, monkeypatch):
        monkeypatch.setenv("STANDIN_FAILS", "1")
        with pytest.raises(RuntimeError, match=r"SPICE's Java program failed:\n(.*\n)*.*no parse of that"):
            spice(PREDICTIONS, REFERENCES, jars)

    def test_a_caption_without_a_score_is_an_error(self, jars, log, monkeypatch):
        monkeypatch.setenv("STANDIN_FORGETS", "1")
        with pytest.raises(RuntimeError, match="SPICE scored 3 of 4 captions"):
            spice(PREDICTIONS, REFERENCES, jars)

    def test_spider_is_the_mean_with_cider_d(self, jars, log):
        consensus = cider_d(PREDICTIONS, REFERENCES)
        scores = spider(PREDICTIONS, REFERENCES, jars)
        assert scores.name == "spider"
        assert scores.score == pytest.approx((consensus.score + 0.15) / 2)
        assert scores.sentences == pytest.approx([(c + s / 10) / 2 for s, c in enumerate(consensus.sentences)])
        assert scores.details == {"tokenizer": TOKENIZER, "cider_d": consensus.score, "spice": pytest.approx(0.15)}


@needs_compiler
class TestMeteor:
    def test_a_dialogue_with_the_program(self, jars, log):
        scores = meteor(PREDICTIONS, REFERENCES, jars)
        assert scores.name == "meteor"
        assert scores.sentences == (0.125, 0.25, 0.375, 0.5)
        assert scores.score == 0.625
        lines = log.read_text(encoding="utf-8").splitlines()
        asked = [
            "SCORE ||| a dog is barking ||| barking dog ||| a dog barks",
            "SCORE ||| wind ||| ",
            "SCORE ||| the caf\u00e9 ||| a caf\u00e9 -lrb- far -rrb- away",
            "SCORE ||| it rains ||| rain ||| rain",
        ]
        assert lines[:-1] == ["- - -stdio -l en -norm", *asked]
        assert lines[-1] == " ||| ".join(["EVAL", *(str(len(line)) for line in asked)])

    def test_the_program_may_lie_as_in_pycocoevalcap(self, jars, log, tmp_path):
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "meteor").symlink_to(jars)
        assert meteor(PREDICTIONS, REFERENCES, tmp_path / "package").score == 0.625

    def test_a_failure_says_what_java_said(self, jars, log, monkeypatch):
        monkeypatch.setenv("STANDIN_FAILS", "1")
        with pytest.raises(RuntimeError, match=r"METEOR's Java program failed:\n(.*\n)*.*no paraphrase of that"):
            meteor(PREDICTIONS, REFERENCES, jars)


@pytest.mark.parametrize("metric", [spice, spider, meteor])
class TestWithoutJavaOrJars:
    def check(self, scores, metric, *said):
        assert scores.name == metric.__name__
        assert scores.score is None
        assert scores.sentences == ()
        line = scores.details["unavailable"]
        assert "\n" not in line
        for part in said:
            assert part in line

    def test_without_a_folder(self, metric, caplog):
        with caplog.at_level(logging.WARNING):
            scores = metric(PREDICTIONS, REFERENCES)
        self.check(scores, metric, "No folder of jars is named.", "name the folder of the package pycocoevalcap 1.2")
        assert scores.details["unavailable"] in caplog.text
        assert json.loads(json.dumps(scores.as_dict()))[metric.__name__] is None

    def test_with_an_empty_folder(self, metric, tmp_path):
        files = METEOR_FILES if metric is meteor else SPICE_FILES
        self.check(metric(PREDICTIONS, REFERENCES, tmp_path), metric, f"{tmp_path} has no {', '.join(files)}.")

    def test_with_a_folder_of_the_programs_name_in_it(self, metric, tmp_path):
        own = tmp_path / ("meteor" if metric is meteor else "spice")
        own.mkdir()
        self.check(metric(PREDICTIONS, REFERENCES, tmp_path), metric, f"{own} has no ")

    def test_without_java(self, metric, tmp_path, monkeypatch):
        for name in (*SPICE_FILES, *METEOR_FILES):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        monkeypatch.delenv("JAVA_HOME", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        self.check(metric(PREDICTIONS, REFERENCES, tmp_path), metric, "There is no Java.")

    def test_a_folder_that_does_not_exist_is_refused(self, metric, tmp_path):
        with pytest.raises(NotADirectoryError, match=r"nowhere is no folder, expected one with .*\.jar"):
            metric(PREDICTIONS, REFERENCES, tmp_path / "nowhere")

    def test_captions_are_checked_first(self, metric):
        with pytest.raises(ValueError, match=r"references\[1\] is empty"):
            metric(["a", "b"], [["a"], []])


def test_spider_without_spice_still_says_cider_d():
    assert spider(PREDICTIONS, REFERENCES).details["cider_d"] == cider_d(PREDICTIONS, REFERENCES).score


def test_spice_and_a_java_without_javascript(tmp_path, monkeypatch):
    pretend_java(tmp_path / "bin", monkeypatch, "15.0.1")
    for name in SPICE_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scores = spice(PREDICTIONS, REFERENCES, tmp_path)
    assert scores.score is None
    assert f"Java is of version 15 and {tmp_path / 'lib'} has no nashorn-core-*.jar." in scores.details["unavailable"]


@pytest.mark.parametrize(("said", "version"), [("1.8.0_312", 8), ("11.0.2", 11), ("17.0.15", 17), ("21", 21)])
def test_versions_of_java(said, version, tmp_path, monkeypatch):
    pretend_java(tmp_path / "bin", monkeypatch, said)
    assert find_java() == Java(str(tmp_path / "bin" / "java"), version)


def test_java_home_goes_first(tmp_path, monkeypatch):
    pretend_java(tmp_path / "bin", monkeypatch, "17.0.1")
    home = tmp_path / "home"
    home.mkdir()
    pretend_java(home / "bin", monkeypatch, "11.0.1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert find_java() == Java(str(home / "bin" / "java"), 11)


def test_a_java_that_does_not_run_is_none(tmp_path, monkeypatch):
    pretend_java(tmp_path / "bin", monkeypatch, "17.0.1")
    (tmp_path / "bin" / "java").write_text("#!/bin/sh\nexit 1\n")
    assert find_java() is None


@pytest.mark.parametrize(("version", "opens"), [(8, False), (9, True), (17, True)])
def test_classes_are_opened_where_java_closes_them(version, opens, tmp_path):
    command = spice_command(Java("java", version), tmp_path, "8G")
    assert any(option.startswith("--add-opens") for option in command) is opens
    assert command[-3:-1] == ["-cp", os.pathsep.join([str(tmp_path / "spice-1.0.jar"), str(tmp_path / "lib" / "*")])]


@pytest.mark.slow
def test_meteor_as_pycocoevalcap():
    spec = find_spec("pycocoevalcap")
    if spec is None or shutil.which("java") is None:
        pytest.skip("METEOR's program is in the package pycocoevalcap and needs Java")
    from pycocoevalcap.meteor.meteor import Meteor

    from evaluation.metrics.ptb import ptb_tokenize

    own = {place: [" ".join(ptb_tokenize(text))] for place, text in enumerate(PREDICTIONS)}
    given = {place: [" ".join(ptb_tokenize(text)) for text in row] for place, row in enumerate(REFERENCES)}
    expected, sentences = Meteor().compute_score(given, own)
    scores = meteor(PREDICTIONS, REFERENCES, spec.submodule_search_locations[0])
    assert scores.score == pytest.approx(expected, abs=1e-12)
    assert scores.sentences == pytest.approx(sentences, abs=1e-12)
    assert 0 < scores.score < 1

"""The command `mats`: what each verb prints, and how it fails."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import transformers
from conftest import MATS_TINY, SENTENCES, make_clap, make_processor, make_speaker, tone
from typer.testing import CliRunner

import modeling_mats.convert_msclap
from mats_cli import memory as memory_verbs
from mats_cli import runtime
from mats_cli.main import app
from mats_cli.sounds import evidence_lines
from modeling_mats import MatsForConditionalGeneration
from processing_mats import MatsProcessor, SantaMemory
from processing_mats.pipeline_mats import CLASSIFY_INSTRUCTION, AudioTextToTextPipeline

MATS = Path(sys.executable).with_name("mats")
QUESTION = "What is making this sound?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    make_speaker().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> list[str]:
    """Three readable files."""
    folder = tmp_path_factory.mktemp("sounds")
    paths = [str(folder / f"{hertz} hertz.wav") for hertz in (220, 440, 880)]
    for path, hertz in zip(paths, (220, 440, 880), strict=True):
        soundfile.write(path, tone(1.3, hertz), 16000)
    return paths


@pytest.fixture
def broken(tmp_path) -> str:
    path = tmp_path / "broken.wav"
    path.write_bytes(b"not audio at all")
    return str(path)


@pytest.fixture(scope="module")
def pipe(checkpoint) -> AudioTextToTextPipeline:
    """What the verbs must agree with."""
    return AudioTextToTextPipeline(
        model=MatsForConditionalGeneration.from_pretrained(checkpoint),
        processor=MatsProcessor.from_pretrained(checkpoint),
    )


@pytest.fixture(autouse=True)
def restore_logging():
    """The command silences transformers for its whole process, which here is that of all tests."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    runtime.settings.verbose = False
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


def mats(*arguments, code: int = 0, stdin: str | None = None):
    """Runs `mats` within this process and checks its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_mats(*arguments, stdin: str = "") -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(argument) for argument in (MATS, *arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=120)


def rows(result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_error(result, message: str) -> None:
    """One line on stderr, nothing on stdout."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message in line


# -- ask, caption, classify --------------------------------------------------------------------------------------------


def test_ask_prints_the_answer(checkpoint, sounds, pipe):
    result = mats("ask", sounds[0], QUESTION, "--model", checkpoint, "--max-new-tokens", 6)
    assert result.stdout == pipe(sounds[0], text=QUESTION, max_new_tokens=6)["generated_text"] + "\n"
    assert result.stderr == ""


def test_ask_json(checkpoint, sounds, pipe):
    common = ("ask", sounds[0], QUESTION, "--model", checkpoint, "--max-new-tokens", 6, "--json")
    expected = pipe(sounds[0], text=QUESTION, max_new_tokens=6, return_evidence=True)
    answer = {"audio": sounds[0], "answer": expected["generated_text"]}
    assert rows(mats(*common)) == [answer]
    (row,) = rows(mats(*common, "--explain"))
    assert row == answer | {"santa": expected["santa"]}
    assert row["santa"], "the weights were never written"


def test_explain_shows_texts_with_their_weights(checkpoint, sounds, pipe):
    evidence = pipe(sounds[0], text=QUESTION, max_new_tokens=1, return_evidence=True)["santa"]
    result = mats("ask", sounds[0], QUESTION, "--model", checkpoint, "--max-new-tokens", 1, "--explain")
    lines = [f"  {row['weight']:.3f}  {row['text']}" for row in evidence]
    assert result.stdout.splitlines()[1:] == lines


def test_explain_shows_the_heaviest_five():
    lines = evidence_lines([{"text": f"text {number}", "weight": 1 / 32} for number in range(32)])
    assert lines[0] == "  0.031  text 0"
    assert len(lines) == 6
    assert lines[5].strip() == "and 27 more"


def test_no_santa(checkpoint, sounds, pipe):
    common = ("ask", sounds[0], QUESTION, "--model", checkpoint, "--no-santa", "--explain", "--max-new-tokens", 6)
    (row,) = rows(mats(*common, "--json"))
    expected = pipe(sounds[0], text=QUESTION, max_new_tokens=6, santa=False)["generated_text"]
    assert row == {"audio": sounds[0], "answer": expected, "santa": []}
    assert mats(*common).stdout.splitlines()[-1] == "  Santa did not act."


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_caption_of_several(checkpoint, sounds, pipe, batch_size):
    common = ("caption", *sounds, "--model", checkpoint, "--max-new-tokens", 6, "--batch-size", batch_size)
    records = pipe(sounds, text="Generate audio caption.", max_new_tokens=6)
    expected = [record["generated_text"] for record in records]
    assert len(set(expected)) == 3, "the model is deaf"
    assert rows(mats(*common, "--json")) == [
        {"audio": path, "answer": answer} for path, answer in zip(sounds, expected, strict=True)
    ]
    lines = [f"{path}: {answer}" for path, answer in zip(sounds, expected, strict=True)]
    assert mats(*common).stdout.splitlines() == lines


def test_caption_by_another_question(checkpoint, sounds, pipe):
    result = mats("caption", sounds[0], "--model", checkpoint, "--question", "Why?", "--max-new-tokens", 6)
    assert result.stdout.strip("\n") == pipe(sounds[0], text="Why?", max_new_tokens=6)["generated_text"]


def test_classify_with_labels_of_several_words(checkpoint, sounds, pipe):
    labels = ["dog", "a car horn", "rain"]
    common = ("classify", *sounds, "--labels", " dog, a car horn,rain,", "--model", checkpoint, "--max-new-tokens", 6)
    expected = pipe(sounds, text=CLASSIFY_INSTRUCTION, candidate_labels=labels, max_new_tokens=6)
    found = rows(mats(*common, "--json"))
    for row, record, path in zip(found, expected, sounds, strict=True):
        assert list(row) == ["audio", "answer", "label", "scores"]
        assert (row["audio"], row["answer"], row["label"]) == (path, record["generated_text"], record["label"])
        assert list(row["scores"]) == labels
        assert row["scores"] == pytest.approx(record["scores"], abs=1e-5)
    lines = [f"{path}: {record['label']}" for path, record in zip(sounds, expected, strict=True)]
    assert mats(*common).stdout.splitlines() == lines


def test_classify_without_a_label(sounds):
    check_error(mats("classify", sounds[0], "--labels", " , ", code=1), "expected labels separated by commas")
    assert "--labels" in mats("classify", sounds[0], code=2).stderr


# -- Light checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def light(tmp_path) -> Path:
    """A light checkpoint, beside its language model, `llm`, and its CLAP, `clap`."""
    model, processor = make_speaker(), make_processor()
    model.language_model.save_pretrained(tmp_path / "llm")
    processor.clap.save_pretrained(tmp_path / "clap")
    model.config.language_model_name_or_path = str(tmp_path / "llm")
    processor.clap_name_or_path = str(tmp_path / "clap")
    model.add_lora().save_pretrained(tmp_path / "light")
    processor.save_pretrained(tmp_path / "light", light=True)
    return tmp_path / "light"


def test_a_light_checkpoint_answers_also_with_its_parts_elsewhere(light, sounds, tmp_path):
    common = ("ask", sounds[0], QUESTION, "--max-new-tokens", 4, "--model", light)
    expected = mats(*common).stdout
    assert expected.strip()
    (tmp_path / "llm").rename(tmp_path / "llm2")
    check_error(mats(*common, code=1), "say so with language_model=... (--language-model)")
    (tmp_path / "clap").rename(tmp_path / "clap2")
    elsewhere = ("--language-model", tmp_path / "llm2", "--clap", tmp_path / "clap2")
    assert mats(*common, *elsewhere).stdout == expected
    for verb in (("caption", sounds[0]), ("classify", sounds[0], "--labels", "dog,rain"), ("chat", sounds[0])):
        assert mats(*verb, "--model", light, "--max-new-tokens", 2, *elsewhere, stdin="What?\n").stdout.strip()


def test_merge_makes_a_whole_checkpoint(light, sounds, tmp_path):
    question = ("ask", sounds[0], QUESTION, "--max-new-tokens", 4)
    expected = mats(*question, "--model", light).stdout
    (tmp_path / "llm").rename(tmp_path / "llm2")
    result = mats("merge", light, tmp_path / "whole", "--language-model", tmp_path / "llm2")
    assert (result.stdout, result.stderr) == ("", f"Wrote {tmp_path / 'whole'}\n")
    for part in ("llm2", "clap", "light"):
        shutil.rmtree(tmp_path / part)
    assert mats(*question, "--model", tmp_path / "whole").stdout == expected
    check_error(mats("merge", tmp_path / "whole", tmp_path / "x", code=1), "is a whole checkpoint already")


def test_merge_leaves_other_content_alone(light, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    for out in (tmp_path / "thesis", tmp_path / "thesis" / "thesis.txt"):
        check_error(mats("merge", light, out, code=1), "is not an empty folder, so it is left alone")
    check_error(mats("merge", tmp_path / "none", tmp_path / "x", code=1), "No such checkpoint")


# -- chat --------------------------------------------------------------------------------------------------------------


def test_chat_keeps_the_conversation(checkpoint, sounds, pipe, monkeypatch):
    encoded = []
    original = MatsProcessor.encode_audio

    def counted(self, audio, *args, **kwargs):
        encoded.append(audio)
        return original(self, audio, *args, **kwargs)

    monkeypatch.setattr(MatsProcessor, "encode_audio", counted)
    common = ("chat", sounds[0], "--model", checkpoint, "--max-new-tokens", 6)
    found = rows(mats(*common, "--json", stdin="What is it?\n\nAnd now\n"))  # an empty line is no question
    assert encoded == [sounds[0]], "encoded once, for all turns"

    conversation = [
        {"role": "user", "content": [{"type": "audio", "path": sounds[0]}, {"type": "text", "text": "What is it?"}]}
    ]
    first = pipe(conversation, max_new_tokens=6)["generated_text"]
    conversation += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now"}]
    second = pipe(conversation, max_new_tokens=6)["generated_text"]
    assert found == [{"audio": sounds[0], "answer": first}, {"audio": sounds[0], "answer": second}]

    streamed = mats(*common, stdin="What is it?\nAnd now").stdout
    assert [line.strip() for line in streamed.splitlines()] == [first, second]


def test_chat_explains_once(checkpoint, sounds):
    common = ("chat", sounds[0], "--model", checkpoint, "--max-new-tokens", 2, "--explain")
    found = rows(mats(*common, "--json", stdin="What is it?\nAnd now?\n"))
    assert len(found) == 2
    assert found[0]["santa"] == found[1]["santa"]
    assert mats(*common, stdin="What is it?\nAnd now?\n").stdout.count(found[0]["santa"][0]["text"]) == 1
    assert mats(*common, stdin="").stdout == ""


def test_a_chat_that_outgrows_the_model_says_so(checkpoint, sounds):
    result = mats("chat", sounds[0], "--model", checkpoint, "--json", stdin="What is it? " * 40, code=1)
    check_error(result, "the language model has 128")


# -- Files that cannot be read, and other mistakes ---------------------------------------------------------------------


def test_one_broken_file(checkpoint, broken):
    for verb in (
        ("ask", broken, QUESTION),
        ("caption", broken),
        ("classify", broken, "--labels", "a,b"),
        ("chat", broken),
    ):
        result = mats(*verb, "--model", checkpoint, code=1)
        check_error(result, "broken.wav is not an audio file")


def test_a_broken_file_among_others(checkpoint, sounds, broken):
    files = [sounds[0], broken, sounds[1], "missing.wav", sounds[2]]
    result = mats("caption", *files, "--model", checkpoint, "--json", "--batch-size", 2, "--max-new-tokens", 2, code=1)
    assert [row["audio"] for row in rows(result)] == sounds
    errors = result.stderr.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"Error: {broken}: ")
    assert errors[1] == "Error: missing.wav: No such audio file: missing.wav"


def test_missing_files_are_told_before_a_model_is_loaded(sounds):
    unreachable = ("--model", "nobody/nothing")
    check_error(mats("caption", "a.wav", "b.wav", *unreachable, code=1), "No such audio file: a.wav, b.wav")
    check_error(mats("chat", "a.wav", *unreachable, code=1), "No such audio file: a.wav")


def test_silence_is_answered_with_one_warning(checkpoint, tmp_path):
    path = tmp_path / "silence.wav"
    soundfile.write(path, tone() * 0, 16000)
    result = mats("ask", path, QUESTION, "--model", checkpoint, "--max-new-tokens", 2)
    assert result.stderr == f"Warning: {path} is completely silent; the answer will not mean much.\n"


def test_no_such_model(sounds, tmp_path):
    check_error(
        mats("ask", sounds[0], QUESTION, "--model", tmp_path / "none", code=1), f"No such checkpoint: {tmp_path}"
    )


def test_a_model_of_another_kind(sounds, tmp_path):
    check_error(mats("ask", sounds[0], QUESTION, "--model", tmp_path, code=1), "no checkpoint: it has no config.json")
    make_speaker().language_model.save_pretrained(tmp_path)
    check_error(mats("ask", sounds[0], QUESTION, "--model", tmp_path, code=1), "of type 'gpt2', expected 'mats'")


def test_the_bundled_model_is_the_default(checkpoint, sounds, tmp_path, monkeypatch):
    assert runtime.bundled_model() == MATS_TINY
    monkeypatch.setattr(runtime, "bundled_model", lambda: tmp_path / "mats-tiny")
    check_error(mats("ask", sounds[0], QUESTION, code=1), "The bundled model is not there")
    (tmp_path / "mats-tiny").symlink_to(checkpoint)
    common = ("ask", sounds[0], QUESTION, "--max-new-tokens", 4)
    assert mats(*common).stdout == mats(*common, "--model", checkpoint).stdout


def test_an_answer_longer_than_the_model(checkpoint, sounds):
    result = mats("ask", sounds[0], QUESTION, "--model", checkpoint, "--max-new-tokens", 5000, code=1)
    check_error(result, "max_new_tokens is 5000")


def test_verbose_and_programming_errors_keep_their_traceback(checkpoint, sounds, broken, monkeypatch):
    with pytest.raises(ValueError, match="not an audio file"):
        mats("--verbose", "ask", broken, QUESTION, "--model", checkpoint)

    def bug(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(MatsProcessor, "encode_audio", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        mats("caption", *sounds, "--model", checkpoint)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(SENTENCES) + "\n", encoding="utf-8")
    return path


def test_memory_build_and_show(checkpoint, sounds, texts, tmp_path):
    out = tmp_path / "new" / "my memory.safetensors"
    built = mats("memory", "build", texts, "--model", checkpoint, "--out", out, "--clusters", 3, "--seed", 7)
    assert built.stderr.endswith("10 of 10 texts in 3 clusters.\n")
    assert list(out.parent.iterdir()) == [out]

    (shown,) = rows(mats("memory", "show", out, "--json"))
    assert shown == {
        "texts": 10,
        "clusters": 3,
        "dimensions": 16,
        "noise_variance": 0.015,
        "seed": 7,
        "clap_fingerprint": make_clap().fingerprint,
    }
    expected = MatsProcessor.from_pretrained(checkpoint)
    expected.santa_memory = SantaMemory.build(
        SENTENCES, expected.encode_text(SENTENCES), expected.clap.fingerprint, num_clusters=3, seed=7
    )
    _, (evidence,) = expected.apply_santa(expected.encode_audio(sounds[0]), return_evidence=True)
    (queried,) = rows(mats("memory", "show", out, "--query", sounds[0], "--model", checkpoint, "--json"))
    assert queried == shown | {"query": sounds[0], "santa": evidence}

    text = mats("memory", "show", out).stdout
    assert "10" in text
    assert "and 5 more" in text
    text = mats("memory", "show", out, "--query", sounds[0], "--model", checkpoint).stdout
    assert evidence[0]["text"] in text


def test_memory_of_a_checkpoint_folder(checkpoint, sounds, texts, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    result = mats("memory", "build", texts, "--model", folder, "--out", folder, code=1)
    check_error(result, "exists already; --force replaces it")
    mats("memory", "build", texts, "--model", folder, "--out", folder, "--force", "--noise-variance", 0, "--size", 4)
    (shown,) = rows(mats("memory", "show", folder, "--query", sounds[0], "--json"))
    assert (shown["texts"], shown["clusters"], shown["noise_variance"]) == (4, 1, 0.0)
    assert len(shown["santa"]) == 4


def test_memory_from_a_column(checkpoint, tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text('file,caption\na.wav,"A dog, barking"\nb.wav,Rain falls\n', encoding="utf-8")
    common = ("memory", "build", path, "--model", checkpoint, "--out", tmp_path)
    check_error(mats(*common, code=1), "--column is missing; the columns are file, caption.")
    check_error(mats(*common, "--column", "text", code=1), "no column 'text'; the columns are file, caption.")
    mats(*common, "--column", "caption")
    assert sorted(SantaMemory.load(tmp_path / "santa_memory.safetensors").texts) == ["A dog, barking", "Rain falls"]

    path.write_text("file,caption\na.wav,Rain falls\nb.wav,\n")
    check_error(mats(*common, "--column", "caption", "--force", code=1), "1 in all; the first is on line 3")
    path.write_text("caption\n")
    check_error(mats(*common, "--column", "caption", "--force", code=1), "no row below its header")


def test_memory_is_drawn_by_seed():
    texts = [str(number) for number in range(100)]
    drawn = memory_verbs.draw(texts, 10, seed=1)
    assert drawn == memory_verbs.draw(texts, 10, seed=1)
    assert drawn != memory_verbs.draw(texts, 10, seed=2)
    assert drawn == sorted(set(drawn), key=int)
    assert memory_verbs.draw(texts, 100, seed=1) == texts


def test_default_clusters_are_the_paper_s_or_as_large_as_the_paper_s():
    sizes = {1: 1, 51: 1, 104: 2, 5171: 99, 5172: 100, 100_000: 100}
    assert {size: memory_verbs.default_clusters(size) for size in sizes} == sizes


def test_memory_of_another_clap_is_refused(checkpoint, sounds, tmp_path):
    make_processor(make_clap(seed=1)).santa_memory.save_pretrained(tmp_path)
    result = mats("memory", "show", tmp_path, "--query", sounds[0], "--model", checkpoint, code=1)
    check_error(result, make_clap(seed=1).fingerprint[:16])
    assert make_clap().fingerprint[:16] in result.stderr


def test_a_memory_of_another_clap_can_be_replaced(checkpoint, texts, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    make_processor(make_clap(seed=1)).santa_memory.save_pretrained(folder)
    mats("memory", "build", texts, "--model", folder, "--out", folder, "--force")
    assert SantaMemory.load(folder / "santa_memory.safetensors").clap_fingerprint == make_clap().fingerprint


def test_memory_mistakes(checkpoint, texts, tmp_path):
    common = ("--model", checkpoint, "--out", tmp_path)
    check_error(mats("memory", "build", tmp_path / "none.txt", *common, code=1), "No such file of texts")
    check_error(mats("memory", "build", texts, *common, "--column", "text", code=1), "--column is for .csv files")
    check_error(
        mats("memory", "build", texts, *common, "--clusters", 11, code=1), "num_clusters is 11, expected 1 to 10"
    )
    check_error(mats("memory", "show", tmp_path, code=1), "No such Santa memory")
    check_error(mats("memory", "show", checkpoint / "model.safetensors", code=1), "not a Santa memory")
    texts.write_text("\n \n")
    check_error(mats("memory", "build", texts, *common, code=1), "holds no text")
    texts.write_text("A dog barks. " * 40)
    check_error(mats("memory", "build", texts, *common, code=1), "longer than the 77 tokens")
    mats("memory", "build", texts, *common, "--truncate")


# -- Checkpoints -------------------------------------------------------------------------------------------------------


def test_export_can_be_asked(checkpoint, sounds, tmp_path):
    out = tmp_path / "repo"
    mats("export", checkpoint, out)
    assert (out / "pipeline_mats.py").is_file()
    common = ("ask", sounds[0], QUESTION, "--max-new-tokens", 4, "--model")
    assert mats(*common, out).stdout == mats(*common, checkpoint).stdout
    check_error(mats("export", checkpoint, out, code=1), "--force")
    mats("export", checkpoint, out, "--force")
    check_error(mats("export", tmp_path / "none", out, code=1), "no config.json")


def test_convert_msclap(tmp_path, monkeypatch):
    check_error(mats("convert-msclap", tmp_path / "none.pth", tmp_path / "clap", "--tokenizer", tmp_path, code=1), "")
    calls = []
    monkeypatch.setattr(modeling_mats.convert_msclap, "convert_msclap", lambda *a, **k: calls.append((a, k)))
    mats("convert-msclap", "weights.pth", tmp_path / "clap")
    mats("convert-msclap", "weights.pth", tmp_path / "clap", "--tokenizer", "my/gpt2")
    assert calls == [
        (("weights.pth", tmp_path / "clap"), {"tokenizer": "gpt2"}),
        (("weights.pth", tmp_path / "clap"), {"tokenizer": "my/gpt2"}),
    ]


# -- The executable ----------------------------------------------------------------------------------------------------


def test_the_executable_writes_answers_to_stdout_and_nothing_else_anywhere(checkpoint, sounds):
    run = run_mats("classify", *sounds, "--labels", "a dog,rain", "--model", checkpoint, "--json", "--explain")
    assert (run.returncode, run.stderr) == (0, "")
    assert [list(json.loads(line)) for line in run.stdout.splitlines()] == [
        ["audio", "answer", "label", "scores", "santa"]
    ] * 3


def test_the_executable_chats_and_fails_without_a_traceback(checkpoint, sounds):
    run = run_mats("chat", sounds[0], "--model", checkpoint, "--max-new-tokens", 3, stdin="What is it?\nAnd now?\n")
    assert (run.returncode, run.stderr) == (0, "")
    assert len(run.stdout.splitlines()) == 2
    run = run_mats("ask", "missing.wav", QUESTION, "--model", checkpoint)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "Error: No such audio file: missing.wav\n")


def test_help_is_fast_and_imports_nothing_heavy():
    script = "import sys, mats_cli.main; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "[]\n"
    start = time.perf_counter()
    run = run_mats("--help")
    assert time.perf_counter() - start < 5, "generous, for a busy machine; it takes a tenth of a second"
    for verb in ("ask", "caption", "classify", "chat", "convert-msclap", "export", "memory"):
        assert f"\n  {verb} " in run.stdout

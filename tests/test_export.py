"""Exports: what is written, what is refused, and whether a Python without our packages can use the result."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import MATS_TINY, SOUNDS, make_processor, make_speaker, tone
from transformers.dynamic_module_utils import get_imports, get_relative_imports
from use_remote_code import LABELS, QUESTION

from hub_cards import export
from hub_cards.export import export_checkpoint
from hub_cards.remote_code import ENTRY_MODULES, RemoteCodeError, find_packages, flatten_modules, requirements_of
from modeling_mats import MatsForConditionalGeneration
from processing_mats import MatsProcessor
from processing_mats.pipeline_mats import AudioTextToTextPipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Model, processor, card and licence in one folder, and what a Trainer leaves beside them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in (make_speaker(), make_processor()):
        part.save_pretrained(folder)
        # As most checkpoints are, loaded and saved again: then every configuration also says its dtype.
        part.from_pretrained(folder).save_pretrained(folder)
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\n---\n# A card, façade included\n", encoding="utf-8"
    )
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"a pickle")
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    return export_checkpoint(checkpoint, tmp_path_factory.mktemp("exports") / "mats-small")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- What is written ---------------------------------------------------------------------------------------------------


def test_export_holds_data_code_and_requirements(checkpoint, exported):
    before, after = contents(checkpoint), contents(exported)
    unchanged = {name for name in before if not name.endswith(("config.json", ".bin", ".pt"))} | {"clap/config.json"}
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    assert set(after) - unchanged == {
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer_config.json",
        "clap/preprocessor_config.json",
        "clap/tokenizer_config.json",
        "requirements.txt",
        "audio_mats.py",
        "chat_mats.py",
        "checkpoint_mats.py",
        "clap_mats.py",
        "configuration_mats.py",
        "configuration_msclap.py",
        "feature_extraction_msclap.py",
        "language_model_mats.py",
        "lora_mats.py",
        "modeling_mats.py",
        "modeling_msclap.py",
        "pipeline_mats.py",
        "processing_mats.py",
        "santa_mats.py",
    }


def test_configs_gain_the_hub_entries_and_lose_nothing(checkpoint, exported):
    config = json.loads((exported / "config.json").read_text())
    assert config.pop("auto_map")["AutoModelForMultimodalLM"] == "modeling_mats.MatsForConditionalGeneration"
    assert config.pop("custom_pipelines")["audio-text-to-text"]["impl"] == "pipeline_mats.AudioTextToTextPipeline"
    assert config == json.loads((checkpoint / "config.json").read_text())
    processor_config = json.loads((exported / "processor_config.json").read_text())
    assert processor_config.pop("auto_map") == {"AutoProcessor": "processing_mats.MatsProcessor"}
    assert processor_config == json.loads((checkpoint / "processor_config.json").read_text())

    for name in ("generation_config.json", "clap/preprocessor_config.json"):
        assert (exported / name).read_bytes() == (checkpoint / name).read_bytes()
    for name in ("tokenizer_config.json", "clap/tokenizer_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (checkpoint, exported))
        assert set(before) - set(after) == {"is_local", "local_files_only"}, "what says how it was loaded"
        assert after.items() <= before.items()


def test_requirements_are_what_transformers_will_demand(exported):
    lines = (exported / "requirements.txt").read_text().split()
    demanded = set().union(*(get_imports(path) for path in exported.glob("*.py"))) - set(sys.stdlib_module_names)
    assert {line.split(">")[0].split("<")[0] for line in lines} == demanded
    assert all(">=" in line for line in lines)
    assert "sklearn" not in demanded, "only building a memory needs it; whoever loads a model should not"


def test_every_import_that_transformers_sees_is_a_file_of_the_export(exported):
    for path in exported.glob("*.py"):
        assert all((exported / f"{name}.py").is_file() for name in get_relative_imports(path)), path.name


def test_no_path_of_this_machine_is_published(checkpoint, exported):
    for name, content in contents(exported).items():
        assert str(checkpoint).encode() not in content, name


def test_exporting_an_export_gives_the_same_bytes(exported, tmp_path):
    assert contents(export_checkpoint(exported, tmp_path / "again")) == contents(exported)


def test_links_of_the_hub_cache_become_files(checkpoint, exported, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in checkpoint.iterdir():
        (snapshot / path.name).symlink_to(path)
    output = export_checkpoint(snapshot, tmp_path / "out")
    assert contents(output) == contents(exported)
    assert not any(path.is_symlink() for path in output.rglob("*"))


# -- Use without our packages ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["folder", "hub"])
def stranger(request, exported, tmp_path_factory) -> tuple[dict, Path, Path]:
    """What a Python without our packages makes of the export: its report, the sound, and the folder that it saved.

    Of a folder transformers checks the entry files, of a Hub repo every file: both must work.
    """
    folder = tmp_path_factory.mktemp("stranger")
    sound, saved = folder / "tone.wav", folder / "saved"
    soundfile.write(sound, tone(1.5), 16000)
    model = str(exported)
    if request.param == "hub":
        model = "you/mats-small.1"
        put_into_hub_cache(exported, model, folder / "hf_home")
    return run_as_stranger(model, sound, saved, folder), sound, saved


def run_as_stranger(model: str, sound: Path, saved: Path, folder: Path) -> dict:
    """The report of `use_remote_code.py`, run by a Python that cannot import our packages."""
    # -S skips the .pth file by which an editable installation adds itself; PYTHONPATH brings back everything else.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf_home"),
        "HF_MODULES_CACHE": str(folder / "hf_modules"),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    script = Path(__file__).with_name("use_remote_code.py")
    run = subprocess.run(
        [sys.executable, "-S", "-P", script, model, sound, saved],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def put_into_hub_cache(export: Path, repo: str, hf_home: Path) -> None:
    """As if the repo had been downloaded."""
    cache, commit = hf_home / "hub" / f"models--{repo.replace('/', '--')}", "a" * 40
    shutil.copytree(export, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)


def test_the_bundled_model_answers_a_stranger_about_a_real_sound(tmp_path):
    report = run_as_stranger(str(MATS_TINY), SOUNDS / "rooster.ogg", tmp_path / "saved", tmp_path)
    assert report["modules"] == ["transformers_modules"]
    assert "rooster" in report["answer"]["generated_text"].lower()
    assert report["answer"]["label"] == "a rooster"
    assert report["answer"]["santa"][0]["text"]


def test_a_stranger_gets_the_same_answers(stranger, checkpoint):
    report, sound, _ = stranger
    assert report["modules"] == ["transformers_modules"]
    assert report["pipeline"] == "AudioTextToTextPipeline"
    assert report["classes"] == ["MatsForConditionalGeneration"] * 2

    processor = MatsProcessor.from_pretrained(checkpoint)
    model = MatsForConditionalGeneration.from_pretrained(checkpoint)
    inputs = processor(text=QUESTION, audio=str(sound))
    assert report["audio_embeds"] == pytest.approx(inputs["audio_embeds"].numpy(), abs=1e-6)
    assert report["tokens"] == model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()

    pipe = AudioTextToTextPipeline(model=model, processor=processor)
    expected = pipe(str(sound), text=QUESTION, candidate_labels=LABELS, return_evidence=True, max_new_tokens=8)
    answer = report["answer"]
    assert answer["generated_text"] == expected["generated_text"]
    assert answer["label"] == expected["label"]
    assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-6)
    assert [row["text"] for row in answer["santa"]] == [row["text"] for row in expected["santa"]]


def test_saved_by_a_stranger_it_exports_to_the_same_bytes(stranger, exported, tmp_path):
    _, _, saved = stranger
    for name in ("README.md", "LICENSE"):  # no part of what transformers saves
        shutil.copy(exported / name, saved)
    assert contents(export_checkpoint(saved, tmp_path / "again")) == contents(exported)


# -- Light checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def light_checkpoint(tmp_path_factory) -> Path:
    """Light in model and processor, which leave their language model and CLAP to Hub repos."""
    folder = tmp_path_factory.mktemp("light")
    model, processor = make_speaker(), make_processor()
    model.language_model.save_pretrained(folder / "llm")
    processor.clap.save_pretrained(folder / "clap")
    model.config.language_model_name_or_path, processor.clap_name_or_path = "some/llm", "some/clap"
    model.add_lora()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint", light=True)
    return folder / "checkpoint"


def test_a_light_export_demands_peft_and_has_neither_language_model_nor_clap(light_checkpoint, exported, tmp_path):
    output = export_checkpoint(light_checkpoint, tmp_path / "out")
    assert not (output / "clap").exists()
    assert (output / "model.safetensors").read_bytes() == (light_checkpoint / "model.safetensors").read_bytes()
    lines = (output / "requirements.txt").read_text().split()
    assert set(lines) - set((exported / "requirements.txt").read_text().split()) == {
        line for line in lines if line.startswith("peft>=")
    }
    assert any(line.startswith("peft>=") for line in lines)


@pytest.mark.parametrize("how", ["folder", "hub"])
def test_a_stranger_uses_a_light_export_with_what_it_names(light_checkpoint, tmp_path, how):
    output = export_checkpoint(light_checkpoint, tmp_path / "out")
    for name in ("llm", "clap"):
        put_into_hub_cache(light_checkpoint.parent / name, f"some/{name}", tmp_path / "hf_home")
    model_name = str(output)
    if how == "hub":
        model_name = "you/mats-light"
        put_into_hub_cache(output, model_name, tmp_path / "hf_home")
    sound = tmp_path / "tone.wav"
    soundfile.write(sound, tone(1.5), 16000)
    report = run_as_stranger(model_name, sound, tmp_path / "saved", tmp_path)

    model = MatsForConditionalGeneration.from_pretrained(
        light_checkpoint, language_model=light_checkpoint.parent / "llm"
    )
    processor = MatsProcessor.from_pretrained(light_checkpoint, clap=light_checkpoint.parent / "clap")
    inputs = processor(text=QUESTION, audio=str(sound))
    assert report["modules"] == ["transformers_modules"]
    assert report["tokens"] == model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
    plain = make_speaker().generate(**inputs, max_new_tokens=8, do_sample=False).tolist()
    assert report["tokens"] != plain, "LoRA did nothing"
    assert contents(export_checkpoint(tmp_path / "saved", tmp_path / "again")) == contents(output)


@pytest.mark.parametrize(
    ("file", "field", "what"),
    [
        ("config.json", "language_model_name_or_path", "language model"),
        ("processor_config.json", "clap_name_or_path", "CLAP"),
    ],
)
@pytest.mark.parametrize("name", ["../llm", "/models/llm"])
def test_what_only_this_machine_has_is_not_published(light_checkpoint, tmp_path, file, field, what, name):
    copy = shutil.copytree(light_checkpoint, tmp_path / "copy")
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | {field: name}))
    with pytest.raises(
        ValueError, match=rf"names {name} as its {what}, .* name a Hub repo in its {file}, or .*mats merge"
    ):
        export_checkpoint(copy, tmp_path / "out")


def test_a_light_processor_without_a_name_of_its_clap_cannot_hear(light_checkpoint, tmp_path):
    copy = shutil.copytree(light_checkpoint, tmp_path / "copy")
    config = json.loads((copy / "processor_config.json").read_text())
    del config["clap_name_or_path"]
    (copy / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"has no clap/config\.json: .* cannot hear"):
        export_checkpoint(copy, tmp_path / "out")


def test_a_whole_export_does_not_say_where_its_language_model_lay(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for name, expected in ((str(tmp_path), None), ("some/llm", "some/llm")):
        (copy / "config.json").write_text(json.dumps(config | {"language_model_name_or_path": name}))
        output = export_checkpoint(copy, tmp_path / "out", force=True)
        assert json.loads((output / "config.json").read_text())["language_model_name_or_path"] == expected


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A checkpoint to break."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_a_source_that_is_no_mats_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint: it has no config\.json"):
        export_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="model type 'gpt2', expected 'mats'"):
        export_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        export_checkpoint(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["processor_config.json", "clap/config.json", "model.safetensors"])
def test_an_incomplete_checkpoint(copy, tmp_path, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=Path(name).suffix):
        export_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pickles, pytorch_model.bin"),
        ("clap/weights.pth", "pickles, clap/weights.pth"),
        ("hack.py", "not MATS's, hack.py"),
        ("clap/modeling_mats.py", "not MATS's, clap/modeling_mats.py"),
    ],
)
def test_pickles_and_foreign_code_are_not_published(copy, tmp_path, name, message):
    (copy / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(copy, tmp_path / "out")


def test_a_folder_with_other_content_is_never_touched(checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(FileExistsError, match="no MATS checkpoint"):
            export_checkpoint(checkpoint, tmp_path, force=force)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}
    with pytest.raises(FileExistsError, match="is a file"):
        export_checkpoint(checkpoint, tmp_path / "thesis.txt", force=True)


def test_a_checkpoint_is_replaced_only_by_force(checkpoint, exported, copy, tmp_path):
    before = contents(copy)
    with pytest.raises(FileExistsError, match="--force"):
        export_checkpoint(checkpoint, copy)
    assert contents(copy) == before
    (copy / "stale.json").write_text("{}")
    export_checkpoint(checkpoint, copy, force=True)
    assert contents(copy) == contents(exported)
    export_checkpoint(copy, copy, force=True)
    assert contents(copy) == contents(exported)
    assert list(tmp_path.iterdir()) == [copy], "nothing is left beside it"


def test_a_repository_is_not_replaced(checkpoint, copy):
    (copy / ".git").mkdir()
    with pytest.raises(FileExistsError, match="git repository"):
        export_checkpoint(checkpoint, copy, force=True)


def test_folders_within_each_other(copy):
    with pytest.raises(ValueError, match="must not lie in each other"):
        export_checkpoint(copy, copy / "hub")
    with pytest.raises(ValueError, match="must not lie in each other"):
        export_checkpoint(copy, copy.parent, force=True)


def test_a_failed_export_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(export.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- Flattening --------------------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path) -> dict[str, Path]:
    """Two packages, `low` and `high`; `high/entry.py` is for the tests to write."""
    folders = {name: tmp_path / name for name in ("low", "high")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "__init__.py").touch()
    (folders["low"] / "base.py").write_text('"""Nothing."""\n')
    return folders


def flatten(packages: dict[str, Path], source: str) -> dict[str, str]:
    (packages["high"] / "entry.py").write_text(source, encoding="utf-8")
    return flatten_modules(["high.entry"], packages)


def test_imports_are_followed_and_rewritten_in_place(packages):
    (packages["low"] / "base.py").write_text("import json\n\nfrom low.deep import x\n")
    (packages["low"] / "deep.py").write_text("x = 1\n")
    (packages["low"] / "unused.py").write_text("")
    source = (
        '"""Example: from low.base import x"""\n'
        "import os\n"
        "from low.base import (\n    json,\n    x,  # low.base\n)\n"
        "def f(é): é = 1; from low.deep import x as y; return os\n"
    )
    flat = flatten(packages, source)
    assert list(flat) == ["base.py", "deep.py", "entry.py"]
    assert flat["base.py"] == "import json\n\nfrom .deep import x\n"
    expected = source.replace("\nfrom low.base", "\nfrom .base").replace("; from low.deep", "; from .deep")
    assert flat["entry.py"] == expected


def test_a_package_and_its_module_may_share_a_name(packages):
    (packages["low"] / "low.py").write_text("x = 1\n")
    assert flatten(packages, "from low.low import x\n")["entry.py"] == "from .low import x\n"


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("\nimport low", 2, "`import low` cannot be flattened"),
        ("import os, low.base", 1, "`import low.base` cannot be flattened"),
        ("from low import base", 1, "`from low import` cannot be flattened"),
        ("from low.base.deeper import x", 1, "cannot be flattened"),
        ("from low.base import *", 1, "hides its names"),
        ("from .other import x", 1, "is relative"),
        ("from . import x", 1, "is relative"),
        ("def f():\n    from ..low.base import x", 2, "is relative"),
        ("from low.nothing import x", 1, "is no module file"),
        ("from low.sub import x", 1, "is no module file"),
        ("import os\nfrom training.data import x", 2, "no part of a published model"),
        ("import hub_cards", 1, "cannot be flattened"),
        ("from low \\\n    .base import x", 1, "several lines"),
        ('"""Doc.\n\n    from .base import x\n"""', 3, "would take 'from .base import' for an import"),
        ("x = '''\nimport .base\n'''", 2, "would take 'import .base' for an import"),
    ],
)
def test_what_cannot_be_flattened_names_file_and_line(packages, source, line, message):
    (packages["low"] / "sub").mkdir()
    with pytest.raises(RemoteCodeError) as error:
        flatten(packages, source + "\n")
    assert str(error.value).startswith(f"{packages['high'] / 'entry.py'}:{line}: ")
    assert message in str(error.value)


def test_two_modules_of_one_name(packages):
    (packages["high"] / "base.py").write_text("")
    with pytest.raises(RemoteCodeError, match=r"entry\.py:2: .*base\.py and .*base\.py cannot both be base\.py"):
        flatten(packages, "from low.base import x\nfrom high.base import y\n")


def test_an_undeclared_dependency(packages):
    assert requirements_of({"a.py": "import torch, json\ntry:\n    import flash_attn\nexcept ImportError:\n    pass\n"})
    with pytest.raises(ValueError, match="imports flash_attn, which"):
        requirements_of({"a.py": "def f():\n    import flash_attn.layers\n"})


def test_the_packages_can_be_flattened_without_importing_them():
    assert len(flatten_modules(ENTRY_MODULES, find_packages())) >= 11

"""`mats train`: from caption files to a checkpoint that others load, and on again after a stop."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import SENTENCES, make_clap, tone
from run_parts import ADAPTED, MIXTURE, NEW, arguments, write_parts, write_recipe
from safetensors.torch import load_file

from modeling_mats import MatsForConditionalGeneration
from processing_mats import MatsProcessor
from processing_mats.clap_mats import ClapEncoder
from training import train_mats
from training.run_folder import CHECKPOINTS, check_inputs, is_whole, last_checkpoint


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def adapted(parts: Path, **fields) -> dict:
    return {"language_model": str(parts / "language-model"), **ADAPTED, **fields}


@pytest.fixture(scope="module")
def new_run(parts) -> Path:
    """A finished run with a new language model; its checkpoints are all kept."""
    out = parts / "new"
    train_mats.main(arguments(parts, write_recipe(parts, "new", **NEW), out))
    return out


@pytest.fixture(scope="module")
def light_run(parts) -> Path:
    """A finished run with LoRA in a pretrained language model."""
    out = parts / "light"
    train_mats.main(arguments(parts, write_recipe(parts, "light", **adapted(parts)), out))
    return out


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights_of(first), weights_of(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def answers(out: Path, **kwargs) -> list[int]:
    model = MatsForConditionalGeneration.from_pretrained(out, **kwargs)
    processor = MatsProcessor.from_pretrained(out)
    inputs = processor(text="What is it?", audio=(tone(), 16000))
    return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_run_ends_in_a_whole_checkpoint_with_its_records(new_run):
    assert len(answers(new_run)) == 4
    processor = MatsProcessor.from_pretrained(new_run)
    assert len(processor.santa_memory) == 20
    assert processor.max_positions == 128
    record = json.loads((new_run / "training_record.json").read_text())
    assert record["clap_fingerprint"] == processor.clap.fingerprint == processor.santa_memory.clap_fingerprint
    assert record["rows"]["seen"] == 24
    assert record["rows"]["train"] + record["rows"]["held_out"] == 50
    assert record["evaluation"]["eval_text_loss"] > 0
    assert [entry["step"] for entry in record["log"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert record["recipe"]["mixture"] == MIXTURE
    assert yaml.safe_load((new_run / "recipe.yaml").read_text()) == record["recipe"]
    assert "audiocaps" in (new_run / "data_card.md").read_text()
    # It is published with the checkpoint.
    assert str(new_run.parent) not in json.dumps(record)


def test_a_light_checkpoint_holds_no_weight_of_the_language_model(parts, light_run):
    names = set(weights_of(light_run))
    assert all(name.startswith("mapper.") or ".lora_" in name for name in names)
    assert any(".lora_" in name for name in names)
    config = json.loads((light_run / "config.json").read_text())
    assert config["light"] and (light_run / config["language_model_name_or_path"]).samefile(parts / "language-model")
    assert not (light_run / "clap").exists()
    assert len(answers(light_run)) == 4


def test_lora_can_be_merged_into_a_whole_checkpoint_by_the_recipe(parts, light_run, tmp_path):
    recipe = write_recipe(parts, "merged", **adapted(parts, checkpoint="whole"))
    train_mats.main(arguments(parts, recipe, tmp_path / "out"))
    assert not any("lora" in name for name in weights_of(tmp_path / "out"))
    assert (tmp_path / "out" / "clap" / "model.safetensors").is_file()
    assert answers(tmp_path / "out") == answers(light_run)


def test_what_is_trained_is_mapper_and_lora_alone(light_run):
    parameters = json.loads((light_run / "training_record.json").read_text())["parameters"]
    assert parameters["trained"] == parameters["mapper"] + parameters["lora"]
    assert parameters["lora"] > 0


def test_the_mapper_can_be_trained_alone(parts, tmp_path):
    recipe = write_recipe(parts, "mapper", **adapted(parts, lora_r=0, checkpoint_dtype="bfloat16"))
    train_mats.main(arguments(parts, recipe, tmp_path / "out", "--max_steps", "1"))
    weights = weights_of(tmp_path / "out")
    assert all(name.startswith("mapper.") for name in weights)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert len(answers(tmp_path / "out")) == 4


def test_a_second_start_encodes_nothing(parts, new_run, tmp_path, monkeypatch):
    def no_more(*args, **kwargs):
        raise AssertionError("a cached text was encoded again")

    monkeypatch.setattr(ClapEncoder, "encode_text", no_more)
    cache = ["--cache_dir", str(new_run / "cache"), "--max_steps", "1"]
    train_mats.main(arguments(parts, parts / "new.yaml", tmp_path / "out", *cache))
    (tmp_path / "other").mkdir()
    make_clap(seed=1).save_pretrained(tmp_path / "other" / "clap")
    with pytest.raises(AssertionError, match="encoded again"):
        train_mats.main(
            arguments(parts, parts / "new.yaml", tmp_path / "out2", *cache, "--clap", str(tmp_path / "other" / "clap"))
        )


def test_the_same_command_gives_the_same_bytes(parts, light_run, tmp_path):
    train_mats.main(arguments(parts, parts / "light.yaml", tmp_path / "out"))
    for name in ("model.safetensors", "santa_memory.safetensors", "tokenizer.json", "data_card.json"):
        assert (tmp_path / "out" / name).read_bytes() == (light_run / name).read_bytes(), name


@pytest.mark.parametrize("kind", ["new", "light"])
def test_a_resumed_run_ends_in_the_same_weights(parts, new_run, light_run, kind, tmp_path):
    whole = {"new": new_run, "light": light_run}[kind]
    out = tmp_path / "out"
    (out / CHECKPOINTS).mkdir(parents=True)
    shutil.copy(whole / "recipe.yaml", out)
    for step in (2, 4):
        name = f"{CHECKPOINTS}/checkpoint-{step}"
        shutil.copytree(whole / name, out / name)
    # As a stop in the middle of saving leaves it.
    (out / CHECKPOINTS / "checkpoint-4" / "optimizer.pt").write_bytes(b"PK\x03\x04 cut off")
    recipe = parts / f"{kind}.yaml"
    train_mats.main(arguments(parts, recipe, out, "--resume", "--cache_dir", str(whole / "cache")))
    assert_same_weights(whole, out)
    log = json.loads((out / "training_record.json").read_text())["log"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_can_be_resumed_to_what_it_is(parts, light_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(light_run, out)
    (out / "model.safetensors").unlink()
    train_mats.main(arguments(parts, parts / "light.yaml", out, "--resume"))
    assert_same_weights(light_run, out)
    before, after = (json.loads((folder / "training_record.json").read_text()) for folder in (light_run, out))
    assert after["train"] == before["train"] and after["seconds"] >= before["seconds"]


def test_a_start_that_failed_does_not_stand_in_its_own_way(parts, tmp_path):
    recipe = write_recipe(parts, "failing", **NEW)
    with pytest.raises(ValueError, match="memory_shares names"):
        train_mats.main(arguments(parts, recipe, tmp_path / "out", "--memory_shares", '{"esc50": 0.5}'))
    train_mats.main(arguments(parts, recipe, tmp_path / "out", "--max_steps", "1"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_run_is_neither_overwritten_nor_resumed_as_another(parts, new_run, tmp_path):
    recipe = parts / "new.yaml"
    with pytest.raises(FileExistsError, match="go on with --resume"):
        train_mats.main(arguments(parts, recipe, new_run))
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01 and is 0\.5"):
        train_mats.main(arguments(parts, recipe, new_run, "--resume", "--learning_rate", "0.5"))
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(FileExistsError, match="holds no run"):
        train_mats.main(arguments(parts, recipe, tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "..."


def test_a_run_is_not_resumed_with_another_clap_or_other_texts(parts, new_run, tmp_path):
    recipe = parts / "new.yaml"
    make_clap(seed=1).save_pretrained(tmp_path / "clap")
    with pytest.raises(ValueError, match="begun with something else: clap_fingerprint was"):
        train_mats.main(arguments(parts, recipe, new_run, "--resume", "--clap", str(tmp_path / "clap")))
    shutil.copytree(parts / "texts", tmp_path / "texts")
    with (tmp_path / "texts" / "audiocaps.csv").open("a") as file:
        file.write("99,video99,30,A cow moos.\n")
    with pytest.raises(ValueError, match="begun with something else: mixture was"):
        train_mats.main(arguments(parts, recipe, new_run, "--resume", "--data_dir", str(tmp_path / "texts")))


def test_an_estimated_noise_stays_what_it_was_when_a_run_goes_on(tmp_path):
    first = check_inputs(tmp_path, {"clap_fingerprint": "a", "noise_variance": 0.02})
    assert first["noise_variance"] == 0.02
    assert check_inputs(tmp_path, {"clap_fingerprint": "a", "noise_variance": None}) == first
    with pytest.raises(ValueError, match=r"noise_variance was 0\.02 and is 0\.03"):
        check_inputs(tmp_path, {"clap_fingerprint": "a", "noise_variance": 0.03})


@pytest.mark.parametrize(
    "damage", ["no state", "cut state", "cut weights", "cut optimizer", "other step", "no state of a rank"]
)
def test_a_half_written_checkpoint_is_not_taken_for_a_whole_one(new_run, damage, tmp_path):
    source = new_run / CHECKPOINTS / "checkpoint-2"
    checkpoint = tmp_path / CHECKPOINTS / ("checkpoint-3" if damage == "other step" else "checkpoint-2")
    shutil.copytree(source, checkpoint)
    assert is_whole(checkpoint) == (damage != "other step")
    assert not is_whole(checkpoint, ranks=2)
    file = {
        "no state": "trainer_state.json",
        "no state of a rank": "rng_state.pth",
        "cut state": "trainer_state.json",
        "cut weights": "model.safetensors",
    }
    path = checkpoint / file.get(damage, "optimizer.pt")
    if damage.startswith("no state"):
        path.unlink()
    elif damage != "other step":
        path.write_bytes(path.read_bytes()[:-40])
    assert not is_whole(checkpoint)
    assert last_checkpoint(tmp_path) is None
    assert not checkpoint.exists()


def test_audio_supervision_trains_on_clips(parts, tmp_path):
    """MATS-Audio: the clips that the mixture names take the place of the descriptions, without noise."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(8):
        soundfile.write(clips / f"clip {number}.wav", tone(0.3, 200 + 100 * number), 16000)
    mixture = {"sources": [MIXTURE["sources"][1]]}
    fields = {"supervision": "audio", "memory_size": 0, "mixture": mixture, "group_by_length": False}
    recipe = write_recipe(tmp_path, "audio", **adapted(parts, **fields))
    out = tmp_path / "out"
    train_mats.main(arguments(parts, recipe, out, "--audio_dir", str(clips)))
    assert json.loads((out / "config.json").read_text())["noise_variance"] == 0
    assert len(answers(out)) == 4
    assert MatsProcessor.from_pretrained(out).santa_memory is None
    (clips / "clip 3.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 8 clips are not there, such as .*clip 3\.wav"):
        train_mats.main(arguments(parts, recipe, tmp_path / "again", "--audio_dir", str(clips)))


def test_rows_without_a_clip_cannot_be_trained_on_as_sound(parts, tmp_path):
    (tmp_path / "own.csv").write_text("caption\nA dog barks.\n")
    mixture = {"sources": [{"reader": "csv", "path": str(tmp_path / "own.csv"), "columns": {"caption": "caption"}}]}
    recipe = write_recipe(tmp_path, "audio", **adapted(parts, supervision="audio", memory_size=0, mixture=mixture))
    with pytest.raises(ValueError, match="rows name none"):
        train_mats.main(arguments(parts, recipe, tmp_path / "out", "--audio_dir", str(tmp_path), "--held_out", "0"))


def test_real_sounds_can_be_evaluated_on_in_between(parts, tmp_path):
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    rows = ["file_name,caption,label"]
    for number, text in enumerate(SENTENCES[:3]):
        soundfile.write(sounds / f"{number}.wav", tone(0.3, 200 + 100 * number), 16000)
        rows.append(f"{number}.wav,{text},thing {number}")
    (sounds / "metadata.csv").write_text("\n".join(rows))
    more = ["--eval_audio", str(sounds), "--eval_strategy", "steps", "--eval_steps", "3"]
    train_mats.main(arguments(parts, parts / "light.yaml", tmp_path / "out", *more))
    record = json.loads((tmp_path / "out" / "training_record.json").read_text())
    evaluated = {entry["step"] for entry in record["log"] if "eval_audio_loss" in entry}
    assert evaluated == {3, 6}
    assert np.isfinite(record["evaluation"]["eval_audio_loss"])
    assert np.isfinite(record["evaluation"]["eval_text_loss"])


def test_noise_can_be_estimated_from_pairs(parts, tmp_path):
    rows = ["file_name,caption"]
    for number in range(40):
        soundfile.write(tmp_path / f"{number}.wav", tone(0.2, 100 + 20 * number), 16000)
        rows.append(f"{number}.wav,{SENTENCES[number % 10]}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    more = ["--noise_variance", "auto", "--noise_pairs", str(tmp_path), "--max_steps", "1"]
    train_mats.main(arguments(parts, parts / "light.yaml", tmp_path / "out", *more))
    variance = json.loads((tmp_path / "out" / "config.json").read_text())["noise_variance"]
    assert variance > 0 and variance != 0.015
    assert json.loads((tmp_path / "out" / "training_record.json").read_text())["noise_variance"] == variance


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--data_dir", "nowhere"], "nowhere"),
        (["--clap", "nowhere/clap"], "nowhere/clap"),
        (["--clap", "./nowhere"], "No such folder of a CLAP: ./nowhere"),
        (["--held_out", "50"], "the mixture has 50 rows"),
        (["--data_order", "sequential", "--max_steps", "60"], "45 rows are no 60 steps of 4"),
        (["--global_batch_size", "6"], "no multiple"),
        (["--max_step", "5"], "did you mean max_steps"),
        (["--eval_strategy", "steps", "--held_out", "0"], "nothing to evaluate on"),
        (["--memory_shares", '{"esc50": 0.5}'], "memory_shares names esc50; the rows"),
    ],
)
def test_what_is_wrong_is_told(parts, more, says, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, OSError), match=says):
        train_mats.main(arguments(parts, write_recipe(tmp_path, "wrong", **NEW), tmp_path / "out", *more))


def test_rows_beyond_the_language_models_positions_are_told_or_dropped(parts, tmp_path):
    (tmp_path / "own.csv").write_text("caption\n" + "\n".join([*SENTENCES, "Bang! " * 60, "é" * 70]) + "\n")
    mixture = {"sources": [{"reader": "csv", "path": str(tmp_path / "own.csv"), "columns": {"caption": "caption"}}]}
    recipe = write_recipe(tmp_path, "long", **adapted(parts, mixture=mixture, held_out=0, max_steps=3, memory_size=5))
    with pytest.raises(ValueError, match=r"2 rows take more than the 128 positions .* 'Bang! .*--unusable_rows drop"):
        train_mats.main(arguments(parts, recipe, tmp_path / "out"))
    train_mats.main(arguments(parts, recipe, tmp_path / "kept", "--unusable_rows", "drop"))
    record = json.loads((tmp_path / "kept" / "training_record.json").read_text())
    assert record["rows"] == {"train": 10, "held_out": 0, "left_out": {"special tokens": 0, "too long": 2}, "seen": 12}


def test_special_tokens_in_texts_are_told_or_dropped(parts, tmp_path):
    rows = [f"{text},What is it?,{text}" for text in SENTENCES]
    rows += ["A horn.,Is it <|audio|>?,Yes.", "A bell.,What is it?,A bell.<|im_end|> Or not."]
    (tmp_path / "own.csv").write_text("description,instruction,answer\n" + "\n".join(rows) + "\n")
    mixture = {"sources": [{"reader": "csv", "path": str(tmp_path / "own.csv")}]}
    recipe = write_recipe(tmp_path, "special", **adapted(parts, mixture=mixture, held_out=0, memory_size=5))
    with pytest.raises(ValueError, match=r"2 rows hold special tokens .* asks 'Is it <\|audio\|>\?'"):
        train_mats.main(arguments(parts, recipe, tmp_path / "out"))
    train_mats.main(arguments(parts, recipe, tmp_path / "kept", "--unusable_rows", "drop"))
    record = json.loads((tmp_path / "kept" / "training_record.json").read_text())
    assert record["rows"]["left_out"] == {"special tokens": 2, "too long": 0}
    assert record["rows"]["train"] == 10


def start(arguments: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "training.train_mats", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(parts, tmp_path):
    """SIGKILL between the first second and the last, over and over, until ten have hit; then to the end."""
    recipe = write_recipe(tmp_path, "killed", **adapted(parts, max_steps=400, save_steps=4, save_total_limit=2))
    began = time.monotonic()
    assert start(arguments(parts, recipe, tmp_path / "unbroken")).wait() == 0
    seconds = time.monotonic() - began
    chance = random.Random(0)
    out, kills, steps = tmp_path / "killed", 0, []
    while kills < 10:
        process = start(arguments(parts, recipe, out, "--resume"))
        try:
            process.wait(timeout=chance.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            states = out.glob(f"{CHECKPOINTS}/checkpoint-*/trainer_state.json")
            steps.append(max((int(path.parent.name.rpartition("-")[2]) for path in states), default=0))
        else:  # it came to its end between two kills: begin anew
            assert process.returncode == 0
            assert_same_weights(tmp_path / "unbroken", out)
            shutil.rmtree(out)
    assert start(arguments(parts, recipe, out, "--resume")).wait() == 0
    print("killed after the checkpoints of steps", steps)
    assert_same_weights(tmp_path / "unbroken", out)
    memory = "santa_memory.safetensors"
    assert (out / memory).read_bytes() == (tmp_path / "unbroken" / memory).read_bytes()

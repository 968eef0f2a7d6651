"""Training the small CLAP: the loss, the frozen text space, and runs of a few steps on generated tones and music."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from test_clap_data import INSTRUMENTS, PHRASES, TEXTS, write_tones
from test_music import write_soundfont
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from modeling_mats.modeling_msclap import MsClapModel, MsClapProjection
from processing_mats.clap_mats import ClapEncoder
from processing_mats.feature_extraction_msclap import MsClapFeatureExtractor
from training.evaluate_clap import confusions
from training.evaluate_clap import main as evaluate_main
from training.train_clap import clap_loss, main, make_music, overlap, start_as_identity, train

RECIPE = Path("training/recipes/mats_tiny_clap.yaml")
WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a low deep high shrill tone one the sound of this is recording can be heard and ."
)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("sounds"))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A sentence encoder of a few thousand weights."""
    folder = tmp_path_factory.mktemp("text_model")
    (folder / "vocab.txt").write_text("\n".join(WORDS.split()), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS.split()),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,  # as different as trained states, so that texts differ
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, text_model):
    """The shipped recipe with towers and front end made small, and without music."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "texts.yaml").write_text(yaml.safe_dump({"descriptions": TEXTS, "synonyms": [["low", "deep"]]}))
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe.update(
        descriptions="texts.yaml",
        validation_group="tones-fold4",
        validation_packages=["far-tones"],
        text_model=str(text_model),
    )
    del recipe["music"]
    recipe["model"]["projection_dim"] = 32
    recipe["model"]["audio_config"].update(
        num_mel_bins=16,
        spec_size=32,
        patch_size=4,
        patch_stride=[4, 4],
        window_size=2,
        patch_embeds_hidden_size=8,
        depths=[1, 1],
        num_attention_heads=[1, 2],
        hidden_size=16,
    )
    recipe["feature_extractor"].update(
        feature_size=16,
        sampling_rate=8000,
        mel_sampling_rate=8000,
        window_seconds=1.0,
        fft_window_size=256,
        hop_length=128,
        frequency_max=4000,
    )
    recipe["batches"].update(batch_size=8, favoured_groups="tones")
    recipe["trainer"].update(
        max_steps=30, warmup_steps=0, logging_steps=5, eval_steps=10, save_steps=10, dataloader_num_workers=0
    )
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def musical_recipe(recipe):
    """The same with rendered music, and without validation packages."""
    folder = recipe.parent
    texts = TEXTS | {label: [f"Sound of the {label}."] for label in INSTRUMENTS.labels}
    melodic = {label: dataclasses.asdict(instrument) for label, instrument in INSTRUMENTS.melodic.items()}
    for name, content in {
        "musical_texts": {"descriptions": texts, "synonyms": [["low", "deep"]]},
        "instruments": {"melodic": melodic, "percussion": INSTRUMENTS.percussion, "drum_kit": INSTRUMENTS.drum_kit},
        "phrases": {"sources": PHRASES},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    music = {"instruments": "instruments.yaml", "phrases": "phrases.yaml", "share": 0.5, "licence": "CC0"}
    changed = yaml.safe_load(recipe.read_text(encoding="utf-8")) | {
        "descriptions": "musical_texts.yaml",
        "validation_packages": [],
        "music": music,
    }
    path = folder / "musical.yaml"
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def soundfont(tmp_path_factory):
    return write_soundfont(tmp_path_factory.mktemp("soundfont") / "sine.sf2")


@pytest.fixture(scope="module")
def finished(recipe, sounds, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("clap")
    return output_dir, train(recipe, sounds, output_dir)


def test_clips_of_one_concept_are_no_negatives_of_each_other():
    concepts = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])  # two alike, another, a mixture
    targets = overlap(concepts)
    assert torch.allclose(targets.sum(-1), torch.ones(4))
    assert torch.allclose(targets[0], torch.tensor([0.4, 0.4, 0.0, 0.2]))
    assert torch.allclose(targets[3], torch.tensor([0.2, 0.2, 0.2, 0.4]))


def test_loss_falls_with_the_gap_and_with_the_confusion():
    text = torch.eye(4)[:3]
    concepts = torch.eye(3)
    scale = torch.tensor(20.0)
    gap = torch.nn.functional.normalize(text + torch.tensor([0.0, 0, 0, 2]), dim=-1)  # in order, but far from the texts
    matched, apart = (clap_loss(audio, text, concepts, scale, cosine_weight=1.0) for audio in (text, gap))
    confused = clap_loss(text.roll(1, 0), text, concepts, scale, cosine_weight=1.0)
    assert matched < 1e-3 < apart < confused
    assert clap_loss(text, text, concepts, scale, 1.0) == clap_loss(text, text, concepts, scale, 0.0)


def test_identity_projection_keeps_the_cosines_of_the_sentence_encoder():
    projection = MsClapProjection(384, 384, dropout=0.5).eval()
    start_as_identity(projection)
    states = torch.randn(64, 384)
    projected = projection(states)
    cosines = torch.nn.functional.cosine_similarity
    assert (cosines(projected[:32], projected[32:]) - cosines(states[:32], states[32:])).abs().max() < 0.02


def test_training_lowers_the_loss(finished):
    _, log = finished
    losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert log["clips"] == {"training": 4, "group": 2, "packages": 2}  # one of the nine is under GPL-2 alone
    assert set(log["result"]) == {"group", "packages"}
    for result in log["result"].values():
        assert result["cosine"] > result["cosine_other"]
    assert log["command"] == "python -m training.train_clap recipe.yaml --sounds DIR --output_dir OUT"


def test_every_set_of_validation_clips_is_evaluated_on_the_way(finished):
    _, log = finished
    for step in (10, 20, 30):
        (found,) = [e for e in log["history"] if e["step"] == step and "eval_group_zero_shot" in e]
        assert {"eval_group_cosine", "eval_packages_zero_shot", "eval_packages_cosine"} <= set(found)
    # The last evaluation is of the same weights as the result, but for their half precision.
    assert found["eval_packages_cosine"] == pytest.approx(log["result"]["packages"]["cosine"], abs=0.01)
    assert found["eval_group_cosine"] != found["eval_packages_cosine"]


def test_the_folder_is_a_complete_clap_in_half_precision(finished, text_model):
    output_dir, log = finished
    model = MsClapModel.from_pretrained(output_dir, dtype=torch.float32).eval()
    extractor = MsClapFeatureExtractor.from_pretrained(output_dir)
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    assert tokenizer.padding_side == "right"
    assert extractor.sampling_rate == 8000
    with safe_open(output_dir / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.float16, torch.int64}  # noqa: SIM118
    assert str(text_model) not in (output_dir / "config.json").read_text()
    assert (output_dir / "credits.csv").read_text().count("\n") == 1 + log["clips"]["training"]
    assert json.loads((output_dir / "training_log.json").read_text())["result"] == log["result"]
    # The text side is the sentence encoder that went in.
    original = AutoModel.from_pretrained(text_model).eval()
    tokens = tokenizer(["a low tone", "a high tone"], return_tensors="pt")
    expected = original(**tokens).last_hidden_state.mean(1)
    found = ClapEncoder(model, extractor, tokenizer).encode_text(["a low tone", "a high tone"])
    similarity = torch.nn.functional.cosine_similarity(expected - expected.mean(-1, keepdim=True), found)
    assert similarity.min() > 0.999


def test_a_saved_clap_measures_as_it_did_after_training(finished, recipe, sounds, capsys):
    output_dir, log = finished
    evaluate_main([str(output_dir), str(recipe), "--sounds", str(sounds)])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"group", "packages"} and printed == log["result"]


def test_a_run_with_music_trains_on_what_it_renders(musical_recipe, sounds, soundfont, tmp_path, capsys):
    pytest.importorskip("tinysoundfont")
    log = train(musical_recipe, sounds, tmp_path, soundfont, max_steps=3, logging_steps=1)
    assert log["clips"] == {"training": 5, "group": 2}  # without packages held out, and no result about them
    assert set(log["result"]) == {"group"}
    assert "--sounds DIR --soundfont FILE --output_dir OUT" in log["command"]
    assert str(soundfont) not in (tmp_path / "training_log.json").read_text()
    with (tmp_path / "credits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows if row["file_name"].startswith("rendered/")] == INSTRUMENTS.labels
    capsys.readouterr()
    evaluate_main([str(tmp_path), str(musical_recipe), "--sounds", str(sounds)])
    assert json.loads(capsys.readouterr().out) == log["result"]
    # The music is heard: without it, the same steps end elsewhere.
    losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
    unmusical = musical_recipe.with_name("unmusical.yaml")
    unmusical.write_text(yaml.safe_dump(yaml.safe_load(musical_recipe.read_text()) | {"music": None}))
    other = train(unmusical, sounds, tmp_path / "other", max_steps=3, logging_steps=1)
    assert losses != [entry["loss"] for entry in other["history"] if "loss" in entry]
    assert "rendered" not in (tmp_path / "other" / "credits.csv").read_text()


def test_music_and_a_soundfont_come_together(recipe, musical_recipe, sounds, soundfont, tmp_path):
    with pytest.raises(ValueError, match="asks for rendered music, but no soundfont was given"):
        train(musical_recipe, sounds, tmp_path)
    with pytest.raises(ValueError, match="has no rendered music, but a soundfont was given"):
        train(recipe, sounds, tmp_path, soundfont)
    assert make_music(None, recipe.parent, None, 8000) is None


def test_the_soundfont_of_the_shipped_recipe_must_have_the_presets_of_its_instruments(soundfont):
    pytest.importorskip("tinysoundfont")
    settings = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["music"]
    with pytest.raises(ValueError, match=r"sine\.sf2 lacks the presets of piano \[1, 2\], .* steel drum \[114\]"):
        make_music(settings, RECIPE.parent, soundfont, 32000)


def test_a_resumed_run_ends_where_the_whole_run_ends(recipe, sounds, finished, tmp_path):
    output_dir, log = finished
    # As after a crash beyond step 20: that checkpoint is all there is.
    shutil.copytree(output_dir / "checkpoints" / "checkpoint-20", tmp_path / "checkpoints" / "checkpoint-20")
    resumed = train(recipe, sounds, tmp_path, resume=True)
    for name, result in resumed["result"].items():
        assert result["cosine"] == pytest.approx(log["result"][name]["cosine"], abs=1e-3)
    assert [entry["step"] for entry in resumed["history"] if "loss" in entry] == [5, 10, 15, 20, 25, 30]


def test_command_line_names_what_is_missing(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main([str(RECIPE)])
    assert "--sounds" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"no metadata\.csv"):
        main([str(RECIPE), "--sounds", str(tmp_path), "--output_dir", str(tmp_path / "out")])


def test_confusions_count_the_wrong_ones():
    assert confusions(["a", "b", "b", "c"], ["a", "a", "a", "b"]) == {"a -> b": 2, "b -> c": 1}

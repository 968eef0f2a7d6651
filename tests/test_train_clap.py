"""Training the small CLAP: the loss, the frozen text space, and a run of a few steps on generated tones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from test_clap_data import write_tones
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from modeling_mats.modeling_msclap import MsClapModel, MsClapProjection
from processing_mats.clap_mats import ClapEncoder
from processing_mats.feature_extraction_msclap import MsClapFeatureExtractor
from training.evaluate_clap import confusions
from training.evaluate_clap import main as evaluate_main
from training.train_clap import clap_loss, main, overlap, start_as_identity, train

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
    """The shipped recipe with towers and front end made small."""
    folder = tmp_path_factory.mktemp("recipe")
    texts = {"low": ["A low tone."], "deep": ["A deep tone."], "high": ["A high tone.", "A shrill tone."]}
    (folder / "texts.yaml").write_text(yaml.safe_dump({"descriptions": texts, "synonyms": [["low", "deep"]]}))
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe.update(descriptions="texts.yaml", validation_group="tones-fold4", text_model=str(text_model))
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
    assert log["clips"] == {"training": 4, "validation": 2}  # one of the five is under GPL-2 alone
    assert log["result"]["cosine"] > log["result"]["cosine_other"]


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
    assert json.loads(capsys.readouterr().out) == log["result"]


def test_a_resumed_run_ends_where_the_whole_run_ends(recipe, sounds, finished, tmp_path):
    output_dir, log = finished
    # As after a crash beyond step 20: that checkpoint is all there is.
    shutil.copytree(output_dir / "checkpoints" / "checkpoint-20", tmp_path / "checkpoints" / "checkpoint-20")
    resumed = train(recipe, sounds, tmp_path, resume=True)
    assert resumed["result"]["cosine"] == pytest.approx(log["result"]["cosine"], abs=1e-3)
    assert [entry["step"] for entry in resumed["history"] if "loss" in entry] == [5, 10, 15, 20, 25, 30]


def test_command_line_names_what_is_missing(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main([str(RECIPE)])
    assert "--sounds" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"no metadata\.csv"):
        main([str(RECIPE), "--sounds", str(tmp_path), "--output_dir", str(tmp_path / "out")])


def test_confusions_count_the_wrong_ones():
    assert confusions(["a", "b", "b", "c"], ["a", "a", "a", "b"]) == {"a -> b": 2, "b -> c": 1}

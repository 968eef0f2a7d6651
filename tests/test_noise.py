"""The noise variance from pairs of sound and text, and `mats noise`."""

import csv
import json
import math

import pytest
import torch
import typer
from conftest import MATS_TINY, ROOT
from typer.testing import CliRunner

from mats_cli.noise import PAIRS as CLI_PAIRS
from mats_cli.noise import noise
from mats_cli.runtime import OneLineErrors
from processing_mats import ClapEncoder
from processing_mats.audio_mats import load_audio
from training.noise import PAIRS, estimate_draws, estimate_from_folder, estimate_noise, read_pairs

SOUNDS = ROOT / "examples" / "sounds"
CLAP = MATS_TINY / "clap"


@pytest.fixture(scope="module")
def clap() -> ClapEncoder:
    return ClapEncoder.from_pretrained(CLAP)


def write_table(path, columns, *rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_infinity_norm_is_the_largest_entry_of_the_difference():
    # Unit vectors at an angle: (1, 0, 0) against (cos, sin, 0). Their difference is (1 - cos, sin, 0).
    angles = torch.tensor([0.1, 0.4])
    audio = torch.tensor([[1.0, 0.0, 0.0]]).expand(2, 3)
    text = torch.stack([angles.cos(), angles.sin(), torch.zeros(2)], dim=1)
    estimate = estimate_noise(audio, text)
    first, second = math.sin(0.1), math.sin(0.4)
    assert estimate.std == pytest.approx((first + second) / 2)
    assert estimate.variance == pytest.approx(((first + second) / 2) ** 2)
    assert estimate.spread == pytest.approx((second - first) / math.sqrt(2))
    assert estimate.pairs == 2


def test_embeddings_are_normalised_first():
    audio, text = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    scaled = estimate_noise(audio * torch.linspace(0.5, 9, 7)[:, None], 3 * text)
    assert scaled.std == pytest.approx(estimate_noise(audio, text).std, rel=1e-6)
    assert estimate_noise(audio, audio).variance == 0


@pytest.mark.parametrize(
    ("audio", "text", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), r"\(3, 4\) and text_embeds \(3, 5\)"),
        (torch.ones(4), torch.ones(4), r"expected \(pairs, dim\)"),
        (torch.ones(1, 4), torch.ones(1, 4), "1 pairs, expected at least 2"),
        (torch.ones(2, 4), torch.zeros(2, 4), "text_embeds holds rows that are zero"),
        (torch.full((2, 4), torch.nan), torch.ones(2, 4), "audio_embeds holds rows"),
    ],
)
def test_unusable_embeddings_are_refused(audio, text, message):
    with pytest.raises(ValueError, match=message):
        estimate_noise(audio, text)


def test_texts_of_a_clip(tmp_path):
    table = write_table(
        tmp_path / "metadata.csv",
        ["file_name", "label", "caption"],
        ["a.wav", "dog", "A dog barks, twice."],
        ["deep/b.wav", "rain", " "],
    )
    first, second = read_pairs(tmp_path)
    assert (first.audio, first.texts) == (tmp_path / "a.wav", ("A dog barks, twice.",))
    assert (second.audio, second.texts) == (tmp_path / "deep" / "b.wav", ("rain",))
    assert read_pairs(table) == [first, second]


def test_several_captions_of_a_clip(tmp_path):
    columns = ["file_name", "caption_1", "caption_2", "caption_10", "caption_source"]
    table = write_table(tmp_path / "captions.csv", columns, ["a.wav", "One.", "", "Ten.", "nobody"])
    assert read_pairs(table)[0].texts == ("One.", "Ten.")


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        (["path", "caption"], ["a.wav", "x"], "columns path, caption; expected file_name"),
        (["file_name", "title"], ["a.wav", "x"], "expected file_name, and caption"),
        (["file_name", "label"], ["a.wav", " "], "line 2: no text"),
        (["file_name", "label"], ["", "dog"], "line 2: no file_name"),
        (["file_name", "label"], None, "no row below its header"),
    ],
)
def test_tables_that_hold_no_pairs(tmp_path, columns, row, message):
    write_table(tmp_path / "metadata.csv", columns, *([row] if row else []))
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path)


def test_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv is not there"):
        read_pairs(tmp_path)


def test_all_pairs_of_a_folder_are_what_clap_says_of_them(clap):
    pairs = read_pairs(SOUNDS)
    audio = clap.encode_audio([load_audio(pair.audio, clap.sampling_rate) for pair in pairs])
    text = clap.encode_text([pair.texts[0] for pair in pairs])
    distances = [(a - t).abs().max().item() for a, t in zip(audio, text, strict=True)]
    estimate = estimate_from_folder(SOUNDS, clap, pairs=len(pairs), seed=3)
    assert estimate.std == pytest.approx(sum(distances) / len(distances), abs=1e-6)
    assert estimate.variance == pytest.approx(estimate.std**2)


def test_draws_follow_the_seed(clap):
    first, *others = estimate_draws(SOUNDS, clap, pairs=3, draws=3, seed=1)
    # Equal but for the rounding of other batches.
    assert estimate_from_folder(SOUNDS, clap, pairs=3, seed=1).std == pytest.approx(first.std, abs=1e-6)
    different = [*others, estimate_from_folder(SOUNDS, clap, pairs=3, seed=2)]
    assert all(abs(first.std - other.std) > 1e-4 for other in different)


def test_one_of_several_captions_is_drawn(clap, tmp_path):
    captions = ["A dog barks.", "Rain falls on a roof."]
    rows = [[str(SOUNDS / name), *captions] for name in ("rain.ogg", "dog_bark.ogg")]
    table = write_table(tmp_path / "captions.csv", ["file_name", "caption_1", "caption_2"], *rows)
    seen = {estimate.std for estimate in estimate_draws(table, clap, pairs=2, draws=12)}
    assert 1 < len({round(std, 6) for std in seen}) <= 4


def test_more_pairs_than_there_are(clap):
    with pytest.raises(ValueError, match="pairs is 30, expected from 2 to 10"):
        estimate_from_folder(SOUNDS, clap)


def test_absent_sounds_are_told_before_any_is_encoded(clap, tmp_path):
    write_table(tmp_path / "metadata.csv", ["file_name", "label"], ["a.wav", "dog"], ["b.wav", "cat"])
    with pytest.raises(FileNotFoundError, match="2 of 2 sounds are not there"):
        estimate_from_folder(tmp_path, clap, pairs=2)


# -- mats noise --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mats_noise():
    app = typer.Typer(cls=OneLineErrors)
    app.callback()(lambda: None)  # with a callback, `noise` is a verb, as in `mats`
    app.command()(noise)

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, ["noise", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    return run


def test_the_command_prints_variance_and_spread(mats_noise, clap):
    expected = estimate_from_folder(SOUNDS, clap, pairs=4, seed=1)
    lines = mats_noise(SOUNDS, "--pairs", 4, "--seed", 1).stdout.splitlines()
    assert lines[0].split() == ["noise_variance", f"{expected.variance:.4f}"]
    assert lines[1].split()[:2] == ["std", f"{expected.std:.4f}"]
    assert lines[2].split()[:2] == ["spread", f"{expected.spread:.4f}"]
    assert lines[3].startswith("in 5 draws")
    assert len(lines) == 4


def test_the_command_as_json(mats_noise, clap):
    record = json.loads(mats_noise(SOUNDS, "--pairs", 4, "--draws", 2, "--clap", CLAP, "--json").stdout)
    estimates = estimate_draws(SOUNDS, clap, pairs=4, draws=2)
    assert record["variance"] == pytest.approx(estimates[0].variance)
    assert record["variances"] == pytest.approx([estimate.variance for estimate in estimates])
    assert record["pairs"] == 4 and record["known_pairs"] == 10
    assert record["clap_fingerprint"] == clap.fingerprint


def test_the_command_says_where_draws_are_much_the_same(mats_noise):
    assert "there are 10 pairs in all" in mats_noise(SOUNDS, "--pairs", 9, "--draws", 2).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SOUNDS,), "pairs is 30, expected from 2 to 10"),
        ((SOUNDS, "--model", MATS_TINY, "--clap", CLAP), "exclude each other"),
        ((ROOT / "nowhere",), "is not there"),
        ((SOUNDS, "--model", CLAP), "expected 'mats'"),
    ],
)
def test_the_command_fails_in_one_line(mats_noise, arguments, message):
    error = mats_noise(*arguments, code=1).stderr
    assert error.startswith("Error: ") and message in error


def test_the_papers_number_is_one():
    assert CLI_PAIRS == PAIRS == 30

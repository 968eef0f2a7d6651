"""The gap between the modalities: pairs, both sides of every bridge, the record and its tables, and `mats gap`."""

import copy
import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import soundfile as sf
import torch
import torch.nn.functional as F
import typer
from conftest import MATS_TINY, ROOT, SOUNDS, make_processor
from PIL import Image
from typer.testing import CliRunner

from configuration_mats import MatsConfig
from evaluation.gap import BRIDGES, MIN_POINTS, PAIRS, draw_pairs, embed, measure, read_sounds
from evaluation.gap_report import overall_table, report_gap, tell_pairs, to_markdown
from evaluation.two_samples import median_distance
from mats_cli import main
from mats_cli.gap import PAIRS as CLI_PAIRS
from mats_cli.gap import gap
from mats_cli.runtime import OneLineErrors
from processing_mats import MatsProcessor
from training.clap_data import Descriptions

KINDS = Descriptions(
    {"dog": ["A dog barks.", "A dog is barking.", "Barking."], "rain": ["It rains.", "Rain falls."]}, [["dog"]]
)


def write_table(folder: Path, columns: list[str], *rows: list[str]) -> Path:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder


# -- Sounds and texts --------------------------------------------------------------------------------------------------


def test_sounds_with_and_without_captions(tmp_path):
    columns = ["file_name", "label", "caption", "group"]
    write_table(tmp_path, columns, ["a.wav", "dog", "Woof!", "x"], ["b/c.wav", " rain ", "", "y"])
    first, second = read_sounds(tmp_path)
    assert (first.audio, first.label, first.captions) == (tmp_path / "a.wav", "dog", ("Woof!",))
    assert (second.audio, second.label, second.captions) == (tmp_path / "b" / "c.wav", "rain", ())
    assert read_sounds(tmp_path, groups=["y"]) == [second]
    assert read_sounds(tmp_path, groups=["y", "x"]) == [first, second]


def test_groups_and_packages_are_united(tmp_path):
    columns = ["file_name", "label", "caption", "group", "licence", "source"]
    rows = [("a.wav", "g1", "alpha 1.0 x"), ("b.wav", "g2", "beta 2.0 y"), ("c.wav", "g2", "gamma")]
    write_table(tmp_path, columns, *([name, "dog", "", group, "CC0", source] for name, group, source in rows))
    chosen = [sound.audio.name for sound in read_sounds(tmp_path, ["g1"], ["gamma"])]
    assert chosen == ["a.wav", "c.wav"]
    assert [sound.audio.name for sound in read_sounds(tmp_path, packages=["beta"])] == ["b.wav"]
    with pytest.raises(ValueError, match="of the packages delta; packages: alpha, beta, gamma"):
        read_sounds(tmp_path, packages=["beta", "delta"])
    with pytest.raises(ValueError, match="no clips of group 'g3'"):
        read_sounds(tmp_path, groups=["g1", "g3"])


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (["file_name", "caption"], [["a.wav", "Woof!"]], "no column 'label'"),
        (["file_name", "label", "caption"], [["a.wav", "", "Woof!"]], "a.wav has no label"),
        (["file_name", "label"], [["a.wav", "dog"], ["a.wav", "dog"]], "has a.wav twice"),
    ],
)
def test_tables_that_will_not_do(tmp_path, columns, rows, message):
    with pytest.raises(ValueError, match=message):
        read_sounds(write_table(tmp_path, columns, *rows))


@pytest.fixture
def four_dogs(tmp_path):
    rows = [["a.wav", "dog", ""], ["b.wav", "dog", ""], ["c.wav", "dog", "Woof!"], ["d.wav", "dog", ""]]
    rows += [["e.wav", "emu", ""], ["f.wav", "dog", ""]]
    return read_sounds(write_table(tmp_path, ["file_name", "label", "caption"], *rows))


def test_a_clip_goes_with_its_caption_else_a_description_else_its_label(four_dogs):
    drawn = draw_pairs(four_dogs, KINDS, 6)
    by_name = {pair.audio.name: pair for pair in drawn.pairs}
    assert len(by_name) == 6
    assert (by_name["c.wav"].text, by_name["c.wav"].kind) == ("Woof!", "caption")
    assert (by_name["e.wav"].text, by_name["e.wav"].kind) == ("The sound of emu.", "label")
    described = [by_name[name] for name in ("a.wav", "b.wav", "d.wav", "f.wav")]
    assert {pair.kind for pair in described} == {"description"}
    # Four clips, three descriptions: all of them, one twice.
    assert {pair.text for pair in described} == set(KINDS.of("dog"))
    assert set(drawn.class_texts["dog"]) == {"Woof!", *KINDS.of("dog")}
    assert len(drawn.class_texts["dog"]) == 4
    assert drawn.class_texts["emu"] == ["The sound of emu."]


def test_fewer_descriptions_can_be_asked_for(four_dogs):
    drawn = draw_pairs(four_dogs, KINDS, 6, texts_per_label=1)
    assert len({pair.text for pair in drawn.pairs if pair.kind == "description"}) == 1
    assert len(drawn.class_texts["dog"]) == 2  # and the caption


def test_the_draw_follows_the_seed(four_dogs):
    draws = [draw_pairs(four_dogs, KINDS, 3, seed) for seed in (1, 1, 2, 3, 4)]
    assert draws[0] == draws[1]
    assert any(draws[0] != other for other in draws[2:])
    with pytest.raises(ValueError, match="pairs is 7, expected from 2 to 6"):
        draw_pairs(four_dogs, KINDS, 7)
    with pytest.raises(ValueError, match="texts_per_label is 0, expected at least 1"):
        draw_pairs(four_dogs, KINDS, 3, texts_per_label=0)


# -- Embeddings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> MatsProcessor:
    return MatsProcessor.from_pretrained(MATS_TINY)


@pytest.fixture(scope="module")
def config() -> MatsConfig:
    return MatsConfig.from_pretrained(MATS_TINY)


@pytest.fixture(scope="module")
def drawn():
    return draw_pairs(read_sounds(SOUNDS), Descriptions({"rain": ["It rains."]}), 10)


@pytest.fixture(scope="module")
def embedded(drawn, tiny, config):
    return embed(drawn, tiny, config)


def test_both_sides_are_what_the_mapper_reads(drawn, embedded, tiny, config):
    audio = tiny.encode_audio([pair.audio for pair in drawn.pairs])
    torch.testing.assert_close(embedded.audio["clap"], audio, atol=1e-5, rtol=0)
    alone = F.normalize(tiny.apply_santa(audio, {"weight": 1.0}), dim=-1)
    torch.testing.assert_close(embedded.audio["memory"], alone, atol=1e-5, rtol=0)
    shipped = F.normalize(tiny.apply_santa(audio), dim=-1)
    torch.testing.assert_close(embedded.audio["santa"], shipped, atol=1e-5, rtol=0)
    assert (shipped - alone).norm(dim=-1).min() > 0.05
    text = tiny.encode_text([pair.text for pair in drawn.pairs])
    torch.testing.assert_close(embedded.text["clean"], text, atol=1e-5, rtol=0)
    # A unit vector with noise of variance v in d dimensions has a cosine of about 1 / sqrt(1 + v d) to itself.
    expected = (1 + config.noise_variance * text.shape[1]) ** -0.5
    assert F.cosine_similarity(embedded.text["noisy"], text).mean().item() == pytest.approx(expected, abs=0.05)
    for side in (*embedded.audio.values(), *embedded.text.values()):
        torch.testing.assert_close(side.norm(dim=-1), torch.ones(10))
    assert {label: own.shape for label, own in embedded.class_text["noisy"].items()} == {
        label: (len(texts), tiny.clap.embed_dim) for label, texts in drawn.class_texts.items()
    }


def test_noise_follows_the_seed(drawn, embedded, tiny, config):
    again, other = embed(drawn, tiny, config), embed(drawn, tiny, config, seed=1)
    assert torch.equal(again.text["noisy"], embedded.text["noisy"])
    assert not torch.allclose(other.text["noisy"], embedded.text["noisy"])
    assert torch.equal(other.text["clean"], embedded.text["clean"])


def test_without_renormalising_lengths_stay(drawn, tiny, config):
    literal = MatsConfig.from_pretrained(MATS_TINY, renormalize=False)
    sides = embed(drawn, tiny, literal)
    assert sides.audio["santa"].norm(dim=-1).max() < 0.99
    assert sides.text["noisy"].norm(dim=-1).min() > 1.2


def test_long_texts_are_counted(tiny, config, tmp_path):
    text = "A dog barks. " * 200
    rows = [[str(SOUNDS / name), "dog", text] for name in ("rain.ogg", "dog_bark.ogg")]
    sounds = read_sounds(write_table(tmp_path, ["file_name", "label", "caption"], *rows))
    assert embed(draw_pairs(sounds, KINDS, 2), tiny, config).cut == 1


def test_sounds_that_are_not_there_or_cannot_be_read_are_named(tiny, config, tmp_path):
    rows = [[name, "dog"] for name in ("a.ogg", "b.ogg", "c.ogg")]
    drawn = draw_pairs(read_sounds(write_table(tmp_path, ["file_name", "label"], *rows)), KINDS, 3)
    shutil.copy(SOUNDS / "rain.ogg", tmp_path / "a.ogg")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 sounds are not there.*[bc]\.ogg.*[bc]\.ogg"):
        embed(drawn, tiny, config)
    shutil.copy(SOUNDS / "rain.ogg", tmp_path / "b.ogg")
    (tmp_path / "c.ogg").write_text("no sound")
    with pytest.raises(ValueError, match=r"c\.ogg"):
        embed(drawn, tiny, config)


def test_a_clip_that_the_processor_refuses_is_named(tmp_path, config):
    refusing = make_processor(long_audio="error")  # its window is one second
    rows = [[str(SOUNDS / name), "dog"] for name in ("rain.ogg", "dog_bark.ogg")]
    drawn = draw_pairs(read_sounds(write_table(tmp_path, ["file_name", "label"], *rows)), KINDS, 2)
    with pytest.raises(ValueError, match=r"(rain|dog_bark)\.ogg: The audio has \d+ samples"):
        embed(drawn, refusing, config)


def test_a_processor_without_a_memory_is_refused(drawn, config):
    with pytest.raises(ValueError, match="no Santa memory"):
        embed(drawn, make_processor(with_memory=False), config)


# -- The gap -----------------------------------------------------------------------------------------------------------


def test_the_bundled_model_closes_part_of_the_gap(drawn, embedded):
    gaps, width = measure(drawn, embedded)
    assert [gap.bridge for gap in gaps] == list(BRIDGES)
    by_name = {gap.bridge.name: gap for gap in gaps}
    assert width == median_distance(embedded.audio["clap"], embedded.text["clean"])
    # Memory and Santa bring clips nearer to their texts; noise takes the texts away from them.
    raw = by_name["raw"].overall
    assert by_name["memory"].overall.cosine > raw.cosine + 0.05
    assert by_name["santa"].overall.cosine > raw.cosine + 0.05
    assert by_name["noise"].overall.cosine < raw.cosine - 0.05
    assert (raw.clips, raw.texts) == (10, 10)
    # One clip a class: its pair is measured, its distribution is not.
    rain = by_name["raw"].classes["rain"]
    assert (rain.clips, rain.texts, rain.discrepancy, rain.between_means, rain.mmd2) == (1, 1, None, None, None)
    assert rain.distance == pytest.approx((2 - 2 * rain.cosine) ** 0.5, abs=1e-5)
    assert by_name["raw"].worst is None


# -- The report --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuts(tmp_path_factory) -> Path:
    """Seven cuts of half a second out of each of three sounds."""
    folder = tmp_path_factory.mktemp("cuts")
    rows = []
    for name, label in (("rain", "rain"), ("rooster", "rooster"), ("dog_bark", "dog bark")):
        waveform, rate = sf.read(SOUNDS / f"{name}.ogg")
        for number in range(MIN_POINTS + 1 if name != "dog_bark" else MIN_POINTS - 1):
            start = number * rate // 3
            sf.write(folder / f"{name}_{number}.wav", waveform[start : start + rate // 2] + 1e-4, rate)
            rows.append([f"{name}_{number}.wav", label])
    return write_table(folder, ["file_name", "label"], *rows)


@pytest.fixture(scope="module")
def record() -> dict:
    return report_gap(SOUNDS, MATS_TINY, pairs=10)


def test_the_record_is_plain_json_with_what_the_model_card_tells(record):
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["settings"]["pairs"] == 10
    assert record["settings"]["descriptions"]["name"] == "descriptions.yaml"
    for name in ("raw", "noise", "memory", "santa"):
        overall = record["bridges"][name]["overall"]
        assert {type(overall[key]) for key in ("cosine", "distance", "between_means", "mmd2")} == {float}


def test_the_model_is_told_by_the_name_of_its_folder(monkeypatch):
    monkeypatch.chdir(MATS_TINY)
    record = report_gap(SOUNDS, ".", pairs=5)
    assert record["settings"]["model"] == MATS_TINY.name
    assert str(ROOT) not in json.dumps(record)


def test_tables_keep_their_columns(record):
    changed = copy.deepcopy(record)
    changed["bridges"]["raw"]["classes_max_l1"] = {"label": "x|y", "l1": 1.5, "error": 0.25}
    header, rule, raw, *others = overall_table(changed).splitlines()
    assert raw.endswith("| 1.50 ± 0.25 | x\\|y |")
    assert all(row.endswith("| -           |      |") for row in others)
    assert len(others) == len(BRIDGES) - 1
    assert {len(line) for line in (header, rule, raw, *others)} == {len(header)}


def test_an_output_that_is_a_file_is_refused_first(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(FileExistsError, match="expected a folder"):
        report_gap(tmp_path / "no sounds", MATS_TINY, output=taken)


# -- The command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mats_gap():
    app = typer.Typer(cls=OneLineErrors)
    app.callback()(lambda: None)  # with a callback, `gap` is a verb, as in `mats`
    app.command()(gap)

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, ["gap", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    return run


def test_the_command_writes_record_table_and_figures(mats_gap, cuts, tiny, config, tmp_path):
    output = tmp_path / "deep" / "gap"
    result = mats_gap(cuts, "--pairs", 19, "--seed", 3, "--output", output)
    assert "19 pairs" in result.stdout and "19 descriptions" in result.stdout
    assert "3 classes, 2 of them" in result.stdout
    assert {path.name for path in output.iterdir()} == {"gap.json", "gap.md", "gap_tsne.png", "gap_classes.png"}
    for name in ("gap_tsne.png", "gap_classes.png"):
        assert (output / name).stat().st_size < 200_000
        with Image.open(output / name) as image:
            assert image.width == 900
            assert len(image.convert("RGB").getcolors(10**6)) > 10

    record = json.loads((output / "gap.json").read_text(encoding="utf-8"))
    settings = record["settings"]
    assert settings["clap_fingerprint"] == tiny.clap.fingerprint
    assert (settings["model"], settings["seed"], settings["pairs"]) == ("mats-tiny", 3, 19)
    assert (settings["noise_variance"], settings["renormalize"]) == (config.noise_variance, config.renormalize)
    assert settings["min_points"] == MIN_POINTS
    assert {key: record["texts"][key] for key in ("caption", "description", "label", "cut")} == {
        "caption": 0,
        "description": 19,
        "label": 0,
        "cut": 0,
    }
    assert [pair["audio"] for pair in record["pairs"]] == list(dict.fromkeys(pair["audio"] for pair in record["pairs"]))
    assert str(ROOT) not in json.dumps(record) and str(tmp_path) not in json.dumps(record)
    raw = record["bridges"]["raw"]
    assert raw["classes"]["dog bark"]["discrepancy"] is None and raw["classes"]["dog bark"]["clips"] == 5
    measured = {label: raw["classes"][label]["discrepancy"]["l1"] for label in ("rain", "rooster")}
    assert raw["classes_max_l1"]["l1"] == max(measured.values())
    assert raw["classes_mean_l1"] == pytest.approx(sum(measured.values()) / 2)

    table = (output / "gap.md").read_text(encoding="utf-8")
    assert f"Left out, with fewer than {MIN_POINTS} clips or texts (clips, texts): dog bark (5, " in table
    assert f"| {raw['overall']['cosine']:.2f} " in table
    assert to_markdown(record) == table  # from the record alone
    assert result.stdout == f"{tell_pairs(record)}\n\n{overall_table(record)}\n"
    assert "| rooster " in table


def test_the_command_as_json(mats_gap):
    record = json.loads(mats_gap(SOUNDS, "--pairs", 10, "--texts-per-label", 2, "--json").stdout)
    assert list(record["bridges"]) == [bridge.name for bridge in BRIDGES]
    assert record["bridges"]["raw"]["classes_max_l1"] is None
    assert record["bridges"]["raw"]["classes"]["rain"]["texts"] == 2
    assert record["settings"]["texts_per_label"] == 2


def test_without_a_class_to_draw_the_other_files_are_written(mats_gap, tmp_path):
    result = mats_gap(SOUNDS, "--pairs", 10, "--output", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"gap.json", "gap.md", "gap_tsne.png"}
    assert "gap_classes.png is not written" in result.stderr


def test_own_descriptions(mats_gap, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("descriptions:\n  rain: [Water falls from the sky.]\n")
    record = json.loads(mats_gap(SOUNDS, "--pairs", 10, "--descriptions", own, "--json").stdout)
    texts = {pair["label"]: (pair["text"], pair["kind"]) for pair in record["pairs"]}
    assert texts["rain"] == ("Water falls from the sky.", "description")
    assert texts["rooster"] == ("The sound of rooster.", "label")
    assert (record["texts"]["description"], record["texts"]["label"]) == (1, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SOUNDS,), "pairs is 350, expected from 2 to 10"),
        ((ROOT / "nowhere",), "is not there"),
        ((SOUNDS, "--pairs", 5, "--group", "none"), "no clips of group 'none'"),
        ((SOUNDS, "--pairs", 5, "--packages", "ESC-10"), "lacks the columns"),
        ((SOUNDS, "--pairs", 5, "--packages", " , "), "expected names separated by commas"),
        ((SOUNDS, "--pairs", 5, "--model", MATS_TINY / "clap"), "expected 'mats'"),
        ((SOUNDS, "--pairs", 5, "--output", ROOT / "pyproject.toml"), "expected a folder"),
        ((SOUNDS, "--pairs", 5, "--descriptions", SOUNDS / "metadata.csv"), "holds no `descriptions`"),
        ((SOUNDS, "--pairs", 5, "--descriptions", ROOT / "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_the_command_fails_in_one_line(mats_gap, arguments, message):
    error = mats_gap(*arguments, code=1).stderr
    assert error.startswith("Error: ") and message in error
    assert len(error.splitlines()) == 1


def test_without_matplotlib_the_command_says_what_to_install(mats_gap, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "evaluation.gap_figures", raising=False)
    error = mats_gap(SOUNDS, "--pairs", 10, "--output", tmp_path / "out", code=1).stderr
    assert error == "Error: Figures need matplotlib: pip install matplotlib, or the extra `figures`.\n"
    assert not (tmp_path / "out").exists()


def test_the_verb_is_registered():
    assert gap in [command.callback for command in main.app.registered_commands]
    assert CLI_PAIRS == PAIRS == 350

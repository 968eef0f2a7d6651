"""Reading tables, JSON lists of any size and names of clips: what is found, and what errors tell."""

import json
import tracemalloc

import pytest

from training.audiotia import json_stream
from training.audiotia.clip_captions import ClipCaptions
from training.audiotia.clips import ClipIndex, clip_parts, read_clip_names, youtube_id
from training.audiotia.json_stream import iterate_json
from training.audiotia.reader import Table
from training.audiotia.tables import read_records, read_table, require_columns

VALUES = [{"a": 'quote " and ] and \\'}, [], {}, "text, with ] inside", -12.5e3, 1234567, True, None, ["ü", {"b": [1]}]]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_lists_are_read_whatever_the_chunk(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = tmp_path / "list.json"
    path.write_text(json.dumps(VALUES, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert list(iterate_json(path)) == VALUES
    path.write_text(json.dumps({"number": 12, "nested": {"data": [0]}, "data": VALUES, "after": 1}, indent=indent))
    assert list(iterate_json(path)) == VALUES


@pytest.mark.parametrize("text", ["[]", " \n[ ]\n", '{"data": []}'])
def test_an_empty_json_list_has_no_elements(tmp_path, text):
    path = tmp_path / "list.json"
    path.write_text(text)
    assert list(iterate_json(path)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1} {"a": 2}]', r"character 10: expected , or \], found {"),
        ('[{"a": 1}, {"a": ', "character 17: Expecting value"),
        ('[{"a": 1}', r"character 9: expected , or \], found the end of the file"),
        ('[{"a": nonsense}]', "character 7: Expecting value"),
        ('"text"', r"character 0: expected \[ or {"),
        ("", "character 0: .* found the end of the file"),
        ('{"a": 1, "b": 2}', r"a JSON object with the keys \['a', 'b'\], expected a list"),
        ('{"data": 1}', r"character 9: expected \[, found 1"),
    ],
)
def test_malformed_json_is_told_with_its_place(tmp_path, text, message):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        list(iterate_json(path))
    assert str(path) in str(error.value)


def test_an_element_that_never_ends_is_not_read_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 10)
    monkeypatch.setattr(json_stream, "MAX_ELEMENT", 100)
    path = tmp_path / "list.json"
    path.write_text('["' + "x" * 10_000)
    with pytest.raises(ValueError, match="character 1: Unterminated string"):
        list(iterate_json(path))


def test_memory_stays_flat(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 20_000))  # 20 MB
    tracemalloc.start()
    count = sum(1 for _ in iterate_json(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 8e6


def test_tables_with_and_without_a_header(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('﻿a, b\n1,"x, ""y"""\n\n2,z\n', encoding="utf-8")
    assert list(read_table(path)) == [{"a": "1", "b": 'x, "y"'}, {"a": "2", "b": "z"}]
    path.write_text('1\tsays "hello\n2\tz\n')
    assert list(read_table(path, ("n", "text"), "\t")) == [{"n": "1", "text": 'says "hello'}, {"n": "2", "text": "z"}]


def test_a_row_of_another_width_is_told(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(ValueError, match=r"t.csv, line 3, has 3 fields, expected 2: \['a', 'b'\]"):
        list(read_table(path))


def test_another_encoding_is_told_and_can_be_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("a\ncafé\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"not in utf-8-sig .*encoding: cp1252"):
        list(read_records(path))
    assert list(read_records(path, "cp1252")) == [{"a": "café"}]


def test_records_of_all_kinds(tmp_path):
    (tmp_path / "t.tsv").write_text("a\tb\n1\t2\n")
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_records(tmp_path / "t.tsv")) == [{"a": "1", "b": "2"}]
    assert list(read_records(tmp_path / "t.jsonl")) == [{"a": 1}, {"a": 2}]
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match=r"t.jsonl, line 2, is not valid JSON"):
        list(read_records(tmp_path / "t.jsonl"))
    with pytest.raises(ValueError, match=r"t.xlsx: expected a .csv"):
        list(read_records(tmp_path / "t.xlsx"))


def test_missing_columns_are_told_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"t.csv has the columns 'a'; expected 'a', 'b'; missing: 'b'"):
        require_columns(tmp_path / "t.csv", ["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("dog.wav", ("dog",)),
        ("./train/dog.WAV", ("train", "dog")),
        ("/data/a\\b/blues.00001.wav", ("data", "a", "b", "blues.00001")),
        ("blues.00001", ("blues.00001",)),  # no audio extension
        ("Take 1.5", ("Take 1.5",)),
    ],
)
def test_clip_names_lose_their_audio_extension_alone(name, parts):
    assert clip_parts(name) == parts


@pytest.mark.parametrize(
    ("stem", "found"),
    [
        ("rZ4d8p0hAfI", "rZ4d8p0hAfI"),
        ("YrZ4d8p0hAfI", "rZ4d8p0hAfI"),
        ("rZ4d8p0hAfI_30", "rZ4d8p0hAfI"),
        ("Y-Z4d8p0hAf__30.000_40.000", "-Z4d8p0hAf_"),
        ("YZ4d8p0hAfI", "YZ4d8p0hAfI"),  # eleven characters that begin with Y
        ("door_slam", None),
        ("1-100032-A-0", None),
    ],
)
def test_youtube_ids(stem, found):
    assert youtube_id(stem) == found


def test_clips_are_found_under_any_way_to_write_them():
    index = ClipIndex([("test/dog_1.wav", "a"), ("cat.flac", "b"), ("rZ4d8p0hAfI", "c")])
    assert index.find("dog_1") == index.find("x/test/dog_1.ogg") == ["a"]
    assert index.find("train/dog_1.wav") == []
    assert index.find("anywhere/cat") == ["b"]
    assert index.find("YrZ4d8p0hAfI_30.wav") == []
    assert index.find("YrZ4d8p0hAfI_30.wav", youtube=True) == ["c"]


def test_lists_of_clips(tmp_path):
    def names(name, text, **kwargs):
        path = tmp_path / name
        path.write_text(text)
        return read_clip_names(path, **kwargs)

    assert names("a.txt", "dog.wav\n\n cat \n") == ["dog.wav", "cat"]
    assert names("a.csv", "n,file_name\n1,dog.wav\n") == ["dog.wav"]
    assert names("a.csv", "n,sound\n1,dog.wav\n", column="sound") == ["dog.wav"]
    assert names("a.json", '{"AudioSet": ["Yabc.wav"], "FreeSound": [123]}') == ["Yabc.wav", "123"]
    assert names("a.json", '{"data": [{"wav": "x/dog.wav", "labels": "/m/0"}]}') == ["x/dog.wav"]
    assert names("a.json", '[{"id": 7, "tags": ["a"]}]') == ["7"]
    assert names("a.jsonl", '{"audio_id": "dog"}\n') == ["dog"]
    with pytest.raises(ValueError, match=r"a.csv has the columns 'n', 'sound', none of which is known to name clips"):
        names("a.csv", "n,sound\n1,dog.wav\n")
    with pytest.raises(ValueError, match="missing: 'other'"):
        names("a.csv", "n,sound\n1,dog.wav\n", column="other")


def test_captions_of_clips_from_all_kinds_of_files(tmp_path):
    files = {
        "audiocaps.csv": "audiocap_id,youtube_id,start_time,caption\n1,rZ4d8p0hAfI,30,A dog barks\n",
        "clotho.csv": "file_name,caption_1,caption_2\nrain.wav,Rain falls,It rains\n",
        "wavcaps.json": '{"num_captions_per_audio": 1, "data": [{"id": "77", "description": "?", "caption": "Wind."}]}',
        "openaqa.json": '[{"audio_id": "/d/v.flac", "task": "caption", "output": "A car."},'
        ' {"audio_id": "/d/v.flac", "task": "cla_label", "output": "Labels: Car"}]',
        "lp.json": '{"012542.wav": [{"text": "Slow piano.", "time": "0:00-10:00"}], "b.wav": "Drums."}',
        "mine.csv": "sound,words\nx.wav,A bell\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    tables = [Table(tmp_path / name) for name in files if name != "mine.csv"]
    captions = ClipCaptions([*tables, Table(tmp_path / "mine.csv", "sound", "words")])
    assert captions.choose("audio/YrZ4d8p0hAfI.flac", "?", youtube=True) == "A dog barks"
    assert {captions.choose("rain", f"What {n}?") for n in range(20)} == {"Rain falls", "It rains"}
    assert captions.choose("rain", "Same?") == captions.choose("rain", "Same?")
    assert [captions.choose(name, "?") for name in ("77", "v", "012542", "b", "x")] == [
        "Wind.",
        "A car.",
        "Slow piano.",
        "Drums.",
        "A bell",
    ]
    assert captions.choose("unknown", "?") is None
    with pytest.raises(ValueError, match=r"mine.csv has the columns 'sound', 'words', none of which"):
        ClipCaptions([Table(tmp_path / "mine.csv")])

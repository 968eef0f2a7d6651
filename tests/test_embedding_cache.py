"""Cached embeddings: each content once, of one CLAP, whole or not at all, from several processes."""

import json
import multiprocessing

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from conftest import SENTENCES, make_clap, tone
from datasets import Dataset

from training.embed import audio_cache, embed_clips, embed_examples, embed_texts, text_cache
from training.embedding_cache import EmbeddingCache, Ranks, content_keys

WIDTH = 8


def open_cache(folder, fingerprint="f" * 64, **kwargs) -> EmbeddingCache:
    return EmbeddingCache(folder, fingerprint, WIDTH, "text", **kwargs)


def number_of(text: str) -> np.ndarray:
    return np.full(WIDTH, float(text.split()[-1]), dtype=np.float32)


def fill(cache: EmbeddingCache, texts: list[str], ranks: Ranks | None = None) -> np.ndarray:
    def encode(indices):
        return np.stack([number_of(texts[i]) for i in indices])

    return cache.add(content_keys(texts), np.array([len(text) for text in texts]), encode, ranks)


def test_every_text_finds_its_own_embedding_and_repeated_ones_are_encoded_once(tmp_path):
    cache = open_cache(tmp_path)
    texts = [f"text {number % 37}" for number in range(100)]
    rows = fill(cache, texts)
    assert cache.encoded == len(cache) == 37
    assert cache.embeddings(rows)[:, 0].tolist() == [number % 37 for number in range(100)]


def test_a_second_run_encodes_nothing_and_another_mixture_only_what_is_new(tmp_path):
    fill(open_cache(tmp_path), [f"text {number}" for number in range(50)])
    again = open_cache(tmp_path)
    rows = fill(again, [f"text {number}" for number in range(20, 70)])
    assert again.encoded == 20
    assert again.embeddings(rows)[:, 3].tolist() == list(range(20, 70))
    assert open_cache(tmp_path).rows(content_keys(["text 69", "text 70"])).tolist()[1] == -1


def test_texts_are_encoded_by_length(tmp_path, monkeypatch):
    monkeypatch.setattr("training.embedding_cache.ITEMS_IN_PART", 10)
    texts = ["x" * length + " 1" for length in np.random.default_rng(0).permutation(40)]
    seen = []

    def encode(indices):
        seen.extend(len(texts[i]) for i in indices)
        return np.zeros((len(indices), WIDTH), dtype=np.float32)

    cache = open_cache(tmp_path)
    cache.add(content_keys(texts), np.array([len(text) for text in texts]), encode)
    assert seen == sorted(seen)
    assert len(list(cache.folder.glob("*.arrow"))) == 4


def test_what_was_encoded_before_a_stop_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("training.embedding_cache.ITEMS_IN_PART", 10)
    texts = [f"text {number:02}" for number in range(40)]
    calls = 0

    def stops(indices):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return np.stack([number_of(texts[i]) for i in indices])

    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path).add(content_keys(texts), np.zeros(40), stops)
    cache = open_cache(tmp_path)
    assert len(cache) == 20
    rows = fill(cache, texts)
    assert cache.encoded == 20
    assert cache.embeddings(rows)[:, 0].tolist() == list(range(40))
    assert not list(cache.folder.glob(".*"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_work(tmp_path, monkeypatch, ranks):
    monkeypatch.setattr("training.embedding_cache.ITEMS_IN_PART", 4)
    monkeypatch.setattr(Ranks, "wait", lambda self: None)
    texts = [f"text {number}" for number in range(30)]
    caches = [open_cache(tmp_path) for _ in range(ranks)]
    for index, cache in enumerate(caches):
        fill(cache, texts, Ranks(index, ranks))
    assert sum(cache.encoded for cache in caches) == 30
    assert max(cache.encoded for cache in caches) <= 30 // ranks + 4
    for cache in caches:
        cache.refresh()
        assert cache.embeddings(cache.rows(content_keys(texts)))[:, 0].tolist() == list(range(30))


def _fill_in_a_process(folder, start):
    fill(open_cache(folder), [f"text {number}" for number in range(start, start + 200)])


def test_two_processes_may_fill_one_cache(tmp_path):
    context = multiprocessing.get_context("fork")  # a spawned one would import torch first
    processes = [context.Process(target=_fill_in_a_process, args=(tmp_path, start)) for start in (0, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = open_cache(tmp_path)
    rows = cache.rows(content_keys([f"text {number}" for number in range(300)]))
    assert cache.embeddings(rows)[:, 0].tolist() == list(range(300))


def test_caches_of_different_claps_lie_side_by_side(tmp_path):
    fill(open_cache(tmp_path, "a" * 64), ["text 1"])
    other = open_cache(tmp_path, "b" * 64)
    assert len(other) == 0
    assert len(open_cache(tmp_path, "a" * 64)) == 1


def test_the_embeddings_of_another_clap_are_refused(tmp_path):
    cache = open_cache(tmp_path, "a" * 64)
    fill(cache, ["text 1"])
    # Same first characters, or a folder that was renamed.
    with pytest.raises(ValueError, match=f"clap_fingerprint '{'a' * 64}', but this run's is '{'a' * 63}b'"):
        open_cache(tmp_path, "a" * 63 + "b")
    cache.folder.rename(tmp_path / f"text-float32-{'c' * 12}")
    with pytest.raises(ValueError, match="cannot be mixed"):
        open_cache(tmp_path, "c" * 64)


@pytest.mark.parametrize("damage", ["cut", "foreign", "other width", "no JSON"])
def test_damaged_files_are_named(tmp_path, damage):
    cache = open_cache(tmp_path)
    fill(cache, ["text 1", "text 2"])
    (part,) = cache.folder.glob("*.arrow")
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-30])
    elif damage == "foreign":
        with pa.ipc.new_file(str(part), pa.schema({"x": pa.int32()})) as writer:
            writer.write_table(pa.table({"x": pa.array([1], pa.int32())}))
    elif damage == "other width":
        EmbeddingCache(tmp_path / "wide", "f" * 64, 2 * WIDTH, "text").add(
            content_keys(["a"]), np.zeros(1), lambda indices: np.zeros((1, 2 * WIDTH), dtype=np.float32)
        )
        (wide,) = (tmp_path / "wide").glob("*/*.arrow")
        part.write_bytes(wide.read_bytes())
    else:
        part = cache.folder / "cache.json"
        part.write_text("{")
    with pytest.raises(ValueError, match=part.name):
        open_cache(tmp_path)


def test_unusable_embeddings_are_refused(tmp_path):
    for bad, says in [(np.full((1, WIDTH), np.nan), "NaN"), (np.zeros((1, 3)), "shape")]:
        with pytest.raises(ValueError, match=says):
            open_cache(tmp_path).add(content_keys(["a"]), np.zeros(1), lambda indices, bad=bad: bad)
    assert len(open_cache(tmp_path)) == 0


def test_half_precision_halves_the_file_and_changes_little(tmp_path):
    clap = make_clap()
    sizes, found = {}, {}
    for dtype in ("float32", "float16"):
        cache = text_cache(tmp_path, clap, dtype)
        found[dtype] = cache.embeddings(embed_texts(SENTENCES, clap, cache))
        assert json.loads((cache.folder / "cache.json").read_text())["dtype"] == dtype
        sizes[dtype] = sum(path.stat().st_size for path in cache.folder.glob("*.arrow"))
    assert sizes["float16"] < sizes["float32"]
    np.testing.assert_allclose(found["float16"], found["float32"], atol=5e-4)


def test_texts_get_claps_own_embeddings(tmp_path):
    clap = make_clap()
    cache = text_cache(tmp_path, clap)
    rows = embed_texts([*SENTENCES, SENTENCES[0]], clap, cache)
    expected = clap.encode_text([*SENTENCES, SENTENCES[0]])
    torch.testing.assert_close(torch.from_numpy(cache.embeddings(rows)), expected)
    assert cache.encoded == len(SENTENCES)


def test_clips_get_claps_own_embeddings_by_their_content(tmp_path):
    clap = make_clap()
    paths = [tmp_path / f"{number}.wav" for number in range(4)]
    for number, path in enumerate(paths):
        soundfile.write(
            path, tone(0.2, 200 + 100 * (number % 3)), 16000, subtype="FLOAT"
        )  # the last is the first once more
    cache = audio_cache(tmp_path / "cache", clap)
    embeds = torch.from_numpy(cache.embeddings(embed_clips(paths, clap, cache)))
    assert cache.encoded == 3
    torch.testing.assert_close(embeds[1], clap.encode_audio([tone(0.2, 300)])[0])
    assert torch.equal(embeds[0], embeds[3])
    soundfile.write(paths[2], tone(0.2, 1000), 16000)
    changed = cache.embeddings(embed_clips(paths, clap, cache))
    assert cache.encoded == 4
    assert not np.allclose(changed[2], embeds[2])
    with pytest.raises(FileNotFoundError, match=r"1 of 2 clips are not there, such as .*gone\.wav"):
        embed_clips([paths[0], tmp_path / "gone.wav"], clap, cache)


def test_an_empty_text_is_an_error_and_not_a_row_of_zeros(tmp_path):
    clap = make_clap()
    with pytest.raises(ValueError, match="non-empty"):
        embed_texts(["A dog.", " "], clap, text_cache(tmp_path, clap))


def test_examples_are_embedded_by_description_or_by_clip(tmp_path):

    clap = make_clap()
    examples = Dataset.from_dict({"description": SENTENCES[:2], "audio": [None, None]})
    cache = text_cache(tmp_path, clap)
    assert cache.embeddings(embed_examples(examples, clap, cache)).shape == (2, 16)

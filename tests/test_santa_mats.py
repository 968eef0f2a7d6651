"""Santa against Eq. 6 and 7 written out in NumPy, k-means, and the memory's file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from processing_mats import SantaMemory
from processing_mats.santa_mats import SANTA_FILE_NAME, SantaOutput

DIM = 16


def unit_vectors(count: int, seed: int, dim: int = DIM) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def make_memory(size: int = 200, num_clusters: int = 7, noise_variance: float = 0.01, **kwargs) -> SantaMemory:
    texts = [f"Text {i}." for i in range(size)]
    return SantaMemory.build(
        texts, unit_vectors(size, 0), "f" * 64, num_clusters=num_clusters, noise_variance=noise_variance, **kwargs
    )


@pytest.fixture(scope="module")
def memory() -> SantaMemory:
    return make_memory()


@pytest.fixture(scope="module")
def audio_embeds() -> torch.Tensor:
    return unit_vectors(20, 1)


# -- Eq. 6 and 7 -------------------------------------------------------------------------------------------------------


def santa_by_hand(memory, z, weight, temperature, top_k, use_kmeans=True, use_memory=True, use_audio=True):
    """Eq. 6 and 7 for one embedding, in float64 and in the paper's order: cluster, L closest, softmax, mixture."""
    embeddings, centroids = memory.embeddings.double().numpy(), memory.centroids.double().numpy()
    if use_kmeans:
        closest = min(range(len(centroids)), key=lambda c: np.linalg.norm(z - centroids[c]))
        rows = range(int(memory.cluster_offsets[closest]), int(memory.cluster_offsets[closest + 1]))
    else:
        rows = range(len(embeddings))
    chosen = sorted(rows, key=lambda i: np.linalg.norm(z - embeddings[i]))[:top_k]
    weights = np.exp([z @ embeddings[i] / temperature for i in chosen])
    weights /= weights.sum()
    if not use_memory:
        return z, chosen, weights
    if not use_audio:
        weight = 1
    return (
        (1 - weight) * z + weight * sum(w * embeddings[i] for i, w in zip(chosen, weights, strict=True)),
        chosen,
        weights,
    )


PAPER = {"weight": 0.3, "temperature": 0.1, "top_k": 32}


@pytest.mark.parametrize(
    "settings",
    [
        PAPER,
        {**PAPER, "top_k": 1},
        {**PAPER, "top_k": 4},
        {**PAPER, "top_k": 1000},
        {**PAPER, "temperature": 1},
        {**PAPER, "temperature": 1 / 150},
        {**PAPER, "weight": 0},
        {**PAPER, "weight": 1},
        {**PAPER, "use_kmeans": False},
        {**PAPER, "use_kmeans": False, "top_k": 1000},
        {**PAPER, "use_memory": False},
        {**PAPER, "use_audio": False},
        {**PAPER, "use_kmeans": False, "use_audio": False},
    ],
    ids=str,
)
def test_santa_is_equation_6_and_7(memory, audio_embeds, settings):
    output = memory(audio_embeds, **settings)
    for row, z in enumerate(audio_embeds.double().numpy()):
        moved, chosen, weights = santa_by_hand(memory, z, **settings)
        used = len(chosen)
        np.testing.assert_allclose(output.embeds[row], moved, atol=1e-6)
        assert output.indices[row].tolist() == chosen + [-1] * (output.indices.shape[1] - used)
        np.testing.assert_allclose(output.weights[row, :used], weights, atol=1e-6 / settings["temperature"])
        assert (output.weights[row, used:] == 0).all()


def test_the_defaults_are_the_papers(memory, audio_embeds):
    assert torch.equal(memory(audio_embeds).embeds, memory(audio_embeds, **PAPER).embeds)


def test_clusters_smaller_and_larger_than_top_k_are_both_met_above(memory, audio_embeds):
    met = memory(audio_embeds, **PAPER).indices
    assert (met < 0).any()
    assert (met >= 0).all(dim=1).any()


def test_a_batch_gives_what_each_embedding_gives_alone(memory, audio_embeds):
    batch = memory(audio_embeds)
    for row, embed in enumerate(audio_embeds):
        alone = memory(embed[None])
        torch.testing.assert_close(alone.embeds[0], batch.embeds[row], atol=1e-6, rtol=0)
        used = alone.indices.shape[1]
        assert alone.indices[0].tolist() == batch.indices[row, :used].tolist()


def test_weights_are_positive_and_sum_to_1(memory, audio_embeds):
    output = memory(audio_embeds)
    torch.testing.assert_close(output.weights.sum(1), torch.ones(len(audio_embeds)))
    assert ((output.weights > 0) == (output.indices >= 0)).all()


def test_no_audio_means_that_only_the_choice_depends_on_it(memory, audio_embeds):
    assert torch.equal(memory(audio_embeds, use_audio=False).embeds, memory(audio_embeds, weight=1).embeds)


def test_an_audio_that_is_in_memory_leans_on_itself(memory):
    output = memory(memory.embeddings[[3, 70]], use_kmeans=False)
    assert output.indices[:, 0].tolist() == [3, 70]
    assert (output.weights.argmax(1) == 0).all()


def test_equal_memories_are_taken_in_their_order():
    repeated = SantaMemory(torch.ones(6, 2), torch.ones(1, 2), torch.tensor([0, 6]), list("abcdef"), "f", 0.0, 0)
    assert repeated(torch.ones(1, 2), top_k=3).indices.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_result_has_the_precision_of_the_embeddings(memory, audio_embeds, dtype):
    output = memory(audio_embeds.to(dtype))
    assert output.embeds.dtype == dtype
    torch.testing.assert_close(output.embeds.float(), memory(audio_embeds).embeds, atol=2e-2, rtol=0)


@pytest.mark.parametrize("use_kmeans", [True, False])
def test_no_embeddings_give_no_embeddings(memory, use_kmeans):
    output = memory(torch.empty(0, DIM), use_kmeans=use_kmeans)
    assert output.embeds.shape == (0, DIM)
    assert memory.explain(output) == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": -0.1}, r"weight \(lambda\) is -0.1, expected 0 to 1"),
        ({"weight": 1.1}, r"weight \(lambda\) is 1.1, expected 0 to 1"),
        ({"temperature": 0}, r"temperature \(tau\) is 0, expected a positive"),
        ({"temperature": float("nan")}, r"temperature \(tau\) is nan, expected a positive"),
        ({"top_k": 0}, r"top_k \(L\) is 0, expected at least 1"),
    ],
)
def test_settings_outside_of_the_equations_are_refused(memory, audio_embeds, kwargs, message):
    with pytest.raises(ValueError, match=message):
        memory(audio_embeds, **kwargs)


@pytest.mark.parametrize("shape", [(DIM,), (2, DIM + 1), (1, 2, DIM)])
def test_embeddings_of_another_shape_are_refused(memory, shape):
    with pytest.raises(ValueError, match=r"audio_embeds has shape .*, expected \(batch, 16\)"):
        memory(torch.zeros(shape))


# -- Evidence ----------------------------------------------------------------------------------------------------------


def test_evidence_names_each_used_text_with_its_weight_heaviest_first(memory, audio_embeds):
    output = memory(audio_embeds)
    for evidence, indices, weights in zip(memory.explain(output), output.indices, output.weights, strict=True):
        listed = [item["weight"] for item in evidence]
        assert listed == sorted(listed, reverse=True)
        assert sum(listed) == pytest.approx(1)
        expected = {memory.texts[i]: w for i, w in zip(indices.tolist(), weights.tolist(), strict=True) if i >= 0}
        assert {item["text"]: item["weight"] for item in evidence} == expected


def test_evidence_is_sorted_by_weight_not_by_distance():
    memory = SantaMemory(torch.eye(3), torch.ones(1, 3), torch.tensor([0, 3]), ["a", "b", "c"], "f", 0.0, 0)
    output = SantaOutput(torch.zeros(1, 3), torch.tensor([[2, 0, 1, -1]]), torch.tensor([[0.25, 0.125, 0.625, 0]]))
    assert memory.explain(output) == [
        [{"text": "b", "weight": 0.625}, {"text": "c", "weight": 0.25}, {"text": "a", "weight": 0.125}]
    ]


# -- Building ----------------------------------------------------------------------------------------------------------


def test_well_separated_texts_form_their_own_clusters():
    groups = torch.eye(DIM)[:5].repeat_interleave(8, dim=0)[
        torch.randperm(40, generator=torch.Generator().manual_seed(0))
    ]
    embeds = F.normalize(groups + 0.05 * unit_vectors(40, 2), dim=-1)
    texts = [f"group {group.argmax()}" for group in groups]
    memory = SantaMemory.build(texts, embeds, "f", num_clusters=5, noise_variance=0)
    assert memory.cluster_offsets.tolist() == [0, 8, 16, 24, 32, 40]
    for cluster in range(5):
        assert len(set(memory.texts[8 * cluster : 8 * cluster + 8])) == 1
    distances = np.linalg.norm(memory.embeddings[:, None] - memory.centroids[None], axis=-1)
    assert distances.argmin(1).tolist() == [row // 8 for row in range(40)]


def test_a_centroid_is_the_mean_of_its_cluster(memory):
    for cluster, (start, end) in enumerate(zip(memory.cluster_offsets, memory.cluster_offsets[1:], strict=False)):
        torch.testing.assert_close(memory.centroids[cluster], memory.embeddings[start:end].mean(0))


def test_texts_stay_with_their_embeddings():
    embeds, texts = unit_vectors(50, 3), [str(i) for i in range(50)]
    memory = SantaMemory.build(texts, embeds, "f", num_clusters=6, noise_variance=0)
    assert sorted(memory.texts, key=int) == texts
    assert torch.equal(memory.embeddings, F.normalize(embeds[[int(text) for text in memory.texts]], dim=-1))


@pytest.mark.parametrize("variance", [0.0, 0.015, 0.25])
def test_the_noise_has_the_variance_that_was_asked_for(variance):
    embeds = unit_vectors(400, 4, dim=256)
    texts = [str(i) for i in range(400)]
    memory = SantaMemory.build(texts, embeds, "f", num_clusters=1, noise_variance=variance, renormalize=False)
    noise = memory.embeddings - embeds[[int(text) for text in memory.texts]]
    assert noise.var().item() == pytest.approx(variance, rel=0.02)
    assert abs(noise.mean().item()) < 0.01


@pytest.mark.parametrize("renormalize", [True, False])
def test_renormalize_says_whether_noisy_embeddings_are_unit_vectors(renormalize):
    norms = make_memory(renormalize=renormalize, noise_variance=0.05).embeddings.norm(dim=-1)
    assert torch.allclose(norms, torch.ones(200)) is renormalize


def test_the_same_seed_makes_the_same_memory_and_another_another(memory):
    torch.manual_seed(99)
    again, other = make_memory(seed=0), make_memory(seed=1)
    assert torch.equal(again.embeddings, memory.embeddings)
    assert torch.equal(again.centroids, memory.centroids)
    assert again.texts == memory.texts
    assert not torch.equal(other.embeddings, memory.embeddings)


def test_large_memories_are_clustered_by_mini_batches_and_just_as_valid(monkeypatch):
    monkeypatch.setattr("processing_mats.santa_mats.MINI_BATCH_KMEANS_ABOVE", 100)
    found, again = make_memory(), make_memory()
    assert 1 < len(found.centroids) <= 7
    assert torch.equal(found.cluster_offsets, again.cluster_offsets)
    assert sorted(found.texts) == sorted(make_memory(100).texts + [f"Text {i}." for i in range(100, 200)])


def test_building_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    make_memory(20, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("num_clusters", [1, 10])
def test_one_cluster_and_one_text_a_cluster_are_allowed(num_clusters):
    memory = make_memory(10, num_clusters)
    assert memory.cluster_offsets.tolist() == list(range(0, 11, 10 // num_clusters))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_texts_that_repeat_leave_no_empty_cluster():
    embeds = torch.eye(DIM)[[0, 0, 0, 1, 1, 1]]
    memory = SantaMemory.build(list("aaabbb"), embeds, "f", num_clusters=4, noise_variance=0)
    assert memory.cluster_offsets.tolist() == [0, 3, 6]
    assert memory(embeds[:1]).indices.tolist() == [[0, 1, 2]] or memory(embeds[:1]).indices.tolist() == [[3, 4, 5]]


@pytest.mark.parametrize(
    ("texts", "kwargs", "message"),
    [
        (SENTENCES[:9], {}, "Got 9 texts but 10 embeddings"),
        (SENTENCES, {"num_clusters": 11}, "num_clusters is 11, expected 1 to 10"),
        (SENTENCES, {"num_clusters": 0}, "num_clusters is 0, expected 1 to 10"),
        (SENTENCES, {"noise_variance": -0.01}, "cannot be negative: -0.01"),
    ],
)
def test_a_memory_that_cannot_be_built_is_refused(texts, kwargs, message):
    with pytest.raises(ValueError, match=message):
        SantaMemory.build(texts, unit_vectors(10, 0), "f", **{"num_clusters": 2, **kwargs})


def test_embeddings_with_nan_are_refused():
    embeds = unit_vectors(4, 0)
    embeds[2, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        SantaMemory(embeds, embeds[:1], torch.tensor([0, 4]), list("abcd"), "f", 0.0, 0)


def test_its_description_says_what_it_is(memory):
    assert len(memory) == 200
    assert repr(memory) == (
        "SantaMemory(200 texts, 7 clusters, 16 dimensions, noise variance 0.01, seed 0, CLAP ffffffffffff)"
    )


# -- The file ----------------------------------------------------------------------------------------------------------


def test_saving_and_loading_keeps_everything_byte_by_byte(tmp_path):
    texts = ["Ein Hühnerhof.", "鶏が鳴く", "🐓🐔", "", "tab\tand\nnew line", "\0", "e\u0301 is not é"] + [""] * 3
    memory = SantaMemory.build(texts, unit_vectors(10, 0), "a" * 64, num_clusters=3, noise_variance=0.1, seed=2**31)
    path = memory.save_pretrained(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / SANTA_FILE_NAME
    loaded = SantaMemory.load(path)
    assert loaded.texts == memory.texts
    for name in ("embeddings", "centroids", "cluster_offsets"):
        assert torch.equal(getattr(loaded, name), getattr(memory, name))
        assert getattr(loaded, name).dtype == getattr(memory, name).dtype
    assert (loaded.clap_fingerprint, loaded.noise_variance, loaded.seed) == ("a" * 64, 0.1, 2**31)
    assert loaded.save_pretrained(tmp_path / "again").read_bytes() == path.read_bytes()


def test_the_same_memory_is_always_the_same_file(memory, tmp_path):
    assert len({memory.save_pretrained(tmp_path / str(i)).read_bytes() for i in range(8)}) == 1


def test_a_memory_of_empty_texts_survives(tmp_path):
    memory = SantaMemory.build(["", ""], unit_vectors(2, 0), "f", num_clusters=1)
    assert SantaMemory.load(memory.save_pretrained(tmp_path)).texts == ["", ""]


def rewritten(memory: SantaMemory, folder, header: dict | str | None = None, **tensors) -> Path:
    """The memory's file with some of its tensors (`None`: left out) and fields of its header changed."""
    path = memory.save_pretrained(folder)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["santa_memory"])
    if not isinstance(header, str):
        merged = {**metadata, **(header or {})}
        header = json.dumps({key: value for key, value in merged.items() if value is not None})
    contents = {key: value for key, value in {**load_file(path), **tensors}.items() if value is not None}
    save_file({key: value.contiguous() for key, value in contents.items()}, path, {"santa_memory": header})
    return path


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ({"format_version": 2}, {}, "it has format 2, this version of MATS reads up to 1; a newer one"),
        ({"format_version": 0}, {}, "it has format 0"),
        ({"format_version": "1"}, {}, "it has format 1"),
        ({"format_version": None}, {}, "format_version"),
        ({"clap_fingerprint": None}, {}, "clap_fingerprint"),
        ({"noise_variance": "much"}, {}, "much"),
        ({"seed": float("inf")}, {}, "infinity"),
        ("{", {}, "Expecting"),
        ("[]", {}, "list indices"),
        ({}, {"centroids": None}, "it lacks centroids"),
        ({}, {"text_bytes": None, "text_offsets": None}, "it lacks text_bytes, text_offsets"),
        ({}, {"embeddings": torch.zeros(200, DIM + 1)}, r"Centroids have shape \(7, 16\), expected \(clusters, 17\)"),
        ({}, {"embeddings": torch.zeros(DIM)}, r"got shape \(16,\)"),
        ({}, {"embeddings": torch.zeros(0, DIM)}, r"got shape \(0, 16\)"),
        ({}, {"embeddings": torch.tensor(0.0)}, "0-d tensor"),
        ({}, {"embeddings": torch.full((200, DIM), torch.nan)}, "NaN or infinite"),
        ({}, {"centroids": torch.full((7, DIM), torch.inf)}, "NaN or infinite"),
        ({}, {"cluster_offsets": torch.arange(8)}, "must rise from 0 to 200 in 7 steps"),
        ({}, {"cluster_offsets": torch.tensor([0, 50, 40, 60, 70, 80, 90, 200])}, "must rise from 0 to 200"),
        ({}, {"cluster_offsets": torch.tensor([0, 50, 50, 60, 70, 80, 90, 200])}, "without empty clusters"),
        ({}, {"cluster_offsets": torch.tensor([-1, 50, 55, 60, 70, 80, 90, 200])}, "must rise from 0 to 200"),
        ({}, {"cluster_offsets": torch.tensor([0, 200])}, "in 7 steps"),
        ({}, {"text_offsets": torch.arange(10)}, "200 embeddings but 9 texts"),
        ({}, {"text_offsets": torch.tensor([0, 10**9])}, "text offsets do not fit"),
        ({}, {"text_offsets": torch.tensor([5, 6])}, "text offsets do not fit"),
        ({}, {"text_offsets": torch.tensor([0, 9, 3])}, "text offsets do not fit"),
        ({}, {"text_offsets": torch.tensor([], dtype=torch.int64)}, "text offsets do not fit"),
        ({}, {"text_bytes": torch.full((5000,), 0xFF, dtype=torch.uint8)}, "can't decode byte 0xff"),
    ],
)
def test_a_damaged_memory_is_refused_and_its_file_named(memory, tmp_path, header, tensors, message):
    path = rewritten(memory, tmp_path, header, **tensors)
    with pytest.raises(ValueError, match=message) as caught:
        SantaMemory.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 100, 3000, -1])
def test_a_truncated_memory_is_refused_and_its_file_named(memory, tmp_path, kept):
    path = memory.save_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is not a readable safetensors file") as caught:
        SantaMemory.load(path)
    assert str(path) in str(caught.value)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / SANTA_FILE_NAME
    save_file({"embeddings": torch.zeros(2, 2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="is a safetensors file but not a Santa memory"):
        SantaMemory.load(path)
    path.write_text("A poem.")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        SantaMemory.load(path)
    with pytest.raises(FileNotFoundError, match="No such Santa memory"):
        SantaMemory.load(tmp_path / "other.safetensors")


def test_flipped_bytes_either_load_or_are_refused_by_name(memory, tmp_path):
    whole = make_memory(12, 3).save_pretrained(tmp_path).read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    generator = np.random.default_rng(0)
    path = tmp_path / "flipped.safetensors"
    refused = 0
    for reach in (header_end, len(whole)) * 100:
        damaged = bytearray(whole)
        damaged[generator.integers(reach)] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            SantaMemory.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("earlier", [True, False])
def test_a_save_that_runs_out_of_space_leaves_no_half_file(memory, tmp_path, earlier):
    old = make_memory(10, 2)
    if earlier:
        old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    resource = pytest.importorskip("resource")  # POSIX
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # bytes a file may have
    try:
        with pytest.raises((SafetensorError, OSError)):
            memory.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_that_cannot_take_its_name_leaves_nothing_behind(memory, tmp_path):
    (tmp_path / SANTA_FILE_NAME / "a folder in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=SANTA_FILE_NAME):
        memory.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SANTA_FILE_NAME]


def test_a_memory_is_replaced_as_a_whole_while_it_is_being_read(memory, tmp_path):
    path = make_memory(10, 2).save_pretrained(tmp_path)
    loaded = SantaMemory.load(path)
    memory.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    assert torch.equal(loaded.embeddings, make_memory(10, 2).embeddings)


def test_a_memory_in_halves_is_computed_in_float32_and_keeps_its_type(tmp_path):
    texts = [f"text {number}" for number in range(50)]
    embeds = torch.nn.functional.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    whole, half = (
        SantaMemory.build(texts, embeds, "clap", num_clusters=5, noise_variance=0, dtype=dtype)
        for dtype in (torch.float32, torch.float16)
    )
    output = half(embeds[:7])
    assert output.embeds.dtype == torch.float32
    torch.testing.assert_close(output.embeds, whole(embeds[:7]).embeds, atol=1e-3, rtol=0)
    again = SantaMemory.load(half.save_pretrained(tmp_path))
    assert again.embeddings.dtype == torch.float16
    assert torch.equal(again(embeds[:7]).embeds, output.embeds)


def test_a_memory_of_whole_numbers_is_refused():
    numbers = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"are floats, got torch\.int64"):
        SantaMemory(numbers, numbers[:1].float(), torch.tensor([0, 2]), ["a", "b"], "clap", 0.0, 0)

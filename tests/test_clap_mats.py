"""CLAP as an encoder: embeddings that depend on nothing but the sound or text, and an identity of the weights."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, make_clap, make_laion_clap, make_tokenizer, tone
from transformers import GPT2Config, GPT2Model

from processing_mats import ClapEncoder, cut_windows

# The tiny LAION extractor has more mel filters than its tiny spectrum can tell apart.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter")

KINDS = {
    "msclap": make_clap,
    "laion": make_laion_clap,
    "laion with fusion": lambda: make_laion_clap(enable_fusion=True),
}
RATE = 16000


@pytest.fixture(scope="module", params=list(KINDS))
def clap(request) -> ClapEncoder:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def sounds() -> list[np.ndarray]:
    """From a tenth of a window to almost four."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 2 * RATE).astype(np.float32)
    medley = np.concatenate([tone(1.3, 300), tone(1.0, 2500), tone(1.4, 700)])
    return [tone(1.0), tone(0.1, 900), medley, noise, tone(2.0, 2000), noise[:5000]]


def assert_same(found: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


# -- Audio -------------------------------------------------------------------------------------------------------------


def test_audio_embeddings_are_unit_vectors_in_float32(clap, sounds):
    embeds = clap.encode_audio(sounds)
    assert embeds.shape == (6, clap.embed_dim) == (6, 16)
    assert embeds.dtype == torch.float32
    assert not embeds.requires_grad
    assert_same(embeds.norm(dim=-1), torch.ones(6))
    assert torch.pdist(embeds).min() > 1e-3  # what is compared below is not the same vector throughout


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_audio_embeddings_do_not_depend_on_the_batch_size(clap, sounds, batch_size):
    assert_same(clap.encode_audio(sounds, batch_size), clap.encode_audio(sounds))


def test_audio_embeddings_do_not_depend_on_order_or_company(clap, sounds):
    together = clap.encode_audio(sounds)
    assert_same(clap.encode_audio(sounds[::-1]).flip(0), together)
    for sound, expected in zip(sounds, together, strict=True):
        assert_same(clap.encode_audio([sound])[0], expected)
        assert_same(clap.encode_audio([sounds[3], sound, sound])[1:], expected.expand(2, -1))


def test_audio_embeddings_do_not_depend_on_chance(clap, sounds):
    found = []
    for seed in (0, 1):
        np.random.seed(seed)
        torch.manual_seed(seed)
        found.append(clap.encode_audio(sounds))
    assert torch.equal(found[0], found[1])


def test_a_long_sound_is_the_normalised_mean_of_its_windows(clap, sounds):
    windows = cut_windows(sounds[2], clap.window_samples)
    assert len(windows) == 4
    alone = torch.cat([clap.encode_audio([window]) for window in windows])
    assert torch.pdist(alone).max() > 1e-4
    assert_same(clap.encode_audio([sounds[2]])[0], F.normalize(alone.mean(0), dim=0))


def test_a_short_sound_is_its_own_repetition(clap, sounds):
    assert_same(clap.encode_audio([sounds[1]]), clap.encode_audio([np.tile(sounds[1], 10)]))


def test_a_random_crop_is_drawn_by_seed(clap, sounds):
    crop = cut_windows(sounds[3], RATE, "random", np.random.default_rng(7))[0]
    embeds = clap.encode_audio([sounds[3]], long_audio="random", seed=7)
    assert_same(embeds, clap.encode_audio([crop]))
    assert not torch.allclose(clap.encode_audio([sounds[3]], long_audio="random", seed=8), embeds, atol=1e-4)


@pytest.mark.parametrize(("long_audio", "message"), [("random", "needs a seed"), ("error", "the window holds 16000")])
def test_what_the_mode_forbids_is_refused(clap, sounds, long_audio, message):
    with pytest.raises(ValueError, match=message):
        clap.encode_audio(sounds, long_audio=long_audio)


def test_no_sounds_and_no_texts_give_no_embeddings(clap):
    assert clap.encode_audio([]).shape == clap.encode_text([]).shape == (0, 16)


def test_rate_and_window_are_the_feature_extractors(clap):
    assert clap.sampling_rate == RATE
    assert clap.window_samples == RATE


# -- Text --------------------------------------------------------------------------------------------------------------


def test_text_embeddings_are_unit_vectors_in_float32(clap):
    embeds = clap.encode_text(SENTENCES)
    assert embeds.shape == (10, 16)
    assert embeds.dtype == torch.float32
    assert_same(embeds.norm(dim=-1), torch.ones(10))
    assert torch.pdist(embeds).min() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_texts_keep_their_order_though_they_are_batched_by_length(clap, batch_size):
    assert_same(
        clap.encode_text(SENTENCES, batch_size), torch.cat([clap.encode_text([sentence]) for sentence in SENTENCES])
    )
    assert_same(clap.encode_text(SENTENCES[::-1], batch_size).flip(0), clap.encode_text(SENTENCES))


def test_padding_beside_a_long_text_changes_nothing(clap):
    long = "Q" * (clap.max_text_tokens - 4)
    assert_same(clap.encode_text(["A dog.", long])[0], clap.encode_text(["A dog."])[0])


def longest_text(clap: ClapEncoder) -> str:
    """As many letters as fit; the tokenizer knows no two of them as one token."""
    suffix = getattr(clap.model.config, "text_suffix", "")
    room = clap.max_text_tokens - (len(clap.tokenizer(suffix)["input_ids"]) if suffix else 0)
    return ("QZJX" * room)[:room]


def test_the_longest_text_fits_and_one_token_more_is_refused(clap):
    longest = longest_text(clap)
    assert torch.isfinite(clap.encode_text([longest])).all()
    with pytest.raises(ValueError, match=rf"2 texts are longer than the {clap.max_text_tokens} tokens") as caught:
        clap.encode_text(["A dog.", longest + "Q", longest * 2])
    assert f"the first, number 1, has {clap.max_text_tokens + 1}: 'QZJX" in str(caught.value)
    assert "truncation=True" in str(caught.value)


def test_truncation_cuts_the_text_and_keeps_the_suffix(clap):
    longest = longest_text(clap)
    found = clap.encode_text(["A dog.", longest + "QZJX" * 9], truncation=True)
    assert_same(found, clap.encode_text(["A dog.", longest]))


@pytest.mark.parametrize("text", ["", "  \n", None, 7])
def test_an_empty_text_is_refused(clap, text):
    with pytest.raises(ValueError, match=r"Text 1 is .*, expected a non-empty string"):
        clap.encode_text(["A dog.", text])


# -- Identity ----------------------------------------------------------------------------------------------------------


def test_saving_and_loading_keeps_embeddings_and_fingerprint(clap, sounds, tmp_path):
    clap.save_pretrained(tmp_path)
    loaded = ClapEncoder.from_pretrained(tmp_path)
    assert type(loaded.model) is type(clap.model)
    assert torch.equal(loaded.encode_audio(sounds), clap.encode_audio(sounds))
    assert torch.equal(loaded.encode_text(SENTENCES), clap.encode_text(SENTENCES))
    assert loaded.fingerprint == clap.fingerprint
    assert loaded.max_text_tokens == clap.max_text_tokens


def test_the_fingerprint_survives_bfloat16_on_disk_and_in_memory(clap, tmp_path):
    halves = ClapEncoder(copy.deepcopy(clap.model).bfloat16(), clap.feature_extractor, clap.tokenizer)
    assert halves.fingerprint == clap.fingerprint
    halves.save_pretrained(tmp_path)
    assert ClapEncoder.from_pretrained(tmp_path).model.dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        assert ClapEncoder.from_pretrained(tmp_path, dtype=dtype).fingerprint == clap.fingerprint


def test_the_fingerprint_survives_float16_on_disk(clap, tmp_path):
    halves = ClapEncoder(clap.model, clap.feature_extractor, clap.tokenizer, storage_dtype=torch.float16)
    halves.save_pretrained(tmp_path)
    loaded = ClapEncoder.from_pretrained(tmp_path)
    assert loaded.model.dtype == torch.float32
    assert loaded.fingerprint == halves.fingerprint
    for dtype in (torch.bfloat16, torch.float16):
        assert ClapEncoder.from_pretrained(tmp_path, dtype=dtype).fingerprint == halves.fingerprint
    loaded.save_pretrained(tmp_path / "again")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / weights).read_bytes()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_float16_is_refused_where_it_would_change_the_identity(tmp_path, stored):
    clap = make_clap()
    ClapEncoder(clap.model, clap.feature_extractor, clap.tokenizer, stored).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"stored in {stored}, and float16 would change its identity: load it in"):
        ClapEncoder.from_pretrained(tmp_path, dtype=torch.float16)


def test_the_fingerprint_tells_other_weights_apart(clap):
    assert len(clap.fingerprint) == 64
    changed = copy.deepcopy(clap.model)
    next(weight for weight in changed.parameters() if weight.ndim > 1).data.view(-1)[0] += 0.1
    assert ClapEncoder(changed, clap.feature_extractor, clap.tokenizer).fingerprint != clap.fingerprint


def test_the_fingerprint_is_that_of_the_seed():
    assert make_clap(0).fingerprint == make_clap(0).fingerprint
    assert make_clap(0).fingerprint != make_clap(1).fingerprint


def test_a_subfolder_is_read(tmp_path):
    clap = make_clap()
    clap.save_pretrained(tmp_path / "clap")
    assert ClapEncoder.from_pretrained(tmp_path, subfolder="clap").fingerprint == clap.fingerprint


def test_bfloat16_is_close_to_float32(sounds):
    clap = make_clap()
    halves = ClapEncoder(copy.deepcopy(clap.model).bfloat16(), clap.feature_extractor, clap.tokenizer)
    assert halves.encode_audio(sounds).dtype == torch.float32
    assert (halves.encode_audio(sounds) * clap.encode_audio(sounds)).sum(-1).min() > 0.99
    assert (halves.encode_text(SENTENCES) * clap.encode_text(SENTENCES)).sum(-1).min() > 0.99


def test_a_loaded_clap_is_frozen_and_in_evaluation_mode(tmp_path):
    make_clap().save_pretrained(tmp_path)
    model = ClapEncoder.from_pretrained(tmp_path).model
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_in_training_is_asked_in_between_and_left_as_it_was(clap, sounds):
    model = copy.deepcopy(clap.model).train().requires_grad_(True)
    model.text_model.eval()
    modes = [module.training for module in model.modules()]
    encoder = ClapEncoder(model, clap.feature_extractor, clap.tokenizer)
    assert torch.equal(encoder.encode_audio(sounds), clap.encode_audio(sounds))
    assert torch.equal(encoder.encode_text(SENTENCES), clap.encode_text(SENTENCES))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_embeddings_can_be_trained_on(clap, sounds):
    head = torch.nn.Linear(16, 1)
    for embeds in (clap.encode_audio(sounds[:1]), clap.encode_text(SENTENCES)):
        head(embeds).sum().backward()
    assert head.weight.grad.any()


def test_a_model_that_is_no_clap_is_refused_by_name(tmp_path):
    GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a GPT2Model, which is no CLAP: it has no get_audio_features"):
        ClapEncoder.from_pretrained(tmp_path)


def test_what_a_call_left_in_the_tokenizer_is_not_saved(tmp_path):
    encoder = make_clap()
    encoder.save_pretrained(tmp_path / "before")
    encoder.tokenizer(["a", "a longer text"], truncation=True, max_length=5)
    encoder.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("before", "after"))
    assert before == after

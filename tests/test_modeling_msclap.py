"""CLAP 2023's own parts against plain numpy, and the promises that its embeddings keep."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertModel

from configuration_mats import MsClapConfig
from modeling_mats import MsClapModel
from modeling_mats.modeling_msclap import MsClapProjection, pool_text

AUDIO = {
    "spec_size": 64,
    "num_mel_bins": 16,
    "window_size": 4,
    "depths": [2, 2],
    "num_attention_heads": [2, 4],
    "patch_embeds_hidden_size": 8,
    "hidden_size": 16,
    "hidden_dropout_prob": 0.0,
}
GPT2 = {"vocab_size": 50, "n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}
LENGTHS = (1, 9, 4, 30)


def make_clap(**kwargs) -> MsClapModel:
    torch.manual_seed(0)
    config = MsClapConfig(**{"audio_config": AUDIO, "text_config": GPT2, "projection_dim": 12, **kwargs})
    return MsClapModel(config).eval()


@pytest.fixture(scope="module")
def clap() -> MsClapModel:
    return make_clap()


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """Four spectrograms in dB, `(4, 1, 200, 16)`."""
    return -30 + 20 * torch.randn(4, 1, 200, 16, generator=torch.Generator().manual_seed(0))


def padded(length: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Texts of `LENGTHS` random tokens, padded to `length`; id 0 is both padding and an ordinary token."""
    rng = np.random.default_rng(0)
    ids, mask = np.zeros((2, len(LENGTHS), length), np.int64)
    for row, count in enumerate(LENGTHS):
        place = slice(0, count) if side == "right" else slice(length - count, length)
        ids[row, place], mask[row, place] = rng.integers(0, 50, count), 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def project(projection: MsClapProjection, x: np.ndarray) -> np.ndarray:
    """`LN(l1(x) + l2(gelu(l1(x))))` in float64."""
    first = x @ to_numpy(projection.linear1.weight).T
    gelu = first * 0.5 * (1 + np.vectorize(math.erf)(first / np.sqrt(2)))
    total = first + gelu @ to_numpy(projection.linear2.weight).T
    centred = total - total.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normed * to_numpy(projection.layer_norm.weight) + to_numpy(projection.layer_norm.bias)


def test_projection_is_msclaps_formula():
    torch.manual_seed(0)
    projection = MsClapProjection(7, 5, dropout=0.5).eval()
    with torch.no_grad():
        projection.layer_norm.weight.uniform_(0.5, 2)
        projection.layer_norm.bias.uniform_(-1, 1)
        x = torch.randn(3, 7)
        np.testing.assert_allclose(projection(x).numpy(), project(projection, to_numpy(x)), atol=1e-6)
    assert {name for name, _ in projection.named_parameters()} == {
        "linear1.weight",
        "linear2.weight",
        "layer_norm.weight",
        "layer_norm.bias",
    }


def test_projection_drops_the_second_branch_only():
    torch.manual_seed(0)
    projection = MsClapProjection(7, 5, dropout=1.0).train()
    x = torch.randn(3, 7)
    assert torch.equal(projection(x), projection.layer_norm(projection.linear1(x)))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["last_token", "first_token", "mean"])
def test_pooling(pooling, side):
    mask = padded(30, side)["attention_mask"]
    hidden = torch.randn(4, 30, 6, generator=torch.Generator().manual_seed(0))
    rows = [hidden[row].numpy()[mask[row].numpy() == 1] for row in range(4)]
    expected = {
        "last_token": [tokens[-1] for tokens in rows],
        "first_token": [tokens[0] for tokens in rows],
        "mean": [tokens.mean(0) for tokens in rows],
    }[pooling]
    np.testing.assert_allclose(pool_text(hidden, mask, pooling).numpy(), np.stack(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "text_config"),
    [("last_token", GPT2), ("mean", GPT2), ("first_token", BERT), ("mean", BERT)],
)
@torch.no_grad()
def test_text_features_are_tower_pooling_projection_norm(pooling, text_config):
    clap = make_clap(text_pooling=pooling, text_config=text_config)
    tokens = padded(30)
    hidden = clap.text_model(**tokens).last_hidden_state
    rows = []
    for row, count in enumerate(LENGTHS):
        states = to_numpy(hidden[row, :count])
        rows.append({"last_token": states[-1], "first_token": states[0], "mean": states.mean(0)}[pooling])
    expected = project(clap.text_projection, np.stack(rows))
    plain = clap.get_text_features(**tokens, normalize=False)
    np.testing.assert_allclose(plain.pooler_output.numpy(), expected, atol=1e-5)
    assert torch.equal(plain.last_hidden_state, hidden)
    unit = clap.get_text_features(**tokens).pooler_output.numpy()
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


@torch.no_grad()
def test_audio_features_are_tower_projection_norm(clap, features):
    expected = project(clap.audio_projection, to_numpy(clap.audio_model(features).pooler_output))
    plain = clap.get_audio_features(features, normalize=False).pooler_output.numpy()
    np.testing.assert_allclose(plain, expected, atol=1e-5)
    unit = clap.get_audio_features(features).pooler_output.numpy()
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    assert clap.get_audio_features(features, return_dict=False)[1].shape == (4, 12)


@torch.no_grad()
def test_padding_to_77_changes_nothing(clap):
    dynamic = clap.get_text_features(**padded(30)).pooler_output
    fixed = clap.get_text_features(**padded(77)).pooler_output
    np.testing.assert_allclose(dynamic.numpy(), fixed.numpy(), atol=1e-6)


@torch.no_grad()
def test_left_padding_changes_nothing_given_the_positions(clap):
    tokens = padded(30, side="left")
    positions = (tokens["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    left = clap.get_text_features(**tokens, position_ids=positions).pooler_output
    np.testing.assert_allclose(left.numpy(), clap.get_text_features(**padded(30)).pooler_output.numpy(), atol=1e-6)


@torch.no_grad()
def test_an_absent_mask_attends_to_everything(clap):
    ids = padded(30)["input_ids"]
    with_mask = clap.get_text_features(ids, torch.ones_like(ids)).pooler_output
    assert torch.equal(clap.get_text_features(ids).pooler_output, with_mask)
    assert not torch.allclose(with_mask, clap.get_text_features(**padded(30)).pooler_output, atol=1e-3)


@torch.no_grad()
def test_embeddings_do_not_depend_on_the_batch(clap, features):
    texts = padded(30)
    together = clap.get_audio_features(features).pooler_output, clap.get_text_features(**texts).pooler_output
    for row, count in enumerate(LENGTHS):
        audio = clap.get_audio_features(features[row : row + 1]).pooler_output[0]
        text = clap.get_text_features(texts["input_ids"][row : row + 1, :count]).pooler_output[0]
        np.testing.assert_allclose(audio.numpy(), together[0][row].numpy(), atol=1e-5)
        np.testing.assert_allclose(text.numpy(), together[1][row].numpy(), atol=1e-6)
    for embeds in together:  # four inputs, four embeddings
        assert (torch.cdist(embeds, embeds) + torch.eye(4)).min() > 1e-3


@torch.no_grad()
def test_logits_and_contrastive_loss(clap, features):
    tokens = padded(30)
    outputs = clap(input_features=features, **tokens, return_loss=True)
    audio = to_numpy(clap.get_audio_features(features).pooler_output)
    text = to_numpy(clap.get_text_features(**tokens).pooler_output)
    logits = audio @ text.T / 0.07
    np.testing.assert_allclose(outputs.logits_per_audio.numpy(), logits, atol=1e-4)
    np.testing.assert_allclose(outputs.logits_per_text.numpy(), logits.T, atol=1e-4)
    np.testing.assert_allclose(outputs.audio_embeds.numpy(), audio, atol=1e-6)
    np.testing.assert_allclose(outputs.text_embeds.numpy(), text, atol=1e-6)
    by_audio = -np.log(np.exp(logits).diagonal() / np.exp(logits).sum(1)).mean()
    by_text = -np.log(np.exp(logits).diagonal() / np.exp(logits).sum(0)).mean()
    np.testing.assert_allclose(outputs.loss.item(), (by_audio + by_text) / 2, rtol=1e-4)


def test_the_loss_reaches_every_parameter(features):
    clap = make_clap(projection_dropout=0.0)
    clap(input_features=features, **padded(30), return_loss=True).loss.backward()
    without = [name for name, parameter in clap.named_parameters() if parameter.grad is None]
    assert without == []


@torch.no_grad()
def test_unpaired_batches_give_logits_but_no_loss(clap, features):
    outputs = clap(input_features=features[:3], **padded(30))
    assert outputs.logits_per_audio.shape == (3, 4)
    assert outputs.loss is None
    with pytest.raises(ValueError, match="got 3 audios and 4 texts"):
        clap(input_features=features[:3], **padded(30), return_loss=True)


@pytest.mark.parametrize("text_config", [GPT2, BERT])
@torch.no_grad()
def test_save_and_load(tmp_path, features, text_config):
    clap = make_clap(text_config=text_config, text_pooling="mean", text_suffix=" end", max_text_tokens=33)
    clap.save_pretrained(tmp_path)
    for loaded in (MsClapModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is MsClapModel
        config = loaded.config
        assert (config.text_pooling, config.text_suffix, config.max_text_tokens) == ("mean", " end", 33)
        assert type(config.text_config) is type(clap.config.text_config)
        state = clap.state_dict()
        assert loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
        for mine, theirs in (
            (loaded.get_audio_features(features), clap.get_audio_features(features)),
            (loaded.get_text_features(**padded(30)), clap.get_text_features(**padded(30))),
        ):
            assert torch.equal(mine.pooler_output, theirs.pooler_output)


def test_default_architecture_is_clap_2023():
    with torch.device("meta"):
        clap = MsClapModel(MsClapConfig())
    assert clap.audio_projection.linear1.weight.shape == (1024, 768)
    assert clap.text_projection.linear1.weight.shape == (1024, 768)
    assert clap.audio_model.config.depths == (2, 2, 6, 2)
    assert (clap.config.text_config.n_layer, clap.config.text_config.vocab_size) == (12, 50257)
    assert clap.config.text_pooling == "last_token"


def test_initial_weights():
    clap = make_clap(logit_scale_init_value=20.0)
    assert clap.logit_scale.item() == pytest.approx(math.log(20))
    for projection in (clap.audio_projection, clap.text_projection):
        assert torch.equal(projection.layer_norm.weight, torch.ones(12))
        assert torch.equal(projection.layer_norm.bias, torch.zeros(12))
    bound = math.sqrt(6 / (16 + 12))  # Xavier
    weight = clap.text_projection.linear1.weight
    assert 0.8 * bound < weight.abs().max() <= bound
    assert isinstance(make_clap(text_config=BERT).text_model, BertModel)


def test_unknown_pooling_is_refused():
    with pytest.raises(Exception, match="text_pooling is 'max', expected one of last_token, first_token, mean"):
        MsClapConfig(text_pooling="max")

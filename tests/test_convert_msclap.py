"""The msclap converter: msclap's own numbers at full size, and on small checkpoints what it refuses.

`peers/msclap_reference.npz` holds what msclap 1.3.4 computed from a full-size checkpoint whose weights follow a
formula; `make parity` runs msclap again.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peers.msclap_inputs import QUIRK_TEXT, SAMPLING_RATE, TEXTS, WAVEFORMS, waveform, write_tokenizer
from peers.msclap_weights import fill
from peers.parity import TOLERANCE, measure
from transformers import AutoTokenizer

from modeling_mats import MsClapModel
from modeling_mats.convert_msclap import MEL_BANKS, convert_msclap, convert_state_dict, load_checkpoint
from processing_mats import MsClapFeatureExtractor

PEERS = Path(__file__).parent / "peers"
AUDIO, TEXT = "audio_encoder.base.htsat.", "caption_encoder.base."
MEL_KEY = AUDIO + "logmel_extractor.melW"
QKV_KEY = AUDIO + "layers.1.blocks.0.attn.qkv.weight"


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return dict(np.load(PEERS / "msclap_reference.npz"))


@pytest.fixture(scope="module")
def keys() -> dict[str, tuple[int, ...]]:
    """Names and shapes of msclap's full-size state dict, as msclap gave them."""
    return {name: tuple(shape) for name, shape in json.loads((PEERS / "msclap_keys.json").read_text()).items()}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "gpt2-formula")


@pytest.fixture(scope="module")
def full_size(tmp_path_factory, keys, reference, tokenizer_folder) -> Path:
    """CLAP 2023 at full size, converted from a .pth file."""
    folder = tmp_path_factory.mktemp("full-size")
    state = {name: torch.from_numpy(array) for name, array in fill(keys, reference["mel_bank"]).items()}
    torch.save({"model": state}, folder / "clap.pth")
    convert_msclap(folder / "clap.pth", folder / "clap", tokenizer=tokenizer_folder)
    (folder / "clap.pth").unlink()  # 640 MB
    yield folder / "clap"
    (folder / "clap" / "model.safetensors").unlink()


def small_shapes(keys: dict[str, tuple[int, ...]], vocab_size: int = 561) -> dict[str, tuple[int, ...]]:
    """msclap's state dict with fewer blocks and a sixth (audio) or a twelfth (text) of the width."""
    shapes = {}
    for name, shape in keys.items():
        if (".layers.2.blocks." in name and int(name.split(".")[6]) > 1) or name.startswith(TEXT + "h.2."):
            continue
        if name.startswith(AUDIO):
            shape = tuple(size // 6 if size % 96 == 0 else size for size in shape)
        elif name.startswith(TEXT):
            if name.startswith(TEXT + "h.") and int(name.split(".")[3]) > 1:
                continue
            sizes = {50257: vocab_size, 1024: 128}
            shape = tuple(sizes.get(size, size // 12) for size in shape)
        elif ".projection." in name:
            width = {768: 128 if name.startswith("audio") else 64, 1024: 32}
            shape = tuple(width[size] for size in shape)
        shapes[name] = shape
    return shapes


@pytest.fixture
def state(keys, reference) -> dict[str, torch.Tensor]:
    """A small state dict in msclap's format, to change at will."""
    shapes = small_shapes(keys)
    return {name: torch.from_numpy(array) for name, array in fill(shapes, reference["mel_bank"]).items()}


def save(state: dict, path: Path) -> Path:
    torch.save({"model": state}, path)
    return path


# Against msclap


def load(folder: Path) -> tuple[MsClapModel, MsClapFeatureExtractor, object]:
    model = MsClapModel.from_pretrained(folder).eval()
    return model, MsClapFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_embeddings_are_msclaps(full_size, reference):
    assert tuple(reference["waveforms"]) == WAVEFORMS
    assert tuple(reference["texts"]) == (*TEXTS, QUIRK_TEXT)
    result = measure(*load(full_size), reference)
    assert set(result) == {
        f"{kind} {stage}" for kind in ("audio", "text") for stage in ("tower", "projected", "normalised")
    }
    for what, (difference, value) in result.items():
        assert difference <= TOLERANCE, what
        assert value > 0.1, what


@torch.no_grad()
def test_the_comparison_would_see_the_wrong_mel_bank(full_size, reference):
    model, extractor, _ = load(full_size)
    other = MsClapFeatureExtractor(**{**extractor.to_dict(), **MEL_BANKS[1]})
    sounds = [waveform(name) for name in WAVEFORMS]
    tower = model.audio_model(**other(sounds, sampling_rate=SAMPLING_RATE)).pooler_output.numpy()
    assert np.abs(tower - reference["audio_tower"]).max(axis=1).min() > 1000 * TOLERANCE


@torch.no_grad()
def test_msclap_pools_one_token_early_for_each_exclamation_mark(full_size, reference):
    # msclap pads with "!" and counts the tokens that are not "!", so its vector for such a text is that of the token
    # before the end token. Ours is the end token's; feeding msclap's position gives msclap's numbers.
    model, _, tokenizer = load(full_size)
    theirs = reference["text_tower"][-1]
    tokens = tokenizer(QUIRK_TEXT + model.config.text_suffix, return_tensors="pt")
    hidden = model.text_model(**tokens).last_hidden_state[0].numpy()
    np.testing.assert_allclose(hidden[-2], theirs, rtol=0, atol=TOLERANCE)
    assert np.abs(hidden[-1] - theirs).max() > 0.1
    embeds = model.get_text_features(**tokens, normalize=False).pooler_output[0].numpy()
    assert np.abs(embeds - reference["text_embeds"][-1]).max() > 0.1


# What is written


def test_the_folder_is_complete_and_stands_alone(tmp_path, state, tokenizer_folder):
    model = convert_msclap(save(state, tmp_path / "clap.pth"), tmp_path / "clap", tokenizer=tokenizer_folder)
    assert not model.training
    names = {path.name for path in (tmp_path / "clap").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= names
    assert not any(name.endswith((".pth", ".bin", ".pkl")) for name in names)

    loaded, extractor, tokenizer = load(tmp_path / "clap")
    saved = loaded.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert extractor.to_dict() == MsClapFeatureExtractor().to_dict()
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    tokens = tokenizer(["rain", "a dog barks <|endoftext|>"], padding=True)
    assert tokens["attention_mask"] == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert loaded.config.text_config.eos_token_id == tokens["input_ids"][1][-1] == 560


def test_architecture_comes_from_the_shapes(state):
    config, _, _ = convert_state_dict(state)
    audio, text = config.audio_config, config.text_config
    assert (audio.depths, audio.num_attention_heads) == ([2, 2, 2, 2], [4, 8, 16, 32])
    assert (audio.patch_embeds_hidden_size, audio.hidden_size, audio.mlp_ratio) == (16, 128, 4.0)
    assert (audio.spec_size, audio.window_size, audio.patch_size, audio.num_mel_bins) == (256, 8, 4, 64)
    assert (text.n_embd, text.n_layer, text.n_head, text.n_inner) == (64, 2, 1, 256)
    assert (text.vocab_size, text.n_positions, config.projection_dim) == (561, 128, 32)


def test_every_weight_arrives(state):
    _, weights, _ = convert_state_dict(state)
    arrived = {tensor.data_ptr() for tensor in weights.values()}
    unused = {name for name, tensor in state.items() if tensor.data_ptr() not in arrived}
    assert {name.removeprefix(AUDIO).split(".")[0] for name in unused if not name.endswith("attn_mask")} == {
        "spectrogram_extractor",
        "logmel_extractor",
        "tscam_conv",
        "head",
    }
    prefix = "audio_model.audio_encoder.layers.1.blocks.0.attention.self."
    parts = [weights[f"{prefix}{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(torch.cat(parts), state[QKV_KEY])
    assert torch.equal(weights["text_model.h.1.mlp.c_fc.weight"], state[TEXT + "h.1.mlp.c_fc.weight"])
    assert torch.equal(weights["logit_scale"], state["logit_scale"])


@pytest.mark.parametrize("settings", MEL_BANKS, ids=lambda settings: str(settings["mel_sampling_rate"]))
def test_the_feature_extractor_gets_the_checkpoints_mel_bank(tmp_path, state, tokenizer_folder, settings, caplog):
    expected = MsClapFeatureExtractor(**settings)
    state[MEL_KEY] = torch.from_numpy(expected.mel_filters)
    with caplog.at_level("INFO"):
        convert_msclap(save(state, tmp_path / "clap.pth"), tmp_path / "clap", tokenizer=tokenizer_folder)
    assert f"sr={settings['mel_sampling_rate']}, fmax={settings['frequency_max']}" in caplog.text
    extractor = MsClapFeatureExtractor.from_pretrained(tmp_path / "clap")
    assert extractor.to_dict() == expected.to_dict()


def test_causal_masks_of_older_checkpoints_are_known(state):
    expected = convert_state_dict(state)[1].keys()
    for layer in range(2):
        state[f"{TEXT}h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool)
        state[f"{TEXT}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    assert convert_state_dict(state)[1].keys() == expected


def test_text_heads(state):
    assert convert_state_dict(state, text_heads=4)[0].text_config.n_head == 4


def test_the_hub_repo_is_read_from_the_cache(tmp_path, state):
    # As huggingface_hub lays out what it has downloaded, so that no network is needed.
    repo = tmp_path / "models--microsoft--msclap"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save(state, repo / "snapshots" / ("0" * 40) / "CLAP_weights_2023.pth")
    code = "from modeling_mats.convert_msclap import load_checkpoint; print(len(load_checkpoint('microsoft/msclap')))"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.stdout.split() == [str(len(state))], result.stderr


# What is refused


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class SystemPayload(Payload):
    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("kind", [Payload, SystemPayload])
@pytest.mark.parametrize("layout", ["zip", "legacy", "bare"])
def test_a_malicious_pickle_is_refused(tmp_path, state, tokenizer_folder, layout, kind):
    trace, path = tmp_path / "trace", tmp_path / "clap.pth"
    content = {"model": {**state, "payload": kind(trace)}}
    if layout == "bare":
        path.write_bytes(pickle.dumps(kind(trace), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(ValueError, match=r"refused|not a PyTorch checkpoint") as caught:
        convert_msclap(path, tmp_path / "clap", tokenizer=tokenizer_folder)
    assert "weights_only=False" not in str(caught.value)  # torch's advice, and the attack's
    assert not trace.exists()
    assert not (tmp_path / "clap").exists()
    if layout != "bare":  # the payload works where it is let
        torch.load(path, weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_the_refusal_names_what_the_file_holds(tmp_path, state, layout):
    path = tmp_path / "clap.pth"
    torch.save(
        {"model": {**state, "payload": SystemPayload(path)}}, path, _use_new_zipfile_serialization=layout == "zip"
    )
    with pytest.raises(ValueError, match=r"was refused: it holds (posix|nt)\.system, expected tensors only"):
        load_checkpoint(path)


def test_both_layouts_of_a_harmless_file_are_read(tmp_path, state):
    for layout in (True, False):
        torch.save({"model": state}, tmp_path / "clap.pth", _use_new_zipfile_serialization=layout)
        assert load_checkpoint(tmp_path / "clap.pth").keys() == state.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a PyTorch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is not a PyTorch checkpoint"),
        (b"PK\x03\x04 half a zip", "is not a PyTorch checkpoint"),
        ([1, 2], r'holds a list, expected msclap\'s \{"model": state_dict\}'),
        ({"state_dict": {}}, "holds keys state_dict, expected msclap's"),
        ({"model": {"epoch": 3}}, "holds values that are no tensors: epoch"),
        ({"model": {}}, f"it lacks {AUDIO}"),
        (
            {"model": {"audio_encoder.base.conv_block1.conv1.weight": torch.ones(1)}},
            "It holds audio_encoder.base.conv_bl",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, tokenizer_folder, content, message):
    path = tmp_path / "clap.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        convert_msclap(path, tmp_path / "clap", tokenizer=tokenizer_folder)
    assert not (tmp_path / "clap").exists()


def test_paths_that_are_no_files(tmp_path, state, tokenizer_folder):
    with pytest.raises(
        FileNotFoundError, match=r'No such checkpoint: .*none\.pth. Expected a \.pth file, or "microsoft'
    ):
        convert_msclap(tmp_path / "none.pth", tmp_path / "clap", tokenizer=tokenizer_folder)
    with pytest.raises(ValueError, match=r"is a folder, expected msclap's \.pth file"):
        convert_msclap(tmp_path, tmp_path / "clap", tokenizer=tokenizer_folder)
    path = save(state, tmp_path / "clap.pth")
    with pytest.raises(NotADirectoryError, match=r"clap\.pth is a file, expected a folder"):
        convert_msclap(path, path, tokenizer=tokenizer_folder)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (AUDIO + "norm.bias", "missing, by MsClapModel's names: audio_model.audio_encoder.norm.bias"),
        (QKV_KEY, "key.weight, .*query.weight, .*value.weight"),
        (TEXT + "h.1.ln_2.weight", r"missing, .*: text_model\.h\.1\.ln_2\.weight"),
        ("audio_encoder.projection.layer_norm.bias", r"missing, .*: audio_projection\.layer_norm\.bias"),
        ("logit_scale", "missing, .*: logit_scale"),
        (TEXT + "wte.weight", rf"it lacks {TEXT}wte\.weight"),
        (MEL_KEY, "it lacks audio_encoder.base.htsat.logmel_extractor.melW"),
        (AUDIO + "spectrogram_extractor.stft.conv_imag.weight", r"it lacks .*conv_imag\.weight"),
    ],
)
def test_missing_keys_are_listed(state, key, message):
    del state[key]
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state)


def test_unexpected_keys_are_listed_by_their_own_names(state):
    state["caption_encoder.base.lm_head.weight"] = torch.ones(2, 2)
    state[AUDIO + "absolute_pos_embed"] = torch.ones(1)
    message = rf"unexpected, by msclap's names: {AUDIO}absolute_pos_embed, caption_encoder\.base\.lm_head\.weight\."
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state)


def test_wrong_shapes_are_listed(state):
    state["caption_encoder.projection.linear2.weight"] = torch.ones(32, 31)
    state[TEXT + "wte.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"wte\.weight has shape \(3,\), expected 2 dimensions"):
        convert_state_dict(state)
    state[TEXT + "wte.weight"] = torch.ones(561, 64)
    message = r"of another shape: caption_encoder\.projection\.linear2\.weight \(32, 31\) instead of \(32, 32\)"
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state)


def test_an_unknown_mel_bank_is_refused(state):
    state[MEL_KEY] = torch.from_numpy(MsClapFeatureExtractor(frequency_max=13900).mel_filters)
    with pytest.raises(
        ValueError, match=r"melW, of shape \(513, 64\), is none of the mel banks .*sr=32000, fmax=14000: "
    ):
        convert_state_dict(state)


def test_another_stft_is_refused(state):
    key = AUDIO + "spectrogram_extractor.stft.conv_real.weight"
    state[key] = state[key] * torch.blackman_window(1024)
    with pytest.raises(
        ValueError, match=r"conv_real\.weight \(513, 1, 1024\) is not the STFT with a Hann window of 1024"
    ):
        convert_state_dict(state)


def test_a_width_that_tells_no_heads_is_refused(keys, reference):
    shapes = small_shapes(keys)
    for name, shape in shapes.items():
        if name.startswith(("caption_encoder.base.", "caption_encoder.projection.linear1")):
            shapes[name] = tuple(size // 64 * 48 if size % 64 == 0 and size != 128 else size for size in shape)
    state = {name: torch.from_numpy(array) for name, array in fill(shapes, reference["mel_bank"]).items()}
    with pytest.raises(ValueError, match="48 wide, no multiple of GPT-2's head width 64; pass text_heads"):
        convert_state_dict(state)
    assert convert_state_dict(state, text_heads=3)[0].text_config.n_head == 3


def test_tokenizers_that_do_not_fit(tmp_path, keys, reference, state, tokenizer_folder):
    shapes = small_shapes(keys, vocab_size=560)
    short = {name: torch.from_numpy(array) for name, array in fill(shapes, reference["mel_bank"]).items()}
    with pytest.raises(ValueError, match="The tokenizer has 561 tokens, the checkpoint embeds 560"):
        convert_msclap(save(short, tmp_path / "clap.pth"), tmp_path / "clap", tokenizer=tokenizer_folder)
    other = AutoTokenizer.from_pretrained(tokenizer_folder, eos_token="a")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"end token is 'a', CLAP 2023 needs GPT-2's '<\|endoftext\|>'"):
        convert_msclap(save(state, tmp_path / "clap.pth"), tmp_path / "clap", tokenizer=tmp_path / "other")
    assert not (tmp_path / "clap").exists()


@pytest.mark.parametrize("content", [b"hello there", b"e", b"RIFF$\x00\x00\x00WAVEfmt ", bytes(range(256))])
def test_what_is_no_pickle_at_all_is_refused_in_one_way(tmp_path, content):
    path = tmp_path / "text.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="PyTorch checkpoint"):
        load_checkpoint(path)

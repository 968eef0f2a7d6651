"""Light checkpoints: what is in them, where the rest comes from, training that goes on from them, and refusals."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_clap, make_processor, make_tokenizer, tone
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora_mats import add_some_lora, trainable
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from configuration_mats import MatsConfig
from modeling_mats import MatsForConditionalGeneration
from modeling_mats.language_model_mats import is_local_location, read_location, split_device_map, written_location
from modeling_mats.lora_mats import is_lora_name
from processing_mats import MatsProcessor

KINDS = ["gpt2", "llama"]
AUDIO_TOKEN_ID, VOCABULARY = 300, 301
TEXTS = ["What is it?", "Describe the sound in a few more words."]
SOUNDS = list(F.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), dim=-1))
MAPPER = {
    "audio_embed_dim": 16,
    "num_audio_tokens": 4,
    "mapper_hidden_size": 32,
    "mapper_num_layers": 1,
    "mapper_num_heads": 4,
    "mapper_clap_tokens": 3,
    "initializer_range": 0.2,
}
COMMIT = "b" * 40


def make_language_model(kind: str, **sizes) -> PreTrainedModel:
    """One that has never heard of the placeholder: its table is a row too short."""
    torch.manual_seed(2)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt2":
        settings = {"vocab_size": 300, "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 128}
        return GPT2LMHeadModel(GPT2Config(**{**settings, **special, **sizes})).eval()
    settings = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**settings, "intermediate_size": 64, **special, **sizes})).eval()


def make_model(language_model: str | os.PathLike | PreTrainedModel, **kwargs) -> MatsForConditionalGeneration:
    torch.manual_seed(3)
    settings = {**MAPPER, **kwargs}
    return MatsForConditionalGeneration.from_language_model(language_model, AUDIO_TOKEN_ID, VOCABULARY, **settings)


@pytest.fixture(scope="module")
def batch():
    processor = make_processor(with_memory=False)
    return processor(text=TEXTS, audio_embeds=SOUNDS, answers=["A dog.", "Rain falls."])


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory) -> tuple[MatsForConditionalGeneration, Path]:
    """A model with LoRA and its light checkpoint, `light`, beside its language model, `llm`. Both are read only."""
    folder = tmp_path_factory.mktemp(request.param)
    make_language_model(request.param).save_pretrained(folder / "llm")
    model = add_some_lora(make_model(folder / "llm"))
    model.save_pretrained(folder / "light")
    return model, folder / "light"


@pytest.fixture
def copied(pair, tmp_path) -> Path:
    """A light checkpoint to break, beside its language model."""
    shutil.copytree(pair[1].parent, tmp_path / "pair")
    return tmp_path / "pair" / "light"


def config_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "config.json").read_text())


def change_config(checkpoint: Path, **changes) -> None:
    (checkpoint / "config.json").write_text(json.dumps(config_of(checkpoint) | changes))


def put_into_hub_cache(folder: Path, repo: str, cache: Path, commit: str = COMMIT) -> None:
    """As if the repo had been downloaded."""
    place = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)


def same_logits(found, expected, batch) -> bool:
    return torch.equal(found(**batch).logits, expected(**batch).logits)


# -- What is in them ---------------------------------------------------------------------------------------------------


def test_a_light_checkpoint_has_mapper_and_lora_and_nothing_of_the_language_model(pair):
    model, light = pair
    assert {path.name for path in light.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    stored = load_file(light / "model.safetensors")
    state = model.state_dict()
    assert set(stored) == {name for name in state if name.startswith("mapper.") or is_lora_name(name)}
    assert all(torch.equal(tensor, state[name]) for name, tensor in stored.items())
    own = {name for name in state if name.startswith("language_model.") and not is_lora_name(name)}
    assert own
    for name in own:
        same_shape = [tensor for tensor in stored.values() if tensor.shape == state[name].shape and tensor.ndim > 1]
        assert not any(torch.equal(tensor, state[name]) for tensor in same_shape), name
    own_bytes = sum(tensor.numel() for tensor in stored.values()) * 4
    assert (light / "model.safetensors").stat().st_size < own_bytes + 10_000


def test_its_configuration_says_what_it_is_and_where_the_rest_lies(pair):
    model, light = pair
    config = config_of(light)
    assert config["light"] is True
    assert config["lora"] == model.config.lora
    assert config["language_model_name_or_path"] == "../llm"
    assert config["text_config"]["vocab_size"] == VOCABULARY
    assert str(light.parent) not in (light / "config.json").read_text()
    assert model.config.light is False, "saving changes no model"
    assert model.config.language_model_name_or_path == str(light.parent / "llm")


def test_a_whole_checkpoint_says_nothing_of_it(tmp_path):
    make_model(make_language_model("gpt2")).save_pretrained(tmp_path)
    assert not {"light", "lora", "language_model_revision"} & set(config_of(tmp_path))
    assert not MatsForConditionalGeneration.from_pretrained(tmp_path).config.light


def test_magnitudes_are_kept_too(batch, tmp_path):
    make_language_model("llama").save_pretrained(tmp_path / "llm")
    model = add_some_lora(make_model(tmp_path / "llm"), use_dora=True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    model.save_pretrained(tmp_path / "light")
    assert any("magnitude" in name for name in load_file(tmp_path / "light" / "model.safetensors"))
    assert same_logits(MatsForConditionalGeneration.from_pretrained(tmp_path / "light"), model, batch)


def test_a_mapper_alone_can_be_saved_light(batch, tmp_path):
    make_language_model("llama").save_pretrained(tmp_path / "llm")
    model = make_model(tmp_path / "llm")
    model.save_pretrained(tmp_path / "light", light=True)
    assert all(name.startswith("mapper.") for name in load_file(tmp_path / "light" / "model.safetensors"))
    loaded = MatsForConditionalGeneration.from_pretrained(tmp_path / "light", is_trainable=True)
    assert same_logits(loaded, model, batch)
    assert trainable(loaded) == {f"mapper.{name}" for name, _ in loaded.mapper.named_parameters()}
    loaded.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again")["light"] is True, "as it was loaded"
    loaded.save_pretrained(tmp_path / "whole", light=False)
    assert same_logits(MatsForConditionalGeneration.from_pretrained(tmp_path / "whole"), model, batch)


def test_weights_in_several_files(pair, batch, tmp_path):
    model, light = pair
    model.save_pretrained(tmp_path / "light", max_shard_size="20KB")
    assert len(list((tmp_path / "light").glob("model-*.safetensors"))) > 1
    shutil.copytree(light.parent / "llm", tmp_path / "llm")
    change_config(tmp_path / "light", language_model_name_or_path="../llm")
    assert same_logits(MatsForConditionalGeneration.from_pretrained(tmp_path / "light"), model, batch)


def test_a_variant_is_found_by_its_name(pair, batch, tmp_path):
    model, _ = pair
    model.save_pretrained(tmp_path / "light", variant="best")
    assert (tmp_path / "light" / "model.best.safetensors").is_file()
    loaded = MatsForConditionalGeneration.from_pretrained(tmp_path / "light", variant="best")
    assert same_logits(loaded, model, batch)


# -- Loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loader", [MatsForConditionalGeneration, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM]
)
def test_loaded_it_is_the_model_that_was_saved(pair, batch, loader):
    model, light = pair
    loaded = loader.from_pretrained(light)
    assert type(loaded) is MatsForConditionalGeneration
    assert same_logits(loaded, model, batch)
    assert sorted(loaded.state_dict()) == sorted(model.state_dict())
    assert not any(module.training for module in loaded.modules())
    assert trainable(loaded) == set()
    assert loaded.config.light is True
    assert loaded.get_input_embeddings().num_embeddings == VOCABULARY


def test_loaded_to_be_trained_mapper_and_lora_are(pair, batch):
    model, light = pair
    loaded = MatsForConditionalGeneration.from_pretrained(light, is_trainable=True)
    assert trainable(loaded) == trainable(model)
    loaded.train()(**batch).loss.backward()


def test_saved_again_it_is_the_same(pair, tmp_path):
    _, light = pair
    loaded = MatsForConditionalGeneration.from_pretrained(light)
    loaded.save_pretrained(tmp_path / "deeper" / "again")
    assert load_file(tmp_path / "deeper" / "again" / "model.safetensors").keys()
    before, after = config_of(light), config_of(tmp_path / "deeper" / "again")
    path = tmp_path / "deeper" / "again" / after.pop("language_model_name_or_path")
    assert path.resolve() == (light.parent / "llm").resolve()
    assert after == {key: value for key, value in before.items() if key != "language_model_name_or_path"}


def test_a_checkpoint_may_be_overwritten_by_the_model_that_was_loaded_from_it(copied, batch):
    loaded = MatsForConditionalGeneration.from_pretrained(copied)
    expected = loaded(**batch).logits
    loaded.save_pretrained(copied)
    assert torch.equal(loaded(**batch).logits, expected)
    assert torch.equal(MatsForConditionalGeneration.from_pretrained(copied)(**batch).logits, expected)


def test_both_folders_can_be_moved_together(copied, batch, pair, tmp_path, monkeypatch):
    copied.parent.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert same_logits(MatsForConditionalGeneration.from_pretrained("elsewhere/light"), pair[0], batch)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "light")
    assert same_logits(MatsForConditionalGeneration.from_pretrained("link"), pair[0], batch)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"mapper": "cpu", "language_model": "cpu"}])
def test_device_maps_are_as_those_of_whole_checkpoints(pair, batch, device_map):
    model, light = pair
    assert same_logits(MatsForConditionalGeneration.from_pretrained(light, device_map=device_map), model, batch)


def test_a_device_map_over_mats_is_one_over_its_language_model():
    found = split_device_map({"mapper": 1, "noise": 0, "language_model.model": 0, "language_model.lm_head": 1})
    assert found == ({"model": 0, "lm_head": 1}, 1)
    assert split_device_map("auto") == ("auto", None)
    with pytest.raises(ValueError, match="device_map names 'head', expected 'mapper' or names that begin with"):
        split_device_map({"mapper": 0, "head": 0})


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_a_spread_language_model_makes_a_spread_model(tmp_path, batch):
    make_language_model("llama", vocab_size=VOCABULARY).save_pretrained(tmp_path / "llm")
    model = make_model(tmp_path / "llm")
    model.save_pretrained(tmp_path / "light", light=True)
    device_map = {"mapper": "cpu", "language_model.model": "cpu", "language_model.lm_head": "disk"}
    loaded = MatsForConditionalGeneration.from_pretrained(
        tmp_path / "light", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.hf_device_map == device_map
    assert loaded.language_model.lm_head.weight.is_meta
    assert same_logits(loaded, model, batch)
    loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"offloaded .* merge the LoRA"):
        loaded.add_lora()


def test_attention_and_settings_are_passed_on(pair):
    _, light = pair
    for auto_class in (MatsForConditionalGeneration, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(light, attn_implementation="eager", noise_variance=0.5)
        assert loaded.config._attn_implementation == "eager"
        assert loaded.language_model.config._attn_implementation == "eager"
        assert (loaded.config.noise_variance, loaded.noise.variance) == (0.5, 0.5)
    with pytest.raises(TypeError, match="atention"):
        MatsForConditionalGeneration.from_pretrained(light, atention="eager")


def test_generation_settings_are_the_checkpoints(copied):
    loaded = MatsForConditionalGeneration.from_pretrained(copied)
    loaded.generation_config.max_new_tokens = 7
    loaded.save_pretrained(copied)
    assert MatsForConditionalGeneration.from_pretrained(copied).generation_config.max_new_tokens == 7


def test_the_language_models_precision_is_kept_and_can_be_chosen(batch, tmp_path):
    make_language_model("llama").bfloat16().save_pretrained(tmp_path / "llm")
    model = add_some_lora(make_model(tmp_path / "llm"))
    model.save_pretrained(tmp_path / "light")
    loaded = MatsForConditionalGeneration.from_pretrained(tmp_path / "light")
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: p.dtype for name, p in model.named_parameters()
    }
    assert same_logits(loaded, model, batch)
    chosen = MatsForConditionalGeneration.from_pretrained(tmp_path / "light", dtype=torch.float64)
    assert (chosen.dtype, chosen.mapper.queries.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(chosen(**batch).logits.float(), model(**batch).logits.float(), atol=0.1, rtol=0.1)
    halves = MatsForConditionalGeneration.from_pretrained(tmp_path / "light", dtype="bfloat16")
    assert (halves.dtype, halves.mapper.queries.dtype) == (torch.bfloat16, torch.bfloat16)
    training = MatsForConditionalGeneration.from_pretrained(tmp_path / "light", dtype="bfloat16", is_trainable=True)
    assert (training.dtype, training.mapper.queries.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("how", ["folder", "Path", "object"])
def test_the_language_model_can_be_elsewhere(copied, batch, pair, how):
    elsewhere = copied.parent / "elsewhere"
    (copied.parent / "llm").rename(elsewhere)
    given = {"folder": str(elsewhere), "Path": elsewhere}.get(how)
    given = AutoModelForCausalLM.from_pretrained(elsewhere) if given is None else given
    loaded = MatsForConditionalGeneration.from_pretrained(copied, language_model=given)
    assert same_logits(loaded, pair[0], batch)
    assert how != "object" or loaded.language_model is given
    loaded.save_pretrained(copied.parent / "again")
    assert config_of(copied.parent / "again")["language_model_name_or_path"] == "../llm", "what is named stays named"


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> Path:
    """A cache to be filled, and no network beside it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_language_model_of_the_hub_is_fetched_at_its_commit(copied, batch, offline_hub, tmp_path):
    put_into_hub_cache(copied.parent / "llm", "some/llm", offline_hub)
    model = add_some_lora(make_model("some/llm"))
    assert model.config.language_model_name_or_path == "some/llm"
    assert model.config.language_model_revision == COMMIT
    model.save_pretrained(tmp_path / "light")
    assert config_of(tmp_path / "light")["language_model_name_or_path"] == "some/llm"
    assert config_of(tmp_path / "light")["language_model_revision"] == COMMIT

    newer = AutoModelForCausalLM.from_pretrained("some/llm")  # in the meantime its repo went on
    for parameter in newer.parameters():
        parameter.data.zero_()
    newer.save_pretrained(tmp_path / "newer")
    put_into_hub_cache(tmp_path / "newer", "some/llm", offline_hub, commit="c" * 40)
    assert same_logits(MatsForConditionalGeneration.from_pretrained(tmp_path / "light"), model, batch)
    put_into_hub_cache(tmp_path / "light", "you/mats", offline_hub)
    for auto_class in (MatsForConditionalGeneration, AutoModelForMultimodalLM):
        assert same_logits(auto_class.from_pretrained("you/mats"), model, batch)


def test_the_commit_can_be_told_for_a_language_model_that_is_loaded():
    language_model = make_language_model("gpt2")
    assert make_model(language_model).config.language_model_revision is None
    told = {"language_model_name_or_path": "some/llm", "language_model_revision": COMMIT}
    config = make_model(language_model, **told).config
    assert (config.language_model_name_or_path, config.language_model_revision) == ("some/llm", COMMIT)


def test_loading_info_is_as_of_whole_checkpoints(pair, tmp_path):
    make_model(make_language_model("gpt2")).save_pretrained(tmp_path)
    _, whole = MatsForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    _, light = MatsForConditionalGeneration.from_pretrained(pair[1], output_loading_info=True)
    assert set(light) <= set(whole)
    assert not any(light.values())


# -- Merging -----------------------------------------------------------------------------------------------------------


def test_merged_it_is_a_whole_checkpoint(pair, batch, tmp_path):
    model, light = pair
    MatsForConditionalGeneration.from_pretrained(light).merge_lora().save_pretrained(tmp_path)
    assert not {"light", "lora"} & set(config_of(tmp_path))
    assert config_of(tmp_path)["language_model_name_or_path"] is None
    whole = MatsForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(whole(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="language_model_name_or_path is None"):
        whole.save_pretrained(tmp_path / "light", light=True)


def test_merged_in_halves_it_is_loaded_in_halves(tmp_path):
    make_language_model("llama").bfloat16().save_pretrained(tmp_path / "llm")
    add_some_lora(make_model(tmp_path / "llm")).merge_lora().save_pretrained(tmp_path / "whole")
    loaded = MatsForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


# -- Training ----------------------------------------------------------------------------------------------------------


def train(model, rows: list[dict], folder: Path, resume: bool = False, steps: int = 4) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        seed=1,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_training_that_stopped_ends_where_training_without_a_stop_does(kind, batch, tmp_path, caplog):
    make_language_model(kind).save_pretrained(tmp_path / "llm")
    rows = [{key: value[row] for key, value in batch.items()} for row in range(len(batch["input_ids"]))]

    def fresh():
        torch.manual_seed(4)
        return make_model(tmp_path / "llm").add_lora()

    through = train(fresh(), rows, tmp_path / "through").model
    checkpoint = tmp_path / "through" / "checkpoint-2"
    assert config_of(checkpoint)["language_model_name_or_path"] == "../../llm"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert all(name.startswith("mapper.") or is_lora_name(name) for name in file.keys())  # noqa: SIM118
    assert not (checkpoint / "adapter_config.json").exists(), "transformers would take it for PEFT's"

    shutil.copytree(checkpoint, tmp_path / "stopped" / "checkpoint-2")
    resumed = train(fresh(), rows, tmp_path / "stopped", resume=True).model
    assert "missing keys" not in caplog.text
    weights = dict(through.named_parameters())
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    last = MatsForConditionalGeneration.from_pretrained(tmp_path / "through" / "checkpoint-4")
    assert same_logits(last, through.eval(), batch)
    halfway = MatsForConditionalGeneration.from_pretrained(checkpoint)
    assert not same_logits(halfway, last, batch)


def test_missing_weights_are_still_told_where_a_state_dict_is_no_light_one(pair):
    model, light = pair
    state = load_file(light / "model.safetensors")
    assert model.load_state_dict(state, strict=False).missing_keys == []
    first = next(iter(state))
    del state[first]
    assert model.load_state_dict(state, strict=False).missing_keys == [first]
    own = next(name for name in model.state_dict() if "base_layer" in name)
    missing = model.load_state_dict(state | {own: model.state_dict()[own]}, strict=False).missing_keys
    assert len(missing) > 2
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(load_file(light / "model.safetensors"))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_language_model_is_trained_and_saved_light(bits, batch, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_language_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "llm")
    quantised = {"quantization_config": BitsAndBytesConfig(**{bits: True}), "device_map": "cpu"}
    model = make_model(AutoModelForCausalLM.from_pretrained(tmp_path / "llm", **quantised))
    with pytest.raises(ValueError, match="is quantised, and so cannot be part of a whole checkpoint"):
        model.save_pretrained(tmp_path / "whole")
    add_some_lora(model)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(len(batch["input_ids"]))]
    train(model, rows, tmp_path / "run", steps=2)
    with pytest.raises(ValueError, match="cannot be merged into a quantised language model"):
        model.merge_lora()
    light = tmp_path / "run" / "checkpoint-2"
    assert "quantization_config" not in (light / "config.json").read_text()
    loaded = MatsForConditionalGeneration.from_pretrained(light, **quantised)
    assert loaded.language_model.hf_quantizer is not None
    expected = model.eval()(**batch).logits
    torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-2, rtol=0)
    plain = MatsForConditionalGeneration.from_pretrained(light)
    torch.testing.assert_close(plain(**batch).logits, expected, atol=0.5, rtol=0)
    plain.merge_lora()


# -- Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 64}, "has hidden_size 64, but .*light was trained on a language model of hidden_size 32"),
        ({"num_hidden_layers": 2}, "has num_hidden_layers 2, but"),
        ({"intermediate_size": 48}, "has intermediate_size 48, but .* of intermediate_size 64"),
        ({"vocab_size": 302}, "has vocab_size 302, but .* of vocab_size 301"),
    ],
)
@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_a_language_model_of_another_size_is_refused(pair, sizes, message, tmp_path):
    _, light = pair
    other = make_language_model("llama", **sizes)
    other.save_pretrained(tmp_path)
    for given in (tmp_path, other):
        with pytest.raises(ValueError, match=message):
            MatsForConditionalGeneration.from_pretrained(light, language_model=given)


def test_a_language_model_of_another_architecture_is_refused_before_its_weights_are_read(pair, tmp_path):
    _, light = pair
    kind = config_of(light)["text_config"]["model_type"]
    other = {"gpt2": "llama", "llama": "gpt2"}[kind]
    make_language_model(other).config.save_pretrained(tmp_path)
    message = f"{tmp_path} has model_type {other}.*, but {light} was trained on a language model of model_type {kind}"
    with pytest.raises(ValueError, match=message):
        MatsForConditionalGeneration.from_pretrained(light, language_model=tmp_path)


def test_a_language_model_that_is_not_there_is_named_with_the_way_out(copied):
    shutil.rmtree(copied.parent / "llm")
    message = (
        rf"{copied} is a light checkpoint, and its language model, .*llm, .* no such folder.*language_model=\.\.\."
    )
    with pytest.raises(OSError, match=message):
        MatsForConditionalGeneration.from_pretrained(copied)
    change_config(copied, language_model_name_or_path="nobody/nothing")
    with pytest.raises(OSError, match=r"(?s)its language model, nobody/nothing, .*language_model=\.\.\."):
        MatsForConditionalGeneration.from_pretrained(copied, local_files_only=True)
    change_config(copied, language_model_name_or_path=None)
    with pytest.raises(ValueError, match="names no language model; pass language_model"):
        MatsForConditionalGeneration.from_pretrained(copied)


def test_a_whole_checkpoint_takes_no_language_model(tmp_path):
    make_model(make_language_model("gpt2")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a whole checkpoint, with a language model of its own"):
        MatsForConditionalGeneration.from_pretrained(tmp_path, language_model=make_language_model("gpt2"))


def test_what_a_loaded_language_model_decided_is_not_asked_again(pair):
    model, light = pair
    given = make_language_model(model.config.text_config.model_type)
    with pytest.raises(ValueError, match="is loaded already, so device_map, dtype must be said where that is done"):
        MatsForConditionalGeneration.from_pretrained(light, language_model=given, device_map="cpu", dtype="bfloat16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("mapper.norm.weight"), "it lacks mapper.norm.weight"),
        (lambda state: state.update({"language_model.x": torch.ones(1)}), "it holds, unexpectedly, language_model.x"),
        (lambda state: state.update({"mapper.norm.weight": torch.ones(3)}), "in another shape mapper.norm.weight"),
        (lambda state: [state.pop(name) for name in list(state) if "lora_B" in name], "it lacks .*lora_B"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(copied, change, message):
    state = load_file(copied / "model.safetensors")
    change(state)
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        MatsForConditionalGeneration.from_pretrained(copied)


def test_a_checkpoint_without_weights_is_refused(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(
        OSError, match=r"has no weights: neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        MatsForConditionalGeneration.from_pretrained(copied)


def test_what_cannot_be_saved_is_refused(pair, tmp_path):
    model, _ = pair
    with pytest.raises(ValueError, match=r"call merge_lora\(\) first, or save light"):
        model.save_pretrained(tmp_path / "x", light=False)
    nameless = make_model(make_language_model("gpt2"))
    with pytest.raises(ValueError, match=r"config\.language_model_name_or_path is None"):
        nameless.save_pretrained(tmp_path / "x", light=True)
    assert not (tmp_path / "x").exists()


def test_a_local_language_model_is_not_pushed(pair):
    model, light = pair
    with pytest.raises(ValueError, match=f"The language model is {light.parent / 'llm'}, a folder of this machine"):
        model.push_to_hub("you/mats")
    with pytest.raises(ValueError, match="a folder of this machine"):
        model.save_pretrained(light.parent / "pushed", push_to_hub=True)


# -- Names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "HuggingFaceTB/SmolLM2-135M"])
def test_names_of_repos(name, tmp_path):
    assert not is_local_location(name)
    assert read_location(name, str(tmp_path)) == name
    assert written_location(name, tmp_path) == name


@pytest.mark.parametrize("name", ["../llm", "./llm", "/models/llm", "models/of/mine", "~/llm", "C:\\llm"])
def test_names_of_folders(name):
    assert is_local_location(name)


def test_folders_are_written_as_seen_from_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("llm").mkdir()
    assert is_local_location("llm"), "transformers looks for a folder first, too"
    assert written_location("llm", "a/b") == "../../llm"
    assert written_location(str(tmp_path / "llm"), tmp_path) == "./llm"
    assert read_location("./llm", ".") == str(tmp_path / "llm")
    assert read_location("../llm", "you/repo-of-the-hub") == "../llm"


def test_only_light_configurations_leave_quantisation_to_the_loader():
    text_config = GPT2Config(vocab_size=VOCABULARY, quantization_config={"quant_method": "bitsandbytes"})
    for light in (True, False):
        config = MatsConfig(text_config=text_config, audio_token_id=AUDIO_TOKEN_ID, light=light)
        assert ("quantization_config" in config.to_diff_dict()["text_config"]) is not light


# -- The processor -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ears(tmp_path) -> tuple[MatsProcessor, Path]:
    """A processor and its light checkpoint, `light`, beside its CLAP, `clap`."""
    processor = make_processor()
    processor.clap.save_pretrained(tmp_path / "clap")
    processor.clap_name_or_path = str(tmp_path / "clap")
    processor.save_pretrained(tmp_path / "light", light=True)
    return processor, tmp_path / "light"


def same_inputs(found: MatsProcessor, expected: MatsProcessor) -> bool:
    inputs = [one(text="?", audio=tone(1.2), sampling_rate=16000)["audio_embeds"] for one in (found, expected)]
    return torch.equal(*inputs)


def test_a_light_processor_names_its_clap(ears):
    processor, light = ears
    config = json.loads((light / "processor_config.json").read_text())
    assert not (light / "clap").exists()
    assert config["clap_name_or_path"] == "../clap"
    assert config["clap_fingerprint"] == processor.clap.fingerprint
    assert "clap_subfolder" not in config
    assert (light / "santa_memory.safetensors").is_file()
    assert processor.clap_fingerprint is None, "saving changes no processor"


@pytest.mark.parametrize("loader", [MatsProcessor, AutoProcessor])
def test_a_light_processor_hears_the_same(ears, loader):
    processor, light = ears
    loaded = loader.from_pretrained(light)
    assert same_inputs(loaded, processor)
    assert loaded.santa_memory.texts == processor.santa_memory.texts


def test_a_processor_is_saved_as_it_was_loaded(ears, tmp_path):
    processor, light = ears
    loaded = MatsProcessor.from_pretrained(light)
    loaded.save_pretrained(tmp_path / "deeper" / "again")
    assert not (tmp_path / "deeper" / "again" / "clap").exists()
    assert same_inputs(MatsProcessor.from_pretrained(tmp_path / "deeper" / "again"), processor)
    deaf = MatsProcessor.from_pretrained(light, load_clap=False)
    deaf.save_pretrained(tmp_path / "of the deaf")
    assert MatsProcessor.from_pretrained(tmp_path / "of the deaf").clap.fingerprint == processor.clap.fingerprint
    loaded.save_pretrained(tmp_path / "whole", light=False)
    assert "fingerprint" not in (tmp_path / "whole" / "processor_config.json").read_text()
    shutil.rmtree(tmp_path / "clap")
    assert same_inputs(MatsProcessor.from_pretrained(tmp_path / "whole"), processor)


def test_the_clap_can_be_elsewhere_or_within_another_checkpoint(ears, tmp_path):
    processor, light = ears
    (tmp_path / "clap").rename(tmp_path / "elsewhere")
    for given in (tmp_path / "elsewhere", str(tmp_path / "elsewhere"), processor.clap):
        assert same_inputs(MatsProcessor.from_pretrained(light, clap=given), processor)
    processor.save_pretrained(tmp_path / "whole")
    processor.clap_name_or_path, processor.clap_subfolder = str(tmp_path / "whole"), "clap"
    processor.save_pretrained(tmp_path / "lighter", light=True)
    assert same_inputs(MatsProcessor.from_pretrained(tmp_path / "lighter"), processor)


def test_a_clap_of_the_hub_is_fetched(ears, offline_hub, tmp_path):
    processor, _ = ears
    put_into_hub_cache(tmp_path / "clap", "some/clap", offline_hub)
    processor.clap_name_or_path = "some/clap"
    processor.save_pretrained(tmp_path / "of the hub", light=True)
    MatsConfig().save_pretrained(tmp_path / "of the hub")
    put_into_hub_cache(tmp_path / "of the hub", "you/mats", offline_hub, commit="d" * 40)
    assert same_inputs(MatsProcessor.from_pretrained("you/mats", revision="d" * 40), processor)


def test_the_memory_can_be_left_out(ears):
    processor, light = ears
    loaded = MatsProcessor.from_pretrained(light, load_memory=False)
    assert loaded.clap.fingerprint == processor.clap.fingerprint
    assert loaded.santa_memory is None


def test_another_clap_is_refused(ears, tmp_path):
    processor, light = ears
    other = make_clap(seed=1)
    names = f"belongs to the CLAP {processor.clap.fingerprint[:16]}, but .* is {other.fingerprint[:16]}"
    other.save_pretrained(tmp_path / "other")
    for given in (other, tmp_path / "other"):
        with pytest.raises(ValueError, match=names):
            MatsProcessor.from_pretrained(light, clap=given)
    loaded = MatsProcessor.from_pretrained(light)
    loaded.santa_memory = None
    loaded.clap = other
    with pytest.raises(ValueError, match=f"processor.clap is the CLAP {other.fingerprint[:16]}, but"):
        loaded.save_pretrained(tmp_path / "x")


def test_a_clap_that_is_not_there_is_named_with_the_way_out(ears, tmp_path):
    _, light = ears
    shutil.rmtree(tmp_path / "clap")
    with pytest.raises(OSError, match=rf"{light} is a light checkpoint, and its CLAP, .*/clap, .*clap=\.\.\."):
        MatsProcessor.from_pretrained(light)
    assert MatsProcessor.from_pretrained(light, load_clap=False).clap is None


def test_calls_that_cannot_be_meant_are_refused(ears, tmp_path):
    processor, light = ears
    with pytest.raises(ValueError, match="load_clap=False leaves CLAP out"):
        MatsProcessor.from_pretrained(light, clap=processor.clap, load_clap=False)
    processor.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="has a CLAP of its own"):
        MatsProcessor.from_pretrained(tmp_path / "whole", clap=processor.clap)
    with pytest.raises(FileExistsError, match="has a clap/ already, which would be loaded"):
        processor.save_pretrained(tmp_path / "whole", light=True)
    with pytest.raises(ValueError, match=r"set processor\.clap_name_or_path"):
        make_processor().save_pretrained(tmp_path / "x", light=True)
    with pytest.raises(ValueError, match="was not loaded from"):
        MatsProcessor.from_pretrained(light, load_clap=False).save_pretrained(tmp_path / "x", light=False)
    with pytest.raises(ValueError, match="Saving light needs CLAP"):
        MatsProcessor(make_tokenizer(), clap_name_or_path="some/clap").save_pretrained(tmp_path / "x", light=True)
    with pytest.raises(ValueError, match="a folder of this machine"):
        MatsProcessor.from_pretrained(light).push_to_hub("you/mats")

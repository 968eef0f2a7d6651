"""LoRA in the language model: where it goes, what is trained, what it becomes when merged, and refusals."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, make_processor, make_talker
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modeling_mats import MatsForConditionalGeneration
from modeling_mats.lora_mats import find_lora_targets, is_lora_name

KINDS = ["gpt2", "llama"]
TEXTS = ["What is it?", "Describe the sound in a few more words."]
SOUNDS = list(F.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), dim=-1))


@pytest.fixture(scope="module")
def batch():
    processor = make_processor(with_memory=False)
    return processor(text=TEXTS, audio_embeds=SOUNDS, answers=["A dog.", "Rain falls."])


def add_some_lora(model: MatsForConditionalGeneration, **kwargs) -> MatsForConditionalGeneration:
    """LoRA as after training: PEFT's own starts without an effect."""
    model.add_lora(**kwargs)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def language_model_of(config: dict) -> PreTrainedModel:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, **config}))


# -- Where it goes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2"}, ["c_attn"]),
        ({"model_type": "llama"}, ["q_proj", "v_proj"]),
        ({"model_type": "qwen2"}, ["q_proj", "v_proj"]),
        ({"model_type": "gpt_neox"}, ["query_key_value"]),
        # PEFT has no choice of its own for these.
        ({"model_type": "olmo2"}, ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ({"model_type": "phi3", "pad_token_id": 0}, ["o_proj", "qkv_proj"]),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_targets_follow_the_architecture(config, expected):
    assert find_lora_targets(language_model_of(config)) == expected


def test_attention_is_told_from_other_layers_of_the_same_name():
    language_model = make_model().language_model
    language_model.config.model_type = "unknown to PEFT"
    found = find_lora_targets(language_model)
    assert found == ["attn.c_proj", "c_attn"], "c_proj alone is the name of a layer behind the attention, too"


def test_a_language_model_without_attention_layers_gets_it_in_every_linear_layer_but_the_head():
    language_model = make_model("llama").language_model
    language_model.config.model_type = "unknown to PEFT"
    for layer in language_model.model.layers:
        layer.mixer = layer.self_attn
        del layer.self_attn
    found = find_lora_targets(language_model)
    assert "lm_head" not in found
    assert found == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_a_language_model_without_linear_layers_is_refused():
    language_model = make_model().language_model
    language_model.config.model_type = "unknown to PEFT"
    for module in language_model.modules():
        for name, child in module.named_children():
            if isinstance(child, Conv1D):
                setattr(module, name, nn.Identity())
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layers"):
        find_lora_targets(language_model)


@pytest.mark.parametrize(
    ("kind", "targets", "expected"),
    [
        ("gpt2", "auto", {"c_attn"}),
        ("gpt2", "all-linear", {"c_attn", "c_proj", "c_fc"}),
        ("llama", "auto", {"q_proj", "v_proj"}),
        ("llama", ["o_proj", "k_proj"], {"k_proj", "o_proj"}),
        (
            "llama",
            r"model\.layers\.0\..*_proj",
            {f"{name}_proj" for name in ("q", "k", "v", "o", "up", "gate", "down")},
        ),
    ],
)
def test_layers_are_chosen_by_word_name_or_pattern(kind, targets, expected, recwarn):
    model = make_model(kind).add_lora(target_modules=targets)
    names = [name for name, _ in model.named_parameters() if is_lora_name(name)]
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names} == expected
    assert all(name.startswith("language_model.") for name in names)
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]


def test_the_settings_are_the_papers_and_stand_in_the_configuration():
    model = make_model("llama").add_lora()
    assert model.config.lora == {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    layer = model.language_model.model.layers[0].self_attn.q_proj
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (8, 4.0, 0.1)


def test_a_model_of_a_configuration_with_lora_has_it(batch):
    model = add_some_lora(make_model("llama"), r=3)
    fresh = MatsForConditionalGeneration(type(model.config)(**model.config.to_dict()))
    assert sorted(fresh.state_dict()) == sorted(model.state_dict())
    fresh.eval().load_state_dict(model.state_dict())
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)


# -- What is trained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}, {"use_rslora": True, "init_lora_weights": "gaussian"}])
def test_fresh_lora_changes_nothing_and_trains_with_the_mapper(batch, kind, kwargs):
    model = make_model(kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = model(**batch).logits
    assert model.add_lora(**kwargs) is model
    assert not any(module.training for module in model.modules()), "its dropout would act at inference"
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)
    names = {name for name, _ in model.named_parameters()}
    assert trainable(model) == {name for name in names if name.startswith("mapper.") or is_lora_name(name)}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    after = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items()}
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    assert changed
    assert all(name.startswith("mapper.") for name in changed)
    assert any(weight.any() for name, weight in after.items() if "lora_B" in name)


def test_lora_and_mapper_are_float32_beside_halves(batch):
    model = make_model("llama").bfloat16().add_lora()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert model.dtype == torch.bfloat16, "the language model's"
    model.train()(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("inputs", ["with audio", "text alone"])
def test_activation_checkpointing_reaches_lora(batch, use_reentrant, inputs):
    model = add_some_lora(make_model("llama"), lora_dropout=0.0)
    if inputs == "text alone":
        batch = {key: value for key, value in batch.items() if not key.startswith("audio")}
        batch["input_ids"] = batch["input_ids"].clamp(max=299)
    model.noise.variance = 0.0
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.train()(**batch).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if is_lora_name(name)})
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda message, name=name: f"{name}: {message}")


# -- Merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}, {"target_modules": "all-linear", "r": 2}])
def test_merged_it_gives_the_same_and_leaves_no_layer(batch, kind, kwargs):
    model = make_talker(kind)
    names, plain = sorted(model.state_dict()), model(**batch).logits
    add_some_lora(model, **kwargs)
    expected = model(**batch).logits
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert model.merge_lora() is model
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-3, rtol=1e-4)
    assert sorted(model.state_dict()) == names
    assert model.config.lora is None
    assert not model.has_lora
    model.add_lora()  # once more, on top


def test_merging_into_halves_keeps_them(batch):
    model = add_some_lora(make_model("llama").bfloat16())
    expected = model(**batch).logits
    model.merge_lora()
    assert {parameter.dtype for parameter in model.language_model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(**batch).logits, expected, atol=2e-2, rtol=0)


def test_a_merged_language_model_is_no_others():
    model = make_model("llama", language_model_name_or_path="some/llm", language_model_revision="a" * 40, light=True)
    config = model.add_lora().merge_lora().config
    assert (config.language_model_name_or_path, config.language_model_revision, config.light) == (None, None, False)


# -- Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"target_modules": ["q_proj", "query"]}, ValueError, r"\(llama\) has no layers named query; .* q_proj"),
        ({"target_modules": r".*\.query"}, ValueError, r"has no layers named \.\*\\\.query"),
        ({"target_modules": []}, ValueError, "target_modules is empty"),
        ({"bias": "all"}, ValueError, "bias is 'all', expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, ValueError, "modules_to_save would change the language model itself"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights is 'pissa', which changes the weights"),
        ({"rank": 8}, TypeError, "rank"),
        ({"rank_pattern": {"q_proj": torch.ones(1)}}, TypeError, "config.json, which cannot hold these"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(kwargs, error, message):
    model = make_model("llama")
    before = set(model.state_dict())
    with pytest.raises(error, match=message):
        model.add_lora(**kwargs)
    assert set(model.state_dict()) == before
    assert model.config.lora is None
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_lora_on_a_tied_head_is_refused():
    for target in ("lm_head", "wte"):
        with pytest.raises(ValueError, match="cannot be merged where these two are one"):
            make_model("gpt2").add_lora(target_modules=[target])


def test_lora_twice_or_none_to_merge_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="has no LoRA to merge"):
        model.merge_lora()
    model.add_lora()
    with pytest.raises(ValueError, match="has LoRA already"):
        model.add_lora()
    model.config.lora = None  # as if another had put it there
    with pytest.raises(ValueError, match="has LoRA layers already"):
        model.add_lora()


def test_weights_that_are_not_finite_are_not_merged():
    model = add_some_lora(make_model("llama"))
    model.language_model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_lora()


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    model = make_model()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install 'peft"):
        model.add_lora()

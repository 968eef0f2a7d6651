"""The model on GPT-2 and Llama: loss, padding, noise, generation, LoRA, files, and refusals."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, make_model, make_processor, make_talker
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TextIteratorStreamer,
)

from configuration_mats import MatsConfig
from modeling_mats import MatsForConditionalGeneration
from modeling_mats.modeling_mats import MatsNoise

# PEFT asks transformers under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

KINDS = ["gpt2", "llama"]
TEXTS = ["What is it?", "Describe the sound in a few more words.", "And this?"]
SOUNDS = list(F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=-1))
ANSWERS = ["A dog.", "Rain falls on a tin roof.", "Someone sneezes loudly."]
AUDIO_TOKEN_ID = 300


@pytest.fixture(scope="module")
def processor():
    """Without a memory: what CLAP and Santa would give is drawn at random here."""
    return make_processor(with_memory=False)


@pytest.fixture(scope="module")
def prompts(processor):
    """Three prompts of different lengths, padded on the left."""
    return processor(text=TEXTS, audio_embeds=SOUNDS)


@pytest.fixture(scope="module")
def batch(processor):
    """The same with answers and labels."""
    return processor(text=TEXTS, audio_embeds=SOUNDS, answers=ANSWERS)


def in_training(model: MatsForConditionalGeneration, noise_variance: float = 0.0) -> MatsForConditionalGeneration:
    """A copy in training mode, without dropout."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.noise.variance = noise_variance
    return model


def same(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# -- Loss --------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_the_labelled_positions(model, batch):
    output = model(**batch)
    assert output.logits.shape == (*batch["input_ids"].shape, 301)
    log_probabilities = output.logits.double().log_softmax(-1)
    terms = [
        -log_probabilities[row, position - 1, label]
        for row, labels in enumerate(batch["labels"])
        for position, label in enumerate(labels)
        if label != -100
    ]
    assert len(terms) == (batch["labels"] != -100).sum()
    assert output.loss.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-5)


def test_training_computes_logits_only_where_there_are_labels_and_the_same_loss(model, batch):
    full = model(**batch)
    kept = in_training(model)(**batch)
    labelled = batch["labels"] != -100
    assert kept.logits.shape == (labelled.sum(), 301)
    same(kept.loss, full.loss)
    same(kept.logits, full.logits[:, :-1][labelled[:, 1:]])


def test_training_gives_the_same_gradients_as_the_full_logits(model, batch):
    training = in_training(model)
    training(**batch).loss.backward()
    full = copy.deepcopy(model)  # in evaluation mode, where all logits are computed
    full(**batch).loss.backward()
    for (name, found), expected in zip(training.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulated_steps_share_one_denominator(model, batch):
    training = in_training(model)
    count = (batch["labels"] != -100).sum()
    parts = sum(
        training(**{key: value[row : row + 1] for key, value in batch.items()}, num_items_in_batch=count).loss
        for row in range(3)
    )
    same(parts, training(**batch).loss)


def test_every_parameter_is_reached_by_the_gradient(model, batch):
    training = in_training(model, noise_variance=0.01)
    training(**batch).loss.backward()
    assert [name for name, p in training.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_freezing_the_language_model_leaves_the_mapper(model, batch):
    training = in_training(model)
    training.freeze_language_model()
    training(**batch).loss.backward()
    trained = {name.split(".")[0] for name, parameter in training.named_parameters() if parameter.grad is not None}
    assert trained == {"mapper"}


def test_learning_by_heart_what_each_sound_is(processor):
    torch.manual_seed(0)
    model = in_training(make_model("llama", initializer_range=0.2), noise_variance=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = processor(text=["?"] * 2, audio_embeds=SOUNDS[:2], answers=["a", "b"])
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    prompts = processor(text=["?"] * 2, audio_embeds=SOUNDS[:2])
    answers = model.eval().generate(**prompts, max_new_tokens=3, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    assert [a.split("<|")[0].strip() for a in processor.batch_decode(answers)] == ["a", "b"]


# -- Mapper ------------------------------------------------------------------------------------------------------------


def test_the_mapper_is_a_transformer_over_embedding_and_queries_read_at_the_queries(model):
    mapper = model.mapper
    width, heads, fed = mapper.queries.shape[1], mapper.layers[0].num_heads, mapper.layers[0].up_proj.out_features
    embeds = torch.stack(SOUNDS)
    tokens = mapper.clap_proj(embeds).unflatten(1, (3, width))
    hidden_states = torch.cat([tokens, mapper.queries.expand(3, 4, width)], dim=1)
    for layer in mapper.layers:
        reference = nn.TransformerEncoderLayer(width, heads, fed, 0.0, "gelu", norm_first=True, batch_first=True).eval()
        reference.load_state_dict(
            {
                "self_attn.in_proj_weight": layer.qkv_proj.weight,
                "self_attn.in_proj_bias": layer.qkv_proj.bias,
                "self_attn.out_proj.weight": layer.out_proj.weight,
                "self_attn.out_proj.bias": layer.out_proj.bias,
                "linear1.weight": layer.up_proj.weight,
                "linear1.bias": layer.up_proj.bias,
                "linear2.weight": layer.down_proj.weight,
                "linear2.bias": layer.down_proj.bias,
                "norm1.weight": layer.attention_norm.weight,
                "norm1.bias": layer.attention_norm.bias,
                "norm2.weight": layer.mlp_norm.weight,
                "norm2.bias": layer.mlp_norm.bias,
            }
        )
        hidden_states = reference(hidden_states)
    expected = mapper.out_proj(F.layer_norm(hidden_states[:, 3:], (width,), mapper.norm.weight, mapper.norm.bias))
    found = mapper(embeds)
    assert found.shape == (3, 4, 32)
    same(found, expected, atol=1e-6)


def test_mapper_dropout_acts_in_training_only():
    mapper = make_model(mapper_dropout=0.5).mapper
    embeds = torch.stack(SOUNDS)
    assert torch.equal(mapper(embeds), mapper(embeds))
    mapper.train()
    assert not torch.allclose(mapper(embeds), mapper(embeds), atol=1e-4)


def test_a_fresh_mapper_is_drawn_with_the_given_spread():
    model = make_model(initializer_range=0.1)
    for weight in (model.mapper.queries, model.mapper.clap_proj.weight, model.mapper.layers[1].up_proj.weight):
        assert weight.std().item() == pytest.approx(0.1, rel=0.2)
    assert not model.mapper.out_proj.bias.any()
    assert (model.mapper.norm.weight == 1).all()


# -- Audio and padding -------------------------------------------------------------------------------------------------


def test_the_prefix_stands_at_the_placeholders(model, prompts):
    seen = []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    output = model(**prompts)
    hook.remove()
    at = prompts["input_ids"] == AUDIO_TOKEN_ID
    prefix = model.mapper(F.normalize(prompts["audio_embeds"][:, 0], dim=-1))
    assert prefix.shape == (3, 4, 32)
    same(seen[0][at], prefix.flatten(0, 1))
    same(output.audio_hidden_states, prefix)
    same(seen[0][~at], model.get_input_embeddings()(prompts["input_ids"][~at]))


def test_the_logits_depend_on_the_sound(model, prompts):
    other = {**prompts, "audio_embeds": prompts["audio_embeds"].flip(0)}
    assert not torch.allclose(model(**other).logits[0, -1], model(**prompts).logits[0, -1], atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, processor, side):
    padded = processor(text=TEXTS, audio_embeds=SOUNDS, padding_side=side)
    logits = model(**padded).logits
    for row, (text, sound) in enumerate(zip(TEXTS, SOUNDS, strict=True)):
        alone = processor(text=text, audio_embeds=sound)
        same(logits[row][padded["attention_mask"][row].bool()], model(**alone).logits[0])


def test_prompts_with_different_numbers_of_audios_give_what_they_give_alone(model, processor):
    groups = [SOUNDS[:2], [], SOUNDS[2:]]
    together = processor(text=TEXTS, audio_embeds=groups)
    assert together["audio_embeds_mask"].sum(1).tolist() == [2, 0, 1]
    # What stands in the padding of audio_embeds must not matter.
    together["audio_embeds"][together["audio_embeds_mask"] == 0] = torch.nan
    logits = model(**together).logits
    for row, (text, group) in enumerate(zip(TEXTS, groups, strict=True)):
        alone = model(**processor(text=text, audio_embeds=group or None)).logits
        same(logits[row, -alone.shape[1] :], alone[0])


def test_text_alone_is_the_language_model_alone(model, processor):
    inputs = processor(text="Hello.")
    expected = model.language_model(**inputs).logits
    same(model(**inputs).logits, expected)


def test_a_mask_of_ones_is_no_mask(model, prompts):
    without = {key: value for key, value in prompts.items() if key != "audio_embeds_mask"}
    same(model(**without).logits, model(**prompts).logits)


def test_a_tuple_is_returned_on_demand(model, batch):
    output = model(**batch)
    loss, logits, *_ = model(**batch, return_dict=False)
    same(loss, output.loss)
    same(logits, output.logits)


def test_an_empty_cache_is_as_none(model, prompts):
    output = model(**prompts, past_key_values=DynamicCache(config=model.config.text_config))
    same(output.logits, model(**prompts).logits)
    with pytest.raises(ValueError, match="audio positions, but audio_embeds has"):
        model(input_ids=prompts["input_ids"], past_key_values=DynamicCache(config=model.config.text_config))


@pytest.mark.parametrize("split", [1, 3])
def test_a_prompt_in_two_parts_is_the_prompt(model, processor, split):
    whole = processor(text=TEXTS, audio_embeds=SOUNDS, answers=["A dog."] * 3)
    del whole["labels"]
    ids, mask = whole.pop("input_ids"), whole.pop("attention_mask")
    first = model(input_ids=ids[:, :-split], attention_mask=mask[:, :-split], use_cache=True, **whole)
    second = model(input_ids=ids[:, -split:], attention_mask=mask, past_key_values=first.past_key_values)
    same(second.logits, model(input_ids=ids, attention_mask=mask, **whole).logits[:, -split:])


# -- Noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.015, 0.2])
def test_the_noise_has_its_variance_in_training_and_none_otherwise(variance):
    torch.manual_seed(0)
    noise = MatsNoise(variance, renormalize=False)
    embeds = F.normalize(torch.randn(500, 1024), dim=-1)
    drawn = noise.train()(embeds) - embeds
    assert drawn.var().item() == pytest.approx(variance, rel=0.01)
    assert drawn.mean().item() == pytest.approx(0, abs=1e-3)
    assert torch.equal(noise.eval()(embeds), embeds)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("renormalize", [True, False])
def test_renormalize_says_whether_the_mapper_sees_unit_vectors(renormalize, training):
    noise = MatsNoise(0.05, renormalize).train(training)
    embeds = 3 * F.normalize(torch.randn(50, 16), dim=-1)
    norms = noise(embeds).norm(dim=-1)
    assert torch.allclose(norms, torch.ones(50)) is renormalize
    if not training and not renormalize:
        assert torch.equal(noise(embeds), embeds)


def test_renormalizing_keeps_the_direction_of_the_noisy_embedding():
    embeds = F.normalize(torch.randn(5, 16), dim=-1)
    found = []
    for renormalize in (True, False):
        torch.manual_seed(3)
        found.append(MatsNoise(0.05, renormalize).train()(embeds))
    same(found[0], F.normalize(found[1], dim=-1))


def test_the_noise_is_drawn_anew_for_every_step_of_training_only(model, batch):
    training = in_training(model, noise_variance=0.015)
    assert training(**batch).loss != training(**batch).loss
    assert model(**batch).loss == model(**batch).loss
    without = in_training(model, noise_variance=0.0)
    assert without(**batch).loss == without(**batch).loss


def test_the_noise_follows_the_configuration():
    model = make_model(noise_variance=0.3, renormalize=False)
    assert (model.noise.variance, model.noise.renormalize) == (0.3, False)
    assert "variance=0.3, renormalize=False" in repr(model.noise)


# -- Generation --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy_by_hand(model, inputs, steps: int) -> torch.Tensor:
    """Without cache and without generate: the whole prompt again for every token."""
    inputs = dict(inputs)
    for _ in range(steps):
        logits = model(**inputs).logits[:, -1]
        logits[:, AUDIO_TOKEN_ID] = -torch.inf
        token = logits.argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, 1), value=1)
    return inputs["input_ids"]


@pytest.fixture(scope="module", params=KINDS)
def talker(request) -> MatsForConditionalGeneration:
    return make_talker(request.param)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_the_argmax_at_every_step(talker, prompts, use_cache):
    found = talker.generate(**prompts, max_new_tokens=10, do_sample=False, use_cache=use_cache)
    expected = greedy_by_hand(talker, prompts, 10)
    assert torch.equal(found, expected)
    answers = expected[:, prompts["input_ids"].shape[1] :]
    assert len({tuple(row) for row in answers.tolist()}) == 3
    assert max(len(set(row)) for row in answers.tolist()) > 2  # it does not just repeat itself


def test_a_batch_generates_what_each_prompt_generates_alone(talker, processor, prompts):
    together = talker.generate(**prompts, max_new_tokens=8, do_sample=False)[:, -8:]
    for row, (text, sound) in enumerate(zip(TEXTS, SOUNDS, strict=True)):
        alone = talker.generate(**processor(text=text, audio_embeds=sound), max_new_tokens=8, do_sample=False)
        assert torch.equal(alone[0, -8:], together[row])


def test_prompts_with_different_numbers_of_audios_generate_together(talker, processor):
    groups = [SOUNDS[:2], [], SOUNDS[2:]]
    together = talker.generate(**processor(text=TEXTS, audio_embeds=groups), max_new_tokens=6, do_sample=False)[:, -6:]
    for row, (text, group) in enumerate(zip(TEXTS, groups, strict=True)):
        alone = processor(text=text, audio_embeds=group or None)
        alone = talker.generate(**alone, max_new_tokens=6, do_sample=False)
        assert torch.equal(alone[0, -6:], together[row])


def test_the_order_of_audios_matters(talker, processor):
    first, second = (
        talker(**processor(text="Compare.", audio_embeds=order)).logits for order in (SOUNDS[:2], SOUNDS[1::-1])
    )
    assert not torch.allclose(first[0, -1], second[0, -1], atol=1e-4)


def score(model, sequences, prompts) -> torch.Tensor:
    """Summed log-probability of what follows the prompts."""
    new = sequences.shape[1] - prompts["input_ids"].shape[1]
    inputs = {**prompts, "input_ids": sequences, "attention_mask": F.pad(prompts["attention_mask"], (0, new), value=1)}
    with torch.no_grad():
        logits = model(**inputs).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, sequences[:, 1:, None]).squeeze(-1)
    return chosen[:, -new:].sum(1)


def test_beams_find_what_is_at_least_as_likely_as_greedy(talker, prompts):
    greedy = talker.generate(**prompts, max_new_tokens=6, do_sample=False)
    beams = talker.generate(
        **prompts, max_new_tokens=6, do_sample=False, num_beams=8, return_dict_in_generate=True, output_scores=True
    )
    found = score(talker, beams.sequences, prompts)
    assert (found >= score(talker, greedy, prompts) - 1e-4).all()
    same(beams.sequences_scores * 6, found, atol=1e-3)  # each beam kept its own sound


def test_beams_with_and_without_a_cache_agree(talker, prompts):
    cached, uncached = (
        talker.generate(**prompts, max_new_tokens=5, do_sample=False, num_beams=3, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


def test_several_answers_for_each_prompt(talker, prompts):
    beams = talker.generate(**prompts, max_new_tokens=5, do_sample=False, num_beams=4, num_return_sequences=2)
    assert beams.shape[0] == 6
    assert torch.equal(beams[::2, : prompts["input_ids"].shape[1]], prompts["input_ids"])
    best = talker.generate(**prompts, max_new_tokens=5, do_sample=False, num_beams=4)
    assert torch.equal(beams[::2], best)
    torch.manual_seed(0)
    sampled = talker.generate(**prompts, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert sampled.shape[0] == 9


def test_sampling_is_repeated_by_its_seed(talker, prompts):
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(talker.generate(**prompts, max_new_tokens=10, do_sample=True, temperature=1.5))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_answer_is_streamed_while_it_is_made(talker, processor):
    inputs = processor(text=TEXTS[0], audio_embeds=SOUNDS[0])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    kwargs = {**inputs, "max_new_tokens": 12, "do_sample": False}
    thread = threading.Thread(target=talker.generate, kwargs={**kwargs, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == processor.decode(talker.generate(**kwargs)[0, inputs["input_ids"].shape[1] :])
    assert len(pieces) > 2


def test_a_repetition_penalty_works_with_placeholders_in_the_prompt(talker, prompts):
    plain = talker.generate(**prompts, max_new_tokens=20, do_sample=False)
    found = talker.generate(**prompts, max_new_tokens=20, do_sample=False, repetition_penalty=1e6)
    length = prompts["input_ids"].shape[1]
    assert any(len(set(row)) < 20 for row in plain[:, length:].tolist())
    for row in found.tolist():
        assert len(set(row[length:])) == 20
        assert not set(row[length:]) & set(row[:length])


@pytest.mark.parametrize("kwargs", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False}])
def test_the_placeholder_is_never_generated(talker, prompts, kwargs):
    model = copy.deepcopy(talker)
    with torch.no_grad():
        last = model(**prompts, output_hidden_states=True).hidden_states[-1][:, -1]
    model.get_output_embeddings().weight.data[AUDIO_TOKEN_ID] = 100 * last.sum(0)
    assert (model(**prompts).logits[:, -1].argmax(-1) == AUDIO_TOKEN_ID).any()  # it would like to
    answers = model.generate(**prompts, max_new_tokens=8, **kwargs)[:, -8:]
    assert not (answers == AUDIO_TOKEN_ID).any()


@pytest.mark.parametrize("how", ["keyword", "generation_config", "own generation_config"])
def test_other_suppressed_tokens_stay_suppressed(talker, prompts, how):
    model = copy.deepcopy(talker)
    first = model.generate(**prompts, max_new_tokens=1, do_sample=False)[:, -1].tolist()
    kwargs = {"max_new_tokens": 1, "do_sample": False}
    if how == "keyword":
        kwargs["suppress_tokens"] = first
    elif how == "generation_config":
        kwargs = {"generation_config": GenerationConfig(suppress_tokens=first, eos_token_id=None, **kwargs)}
    else:
        model.generation_config.suppress_tokens = first
    second = model.generate(**prompts, **kwargs)[:, -1].tolist()
    assert not set(first) & set(second)


def test_generation_stops_at_the_end_token(talker, prompts):
    free = talker.generate(**prompts, max_new_tokens=8, do_sample=False)[:, -8:]
    end = free[0, 3].item()
    found = talker.generate(**prompts, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0)
    answer = found[0, prompts["input_ids"].shape[1] :].tolist()
    stop = free[0].tolist().index(end)
    assert answer[: stop + 1] == free[0].tolist()[: stop + 1]
    assert set(answer[stop + 1 :]) <= {0}


def test_the_prefix_is_computed_once_with_a_cache(talker, prompts):
    calls = []
    hook = talker.mapper.register_forward_hook(lambda *_: calls.append(1))
    talker.generate(**prompts, max_new_tokens=5, do_sample=False)
    hook.remove()
    assert len(calls) == 1


def test_a_language_model_without_a_cache_generates(processor, prompts, batch):
    text_config = {"model_type": "openai-gpt", "n_positions": 128, "n_embd": 32, "n_layer": 1, "n_head": 2}
    config = MatsConfig(text_config={**text_config, "vocab_size": 301}, audio_token_id=AUDIO_TOKEN_ID, **MAPPER)
    model = MatsForConditionalGeneration(config).eval()
    output = model(**batch)
    assert torch.isfinite(output.loss)
    assert output.past_key_values is None
    found = model.generate(**prompts, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, greedy_by_hand(model, prompts, 5))


def test_text_alone_can_be_continued(talker, processor):
    inputs = processor(text="Hello.")
    assert talker.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3


# -- Precision, attention, memory --------------------------------------------------------------------------------------


def test_bfloat16_is_close_to_float32(model, batch, prompts):
    halves = copy.deepcopy(model).to(torch.bfloat16)
    output = halves(**batch)
    assert output.logits.dtype == torch.bfloat16
    assert batch["audio_embeds"].dtype == torch.float32  # as the processor gives them
    assert output.loss.item() == pytest.approx(model(**batch).loss.item(), rel=0.02)
    assert halves.generate(**prompts, max_new_tokens=4).shape[1] == prompts["input_ids"].shape[1] + 4
    training = in_training(halves, noise_variance=0.015)
    training(**batch).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in training.parameters())


def test_sdpa_and_eager_attention_agree(model, batch):
    other = copy.deepcopy(model)
    assert other.language_model.config._attn_implementation == "sdpa"
    other.set_attn_implementation("eager")
    assert other.language_model.config._attn_implementation == "eager"
    kept = batch["attention_mask"].bool()
    same(other(**batch).logits[kept], model(**batch).logits[kept])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model, batch, use_reentrant):
    plain, thrifty = in_training(model), in_training(model)
    thrifty.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert thrifty.is_gradient_checkpointing
    runs = []
    layers = thrifty.get_decoder().h if hasattr(thrifty.get_decoder(), "h") else thrifty.get_decoder().layers
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for one in (plain, thrifty):
        one(**batch, use_cache=False).loss.backward()
    assert len(runs) == 2 * len(layers)  # once more on the way back
    for (name, found), expected in zip(thrifty.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# -- Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "auto_class", [MatsForConditionalGeneration, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM]
)
def test_saving_and_loading_keeps_weights_settings_and_outputs(model, batch, tmp_path, auto_class):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is MatsForConditionalGeneration
    assert not loaded.training
    assert loaded.config.to_dict() == {**model.config.to_dict(), **{k: loaded.config.to_dict()[k] for k in CHANGING}}
    assert sorted(loaded.state_dict()) == sorted(model.state_dict())
    same(loaded(**batch).loss, model(**batch).loss, atol=0)


# Fields that transformers itself fills in on saving or loading.
CHANGING = {"_name_or_path", "architectures", "dtype", "transformers_version", "text_config"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_tied_embeddings_stay_tied_and_others_apart(tmp_path, kind, tied):
    model = make_model(kind)
    text_config = {**model.config.text_config.to_dict(), "tie_word_embeddings": tied}
    model = MatsForConditionalGeneration(type(model.config)(**{**model.config.to_dict(), "text_config": text_config}))
    model.save_pretrained(tmp_path)
    loaded = MatsForConditionalGeneration.from_pretrained(tmp_path)
    for one in (model, loaded):
        assert (one.get_output_embeddings().weight is one.get_input_embeddings().weight) is tied
    same(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight, atol=0)


def test_the_precision_of_a_file_is_kept(model, tmp_path):
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path)
    assert MatsForConditionalGeneration.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert MatsForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_large_weights_are_sharded(model, batch, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    same(MatsForConditionalGeneration.from_pretrained(tmp_path)(**batch).loss, model(**batch).loss, atol=0)


# -- Around a pretrained language model --------------------------------------------------------------------------------

MAPPER = {
    "audio_embed_dim": 16,
    "num_audio_tokens": 4,
    "mapper_hidden_size": 32,
    "mapper_num_layers": 1,
    "mapper_num_heads": 4,
    "mapper_clap_tokens": 3,
}


def make_language_model(kind: str, rows: int = 300):
    torch.manual_seed(2)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=rows, n_layer=1, n_embd=32, n_head=2, n_positions=128)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(vocab_size=rows, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("how", ["object", "str", "Path"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_keeps_its_weights_and_gets_a_row_for_the_placeholder(kind, how, tmp_path, processor):
    language_model = make_language_model(kind)
    expected = {name: weight.clone() for name, weight in language_model.state_dict().items()}
    inputs = processor(text=["Hello there.", "Good morning."], padding_side="right")
    logits = language_model(**inputs).logits
    language_model.save_pretrained(tmp_path / "lm")
    source = {"object": language_model, "str": str(tmp_path / "lm"), "Path": tmp_path / "lm"}[how]
    model = MatsForConditionalGeneration.from_language_model(source, AUDIO_TOKEN_ID, 301, **MAPPER)
    found = model.language_model.state_dict()
    assert sorted(found) == sorted(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name][: len(weight)], weight), name
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert table.weight.shape == (301, 32)
        same(table.weight[300], table.weight[:300].mean(0), atol=1e-6)
    kept = inputs["attention_mask"].bool()
    same(model(**inputs).logits[kept][:, :300], logits[kept])
    assert model.config.text_config.vocab_size == 301
    assert model.config.language_model_name_or_path == (None if how == "object" else str(tmp_path / "lm"))
    assert not any(module.training for module in model.modules())


def test_a_new_model_survives_saving_and_loading(tmp_path, batch):
    model = MatsForConditionalGeneration.from_language_model(make_language_model("gpt2"), AUDIO_TOKEN_ID, 301, **MAPPER)
    model.save_pretrained(tmp_path)
    loaded = MatsForConditionalGeneration.from_pretrained(tmp_path)
    same(loaded(**batch).loss, model(**batch).loss, atol=0)
    assert loaded.config.audio_token_id == AUDIO_TOKEN_ID


@pytest.mark.parametrize("rows", [301, 320])
def test_a_table_that_is_large_enough_is_left_alone(rows):
    language_model = make_language_model("llama", rows)
    weight = language_model.get_input_embeddings().weight.clone()
    model = MatsForConditionalGeneration.from_language_model(language_model, AUDIO_TOKEN_ID, 301, **MAPPER)
    assert torch.equal(model.get_input_embeddings().weight, weight)


def test_a_new_model_generates_as_the_language_model_is_told_to():
    language_model = make_language_model("llama")
    language_model.generation_config.temperature = 0.3
    language_model.generation_config.eos_token_id = [5, 6]
    model = MatsForConditionalGeneration.from_language_model(language_model, AUDIO_TOKEN_ID, 301, **MAPPER)
    assert model.generation_config.temperature == 0.3
    assert model.generation_config.eos_token_id == [5, 6]


def test_a_new_model_has_the_language_models_precision():
    language_model = make_language_model("llama").bfloat16()
    model = MatsForConditionalGeneration.from_language_model(language_model, AUDIO_TOKEN_ID, 301, **MAPPER)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_new_model_attends_as_the_language_model_did(monkeypatch, implementation):
    language_model = make_language_model("llama")
    language_model.set_attn_implementation(implementation)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", None)  # no second language model is built
    model = MatsForConditionalGeneration.from_language_model(language_model, AUDIO_TOKEN_ID, 301, **MAPPER)
    assert model.language_model is language_model
    assert language_model.config._attn_implementation == implementation
    model.set_attn_implementation("eager")
    assert language_model.config._attn_implementation == "eager"


def test_a_new_model_has_a_fresh_mapper():
    model = MatsForConditionalGeneration.from_language_model(
        make_language_model("gpt2"), AUDIO_TOKEN_ID, 301, initializer_range=0.1, **MAPPER
    )
    assert model.mapper.clap_proj.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert not model.mapper.clap_proj.bias.any()


def test_a_placeholder_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="audio_token_id is 301, but there are 301 tokens"):
        MatsForConditionalGeneration.from_language_model(make_language_model("gpt2"), 301, 301, **MAPPER)


# -- LoRA --------------------------------------------------------------------------------------------------------------


def with_lora(model: MatsForConditionalGeneration) -> PeftModel:
    gpt2 = model.config.text_config.model_type == "gpt2"
    return get_peft_model(
        model,
        LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=r"language_model\..*\.(c_attn|q_proj|v_proj)",
            fan_in_fan_out=gpt2,
            modules_to_save=["mapper"],
            task_type="CAUSAL_LM",
        ),
    )


@pytest.fixture(scope="module", params=KINDS)
def adapted(request, processor) -> PeftModel:
    """A model with LoRA, trained for some steps on descriptions."""
    torch.manual_seed(0)
    model = with_lora(make_talker(request.param))
    batch = processor(text=TEXTS, descriptions=SENTENCES[:3], answers=ANSWERS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.losses = losses
    return model.eval()


def test_lora_trains_mapper_and_adapters_alone(adapted):
    assert sum(adapted.losses[-3:]) < 0.8 * sum(adapted.losses[:3])
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or ".mapper.modules_to_save." in name for name in trained)
    assert any("lora_" in name for name in trained)
    assert not any("mapper" in name and "lora_" in name for name in trained)
    original = make_talker(adapted.config.text_config.model_type).language_model.state_dict()
    for name, weight in adapted.base_model.model.language_model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, original[name.replace(".base_layer", "")]), name


def test_lora_generates(adapted, prompts):
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    found = adapted.generate(**prompts, **kwargs)
    cacheless = adapted.generate(**prompts, use_cache=False, **kwargs)
    assert torch.equal(found, cacheless)
    with adapted.disable_adapter():
        assert not torch.equal(adapted.generate(**prompts, **kwargs), found)


def test_lora_merges_into_a_whole_checkpoint(adapted, batch, tmp_path):
    expected = adapted(**batch).logits
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert type(merged) is MatsForConditionalGeneration
    same(merged(**batch).logits, expected, atol=1e-4)
    merged.save_pretrained(tmp_path)
    same(MatsForConditionalGeneration.from_pretrained(tmp_path)(**batch).logits, expected, atol=1e-4)


def test_lora_is_saved_light_and_loaded_onto_the_model(adapted, batch, tmp_path):
    adapted.save_pretrained(tmp_path)
    kind = adapted.config.text_config.model_type
    assert not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(make_talker(kind), tmp_path).eval()
    same(loaded(**batch).logits, adapted(**batch).logits, atol=1e-6)
    assert not torch.allclose(make_talker(kind)(**batch).logits, adapted(**batch).logits, atol=1e-3)


# -- Refusals ----------------------------------------------------------------------------------------------------------


def changed(inputs, **kwargs) -> dict:
    return {key: value for key, value in {**inputs, **kwargs}.items() if value is not None}


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda inputs: {"audio_embeds": None, "audio_embeds_mask": None},
            r"hold \[4, 4, 4\] audio positions, but audio_embeds has \[0, 0, 0\] audios of 4 positions",
        ),
        (
            lambda inputs: {"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == AUDIO_TOKEN_ID, 5)},
            r"hold \[0, 0, 0\] audio positions, but audio_embeds has \[1, 1, 1\] audios",
        ),
        (
            lambda inputs: {"audio_embeds": inputs["audio_embeds"].repeat(1, 2, 1), "audio_embeds_mask": None},
            r"audio_embeds has \[2, 2, 2\] audios",
        ),
        (lambda inputs: {"audio_embeds_mask": torch.tensor([[1], [0], [1]])}, r"audio_embeds has \[1, 0, 1\] audios"),
        (lambda inputs: {"input_ids": inputs["input_ids"][:, :-1] * 0 + AUDIO_TOKEN_ID}, "audio positions, but"),
        (
            lambda inputs: {"audio_embeds": inputs["audio_embeds"][:2], "audio_embeds_mask": None},
            r"audio_embeds has \[1, 1\] audios",
        ),
        (
            lambda inputs: {"audio_embeds": inputs["audio_embeds"].repeat(2, 1, 1), "audio_embeds_mask": None},
            r"audio_embeds has \[1, 1, 1, 1, 1, 1\] audios",
        ),
        (
            lambda inputs: {"audio_embeds": inputs["audio_embeds"][..., :15]},
            r"audio_embeds has shape \(3, 1, 15\), expected \(batch, audios, 16\)",
        ),
        (
            lambda inputs: {"audio_embeds": inputs["audio_embeds"].repeat(1, 2, 1)},
            r"audio_embeds_mask has shape \(3, 1\), expected \(3, 2\) as audio_embeds",
        ),
    ],
    ids=[
        "no audio",
        "no placeholder",
        "too many audios",
        "masked audio",
        "too many placeholders",
        "too few rows",
        "too many rows",
        "another width",
        "another mask",
    ],
)
def test_inputs_that_contradict_each_other_are_refused(model, prompts, call, change, message):
    inputs = changed(prompts, **change(prompts))
    if "input_ids" in change(prompts):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with pytest.raises(ValueError, match=message):
        model(**inputs) if call == "forward" else model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "Pass input_ids or inputs_embeds"),
        (
            {"inputs_embeds": torch.zeros(1, 4, 32), "audio_embeds": torch.zeros(1, 1, 16)},
            "audio_embeds need input_ids, where their placeholders are",
        ),
        ({"audio_embeds": torch.zeros(1, 16)}, r"has shape \(1, 16\), expected \(batch, audios, 16\)"),
    ],
)
def test_inputs_without_tokens_are_refused(model, inputs, message):
    if "inputs_embeds" not in inputs and inputs:
        inputs = {**inputs, "input_ids": torch.full((1, 64), AUDIO_TOKEN_ID)}
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_labels_with_nothing_to_learn_are_refused(model, batch):
    nothing = changed(batch, labels=torch.full_like(batch["labels"], -100))
    with pytest.raises(ValueError, match="labels are -100 everywhere"):
        in_training(model)(**nothing)


@pytest.mark.parametrize("how", ["keyword", "generation_config", "own generation_config"])
@pytest.mark.parametrize(
    ("length", "limit", "value"),
    [
        (129, "max_new_tokens", 1),
        (120, "max_new_tokens", 10),
        (120, "max_length", 130),
    ],
)
def test_an_answer_that_may_outgrow_the_positions_is_refused(model, length, limit, value, how):
    kwargs = {limit: value}
    if how == "generation_config":
        kwargs = {"generation_config": GenerationConfig(**kwargs)}
    elif how == "own generation_config":
        model = copy.deepcopy(model)
        model.generation_config.update(**kwargs)
        kwargs = {}
    with pytest.raises(ValueError, match=rf"prompt has {length} positions, .* model has 128, .* {limit} is {value}\."):
        model.generate(input_ids=torch.full((1, length), 7), **kwargs)


@pytest.mark.parametrize(
    ("length", "limit"), [(120, {"max_new_tokens": 9}), (120, {"max_length": 129}), (128, {"max_new_tokens": 1})]
)
def test_the_last_position_can_be_used(talker, length, limit):
    found = talker.generate(input_ids=torch.full((1, length), 7), do_sample=False, **limit)
    assert found.shape == (1, 129)


@pytest.mark.parametrize(
    "text_config",
    [
        {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
        {"model_type": "rwkv", "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_recurrent_language_model_is_refused(text_config):
    config = MatsConfig(text_config={**text_config, "vocab_size": 301}, audio_token_id=AUDIO_TOKEN_ID, **MAPPER)
    with pytest.raises(ValueError, match="ForCausalLM keeps a recurrent state in place of past_key_values"):
        MatsForConditionalGeneration(config)


def test_the_processor_refuses_what_the_model_cannot_hold(model):
    processor = make_processor(max_positions=model.config.text_config.max_position_embeddings)
    with pytest.raises(ValueError, match="129 positions, audio included; the language model has 128"):
        processor(text="x" * 125, audio_embeds=SOUNDS[0])

"""MatsProcessor: placeholders, embeddings, labels, conversations, files, and every refusal before CLAP runs."""

import copy
import pickle
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import SENTENCES, make_chat_tokenizer, make_clap, make_laion_clap, make_processor, make_tokenizer, tone
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.constants import ENDPOINT
from test_audio_mats import BAD_AUDIO
from transformers import AutoProcessor

from processing_mats import ClapEncoder, MatsProcessor, SantaMemory, cut_windows

RATE = 16000
TOKENS = 4  # positions of one audio
AUDIO = "<|audio|>"
A, B, C = (tone(), RATE), (tone(0.4, 900), RATE), (tone(2.5, 2500), RATE)
QUESTION = "What is making this sound?"


@pytest.fixture(scope="module")
def chat_processor() -> MatsProcessor:
    """For a language model with a template of its own."""
    return make_processor(tokenizer=make_chat_tokenizer(), max_positions=512)


@pytest.fixture(params=["default template", "ChatML"])
def any_processor(request, processor, chat_processor) -> MatsProcessor:
    return {"default template": processor, "ChatML": chat_processor}[request.param]


def same(found: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def same_inputs(found, expected):
    assert sorted(found) == sorted(expected)
    for key in expected:
        same(found[key], expected[key])


def answers_in(processor, inputs) -> list[str]:
    """What the labels decode to, row by row."""
    return [processor.decode(row[row != -100]) for row in inputs["labels"]]


def prompts_in(processor, inputs) -> list[str]:
    """What the tokens decode to without padding, an audio's positions as one placeholder."""
    texts = [
        processor.decode(ids[mask.bool()])
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    return [text.replace(AUDIO * TOKENS, AUDIO) for text in texts]


# -- Shapes and placeholders -------------------------------------------------------------------------------------------


def test_a_prompt_and_a_sound_give_the_models_inputs(processor):
    inputs = processor(text=QUESTION, audio=A)
    length = TOKENS + len(processor.tokenizer(QUESTION)["input_ids"])
    assert {key: tuple(value.shape) for key, value in inputs.items()} == {
        "input_ids": (1, length),
        "attention_mask": (1, length),
        "audio_embeds": (1, 1, 16),
        "audio_embeds_mask": (1, 1),
    }
    assert set(inputs) == set(processor.model_input_names)
    assert inputs["input_ids"][0, :TOKENS].tolist() == [processor.audio_token_id] * TOKENS
    assert inputs["audio_embeds"].dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (QUESTION, f"{AUDIO}{QUESTION}"),
        (f"{AUDIO}{QUESTION}", f"{AUDIO}{QUESTION}"),
        (f"Listen: {AUDIO}. {QUESTION}", f"Listen: {AUDIO}. {QUESTION}"),
        (f"{QUESTION} {AUDIO}", f"{QUESTION} {AUDIO}"),
        ("", AUDIO),
    ],
)
def test_a_placeholder_is_kept_where_it_is_and_otherwise_goes_in_front(processor, text, expected):
    inputs = processor(text=text, audio=A)
    assert prompts_in(processor, inputs) == [expected]
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == TOKENS


def test_text_alone_has_no_audio(processor):
    inputs = processor(text=["Hello.", "Good morning to you."])
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert prompts_in(processor, inputs) == ["Hello.", "Good morning to you."]


@pytest.mark.parametrize("text", ["Compare.", f"Compare {AUDIO} with {AUDIO}."])
def test_several_audios_in_one_prompt_keep_their_order(processor, text):
    inputs = processor(text=text, audio=[A, B])
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 2 * TOKENS
    same(inputs["audio_embeds"][0], processor.apply_santa(processor.encode_audio([A, B])))
    assert inputs["audio_embeds_mask"].tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("audio", "text"),
    [
        ([A, B, C], [f"{AUDIO}{AUDIO}Compare.", QUESTION]),
        ([[A, B], [C]], ["Compare.", QUESTION]),
        ([[A, B], [C]], [f"{AUDIO}{AUDIO}Compare.", f"{AUDIO}{QUESTION}"]),
    ],
    ids=["dealt out by placeholders", "nested", "nested with placeholders"],
)
def test_prompts_with_different_numbers_of_audios_are_masked(processor, audio, text):
    inputs = processor(text=text, audio=audio)
    assert inputs["audio_embeds_mask"].tolist() == [[1, 1], [1, 0]]
    expected = processor.apply_santa(processor.encode_audio([A, B, C]))
    same(inputs["audio_embeds"][0], expected[:2])
    same(inputs["audio_embeds"][1, 0], expected[2])
    assert (inputs["audio_embeds"][1, 1] == 0).all()
    assert (inputs["input_ids"] == processor.audio_token_id).sum(1).tolist() == [2 * TOKENS, TOKENS]


def test_a_prompt_of_a_batch_may_have_no_audio(processor):
    inputs = processor(text=[QUESTION, "Hello."], audio=[[A], []])
    assert inputs["audio_embeds_mask"].tolist() == [[1], [0]]
    assert prompts_in(processor, inputs) == [f"{AUDIO}{QUESTION}", "Hello."]


def test_a_batch_gives_what_each_prompt_gives_alone(processor):
    texts, sounds = [QUESTION, "And this?", "Describe the scene in detail."], [A, B, C]
    batch = processor(text=texts, audio=sounds)
    for row, (text, sound) in enumerate(zip(texts, sounds, strict=True)):
        alone = processor(text=text, audio=sound)
        kept = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][kept], alone["input_ids"][0])
        same(batch["audio_embeds"][row], alone["audio_embeds"][0])


@pytest.mark.parametrize(
    ("form", "rate"),
    [
        (lambda path: path, None),
        (str, None),
        (lambda path: [str(path)], None),
        (lambda path: [[str(path)]], None),
        (lambda path: sf.read(path), None),
        (lambda path: sf.read(path)[0], RATE),
        (lambda path: sf.read(path)[0].tolist(), RATE),
        (lambda path: torch.from_numpy(sf.read(path)[0]), RATE),
        (lambda path: {"path": None, "bytes": path.read_bytes()}, None),
    ],
    ids=["Path", "str", "list", "nested", "pair", "array", "list of numbers", "tensor", "bytes"],
)
def test_a_sound_is_the_same_in_whatever_form_it_comes(processor, tmp_path, form, rate):
    sf.write(tmp_path / "a.wav", A[0], RATE, subtype="FLOAT")
    same_inputs(
        processor(text=QUESTION, audio=form(tmp_path / "a.wav"), sampling_rate=rate), processor(text=QUESTION, audio=A)
    )


@pytest.mark.parametrize(("side", "padded"), [("left", slice(0, 3)), ("right", slice(-3, None))])
def test_padding_is_on_the_asked_side_and_masked(processor, side, padded):
    tokens = len(processor.tokenizer("ab")["input_ids"])
    inputs = processor(text=["ab", "ab"], audio=[A, B], padding="max_length", max_length=tokens + 7, padding_side=side)
    assert inputs["input_ids"].shape == (2, tokens + 7)
    assert (inputs["attention_mask"][:, padded] == 0).all()
    assert inputs["attention_mask"].sum(1).tolist() == [tokens + TOKENS] * 2
    assert (inputs["input_ids"][:, padded] == processor.tokenizer.pad_token_id).all()


def test_padding_is_on_the_left_by_default_and_to_a_multiple_where_asked(processor):
    inputs = processor(text=["ab", "A dog barks twice."], audio=[A, B], pad_to_multiple_of=8)
    assert inputs["input_ids"].shape[1] % 8 == 0
    assert inputs["attention_mask"][0, 0] == 0
    assert (inputs["attention_mask"][:, -1] == 1).all()


def test_special_tokens_of_the_tokenizer_are_added_unless_refused():
    processor = make_processor(tokenizer=with_bos(make_tokenizer()))
    first, without = (processor(text="Hi.", audio=A, answers="A dog.", add_special_tokens=add) for add in (True, False))
    assert first["input_ids"][0].tolist() == [processor.tokenizer.bos_token_id, *without["input_ids"][0].tolist()]
    assert answers_in(processor, first) == answers_in(processor, without) == [" A dog.<|endoftext|>"]


def test_a_tokenizer_that_knows_the_placeholder_is_not_extended():
    tokenizer = make_tokenizer()
    first = make_processor(tokenizer=tokenizer, with_memory=False)
    again = make_processor(tokenizer=tokenizer, with_memory=False)
    assert first.audio_token_id == again.audio_token_id == 300
    assert len(tokenizer) == 301


# -- Embeddings and Santa ----------------------------------------------------------------------------------------------


def test_encoded_audio_asked_again_gives_the_same_inputs(processor):
    embeds = processor.encode_audio([A, B])
    assert embeds.shape == (2, 16)
    same_inputs(processor(text=QUESTION, audio_embeds=embeds[0]), processor(text=QUESTION, audio=A))
    texts = [QUESTION, "And this?"]
    expected = processor(text=texts, audio=[A, B])
    same_inputs(processor(text=texts, audio_embeds=embeds), expected)
    same_inputs(processor(text=texts, audio_embeds=list(embeds)), expected)
    same_inputs(processor(text=texts, audio_embeds=[embeds[:1], embeds[1:]]), expected)
    same_inputs(processor(text="Compare.", audio_embeds=embeds), processor(text="Compare.", audio=[A, B]))


@pytest.mark.parametrize("form", [lambda embeds: embeds, torch.Tensor.numpy, torch.Tensor.tolist])
def test_embeddings_come_as_tensors_arrays_or_numbers(processor, form):
    embeds = processor.encode_audio([A, B])
    texts = [QUESTION, "And this?"]
    one, two = (processor(text=text, audio_embeds=embeds) for text, embeds in ((QUESTION, embeds[0]), (texts, embeds)))
    same_inputs(processor(text=QUESTION, audio_embeds=form(embeds[0])), one)
    same_inputs(processor(text=texts, audio_embeds=form(embeds)), two)
    same_inputs(processor(text=texts, audio_embeds=[form(embed) for embed in embeds]), two)
    same_inputs(processor(text=texts, audio_embeds=[[form(embed)] for embed in embeds]), two)
    same_inputs(processor(text=texts, audio_embeds=form(embeds[:, None])), two)


def test_one_sound_needs_no_list(processor):
    same(processor.encode_audio(A), processor.encode_audio([A]))
    same(processor.encode_audio(A[0], sampling_rate=RATE), processor.encode_audio([A]))
    same(processor.encode_text("A dog."), processor.encode_text(["A dog."]))


def test_descriptions_stand_in_for_audio_and_santa_leaves_them(processor):
    inputs = processor(text=[QUESTION, "And this?"], descriptions=SENTENCES[:2])
    same(inputs["audio_embeds"].squeeze(1), processor.clap.encode_text(SENTENCES[:2]))
    assert inputs["audio_embeds_mask"].tolist() == [[1], [1]]


def test_santa_acts_by_default_and_as_the_settings_say(processor):
    embeds = processor.encode_audio([A])
    memory = processor.santa_memory
    for santa, expected in (
        (None, memory(embeds).embeds),
        (True, memory(embeds).embeds),
        (False, embeds),
        ({"weight": 0.9}, memory(embeds, weight=0.9).embeds),
        ({"top_k": 1, "use_kmeans": False}, memory(embeds, top_k=1, use_kmeans=False).embeds),
    ):
        same(processor(text=QUESTION, audio=A, santa=santa)["audio_embeds"][0], expected)
        same(processor.apply_santa(embeds, santa), expected)
    assert not torch.allclose(memory(embeds).embeds, embeds, atol=1e-3)


def test_settings_of_the_processor_are_overridden_one_by_one():
    processor = make_processor(santa_settings={"weight": 0.5, "top_k": 2})
    embeds = processor.encode_audio([A])
    same(processor.apply_santa(embeds), processor.santa_memory(embeds, weight=0.5, top_k=2).embeds)
    same(processor.apply_santa(embeds, {"top_k": 1}), processor.santa_memory(embeds, weight=0.5, top_k=1).embeds)
    assert processor.santa_settings["temperature"] == 0.1


def test_without_a_memory_audio_goes_in_as_it_is():
    processor = make_processor(with_memory=False)
    same(processor(text=QUESTION, audio=A)["audio_embeds"][0], processor.encode_audio([A]))


def test_evidence_is_dealt_out_to_prompts_and_audios(processor):
    inputs = processor(text=["Compare.", QUESTION], audio=[[A, B], [C]], return_evidence=True)
    assert [len(of_prompt) for of_prompt in inputs["santa"]] == [2, 1]
    _, expected = processor.apply_santa(processor.encode_audio([A, B, C]), return_evidence=True)
    assert [item["text"] for item in inputs["santa"][1][0]] == [item["text"] for item in expected[2]]
    assert set(expected[2][0]) == {"text", "weight"}
    assert processor(text=QUESTION, audio=A, santa=False, return_evidence=True)["santa"] == [None]
    assert processor(text=QUESTION, descriptions="Rain.", return_evidence=True)["santa"] == [None]
    off = processor(text=QUESTION, audio=A, santa={"use_memory": False}, return_evidence=True)
    assert off["santa"] == [None]
    same(off["audio_embeds"][0], processor.encode_audio(A))


def test_long_audio_is_heard_to_its_end_unless_a_random_crop_is_wanted():
    processor = make_processor(with_memory=False)
    windows = [(window, RATE) for window in cut_windows(C[0], RATE)]
    mean = torch.nn.functional.normalize(processor.encode_audio(windows).mean(0), dim=0)
    same(processor.encode_audio(C)[0], mean)
    noise = (np.random.default_rng(0).uniform(-1, 1, 3 * RATE).astype(np.float32), RATE)
    random = make_processor(with_memory=False, long_audio="random")
    first, again, other = (random(text="?", audio=noise, seed=seed)["audio_embeds"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-4)


def test_silence_is_answered_with_a_warning(processor):
    with pytest.warns(UserWarning, match="completely silent"):
        inputs = processor(text=QUESTION, audio=(np.zeros(RATE), RATE))
    assert torch.isfinite(inputs["audio_embeds"]).all()


@pytest.mark.filterwarnings("ignore:At least one mel filter")
def test_laions_clap_works_in_its_place():
    processor = make_processor(make_laion_clap())
    inputs = processor(text=[QUESTION, "And this?"], audio=[A, C])
    assert inputs["audio_embeds"].shape == (2, 1, 16)
    same_inputs(processor(text=[QUESTION, "And this?"], audio=[A, C]), inputs)


# -- Matching by text --------------------------------------------------------------------------------------------------


def test_matching_gives_the_cosines_of_answers_and_labels(processor):
    scores = processor.match_labels(["A dog.", "Rain falls."], SENTENCES)
    assert scores.shape == (2, 10)
    same(scores, processor.encode_text(["A dog.", "Rain falls."]) @ processor.encode_text(SENTENCES).T)
    same(processor.match_labels(SENTENCES, SENTENCES).diagonal(), torch.ones(10))


def test_an_empty_answer_matches_nothing_and_a_long_one_is_cut(processor):
    scores = processor.match_labels(["", "A dog.", " \n", "woof " * 200], ["A dog.", "Rain."])
    assert (scores[[0, 2]] == 0).all()
    assert scores[1, 0] == pytest.approx(1, abs=1e-6)
    assert (scores[3] != 0).all()
    assert processor.match_labels([""], ["A dog."]).tolist() == [[0]]
    assert processor.match_labels([], ["A dog."]).shape == (0, 1)


@pytest.mark.parametrize(
    ("labels", "message"), [([], "labels is empty"), (["A dog.", ""], "Text 1 is ''"), (["x" * 999], "longer than")]
)
def test_labels_that_cannot_be_matched_are_refused(processor, labels, message):
    with pytest.raises(ValueError, match=message):
        processor.match_labels(["A dog."], labels)


# -- Labels ------------------------------------------------------------------------------------------------------------

ANSWERS = ["A dog.", "Rain falls on a tin roof, then it stops.\nSilence", "鶏 🐓"]


def user(*parts) -> dict:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": parts}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def sound(pair) -> dict:
    return {"type": "audio", "audio": pair[0], "sampling_rate": pair[1]}


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_answers_are_exactly_the_answers(processor, side):
    inputs = processor(
        text=[QUESTION, f"Listen: {AUDIO} What?", "Hm "], audio=[A, B, C], answers=ANSWERS, padding_side=side
    )
    assert answers_in(processor, inputs) == [f" {answer}<|endoftext|>" for answer in ANSWERS]
    labelled = inputs["labels"] != -100
    assert torch.equal(inputs["labels"][labelled], inputs["input_ids"][labelled])
    assert (inputs["attention_mask"][labelled] == 1).all()
    assert not (inputs["labels"] == processor.audio_token_id).any()
    # One piece at the end of each prompt.
    for row, mask in zip(labelled, inputs["attention_mask"], strict=True):
        row = row[mask.bool()].tolist()
        assert row == sorted(row)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_end_token_is_trained_on_though_padding_has_the_same_id(processor, side):
    end = processor.tokenizer.eos_token_id
    assert end == processor.tokenizer.pad_token_id
    inputs = processor(text=["a", "A dog barks twice."], audio=[A, B], answers=["b", "c"], padding_side=side)
    assert (inputs["attention_mask"] == 0).any()
    for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"].bool(), strict=True):
        assert (ids[~mask] == end).all()
        assert (labels[~mask] == -100).all()
        assert labels[mask][-1] == end


def test_an_answer_changes_nothing_in_front_of_it(processor):
    plain, trained = processor(text=QUESTION, audio=A), processor(text=QUESTION, audio=A, answers="A dog.")
    length = plain["input_ids"].shape[1]
    assert torch.equal(trained["input_ids"][:, :length], plain["input_ids"])
    assert (trained["labels"][:, :length] == -100).all()
    assert (trained["labels"][:, length:] != -100).all()


CONVERSATIONS = [
    [user(sound(A), QUESTION), assistant(ANSWERS[0])],
    [
        {"role": "system", "content": "Be brief."},
        user("Compare ", sound(A), " with ", sound(B)),
        assistant(ANSWERS[1]),
        user("A dog. Are you sure?"),
        assistant(ANSWERS[0]),
        user(sound(C), "And this?"),
        assistant(ANSWERS[2]),
    ],
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_conversations_are_exactly_the_assistants_turns(any_processor, side):
    inputs = any_processor.apply_chat_template(CONVERSATIONS, tokenize=True, return_labels=True, padding_side=side)
    space = " " if any_processor.tokenizer.eos_token == "<|endoftext|>" else ""
    end = any_processor.tokenizer.eos_token
    first, *turns = [f"{space}{answer}{end}" for answer in (ANSWERS[0], ANSWERS[1], ANSWERS[0], ANSWERS[2])]
    assert answers_in(any_processor, inputs) == [first, "".join(turns)]
    assert (inputs["labels"][inputs["attention_mask"] == 0] == -100).all()
    assert inputs["audio_embeds_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    expected = any_processor.apply_santa(any_processor.encode_audio([A, B, C]))
    same(inputs["audio_embeds"][1], expected)
    same(inputs["audio_embeds"][0, 0], expected[0])


def test_a_conversation_without_answers_has_no_labels_left(any_processor):
    inputs = any_processor.apply_chat_template([user(sound(A), "?")], tokenize=True, return_labels=True)
    assert (inputs["labels"] == -100).all()


# -- Conversations -----------------------------------------------------------------------------------------------------


def test_with_the_default_template_a_chat_is_a_plain_prompt(processor):
    turns = [user(sound(A), QUESTION)]
    plain = processor(text=QUESTION, audio=A)
    same_inputs(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True), plain)
    trained = processor.apply_chat_template([*turns, assistant("A dog.")], tokenize=True, return_labels=True)
    same_inputs(trained, processor(text=QUESTION, audio=A, answers="A dog."))


def test_a_tokenizers_own_template_is_used(chat_processor):
    assert chat_processor.apply_chat_template([user(sound(A), "What?")], add_generation_prompt=True) == (
        f"<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n{AUDIO}What?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = chat_processor.apply_chat_template([user(sound(A), "What?")], tokenize=True)
    assert prompts_in(chat_processor, inputs) == [
        f"<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n{AUDIO}What?<|im_end|>\n"
    ]


def with_bos(tokenizer):
    """Puts the tokenizer's first token in front of every text, as Llama's does."""
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    return tokenizer


def test_a_template_that_writes_the_first_token_gets_no_second():
    processor = make_processor(tokenizer=with_bos(make_chat_tokenizer()))
    turns = [user(sound(A), "What?")]
    inputs = processor.apply_chat_template([turns, turns], tokenize=True)
    expected = processor.apply_chat_template(turns)
    assert expected.startswith("<|im_start|>system")
    assert prompts_in(processor, inputs) == [expected] * 2


def test_a_template_that_does_not_write_the_first_token_gets_it():
    processor = make_processor(tokenizer=with_bos(make_tokenizer()))
    turns = [user(sound(A), QUESTION), assistant("A dog.")]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_labels=True)
    assert prompts_in(processor, inputs) == [f"<|endoftext|>{AUDIO}{QUESTION} A dog.<|endoftext|>"]
    assert answers_in(processor, inputs) == [" A dog.<|endoftext|>"]
    same_inputs(inputs, processor(text=QUESTION, audio=A, answers="A dog."))


def test_an_explicit_template_goes_before_the_own(chat_processor):
    template = "{% for message in messages %}[{{ message['content'] }}]{{ sign }}{% endfor %}"
    turns = [user(sound(A), "What?")]
    assert chat_processor.apply_chat_template(turns, chat_template=template) == f"[{AUDIO}What?]"
    assert chat_processor.apply_chat_template(turns, chat_template=template, sign="!") == f"[{AUDIO}What?]!"


def test_a_tokenizer_with_several_templates_is_asked_by_name():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {
        "default": "{{ messages[0]['content'] }}",
        "loud": "{{ messages[0]['content'] }}{{ sign }}",
    }
    processor = make_processor(tokenizer=tokenizer, with_memory=False)
    turns = [user(sound(A), "What?")]
    assert processor.apply_chat_template(turns) == f"{AUDIO}What?"
    assert processor.apply_chat_template(turns, chat_template="loud", sign="!") == f"{AUDIO}What?!"
    with pytest.raises(TypeError, match="unknown keywords: tone"):
        processor.apply_chat_template(turns, chat_template="loud", tone="!")


def test_a_final_message_can_be_continued(any_processor):
    inputs = any_processor.apply_chat_template(
        [user(sound(A), QUESTION), assistant("It is a")], continue_final_message=True, tokenize=True
    )
    assert prompts_in(any_processor, inputs)[0].endswith("It is a")


def test_one_conversation_gives_a_string_and_several_a_list(processor):
    turns = [user("Hi.")]
    assert processor.apply_chat_template(turns) == "Hi."
    assert processor.apply_chat_template([turns, turns]) == ["Hi.", "Hi."]
    ids = processor.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert processor.decode(ids[0]) == "Hi."


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (lambda processor: {"audio_embeds": processor.encode_audio(A)[0]}, {"audio": A}),
        (lambda processor: {"description": "Rain."}, {"descriptions": "Rain."}),
    ],
    ids=["audio_embeds", "description"],
)
def test_parts_hold_embeddings_or_descriptions_too(processor, part, expected):
    turns = [user({"type": "audio", **part(processor)}, QUESTION)]
    found = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)
    same_inputs(found, processor(text=QUESTION, **expected))


def test_files_in_conversations_are_read(processor, tmp_path):
    sf.write(tmp_path / "a.wav", A[0], RATE, subtype="FLOAT")
    for part in ({"path": str(tmp_path / "a.wav")}, {"path": tmp_path / "a.wav", "sampling_rate": RATE}):
        found = processor.apply_chat_template([user({"type": "audio", **part}, QUESTION)], tokenize=True)
        same_inputs(found, processor(text=QUESTION, audio=A))


def test_settings_reach_a_conversation(processor):
    turns = [user({"type": "audio", "audio": A[0]}, QUESTION)]
    found = processor.apply_chat_template(
        turns, tokenize=True, sampling_rate=RATE, santa=False, padding="max_length", max_length=60, processor_kwargs={}
    )
    expected = processor(text=QUESTION, audio=A, santa=False, padding="max_length", max_length=60)
    same_inputs(found, expected)


# -- Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [MatsProcessor, AutoProcessor])
def test_saving_and_loading_keeps_everything(tmp_path, loader):
    processor = make_processor(
        tokenizer=make_chat_tokenizer(), santa_settings={"weight": 0.5}, num_audio_tokens=3, max_positions=99
    )
    files = processor.save_pretrained(tmp_path)
    assert {"santa_memory.safetensors", "processor_config.json", "clap"} <= {path.name for path in tmp_path.iterdir()}
    written = {path.name for path in (tmp_path / "clap").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= written
    assert sorted(files) == sorted(
        [str(tmp_path / name) for name in ("processor_config.json", "santa_memory.safetensors")]
        + [str(tmp_path / "clap" / name) for name in written]
    )
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is MatsProcessor
    assert loaded.chat_template == processor.chat_template
    assert (loaded.num_audio_tokens, loaded.max_positions, loaded.long_audio) == (3, 99, "windows")
    assert loaded.santa_settings == processor.santa_settings
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.audio_token_id == processor.audio_token_id
    assert loaded.clap.fingerprint == processor.clap.fingerprint
    assert loaded.santa_memory.texts == processor.santa_memory.texts
    batch = {"text": [QUESTION, "And?"], "audio": [A, C], "answers": ["A dog.", "Rain."]}
    same_inputs(loaded(**batch), processor(**batch))


def test_what_is_pushed_is_also_saved(tmp_path, processor, monkeypatch):
    uploads = []

    class Hub:
        def create_repo(self, repo_id, **_):
            return RepoUrl(f"{ENDPOINT}/someone/{repo_id}")

        def create_commit(self, **commit):
            uploads.append(commit)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("---\n---\n"))
    files = processor.save_pretrained(tmp_path / "ears", push_to_hub=True, commit_message="New ears")
    processor.save_pretrained(tmp_path / "ears", push_to_hub=True, repo_id="other")
    saved = {path.relative_to(tmp_path / "ears") for path in (tmp_path / "ears").rglob("*") if path.is_file()}
    assert {Path(file).relative_to(tmp_path / "ears") for file in files} <= saved
    for upload in uploads:
        assert {Path(add.path_in_repo) for add in upload["operations"]} == {*saved, Path("README.md")}
    assert [upload["repo_id"] for upload in uploads] == ["someone/ears", "someone/other"]
    assert uploads[0]["commit_message"] == "New ears"
    same_inputs(MatsProcessor.from_pretrained(tmp_path / "ears")(text="?", audio=A), processor(text="?", audio=A))


def test_loading_and_saving_settles_on_the_same_files(tmp_path, processor):
    # transformers adds notes of its own ("is_local") on the first round.
    folders = [tmp_path / str(i) for i in range(3)]
    processor.save_pretrained(folders[0])
    for old, new in pairwise(folders):
        MatsProcessor.from_pretrained(old).save_pretrained(new)
    first, second, third = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in folders
    )
    assert [name for name in second if third[name] != second[name]] == []
    assert [name for name in second if name.suffix == ".safetensors" and first[name] != second[name]] == []
    assert sorted(first) == sorted(second) == sorted(third)


def test_what_a_checkpoint_lacks_is_none(tmp_path):
    make_processor(with_memory=False).save_pretrained(tmp_path / "no memory")
    loaded = MatsProcessor.from_pretrained(tmp_path / "no memory")
    assert loaded.clap is not None
    assert loaded.santa_memory is None
    MatsProcessor(make_tokenizer()).save_pretrained(tmp_path / "no clap")
    assert not (tmp_path / "no clap" / "clap").exists()
    assert MatsProcessor.from_pretrained(tmp_path / "no clap").clap is None


def test_clap_can_be_left_out_and_its_precision_chosen(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    light = MatsProcessor.from_pretrained(tmp_path, load_clap=False)
    assert light.clap is None
    assert light.santa_memory is None
    halves = MatsProcessor.from_pretrained(tmp_path, clap_dtype=torch.bfloat16)
    assert halves.clap.model.dtype == torch.bfloat16
    assert halves.santa_memory is not None  # the fingerprint is the same in any precision


def test_what_is_meant_for_the_model_is_not_taken(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert loaded.clap.model.dtype == torch.float32


def test_the_settings_hold_neither_clap_nor_memory(processor):
    settings = processor.to_dict()
    assert settings["num_audio_tokens"] == TOKENS
    assert not {"clap", "_santa_memory", "santa_memory"} & set(settings)
    assert not any(isinstance(value, torch.Tensor) for value in settings.values())
    assert "SantaMemory" not in repr(processor)


def test_looking_at_the_settings_does_not_copy_clap():
    class Uncopied(ClapEncoder):
        def __deepcopy__(self, memo):
            raise AssertionError("CLAP was copied")

    clap = make_clap()
    processor = MatsProcessor(make_tokenizer())
    processor.clap = Uncopied(clap.model, clap.feature_extractor, clap.tokenizer)
    assert "num_audio_tokens" in repr(processor)
    assert processor.to_dict()
    assert processor.clap is not None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_works_as_the_original(processor, duplicate):
    twin = duplicate(processor)
    assert twin.clap is not processor.clap
    same_inputs(twin(text=QUESTION, audio=A), processor(text=QUESTION, audio=A))


# -- What is refused, and before CLAP runs -----------------------------------------------------------------------------


class ClapRan(AssertionError):
    pass


@pytest.fixture(scope="module")
def deaf() -> MatsProcessor:
    """A processor whose CLAP raises as soon as one of its towers is called."""
    processor = make_processor()

    def refuse(*_):
        raise ClapRan

    for tower in (processor.clap.model.audio_model, processor.clap.model.text_model):
        tower.register_forward_pre_hook(refuse)
    return processor


@pytest.mark.parametrize("kwargs", [{"audio": A}, {"descriptions": "Rain."}])
def test_the_deaf_processor_would_notice_that_clap_runs(deaf, kwargs):
    with pytest.raises(ClapRan):
        deaf(text=QUESTION, **kwargs)


@pytest.mark.parametrize("where", ["prompt", "chat", "batch"])
@pytest.mark.parametrize(("content", "source", "rate", "error", "message"), BAD_AUDIO.values(), ids=list(BAD_AUDIO))
def test_bad_audio_is_refused_before_clap_runs(deaf, tmp_path, where, content, source, rate, error, message):
    if content is not None:
        source = tmp_path / "x.wav"
        source.write_bytes(content)
    with pytest.raises(error, match=message):
        if where == "prompt":
            deaf(text=QUESTION, audio=source, sampling_rate=rate)
        elif where == "chat":
            part = {"type": "audio", "audio": source}
            deaf.apply_chat_template([user(part, QUESTION)], tokenize=True, sampling_rate=rate)
        else:
            good = A if rate is None else A[0]
            deaf(text=[QUESTION, QUESTION], audio=[good, source], sampling_rate=rate)


REFUSED = {
    "placeholder without audio": ({"text": f"{AUDIO}?"}, ValueError, r"Prompt 0 has 1 .* placeholders but 0 audios"),
    "placeholders without audio": ({"text": ["a", f"{AUDIO}{AUDIO}"]}, ValueError, "Prompt 1 has 2 .* but 0 audios"),
    "no audio in a list": (
        {"text": "a", "audio": []},
        ValueError,
        "audio is an empty list, expected at least one; leave it out for text alone",
    ),
    "no audio for any prompt": ({"text": ["a", "b"], "audio": [[], []]}, ValueError, "audio is an empty list"),
    "no audio where another prompt has some": (
        {"text": ["a", f"{AUDIO}b"], "audio": [[A], []]},
        ValueError,
        "Prompt 1 has 1 .* placeholders but 0 audios",
    ),
    "no embedding in a list": ({"text": "a", "audio_embeds": []}, ValueError, "audio_embeds is an empty list"),
    "no embedding in a tensor": (
        {"text": "a", "audio_embeds": torch.empty(0, 16)},
        ValueError,
        "audio_embeds is an empty list",
    ),
    "no description in a list": ({"text": "a", "descriptions": []}, ValueError, "descriptions is an empty list"),
    "more placeholders than audios": ({"text": f"{AUDIO}{AUDIO}", "audio": A}, ValueError, "has 2 .* but 1 audios"),
    "more audios than placeholders": ({"text": f"{AUDIO}", "audio": [A, B]}, ValueError, "has 1 .* but 2 audios"),
    "more audios than prompts": (
        {"text": ["a", "b"], "audio": [A, B, C]},
        ValueError,
        r"Got 3 audios for 2 prompts with places for \[1, 1\], 2 in all",
    ),
    "fewer audios than prompts": ({"text": ["a", "b"], "audio": A}, ValueError, "Got 1 audios for 2 prompts"),
    "nested lists for too few prompts": (
        {"text": ["a", "b"], "audio": [[A], [B], [C]]},
        ValueError,
        "Got 2 prompts but 3 lists of audio; they must match 1:1",
    ),
    "nested list against placeholders": (
        {"text": [AUDIO, AUDIO], "audio": [[A, B], [C]]},
        ValueError,
        "Prompt 0 has 1 .* placeholders but 2 audios",
    ),
    "nested and flat mixed": ({"text": ["a", "b"], "audio": [A, [B]]}, ValueError, "audio is .*, got a mixture"),
    "audio and embeddings": (
        {"text": "a", "audio": A, "audio_embeds": torch.zeros(16)},
        ValueError,
        "Got audio and audio_embeds; pass one of them",
    ),
    "audio and descriptions": ({"text": "a", "audio": A, "descriptions": "b"}, ValueError, "audio and descriptions"),
    "fewer answers than prompts": (
        {"text": ["a", "b"], "audio": [A, B], "answers": "c"},
        ValueError,
        "Got 2 prompts but 1 answers; they must match 1:1",
    ),
    "more answers than prompts": ({"text": "a", "audio": A, "answers": ["c", "d"]}, ValueError, "1 prompts but 2"),
    "placeholder in an answer": ({"text": "a", "audio": A, "answers": f"b{AUDIO}"}, ValueError, "2 .* but 1 audios"),
    "unknown keywords": (
        {"text": "a", "audio": A, "sanat": False, "audios": B},
        TypeError,
        "got unknown keywords: audios, sanat",
    ),
    "no text": ({"audio": A}, ValueError, "text is missing"),
    "no prompts": ({"text": [], "audio": A}, ValueError, "text is an empty list"),
    "text of another type": ({"text": ["a", 7], "audio": [A, B]}, TypeError, r"text\[1\] is int, expected str"),
    "prompt too long": (
        {"text": "x" * 125, "audio": A},
        ValueError,
        "longest prompt has 129 positions, audio included; the language model has 128",
    ),
    "prompt too long by its answer": (
        {"text": "x" * 100, "audio": A, "answers": "x" * 100},
        ValueError,
        "longest prompt has 206 positions",
    ),
    "unknown Santa setting": (
        {"text": "a", "audio": A, "santa": {"wieght": 1}},
        ValueError,
        "Unknown Santa settings: wieght; expected weight, temperature, top_k",
    ),
    "Santa setting out of range": ({"text": "a", "audio": A, "santa": {"weight": 2}}, ValueError, "is 2, expected 0"),
    "Santa of another type": ({"text": "a", "audio": A, "santa": 0.5}, TypeError, "santa is float, expected None, a"),
    "Santa for descriptions": ({"text": "a", "descriptions": "b", "santa": True}, ValueError, "are there already"),
    "empty description": ({"text": "a", "descriptions": " "}, ValueError, "Text 0 is ' ', expected a non-empty string"),
    "description too long": ({"text": "a", "descriptions": "x" * 99}, ValueError, "longer than the 77 tokens of CLAP"),
    "embeddings with NaN": (
        {"text": "a", "audio_embeds": torch.full((16,), torch.nan)},
        ValueError,
        "audio_embeds hold NaN or infinite",
    ),
    "embeddings of another width": (
        {"text": "a", "audio_embeds": torch.ones(1, 17), "santa": False},
        ValueError,
        r"audio_embeds hold one of shape \(17,\), expected \(16,\)",
    ),
    "embeddings of zeros": (
        {"text": ["a", "b"], "audio_embeds": torch.eye(16)[:2] * torch.tensor([[1], [0]])},
        ValueError,
        "audio_embeds hold a vector of zeros",
    ),
    "max_length that is too short": (
        {"text": "a", "audio": A, "padding": "max_length", "max_length": 4},
        ValueError,
        "longest prompt has 5 positions, audio included; max_length is 4",
    ),
    "max_length without padding to it": (
        {"text": "a", "audio": A, "max_length": 60},
        ValueError,
        "max_length needs padding='max_length'",
    ),
    "no padding for different lengths": ({"text": ["a", "bc"], "audio": [A, B], "padding": False}, ValueError, "pad"),
    "unknown padding": ({"text": "a", "audio": A, "padding": "much"}, ValueError, "much"),
    "other tensors": ({"text": "a", "audio": A, "return_tensors": "np"}, ValueError, "'np'; only 'pt'"),
}


@pytest.mark.parametrize(("kwargs", "error", "message"), REFUSED.values(), ids=list(REFUSED))
def test_a_call_that_cannot_be_meant_is_refused_before_clap_runs(deaf, kwargs, error, message):
    with pytest.raises(error, match=message):
        deaf(**kwargs)


REFUSED_CHATS = {
    "placeholder without audio": ([user(f"{AUDIO}?")], {}, ValueError, "1 .* placeholders but 0 audios"),
    "placeholder as string": ([{"role": "user", "content": AUDIO}], {}, ValueError, "1 .* placeholders but 0 audios"),
    "placeholder beside an audio": ([user(sound(A), AUDIO)], {}, ValueError, "2 .* placeholders but 1 audios"),
    "audio that the template leaves out": (
        [user(sound(A), "?")],
        {"chat_template": "{{ messages[0]['role'] }}"},
        ValueError,
        "0 .* placeholders but 1 audios",
    ),
    "audio beside the conversation": ([user("?")], {"audio": A}, TypeError, "got unknown keywords: audio"),
    "unknown keywords": ([user("?")], {"sanat": 1, "truncate": 1}, TypeError, "unknown keywords: sanat, truncate"),
    "unknown among processor_kwargs": ([user("?")], {"processor_kwargs": {"rate": 1}}, TypeError, "keywords: rate"),
    "sounds of two kinds": (
        [user(sound(A), {"type": "audio", "description": "Rain."})],
        {},
        ValueError,
        "audios of one kind, got audio and descriptions",
    ),
    "part without a sound": ([user({"type": "audio"}, "?")], {}, ValueError, "holds its sound under"),
    "part of another type": ([user({"type": "image"})], {}, ValueError, "A part is {'type': 'image'}"),
    "no conversation": ("Hi", {}, ValueError, "A conversation is a list of messages"),
    "prompt too long": ([user(sound(A), "x" * 125)], {}, ValueError, "129 positions"),
    "unknown Santa setting": ([user(sound(A), "?")], {"santa": {"k": 1}}, ValueError, "Unknown Santa settings: k"),
    "an embedding of two dimensions in a part": (
        [user({"type": "audio", "audio_embeds": torch.ones(1, 16)}, "?")],
        {},
        ValueError,
        r"audio_embeds hold one of shape \(1, 16\), expected \(16,\)",
    ),
    "labels where the assistant begins": (
        [assistant("A dog."), user("?")],
        {"return_labels": True},
        ValueError,
        "opens with the assistant",
    ),
    "rate 0 in a part": ([user({**sound(A), "sampling_rate": 0})], {}, ValueError, "sampling rate is 0"),
    "labels where the template rewrites the past": (
        [user(sound(A), "?"), assistant("A dog.")],
        {"return_labels": True, "chat_template": "{{ messages | length }}{{ messages[0]['content'] }}"},
        ValueError,
        "the answers cannot be located",
    ),
}


@pytest.mark.parametrize(
    ("conversation", "kwargs", "error", "message"), REFUSED_CHATS.values(), ids=list(REFUSED_CHATS)
)
def test_a_conversation_that_cannot_be_meant_is_refused_before_clap_runs(deaf, conversation, kwargs, error, message):
    with pytest.raises(error, match=message):
        deaf.apply_chat_template(conversation, tokenize=True, **kwargs)


def test_labels_of_text_that_is_not_tokenised_are_refused(deaf):
    with pytest.raises(ValueError, match="return_labels=True needs tokenize=True"):
        deaf.apply_chat_template([user("?")], return_labels=True)


@pytest.mark.parametrize("santa", [True, {"weight": 0.5}])
def test_santa_without_a_memory_is_refused_before_clap_runs(deaf, santa):
    without = copy.copy(deaf)
    without.santa_memory = None
    with pytest.raises(ValueError, match="Santa was asked for, but this processor has no memory"):
        without(text=QUESTION, audio=A, santa=santa)
    with pytest.raises(ValueError, match="Santa was asked for, but this processor has no memory"):
        without.apply_santa(torch.zeros(1, 16), santa)


@pytest.mark.parametrize(
    ("long_audio", "message"), [("random", "needs a seed"), ("error", "has 40000 samples, the window holds 16000")]
)
def test_long_audio_that_the_mode_forbids_is_refused_before_clap_runs(deaf, long_audio, message):
    strict = copy.copy(deaf)
    strict.long_audio = long_audio
    with pytest.raises(ValueError, match=message):
        strict(text=QUESTION, audio=C)


def test_a_processor_without_clap_says_so_but_takes_embeddings():
    processor = MatsProcessor(make_tokenizer(), num_audio_tokens=TOKENS)
    for call in (
        lambda: processor(text=QUESTION, audio=A),
        lambda: processor(text=QUESTION, descriptions="Rain."),
        lambda: processor.encode_audio(A),
        lambda: processor.encode_text("Rain."),
        lambda: processor.match_labels(["Rain."], ["Rain."]),
    ):
        with pytest.raises(ValueError, match=r"needs CLAP, and this processor has none; set processor\.clap"):
            call()
    assert processor(text=QUESTION, audio_embeds=torch.ones(16))["audio_embeds"].shape == (1, 1, 16)


def test_a_memory_of_another_clap_is_refused_with_both_named(processor, tmp_path):
    other = make_processor(make_clap(seed=1))
    both = f"{re.escape(processor.clap.fingerprint[:16])}.*{other.clap.fingerprint[:16]}"
    with pytest.raises(ValueError, match=both):
        other.santa_memory = processor.santa_memory
    other.save_pretrained(tmp_path)
    processor.santa_memory.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=both):
        MatsProcessor.from_pretrained(tmp_path)


def test_a_damaged_memory_stops_loading_by_name(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "santa_memory.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"santa_memory\.safetensors is not a readable"):
        MatsProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"wieght": 1}, "Unknown Santa settings: wieght"), ({"top_k": 0}, "is 0, expected at least 1")],
)
def test_settings_are_checked_when_they_are_set(settings, message):
    with pytest.raises(ValueError, match=message):
        MatsProcessor(make_tokenizer(), santa_settings=settings)


def test_a_memory_is_bound_to_a_processor_with_clap():
    memory = SantaMemory(torch.ones(1, 16), torch.ones(1, 16), torch.tensor([0, 1]), ["a"], "f", 0.0, 0)
    with pytest.raises(ValueError, match="A Santa memory needs CLAP"):
        MatsProcessor(make_tokenizer()).santa_memory = memory

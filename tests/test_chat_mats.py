"""Conversations: audio parts to placeholders, and where the answers are in what a template renders."""

import numpy as np
import pytest
from conftest import CHATML_TEMPLATE, make_chat_tokenizer, make_tokenizer

from processing_mats.chat_mats import DEFAULT_CHAT_TEMPLATE, answer_spans, is_conversation, split_audio_parts

AUDIO = "<|audio|>"


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


# -- Parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"role": "user", "content": "Hi"}], True),
        (({"role": "user", "content": "Hi"},), True),
        ([[{"role": "user", "content": "Hi"}]], False),
        ([], False),
        ("Hi", False),
        ({"role": "user"}, False),
        ([{"content": "Hi"}], False),
    ],
)
def test_a_conversation_is_a_list_of_messages_with_a_role(value, expected):
    assert is_conversation(value) is expected


def test_audio_parts_become_placeholders_where_they_stand():
    conversation = [
        {"role": "system", "content": "Be brief."},
        user(text("First "), {"type": "audio", "path": "a.wav"}, text(" then "), {"type": "audio", "audio": "b.wav"}),
        {"role": "assistant", "content": [text("A dog.")]},
        user({"type": "audio", "url": "http://x/c.wav"}, text("And this?")),
    ]
    plain, sounds = split_audio_parts(conversation, AUDIO)
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in plain] == [
        "Be brief.",
        f"First {AUDIO} then {AUDIO}",
        "A dog.",
        f"{AUDIO}And this?",
    ]
    assert sounds == [("audio", "a.wav"), ("audio", "b.wav"), ("audio", "http://x/c.wav")]


def test_the_conversation_itself_is_left_as_it_was():
    conversation = [user(text("Hi"), {"type": "audio", "path": "a.wav"})]
    split_audio_parts(conversation, AUDIO)
    assert conversation == [user(text("Hi"), {"type": "audio", "path": "a.wav"})]


def test_other_fields_of_a_message_reach_the_template():
    plain, _ = split_audio_parts([{**user(text("Hi")), "name": "Eve"}], AUDIO)
    assert plain == [{"role": "user", "content": "Hi", "name": "Eve"}]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"audio": "a.wav"}, ("audio", "a.wav")),
        ({"path": "a.wav"}, ("audio", "a.wav")),
        ({"url": "http://x/a.wav"}, ("audio", "http://x/a.wav")),
        ({"audio": None, "path": "a.wav"}, ("audio", "a.wav")),
        ({"audio": [0.5], "sampling_rate": 16000}, ("audio", ([0.5], 16000))),
        ({"audio": [0.5], "sampling_rate": 0}, ("audio", ([0.5], 0))),
        ({"path": "a.wav", "sampling_rate": 16000}, ("audio", ("a.wav", 16000))),
        ({"audio_embeds": [1.0]}, ("audio_embeds", [1.0])),
        ({"description": "Rain."}, ("descriptions", "Rain.")),
    ],
)
def test_the_sound_of_a_part_is_found_under_each_of_its_names(part, expected):
    assert split_audio_parts([user({"type": "audio", **part})], AUDIO)[1] == [expected]


def test_a_waveform_is_handed_on_untouched():
    waveform = np.zeros(5)
    _, [(kind, (found, rate))] = split_audio_parts(
        [user({"type": "audio", "audio": waveform, "sampling_rate": 8000})], AUDIO
    )
    assert (kind, rate) == ("audio", 8000)
    assert found is waveform


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ("Hi", "A conversation is a list of messages with role and content, got 'Hi'"),
        ([], "A conversation is a list of messages"),
        ([{"content": "Hi"}], "A conversation is a list of messages"),
        ([user(text("Hi")), {"content": "Hi"}], "Message 1 is {'content': 'Hi'}, expected a dict with role"),
        ([user(text("Hi")), "Hi"], "Message 1 is 'Hi', expected a dict with role"),
        ([{"role": "user", "content": None}], "content is a string or a list of parts, got NoneType"),
        ([{"role": "user"}], "content is a string or a list of parts, got NoneType"),
        ([user("Hi")], "A part is 'Hi', expected {'type': 'text'"),
        ([user({"type": "text"})], "A part is {'type': 'text'}, expected {'type': 'text', 'text': ...}"),
        ([user({"type": "image", "path": "a.png"})], "A part is {'type': 'image'.*expected {'type': 'text'"),
        ([user({"type": "audio"})], r"under 'audio', 'path', 'url', .*got keys \['type'\]"),
        ([user({"type": "audio", "audio": None, "text": "?"})], r"got keys \['audio', 'text', 'type'\]"),
    ],
)
def test_a_conversation_of_another_form_is_refused(conversation, message):
    with pytest.raises(ValueError, match=message):
        split_audio_parts(conversation, AUDIO)


# -- Answers -----------------------------------------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": f"{AUDIO}What is it?"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "A dog. Are you sure?"},
    {"role": "assistant", "content": "Yes,\na dog.  "},
]


def renderer(template: str, tokenizer):
    def render(turns, generation_prompt=False):
        return tokenizer.apply_chat_template(
            turns, chat_template=template, add_generation_prompt=generation_prompt, tokenize=False
        )

    return render


def default_template():
    return renderer(DEFAULT_CHAT_TEMPLATE, make_tokenizer())


def chatml():
    return renderer(CHATML_TEMPLATE, make_chat_tokenizer())


def test_the_default_template_is_prompt_space_answer_end():
    assert default_template()(TURNS) == (
        f"{AUDIO}What is it? A dog.<|endoftext|>A dog. Are you sure? Yes,\na dog.  <|endoftext|>"
    )
    assert default_template()(TURNS[:1], generation_prompt=True) == f"{AUDIO}What is it?"


@pytest.mark.parametrize(
    ("render", "space", "end"), [(default_template, " ", "<|endoftext|>"), (chatml, "", "<|im_end|>")]
)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_spans_are_the_assistants_turns_with_their_end_tokens(render, space, end, count):
    render = render()
    rendered = render(TURNS[:count])
    found = [rendered[start:stop] for start, stop in answer_spans(TURNS[:count], rendered, render)]
    assert found == [f"{space}A dog.{end}", f"{space}Yes,\na dog.  {end}"][: count // 2]


def test_the_default_template_marks_the_same_spans_for_transformers():
    tokenizer = make_tokenizer()
    encoded = tokenizer.apply_chat_template(
        TURNS, chat_template=DEFAULT_CHAT_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "A dog.<|endoftext|>Yes,\na dog.  <|endoftext|>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
        # Qwen3 drops earlier thoughts in this way.
        "{% for m in messages %}{{ m['role'] }}{{ m['content'] if loop.last else m['content'][:2] }}{% endfor %}",
    ],
)
def test_a_template_that_rewrites_the_past_cannot_be_trained_with(template):
    render = renderer(template, make_tokenizer())
    with pytest.raises(ValueError, match="the answers cannot be located"):
        answer_spans(TURNS, render(TURNS), render)


@pytest.mark.parametrize("render", [default_template, chatml])
def test_an_answer_to_nothing_cannot_be_trained_on(render):
    turns = [{"role": "assistant", "content": "Hello."}, *TURNS]
    with pytest.raises(ValueError, match="opens with the assistant; there is no prompt"):
        answer_spans(turns, render()(turns), render())

"""Training batches: the labels are the answers and nothing else, whatever the template, the task and the turns."""

import pytest
import torch
from conftest import SENTENCES, make_chat_tokenizer, make_processor

from training.audiotia.examples import Example
from training.audiotia.templates import captioning, classification, question
from training.collator import MatsCollator, conversation

TURNS = {
    "CLS, one label": (classification(["Dog"]),),
    "CLS, two labels": (classification(["Bark", "Rain on surface"]),),
    "sound CAP": (captioning("A dog barks twice.", "sound"),),
    "music CAP": (captioning("A slow piano ballad, sung softly.", "music"),),
    "AQA": (question("Is there a dog?", "Yes"),),
    "two turns": (question("What is it?", "A dog."), question("Is it loud?", "No, it is far away.")),
    "three turns": (captioning("Rain falls.", "sound"), classification(["Rain"]), question("Is it music?", "No")),
    "answer repeats the question": (question("Is it a dog or a cat?", "Is it a dog or a cat?"),),
    "answer holds the end of a question": (question("Say: yes", "yes"), question("Again: yes", "yes")),
    "several lines, quotes, accents": (question('What is "this"?\nSay it.', 'A café:\n"ding" - 3 €'),),
}


def rows_of(turns, description=SENTENCES[0]):
    first, *further = turns
    example = Example(description, *first, "AQA", "sound", "test", further_turns=tuple(further))
    return {
        "text_embeds": torch.full((16,), 0.25),
        "instruction": example.instruction,
        "answer": example.answer,
        "further_turns": [turn._asdict() for turn in example.further_turns],
    }


def answers_in(processor, labels):
    """What the positions with labels say, stretch by stretch."""
    stretches, current = [], []
    for label in [*labels.tolist(), -100]:
        if label != -100:
            current.append(label)
        elif current:
            stretches.append(processor.tokenizer.decode(current))
            current = []
    return stretches


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_batch_of_every_task_is_labelled_on_its_answers_alone(template):
    if template == "plain":
        processor, before, end = make_processor(max_positions=512), " ", "<|endoftext|>"
    else:
        processor, before, end = make_processor(tokenizer=make_chat_tokenizer(), max_positions=512), "", "<|im_end|>"
    batch = MatsCollator(processor)([rows_of(turns) for turns in TURNS.values()])
    assert batch["labels"].shape == batch["input_ids"].shape
    for name, turns, labels in zip(TURNS, TURNS.values(), batch["labels"], strict=True):
        expected = [f"{before}{turn.answer}{end}" for turn in turns]
        found = answers_in(processor, labels)
        assert found == expected, name
    # Each label is the token at its own position: the model shifts them.
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert not (labelled & ~batch["attention_mask"].bool()).any()
    assert not (labelled & (batch["input_ids"] == processor.audio_token_id)).any()


def test_rows_of_one_turn_need_no_further_turns():
    processor = make_processor()
    row = {"text_embeds": [0.5] * 16, "instruction": "What is it?", "answer": "A dog."}
    batch = MatsCollator(processor)([row, {**row, "further_turns": None}, {**row, "further_turns": []}])
    assert answers_in(processor, batch["labels"][0]) == [" A dog.<|endoftext|>"]
    assert torch.equal(batch["labels"][0], batch["labels"][1])
    torch.testing.assert_close(batch["audio_embeds"], torch.full((3, 1, 16), 0.5))


def test_the_sound_comes_once_and_first():
    messages = conversation(rows_of(TURNS["three turns"]))
    kinds = [[part["type"] for part in m["content"]] for m in messages if m["role"] == "user"]
    assert kinds == [["audio", "text"], ["text"], ["text"]]


@pytest.mark.parametrize("missing", ["text_embeds", "instruction", "answer"])
def test_the_collator_says_what_a_row_lacks(missing):
    row = rows_of(TURNS["AQA"])
    del row[missing]
    with pytest.raises(ValueError, match=f"lacks {missing}"):
        MatsCollator(make_processor())([row])

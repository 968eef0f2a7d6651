"""The pipeline: every form of input, batches, labels and evidence, on small random weights."""

import datasets
import pytest
import torch
from conftest import SENTENCES, make_model, make_processor, tone
from transformers import TextIteratorStreamer, pipeline

RATE = 16000
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return pipeline("audio-text-to-text", model=str(checkpoint), max_new_tokens=6)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    import soundfile

    folder = tmp_path_factory.mktemp("sounds")
    paths = []
    for number, (seconds, hertz) in enumerate([(1.0, 440), (0.4, 880), (2.3, 220)]):
        path = folder / f"{number}.wav"
        soundfile.write(path, tone(seconds, hertz), RATE)
        paths.append(str(path))
    return paths


def chat(sound, text=QUESTION):
    return [{"role": "user", "content": [{"type": "audio", "path": sound}, {"type": "text", "text": text}]}]


def test_the_installed_package_registers_the_task(pipe):
    assert type(pipe).__name__ == "AudioTextToTextPipeline"


def test_one_sound_gives_what_processor_and_model_give(pipe, sounds):
    inputs = pipe.processor(text=QUESTION, audio=sounds[0])
    expected = pipe.model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    answer = pipe.processor.batch_decode(expected, skip_special_tokens=True)[0].strip()
    assert pipe(sounds[0], text=QUESTION) == {"generated_text": answer}


@pytest.mark.parametrize(
    "as_input",
    [
        lambda s: {"inputs": s, "text": QUESTION},
        lambda s: {"audio": s, "text": QUESTION},
        lambda s: {"inputs": {"audio": s, "text": QUESTION}},
        lambda s: {"inputs": {"audio": s}, "text": QUESTION},
        lambda s: {"inputs": {"path": s}, "text": QUESTION},
        lambda s: {"inputs": chat(s)},
        lambda s: {"inputs": {"messages": chat(s)}},
        lambda s: {"inputs": (tone(), RATE), "text": QUESTION},
        lambda s: {"inputs": tone(), "text": QUESTION, "sampling_rate": RATE},
        lambda s: {"inputs": torch.from_numpy(tone()), "text": QUESTION, "sampling_rate": RATE},
        lambda s: {"inputs": tone().tolist(), "text": QUESTION, "sampling_rate": RATE},
        lambda s: {"inputs": {"array": tone(), "sampling_rate": RATE}, "text": QUESTION},
        lambda s: {"inputs": {"audio": s, "text": f"<|audio|>{QUESTION}"}},
    ],
    ids=[
        "path",
        "audio=",
        "dict",
        "dict+text",
        "path value",
        "chat",
        "messages",
        "tuple",
        "array",
        "tensor",
        "numbers",
        "array value",
        "placeholder",
    ],
)
def test_every_form_of_one_input_gives_the_same_answer(pipe, sounds, as_input):
    # 16-bit PCM of the file and the float tone differ by rounding, not in the answer.
    assert pipe(**as_input(sounds[0])) == pipe(sounds[0], text=QUESTION)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("form", ["paths", "dicts", "chats"])
def test_a_list_gives_the_single_answers_in_order(pipe, sounds, form, batch_size):
    questions = ["What?", "What is making this sound, and why so loud?", "Describe."]
    single = [pipe(s, text=q) for s, q in zip(sounds, questions, strict=True)]
    if form == "paths":
        together = pipe(sounds, text=questions, batch_size=batch_size)
    elif form == "dicts":
        rows = [{"audio": s, "text": q} for s, q in zip(sounds, questions, strict=True)]
        together = pipe(rows, batch_size=batch_size)
    else:
        together = pipe([chat(s, q) for s, q in zip(sounds, questions, strict=True)], batch_size=batch_size)
    assert together == single


def test_generators_and_datasets_are_streamed(pipe, sounds):
    single = [pipe(s, text=QUESTION) for s in sounds]
    read = []

    def rows():
        for sound in sounds:
            read.append(sound)
            yield {"audio": sound, "text": QUESTION}

    answers = iter(pipe(rows(), batch_size=1))
    first = next(answers)
    assert len(read) < len(sounds), "the generator was read to its end before the first answer"
    assert [first, *answers] == single
    dataset = datasets.Dataset.from_list([{"audio": {"path": s}, "text": QUESTION, "other": 1} for s in sounds])
    assert list(pipe(dataset, batch_size=2)) == single


def test_one_sound_and_several_questions_encode_it_once(pipe, sounds, monkeypatch):
    questions = ["What?", "Where?", "Who is it?"]
    single = [pipe(sounds[0], text=question) for question in questions]
    clap = pipe.processor.clap
    encoded = []
    original = clap.encode_audio
    monkeypatch.setattr(
        clap, "encode_audio", lambda waves, *a, **k: encoded.append(len(waves)) or original(waves, *a, **k)
    )
    assert pipe(sounds[0], text=questions, batch_size=3) == single
    assert encoded == [1]


def test_several_audios_in_one_prompt_and_mixed_batches(pipe, sounds):
    two = {"audio": sounds[:2], "text": "Is <|audio|> like <|audio|>?"}
    one = {"audio": sounds[2], "text": QUESTION}
    assert pipe([two, one], batch_size=2) == [pipe(two), pipe(one)]


def test_a_conversation_goes_on(pipe, sounds):
    turns = [*chat(sounds[0]), {"role": "assistant", "content": "A dog."}, {"role": "user", "content": "Loud?"}]
    inputs = pipe.processor(text=f"<|audio|>{QUESTION} A dog.<|endoftext|>Loud?", audio=sounds[0])
    expected = pipe.model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    answer = pipe.processor.batch_decode(expected, skip_special_tokens=True)[0].strip()
    assert pipe(turns)["generated_text"] == answer


def test_candidate_labels_are_matched_by_text(pipe, sounds):
    labels = ["dog", "rooster", "rain"]
    record = pipe(sounds[0], candidate_labels=labels)
    plain = pipe(sounds[0], text="Classify events in the audio clip.")
    assert record["generated_text"] == plain["generated_text"]
    expected = pipe.processor.match_labels([record["generated_text"]], labels)[0].tolist()
    assert list(record["scores"].items()) == list(zip(labels, expected, strict=True))
    assert record["label"] == max(record["scores"], key=record["scores"].get)
    assert pipe(sounds[0], candidate_labels="dog, rooster, rain") == record
    asked = pipe(sounds[0], text=QUESTION, candidate_labels=labels)
    assert asked["generated_text"] == pipe(sounds[0], text=QUESTION)["generated_text"]


def test_a_row_keeps_its_own_question_beside_candidate_labels(pipe, sounds):
    row = {"audio": sounds[0], "text": QUESTION}
    assert pipe(row, candidate_labels=["dog", "rain"])["generated_text"] == pipe(row)["generated_text"]


def test_evidence_names_memory_texts_with_their_weights(pipe, sounds):
    records = pipe(sounds, text=QUESTION, return_evidence=True, batch_size=2)
    for sound, record in zip(sounds, records, strict=True):
        assert {entry["text"] for entry in record["santa"]} <= set(SENTENCES)
        weights = [entry["weight"] for entry in record["santa"]]
        assert sum(weights) == pytest.approx(1, abs=1e-5)
        assert weights == sorted(weights, reverse=True)
        assert pipe(sound, text=QUESTION, return_evidence=True)["santa"][0]["text"] == record["santa"][0]["text"]
    off = pipe(sounds, text=QUESTION, return_evidence=True, santa=False, batch_size=2)
    assert [record["santa"] for record in off] == [None] * 3
    two = pipe({"audio": sounds[:2], "text": QUESTION}, return_evidence=True)
    assert len(two["santa"]) == 2


def test_santa_can_be_switched_and_set(pipe, sounds):
    embeds = pipe.processor.encode_audio(sounds[0])
    memory = pipe.processor.santa_memory
    for santa, expected in [(False, embeds), ({"use_audio": False}, memory(embeds, use_audio=False).embeds)]:
        prepared = pipe.preprocess({"row": sounds[0]}, text=QUESTION, santa=santa)
        torch.testing.assert_close(prepared["audio_embeds"][0], expected)


def test_several_sequences_come_as_a_list(pipe, sounds):
    beams = pipe(sounds[:2], text=QUESTION, num_beams=3, num_return_sequences=2, batch_size=2)
    assert [len(record) for record in beams] == [2, 2]
    best = pipe(sounds[0], text=QUESTION, num_beams=3)
    assert beams[0][0] == best


def test_tokens_can_be_streamed(pipe, sounds):
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    record = pipe(sounds[0], text=QUESTION, generate_kwargs={"streamer": streamer})
    assert "".join(streamer).strip() == record["generated_text"]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda p, s: p(s[0], text=QUESTION, temprature=1), TypeError, "unknown keywords: temprature"),
        (lambda p, s: p(s[0]), ValueError, "without a question"),
        (lambda p, s: p(), ValueError, "Pass the sounds once"),
        (lambda p, s: p(s[0], audio=s[0], text=QUESTION), ValueError, "Pass the sounds once"),
        (lambda p, s: p(s, text=["a", "b"]), ValueError, "3 sounds but 2 texts"),
        (lambda p, s: p({"sound": s[0], "text": QUESTION}), ValueError, "needs 'audio'"),
        (lambda p, s: p({"audio": s[0], "text": "<|audio|><|audio|>"}), ValueError, "2 placeholders but 1 audios"),
        (lambda p, s: p(s[0], candidate_labels=[]), ValueError, "candidate_labels is empty"),
        (lambda p, s: p("nowhere.wav", text=QUESTION), FileNotFoundError, "nowhere.wav"),
        (lambda p, s: p(s[0], text=QUESTION, santa={"lambda": 1}), ValueError, "Unknown Santa settings: lambda"),
        (
            lambda p, s: p(s[0], text=QUESTION, max_new_tokens=3, generate_kwargs={"max_new_tokens": 4}),
            ValueError,
            "Given twice",
        ),
        (lambda p, s: p(s[0], text="long " * 200), ValueError, "the language model has 128"),
    ],
)
def test_errors_say_what_came(pipe, sounds, call, error, says):
    with pytest.raises(error, match=says):
        call(pipe, sounds)


def test_saved_pipeline_loads_and_answers_the_same(pipe, sounds, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = pipeline("audio-text-to-text", model=str(tmp_path / "saved"), max_new_tokens=6)
    assert again(sounds, text=QUESTION) == pipe(sounds, text=QUESTION)

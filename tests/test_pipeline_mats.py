"""The pipeline: every form of input, batches, labels and evidence, on small random weights."""

import copy

import datasets
import pytest
import torch
from conftest import SENTENCES, make_processor, make_speaker, tone
from transformers import TextIteratorStreamer, TextStreamer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

RATE = 16000
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_speaker().save_pretrained(folder)
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


def test_the_model_hears_what_it_is_asked_about(pipe, sounds):
    """Without it the tests below would compare answers that are the same whatever comes in."""
    answers = [pipe(sound, text=question)["generated_text"] for sound in sounds for question in (QUESTION, "Why?")]
    assert len(set(answers)) == 6
    assert pipe(sounds[0], text=QUESTION, santa=False)["generated_text"] != answers[0]


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
        lambda s: {"inputs": {"audio": s, "path": "another.wav", "bytes": b"", "array": None, "text": QUESTION}},
        lambda s: {"inputs": {"messages": chat(s), "path": "another.wav"}},
        lambda s: {"inputs": {"path": s, "text": QUESTION}},
        lambda s: {"inputs": {"array": tone(), "sampling_rate": RATE, "text": QUESTION}},
        lambda s: {"inputs": {"audio": tone(), "sampling_rate": RATE, "text": QUESTION}},
        lambda s: {"inputs": {"audio": None, "audio_embeds": None, "messages": None, "path": s}, "text": QUESTION},
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
        "dict beside a path",
        "messages beside a path",
        "path value+text",
        "array value+text",
        "array+rate",
        "columns of None",
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


class Sounds(torch.utils.data.Dataset):
    """Neither iterable nor a list, as most datasets of torch; it remembers what was read."""

    def __init__(self, sounds):
        self.sounds = sounds
        self.read = []

    def __len__(self):
        return len(self.sounds)

    def __getitem__(self, index):
        self.read.append(index)
        return {"sound": self.sounds[index]}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_torch_datasets_are_streamed(pipe, sounds, batch_size):
    dataset = Sounds(sounds)
    results = pipe(KeyDataset(dataset, "sound"), text=QUESTION, batch_size=batch_size)
    assert len(results) == -(-3 // batch_size)  # as everywhere in transformers, it counts batches
    results = iter(results)
    answers = [next(results)]
    assert dataset.read == list(range(batch_size))
    answers += [next(results), next(results)]
    assert answers == [pipe(sound, text=QUESTION) for sound in sounds]

    questions = ["What?", "Where?", "Who is it?"]
    expected = [pipe(sound, text=question) for sound, question in zip(sounds, questions, strict=True)]
    assert list(pipe(KeyDataset(dataset, "sound"), text=questions, batch_size=batch_size)) == expected
    assert list(pipe(iter(sounds), text=questions, batch_size=batch_size)) == expected


def test_an_iterable_dataset_of_torch_is_streamed(pipe, sounds):
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(sounds)

    assert list(pipe(Rows(), text=QUESTION)) == [pipe(sound, text=QUESTION) for sound in sounds]


def test_nothing_in_nothing_out(pipe):
    assert pipe([]) == []
    assert pipe([], text=QUESTION) == []
    assert pipe([], text=[]) == []
    assert pipe([], candidate_labels=["dog"], batch_size=2) == []
    assert list(pipe(iter([]), text=QUESTION)) == []


def test_a_row_says_the_rate_of_its_waveform(pipe):
    wave = tone(rate=8000)
    expected = pipe((wave, 8000), text=QUESTION)
    assert pipe({"audio": wave, "sampling_rate": 8000, "text": QUESTION}) == expected
    assert pipe({"audio": [wave, wave], "sampling_rate": 8000, "text": QUESTION}) == pipe(
        {"audio": [(wave, 8000)] * 2, "text": QUESTION}
    )
    assert pipe({"audio": wave, "sampling_rate": 8000}, text=[QUESTION]) == [expected]
    assert pipe(wave, text=QUESTION, sampling_rate=16000) != expected


def test_a_row_of_several_sounds_can_be_asked_several_questions(pipe, sounds):
    row, questions = {"audio": sounds[:2]}, ["Is <|audio|> like <|audio|>?", QUESTION]
    assert pipe(row, text=questions) == [pipe({**row, "text": question}) for question in questions]
    embeds = {"audio_embeds": pipe.processor.encode_audio(sounds[:2])}
    assert pipe(embeds, text=questions) == pipe(row, text=questions)


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


def test_chats_with_and_without_audio_share_a_batch(pipe, sounds):
    chats = [[{"role": "user", "content": "Hello."}], chat(sounds[0]), [{"role": "user", "content": "How loud is it?"}]]
    single = [pipe(messages, return_evidence=True) for messages in chats]
    inputs = pipe.processor(text="Hello.")
    expected = pipe.model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    assert single[0] == {
        "generated_text": pipe.processor.batch_decode(expected, skip_special_tokens=True)[0].strip(),
        "santa": None,
    }
    for batch_size in (2, 3):
        together = pipe(chats, batch_size=batch_size, return_evidence=True)
        assert [r["generated_text"] for r in together] == [r["generated_text"] for r in single]
        assert [r["santa"] is None for r in together] == [True, False, True]


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


def test_labels_are_encoded_once_and_before_anything_else(pipe, sounds, monkeypatch):
    labels = ["dog", "rooster", "rain"]
    expected = [pipe(sound, candidate_labels=labels) for sound in sounds]
    happened = []

    def note(owner, name, what):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: happened.append(what(*a, **k)) or original(*a, **k))

    note(pipe.processor.clap, "encode_text", lambda texts, *a, **k: texts)
    note(pipe.processor.clap, "encode_audio", lambda *a, **k: "CLAP")
    note(pipe.model, "generate", lambda *a, **k: "generate")
    assert pipe(sounds, candidate_labels=labels, batch_size=2) == expected
    assert happened[0] == labels
    assert labels not in happened[1:]
    assert happened.count("generate") == 2
    happened.clear()
    for bad in (["dog", " "], ["dog", None], ["dog", "word " * 200]):
        with pytest.raises(ValueError, match="candidate_labels"):
            pipe(sounds, candidate_labels=bad)
        with pytest.raises(ValueError, match="candidate_labels"):
            pipe(iter(sounds), candidate_labels=bad)
    assert "generate" not in happened
    assert "CLAP" not in happened


def test_labels_are_scored_as_the_processor_does(pipe):
    labels = ["dog", "a rooster", "rain"]
    answers = ["A dog barks.", " ", "Rain falls. " * 60]
    ids = pipe.processor.tokenizer(answers, padding=True, return_tensors="pt")["input_ids"]
    records = pipe.postprocess({"answers": ids[None]}, labels, pipe.processor.encode_text(labels))
    expected = pipe.processor.match_labels(answers, labels)
    assert not expected[1].any()
    for record, row in zip(records, expected, strict=True):
        assert list(record["scores"]) == labels
        assert list(record["scores"].values()) == pytest.approx(row.tolist(), abs=1e-6)


def test_labels_can_be_given_with_the_pipeline(checkpoint, pipe, sounds):
    own = pipeline("audio-text-to-text", model=str(checkpoint), max_new_tokens=6, candidate_labels=["dog", "rain"])
    assert own(sounds[0]) == pipe(sounds[0], candidate_labels=["dog", "rain"])
    assert own(sounds[0], candidate_labels="rooster, sea") == pipe(sounds[0], candidate_labels=["rooster", "sea"])


def test_a_row_keeps_its_own_question_beside_candidate_labels(pipe, sounds):
    row = {"audio": sounds[0], "text": QUESTION}
    assert pipe(row, candidate_labels=["dog", "rain"])["generated_text"] == pipe(row)["generated_text"]
    value = {"path": sounds[0], "text": QUESTION}
    assert pipe(value, candidate_labels=["dog", "rain"])["generated_text"] == pipe(row)["generated_text"]


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


def make_pipe(pipe, **kwargs):
    """Another pipeline of the same parts."""
    return type(pipe)(model=pipe.model, processor=pipe.processor, **kwargs)


def test_what_a_pipeline_is_made_with_holds_for_its_calls_unless_they_say_otherwise(pipe, sounds):
    def ask(asked, **kwargs):
        return asked(sounds[0], text=QUESTION, **kwargs)

    three, six = (ask(pipe, max_new_tokens=count) for count in (3, 6))
    assert three != six
    for asked in (make_pipe(pipe, max_new_tokens=3), make_pipe(pipe, generate_kwargs={"max_new_tokens": 3})):
        assert ask(asked) == three
        assert ask(asked, min_new_tokens=1) == three
        assert ask(asked, generate_kwargs={"min_new_tokens": 1}) == three
        assert ask(asked, max_new_tokens=6) == six
        assert ask(asked, generate_kwargs={"max_new_tokens": 6}) == six
        other = copy.deepcopy(pipe.model.generation_config)
        other.max_new_tokens = 6
        assert ask(asked, generation_config=other) == six
        assert ask(asked) == three
    with pytest.raises(ValueError, match="Given twice, directly and in generate_kwargs: max_new_tokens"):
        make_pipe(pipe, max_new_tokens=3, generate_kwargs={"max_new_tokens": 4})


@pytest.mark.parametrize("nested", [True, False])
def test_a_streamer_can_be_given_with_the_pipeline(pipe, sounds, nested):
    heard = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            heard.append(text)

    given = {"streamer": Streamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True), "max_new_tokens": 5}
    asked = make_pipe(pipe, **({"generate_kwargs": given} if nested else given))
    record = asked(sounds[0], text=QUESTION)
    assert "".join(heard).strip() == record["generated_text"]
    heard.clear()
    record = asked(sounds[0], text=QUESTION, max_new_tokens=4)
    assert "".join(heard).strip() == record["generated_text"]


def test_the_question_that_a_pipeline_is_made_with_is_for_inputs_without_one(pipe, sounds):
    asked = make_pipe(pipe, text="Why?", max_new_tokens=6)
    assert asked(sounds[0]) == pipe(sounds[0], text="Why?")
    assert asked(sounds[0], text=QUESTION) == pipe(sounds[0], text=QUESTION)
    assert asked({"audio": sounds[0], "text": QUESTION}) == pipe(sounds[0], text=QUESTION)
    assert asked(chat(sounds[0])) == pipe(sounds[0], text=QUESTION)


def test_generation_can_stop_at_a_string(pipe, sounds):
    whole = pipe(sounds[0], text=QUESTION)["generated_text"]
    end = whole[2:4]
    expected = pipe(sounds[0], text=QUESTION, stop_strings=[end])
    assert whole.startswith(expected["generated_text"])
    assert end in expected["generated_text"]
    assert len(expected["generated_text"]) < len(whole)
    config = copy.deepcopy(pipe.model.generation_config)
    config.update(max_new_tokens=6, stop_strings=end)
    assert pipe(sounds[0], text=QUESTION, generation_config=config) == expected
    assert make_pipe(pipe, max_new_tokens=6, stop_strings=end)(sounds[0], text=QUESTION) == expected


def test_generation_can_be_told_the_tokens_to_choose_from(pipe, sounds):
    allowed = pipe.tokenizer("abc", add_special_tokens=False)["input_ids"]
    answer = pipe(sounds[0], text=QUESTION, prefix_allowed_tokens_fn=lambda row, ids: allowed)["generated_text"]
    assert answer
    assert set(answer) <= set("abc")


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda p, s: p(s[0], text=QUESTION, temprature=1), TypeError, "unknown keywords: temprature"),
        (lambda p, s: p(s[0]), ValueError, "without a question"),
        (lambda p, s: p(), ValueError, "Pass the sounds once"),
        (lambda p, s: p(s[0], audio=s[0], text=QUESTION), ValueError, "Pass the sounds once"),
        (lambda p, s: p(s, text=["a", "b"]), ValueError, "3 sounds but 2 texts"),
        (lambda p, s: p(Sounds(s), text=["a", "b"]), ValueError, "3 sounds but 2 texts"),
        (lambda p, s: p(chat(s[0]), text=QUESTION), ValueError, "A conversation brings its own text"),
        (lambda p, s: p(chat(s[0]), text=["a", "b"]), ValueError, "A conversation brings its own text"),
        (lambda p, s: p([chat(s[0])], text=QUESTION), ValueError, "A conversation brings its own text"),
        (lambda p, s: p({"messages": chat(s[0])}, text=QUESTION), ValueError, "A conversation brings its own text"),
        (lambda p, s: p({"messages": chat(s[0]), "text": "?"}), ValueError, r"this one also has \['text'\]"),
        (lambda p, s: p({"messages": chat(s[0]), "audio": s[0]}), ValueError, r"this one also has \['audio'\]"),
        (lambda p, s: p({"audio": s[0], "text": "a"}, text="b"), ValueError, "text was given twice: 'a' .* and 'b'"),
        (lambda p, s: p({"path": s[0], "text": "a"}, text="b"), ValueError, "text was given twice"),
        (lambda p, s: p([{"audio": s[0], "text": "a"}], text=["b"]), ValueError, "text was given twice"),
        (
            lambda p, s: p({"audio": s[0], "audio_embeds": torch.ones(16)}, text=QUESTION),
            ValueError,
            "both 'audio' and 'audio_embeds'",
        ),
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

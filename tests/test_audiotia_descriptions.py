"""Descriptions of labels: what is kept of a chat model's replies, and chat models themselves.

The endpoint is a real one: a small HTTP server that speaks OpenAI's protocol and can fail in every way, and
`transformers serve`.
"""

import json
import logging
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import typer
from conftest import CHATML_TEMPLATE, make_tokenizer
from huggingface_hub.errors import HfHubHTTPError
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mats_cli.describe import TOO_FEW, describe
from training.audiotia.chat_models import TOKEN_VARIABLE, EndpointChatModel, LocalChatModel, Reply
from training.audiotia.description_rules import mentions, names_of, parse_reply, refuse
from training.audiotia.descriptions import (
    EXAMPLES,
    Described,
    make_conversation,
    read_described,
    read_labels,
    write_descriptions,
)

# ---------------------------------------------------------------------------------------------------------- endpoints


class Handler(BaseHTTPRequestHandler):
    """`POST /v1/chat/completions`, answered by the endpoint's plan."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, "authorization": self.headers["Authorization"], **body})
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "hang up":
            return
        if fault == "be slow":
            time.sleep(1.0)
            return
        if fault is not None:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self.reply(status, {"error": {"message": f"fault {status}"}}, headers)
            return
        text = self.server.write(body)
        finish = "length" if text.endswith("~") else "stop"  # as if the limit of tokens had been reached
        message = {"role": "assistant", "content": text.rstrip("~")}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        self.reply(200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}, {})

    def reply(self, status: int, content: dict, headers: dict):
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Endpoint(ThreadingHTTPServer):
    """Writes by `write` unless there are faults left; keeps what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.requests: list[dict] = []
        self.faults: list[str | int | tuple[int, dict]] = []
        self.write: Callable[[dict], str] = good_writer()

    def chat(self, **kwargs) -> EndpointChatModel:
        settings = {"first_wait": 0.01, "batch_size": 2, "timeout": 20.0} | kwargs
        return EndpointChatModel(self.url, "m", **settings)

    def asked(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]


def wanted_of(body: dict) -> tuple[int, str]:
    """How many captions of which labels a request asks for."""
    found = re.search(r"Write (\d+) (?:different )?captions? .* hears: (.*)\.$", body["messages"][-1]["content"])
    return int(found[1]), found[2].replace("; ", " and a ")


def good_writer() -> Callable[[dict], str]:
    """A chat model that does as it is asked, differently each time."""
    places = iter(range(1000))

    def write(body: dict) -> str:
        count, labels = wanted_of(body)
        return "\n".join(f"{i + 1}. A {labels} is heard at place {next(places)}." for i in range(count))

    return write


@pytest.fixture
def endpoint():
    server = Endpoint()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------------------------------------- judgements


@pytest.mark.parametrize(
    ("label", "description"),
    [
        ("dog", "Two dogs bark."),
        ("dog", "A dog's bark echoes."),
        ("Bark", "A dog is barking."),
        ("Bark, woof", "The woofing of a big dog."),
        ("crying_baby", "Babies cry."),
        ("sneezing", "Someone sneezes."),
        ("clapping", "A crowd claps."),
        ("door_wood_knock", "Someone knocks on a wooden door."),
        ("brushing teeth", "A tooth is brushed."),
        ("Laughter", "A child laughs."),
        ("squeak", "A squeaky wheel turns."),
        ("chainsaw", "A chain saw runs."),
        ("hand saw", "A handsaw cuts."),
        ("hi-hat", "A hihat is hit."),
        ("Roaring cats (lions, tigers)", "A lion growls."),
        ("Cupboard open or close", "Someone opens a cupboard."),
        ("Chirp_and_tweet", "Birds tweet."),  # FSD50K's "Chirp, tweet"
        ("Music of Latin America", "Latin music from America plays."),
        ("dog bark", "“Barking” of a dog"),
        ("Glockenspiel", "GLOCKENSPIEL!"),
    ],
)
def test_a_label_is_named(label, description):
    assert mentions(description, label)


@pytest.mark.parametrize(
    ("label", "description"),
    [
        ("dog", "A puppy yelps."),
        ("dog", "Hotdogs sizzle."),
        ("cat", "A cattle market."),
        ("crying baby", "A baby laughs."),
        ("Drum and bass", "A drum beats."),
        ("Bark, woof", "A dog howls."),
        ("rain", "A train passes."),
        ("hen", "When night falls."),
    ],
)
def test_a_label_is_missed(label, description):
    assert not mentions(description, label)


def test_names_of_a_label():
    assert names_of("Fire engine, fire truck (siren)") == [["fire", "engine"], ["fire", "truck"], ["siren"]]
    assert names_of("Of the") == [["of", "the"]]
    assert names_of("?!") == []


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (
            "Here are two captions:\n\n1. A dog barks.\n2) A cat meows.\n\nI hope this helps!",
            ["A dog barks.", "A cat meows."],
        ),
        ("- “A dog barks.”\n* *A cat meows.*", ["A dog barks.", "A cat meows."]),
        ("1. A dog barks. 2. A cat meows.3. It rains.", ["A dog barks.", "A cat meows.", "It rains."]),
        ("A dog barks.\nA cat meows.", ["A dog barks.", "A cat meows."]),
        ("Captions:\nA dog barks.", ["A dog barks."]),
        ("Caption 1: A dog barks.\n**Cat**: A cat meows.", ["A dog barks.", "A cat meows."]),
        ("```\n(1) A dog barks.\n```", ["A dog barks."]),
        ("<think>1. Hm.\n2. Well.</think>1. A dog barks.", ["A dog barks."]),
        ("<think>still thinking", []),
        ("a) A dog barks.\nb) A cat  meows.", ["A dog barks.", "A cat meows."]),
        ("1. A 2.5 second bark.", ["A 2.5 second bark."]),
        ("2.5 seconds of barking.", ["2.5 seconds of barking."]),
        ("1.", []),
        (" \n", []),
    ],
)
def test_replies_are_parsed(reply, found):
    assert parse_reply(reply) == found


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ("A dog barks in the rain.", None),
        ("I'm sorry, but I cannot describe the dog and the rain.", "refusal"),
        ("As an AI, I hear neither dog nor rain.", "refusal"),
        ("A man says I'm sorry to his dog in the rain.", None),
        ("A dog barks " + "and barks " * 10 + "in the rain.", "too long"),
        ("A dog barks.", "label missing"),
        ("A DOG barks, on a rainy day", "duplicate"),
        ("A dog barks - on a rainy night!", "copy of an example"),
    ],
)
def test_descriptions_are_judged(description, reason):
    seen, examples = {"a dog barks on a rainy day"}, {"a dog barks on a rainy night"}
    assert refuse(description, ["dog", "rain"], 15, seen, examples) == reason


def test_a_label_alone_is_no_description():
    assert refuse("Clock tick.", ["clock_tick"], 25, set()) == "label alone"
    assert refuse("Barking!", ["bark"], 25, set()) == "label alone"
    assert refuse("A clock ticks.", ["clock_tick"], 25, set()) is None


def test_a_conversation_shows_examples_and_asks():
    conversation = make_conversation(["dog_bark", "Boat, Water vehicle"], EXAMPLES, 3, 20, random.Random(0))
    assert [message["role"] for message in conversation] == ["user", "assistant"] * 4 + ["user"]
    assert "at most 20 words" in conversation[0]["content"]
    assert conversation[-1]["content"] == (
        "Write 3 different captions of a recording in which one hears: dog bark; Boat, Water vehicle."
    )
    shown = {message["content"].removeprefix("1. ") for message in conversation[1::2]}
    assert shown < {example.description for example in EXAMPLES}
    plain = make_conversation(["dog"], [Described((), "It {rains}.")], 1, 20, random.Random(0))
    assert plain[0]["content"].endswith("Write 1 caption of a recording.")
    assert plain[1]["content"] == "1. It {rains}."


# -------------------------------------------------------------------------------------------------------------- files


def test_labels_come_in_several_formats(tmp_path):
    files = {
        "space.json": ('{"dog": 0, "sea waves": 1}', None),
        "list.json": ('["dog", "sea waves", "dog"]', None),
        "lines.txt": ("dog\n\n sea waves \n", None),
        "table.csv": ('file,category\n1.wav,dog\n2.wav,"sea waves"\n3.wav,dog\n', "category"),
    }
    for name, (text, column) in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_labels(tmp_path / name, column) == [("dog",), ("sea waves",)], name
    (tmp_path / "combinations.json").write_text('[["dog", "rain"], ["dog"]]')
    assert read_labels(tmp_path / "combinations.json") == [("dog", "rain"), ("dog",)]


def test_label_files_that_cannot_be_read_are_told(tmp_path):
    table, empty, other = tmp_path / "table.csv", tmp_path / "empty.txt", tmp_path / "other.json"
    table.write_text("file,category\n1.wav,dog\n")
    empty.write_text("\n")
    other.write_text("3")
    for path, column, message in (
        (table, None, "a column is to be named"),
        (table, "label", "'file', 'category'.*missing: 'label'"),
        (empty, "label", "no other"),
        (empty, None, "holds no label"),
        (other, None, "neither"),
    ):
        with pytest.raises(ValueError, match=message):
            read_labels(path, column)
    with pytest.raises(FileNotFoundError, match="No such file of labels"):
        read_labels(tmp_path / "nowhere.txt")


def test_examples_are_read_with_labels_or_without(tmp_path):
    (tmp_path / "a.txt").write_text("A dog barks.\n\nIt rains.\n")
    assert read_described(tmp_path / "a.txt") == [Described((), "A dog barks."), Described((), "It rains.")]
    line = Described(("dog", "rain"), "A dog barks in the rain; \u266a follows.")
    (tmp_path / "a.jsonl").write_text(line.to_json() + "\n", encoding="utf-8")
    assert read_described(tmp_path / "a.jsonl") == [line]
    (tmp_path / "b.jsonl").write_text(line.to_json() + '\n{"labels": "dog", "description": "A dog."}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, record 2"):
        read_described(tmp_path / "b.jsonl")
    with pytest.raises(FileNotFoundError):
        read_described(tmp_path / "c.jsonl")


# ------------------------------------------------------------------------------------------------------------ writing


def test_every_label_gets_its_descriptions(endpoint, tmp_path):
    output = tmp_path / "new" / "descriptions.jsonl"
    report = write_descriptions(["dog", "sea_waves", ("dog", "rain")], endpoint.chat(), 12, output)
    lines = lines_of(output)
    assert report.accepted == len(lines) == 36 and not report.short and not report.refused
    assert [line["labels"] for line in lines].count(["dog", "rain"]) == 12
    assert {tuple(line) for line in lines} == {("labels", "description")}
    assert len({line["description"] for line in lines}) == 36
    # At most ten at a time, then only the rest.
    assert [wanted_of(request)[0] for request in endpoint.requests] == [10, 10, 10, 2, 2, 2]
    assert {request["path"] for request in endpoint.requests} == {"/v1/chat/completions"}
    assert {request["model"] for request in endpoint.requests} == {"m"}
    assert len({request["seed"] for request in endpoint.requests}) == 6


def test_what_is_refused_is_counted(endpoint, tmp_path):
    copied = EXAMPLES[0].description
    endpoint.write = lambda body: (
        f"1. {copied}\n2. A dog.\n3. a dog\n4. A cat.\n5. I'm sorry, I have no dog.\n6. Dog.\n7. A dog ba~"
    )
    report = write_descriptions(["dog"], endpoint.chat(), 2, tmp_path / "d.jsonl", patience=2)
    assert report.refused == {
        "copy of an example": 3,
        "duplicate": 5,
        "label missing": 3,
        "refusal": 3,
        "label alone": 3,
        "cut off": 3,
    }
    assert report.prompts == 3 and report.accepted == 1
    assert "accepted 1, from prompts: 3" in str(report) and "duplicate 5" in str(report)


def test_a_description_is_not_given_to_two_labels(endpoint, tmp_path):
    endpoint.write = lambda body: "1. A dog barks in the rain."
    report = write_descriptions(["dog", "rain"], endpoint.chat(), 1, tmp_path / "d.jsonl", patience=1)
    assert report.accepted == 1 and report.refused == {"duplicate": 1}
    assert report.short == {("rain",): 0}


def test_labels_that_get_too_few_are_told(endpoint, tmp_path, caplog):
    good = good_writer()
    endpoint.write = lambda body: good(body) if "dog" in wanted_of(body)[1] else "I cannot do that."
    report = write_descriptions(["dog", "Bark, woof"], endpoint.chat(), 3, tmp_path / "d.jsonl", patience=4)
    assert report.short == {("Bark, woof",): 0}
    assert "Fewer than 3 descriptions for 1 labels: Bark, woof (0)" in caplog.text
    assert report.prompts == 1 + 4 and report.refused == {"refusal": 4}


def test_a_killed_run_goes_on(endpoint, tmp_path):
    output = tmp_path / "d.jsonl"
    endpoint.faults = [None, None, 400]
    with pytest.raises(HfHubHTTPError):
        write_descriptions(["dog", "cat", "hen"], endpoint.chat(batch_size=1), 3, output)
    assert len(lines_of(output)) == 6  # what was answered is kept
    whole = output.read_text()
    output.write_text(whole[: len(whole) - 20])  # and the last line is half there
    with pytest.raises(FileExistsError):
        write_descriptions(["dog", "cat", "hen"], endpoint.chat(), 3, output)

    endpoint.requests.clear()
    report = write_descriptions(["dog", "cat", "hen"], endpoint.chat(), 3, output, resume=True)
    assert sorted(map(wanted_of, endpoint.requests)) == [(1, "cat"), (3, "hen")]
    assert (report.found, report.accepted) == (5, 4)
    lines = lines_of(output)
    assert [sum(line["labels"] == [label] for line in lines) for label in ("dog", "cat", "hen")] == [3, 3, 3]
    assert len({line["description"] for line in lines}) == 9

    endpoint.requests.clear()
    assert write_descriptions(["dog", "cat", "hen"], endpoint.chat(), 3, output, resume=True).found == 9
    assert not endpoint.requests


def test_a_seed_repeats_a_run(endpoint, tmp_path):
    asked = []
    for number, seed in enumerate((1, 1, 2)):
        endpoint.requests.clear()
        endpoint.write = good_writer()
        write_descriptions(["dog", "cat"], endpoint.chat(batch_size=1), 2, tmp_path / str(number), seed=seed)
        asked.append([(request["seed"], request["messages"]) for request in endpoint.requests])
    assert asked[0] == asked[1] != asked[2]


def test_nonsense_is_refused_before_anything_is_asked(endpoint, tmp_path):
    output = tmp_path / "d.jsonl"
    for labels, settings, message in (
        ([], {}, "no labels"),
        (["dog", "?"], {}, r"'\?' has no word"),
        ([()], {}, "has no word"),
        (["dog"], {"examples": []}, "no example"),
        (["dog"], {"count_per_label": 0}, "count_per_label is 0"),
        (["dog"], {"patience": 0}, "patience is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            write_descriptions(labels, endpoint.chat(), **{"count_per_label": 1, "output": output, **settings})
    assert not output.exists() and not endpoint.requests


# ---------------------------------------------------------------------------------------------------- endpoint's ways


def test_a_busy_or_failing_endpoint_is_asked_again(endpoint, caplog):
    endpoint.faults = [(429, {"Retry-After": "0.05"}), 503, "hang up", "be slow", 500]
    start = time.monotonic()
    (reply,) = endpoint.chat(timeout=0.4).reply(make_conversations("dog"), seed=3)
    assert reply == Reply("1. A dog is heard at place 0.", True)
    assert len(endpoint.requests) == 6
    assert {request["seed"] for request in endpoint.requests} == {3}
    assert time.monotonic() - start > 0.05 + 0.02 + 0.04 + 0.4 + 0.08 + 0.16  # as long as it asked for, then doubling
    assert caplog.text.count("asking again in") == 5


def test_an_endpoint_that_stays_busy_is_given_up(endpoint):
    endpoint.faults = [503] * 9
    with pytest.raises(ConnectionError, match=r"no answer in 3 attempts.*503"):
        endpoint.chat(attempts=3).reply(make_conversations("dog"), seed=0)
    assert len(endpoint.requests) == 3


def test_an_endpoint_that_is_not_there_is_told(endpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ConnectionError, match=f"{url}: no answer in 2 attempts"):
        EndpointChatModel(url, "m", attempts=2, first_wait=0.01).reply(make_conversations("dog"), seed=0)
    with pytest.raises(ValueError, match="expected a URL"):
        EndpointChatModel("localhost:8000", "m")


def test_a_request_that_is_wrong_is_not_repeated(endpoint):
    endpoint.faults = [401]
    with pytest.raises(HfHubHTTPError, match="401"):
        endpoint.chat().reply(make_conversations("dog"), seed=0)
    assert len(endpoint.requests) == 1


def test_the_token_goes_to_the_endpoint_and_nowhere_else(endpoint, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_the-users-own")
    monkeypatch.setenv(TOKEN_VARIABLE, "the-endpoints-token")
    endpoint.faults = [503, 503, 401]
    with caplog.at_level(logging.DEBUG), pytest.raises(HfHubHTTPError) as raised:
        endpoint.chat().reply(make_conversations("dog"), seed=0)
    assert {request["authorization"] for request in endpoint.requests} == {"Bearer the-endpoints-token"}
    assert "the-endpoints-token" not in caplog.text + str(raised.value) + repr(endpoint.chat().client)

    endpoint.requests.clear()
    monkeypatch.delenv(TOKEN_VARIABLE)
    endpoint.chat().reply(make_conversations("dog"), seed=0)
    assert [request["authorization"] for request in endpoint.requests] == ["Bearer EMPTY"]


def test_replies_keep_the_order_of_the_conversations(endpoint):
    good = endpoint.write
    endpoint.write = lambda body: time.sleep(0.1 * ("dog" in wanted_of(body)[1])) or good(body)
    replies = endpoint.chat(extra_body={"n_probs": 1}).reply(make_conversations("dog", "cat", "hen"), seed=5)
    assert [next(label for label in ("dog", "cat", "hen") if label in reply.text) for reply in replies] == [
        "dog",
        "cat",
        "hen",
    ]
    assert sorted(request["seed"] for request in endpoint.requests) == [5, 6, 7]
    assert endpoint.requests[0]["n_probs"] == 1


def test_a_reply_without_text_is_empty(endpoint, tmp_path):
    endpoint.write = lambda body: ""
    report = write_descriptions(["dog"], endpoint.chat(), 1, tmp_path / "d.jsonl", patience=1)
    assert report.refused == {"empty reply": 1}


def make_conversations(*labels: str) -> list:
    return [make_conversation([label], EXAMPLES, 1, 25, random.Random(0)) for label in labels]


# -------------------------------------------------------------------------------------------------------- local models


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A chat model of a few thousand weights."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = make_tokenizer("<|im_end|>")
    tokenizer.chat_template = CHATML_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_local_model_answers_by_its_seed(folder):
    chat = LocalChatModel.from_pretrained(str(folder), max_tokens=8)
    conversations = make_conversations("dog", "Boat, Water vehicle")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (chat.reply(conversations, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)
    assert all(reply.text and not reply.complete for reply in first)
    assert "im_start" not in first[0].text  # the reply alone, without the conversation


def test_a_local_model_tells_whether_it_came_to_an_end(folder):
    chat = LocalChatModel.from_pretrained(str(folder), max_tokens=8)
    end = chat.tokenizer.eos_token_id
    chat.model.generation_config.eos_token_id = list(
        range(0, 300, 2)
    )  # half of all tokens, as chat models have several
    replies = chat.reply(make_conversations("dog") * 8, seed=0)
    assert any(reply.complete for reply in replies)
    chat.model.generation_config.eos_token_id = end


def test_batches_are_padded_on_the_left(folder):
    """The greedy answer to a conversation is the same beside a longer one."""
    chat = LocalChatModel.from_pretrained(str(folder), max_tokens=8)
    chat.sampling = {"max_new_tokens": 8, "temperature": 1e-4}
    alone = chat.reply(make_conversations("dog"), 0)
    beside, _ = chat.reply(make_conversations("dog", "a much longer label than that"), 0)
    assert alone == [beside]


def test_a_model_without_a_chat_template_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        LocalChatModel.from_pretrained(str(tmp_path / "model"))


@pytest.mark.slow
def test_transformers_serve(folder, tmp_path):
    """A server of others' making: the tiny model's words are random, but come back through the whole path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).with_name("transformers"),
        "serve",
        folder,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        generation = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": 0, "pad_token_id": 0}
        chat = EndpointChatModel(
            f"http://127.0.0.1:{port}/v1",
            str(folder),
            batch_size=1,
            max_tokens=8,
            extra_body={"generation_config": json.dumps(generation)},
        )
        first, again, other = (chat.reply(make_conversations("dog"), seed) for seed in (1, 1, 2))
        assert first[0].text and not first[0].complete
        assert first == again != other
        report = write_descriptions(["dog"], chat, 1, tmp_path / "d.jsonl", patience=1)
        assert report.prompts == 1 and report.short == {("dog",): 0}
    finally:
        server.terminate()
        server.wait(20)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=1).read()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(describe)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_and_resumes(endpoint, tmp_path, run):
    labels, examples, output = tmp_path / "labels.json", tmp_path / "examples.txt", tmp_path / "d.jsonl"
    labels.write_text('{"dog": 0, "sea waves": 1}')
    examples.write_text("It thunders.\n")
    arguments = (labels, "--model", "m", "--base-url", endpoint.url, "--examples", examples, "--out", output)
    result = run(*arguments, "--count", 2)
    assert result.exit_code == 0, result.output
    assert f"Wrote {output}: accepted 4, from prompts: 2" in result.stderr
    assert endpoint.requests[0]["messages"][1]["content"] == "1. It thunders."
    assert isinstance(run(*arguments, "--count", 3).exception, FileExistsError)
    assert run(*arguments, "--count", 3, "--resume").exit_code == 0
    assert len(lines_of(output)) == 6


def test_the_commands_exit_code_tells_of_labels_with_too_few(folder, tmp_path, run):
    (tmp_path / "labels.txt").write_text("dog\n")
    arguments = (tmp_path / "labels.txt", "--model", folder, "--out", tmp_path / "d.jsonl", "--max-tokens", 4)
    result = run(*arguments, "--count", 1)
    assert result.exit_code == TOO_FEW
    assert "labels with too few: 1" in result.stderr

"""Chat models: one that transformers loads, or one behind an OpenAI-compatible endpoint."""

import logging
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError
from huggingface_hub.utils import httpx
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from training.wheels import resolve_language_model

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "MATS_CHAT_TOKEN"
RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT = 60.0  # seconds

Conversation = list[dict[str, str]]  # of `role` and `content`, as chat templates take it


class Reply(NamedTuple):
    """What a chat model answered."""

    text: str
    complete: bool  # whether it ended by itself, not at the limit of tokens


class ChatModel(Protocol):
    """What writes the descriptions.

    Attributes:
        batch_size (`int`): how many conversations it likes to go on with at once.
    """

    batch_size: int

    def reply(self, conversations: Sequence[Conversation], seed: int) -> list[Reply]:
        """Goes on with each conversation; the seed makes the sampling repeatable."""
        ...


class LocalChatModel:
    """A chat model of transformers.

    Args:
        model (`PreTrainedModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        batch_size (`int`): How many conversations go through the model together.
        max_tokens (`int`): Where a reply is cut off.
        temperature, top_p (`float`): Of the sampling.

    Raises:
        ValueError: the tokenizer has no chat template.

    Example:
        chat = LocalChatModel.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        write_descriptions(["dog", "rain"], chat, count_per_label=10, output=Path("descriptions.jsonl"))
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 8,
        max_tokens: int = 512,
        temperature: float = 0.8,
        top_p: float = 0.95,
    ):
        if tokenizer.chat_template is None:
            raise ValueError(f"{tokenizer.name_or_path} is no chat model: its tokenizer has no chat template.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.batch_size = batch_size
        self.sampling = {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": 0}

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> "LocalChatModel":
        """Loads a folder or a Hub repo, or what stands in for it (`training/wheels.py`), onto the accelerators.

        Args:
            name (`str`): The folder or repo.
            kwargs: As for the class.
        """
        folder = resolve_language_model(name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        device_map = "auto" if torch.accelerator.is_available() else None
        return cls(AutoModelForCausalLM.from_pretrained(folder, device_map=device_map), tokenizer, **kwargs)

    @torch.inference_mode()
    def reply(self, conversations: Sequence[Conversation], seed: int) -> list[Reply]:
        inputs = self.tokenizer.apply_chat_template(
            list(conversations), add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        with torch.random.fork_rng():  # the caller's random numbers stay as they are
            torch.manual_seed(seed)
            output = self.model.generate(
                **inputs, do_sample=True, pad_token_id=self.tokenizer.pad_token_id, **self.sampling
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor(ends if isinstance(ends, list) else [ends], device=new.device)
        complete = torch.isin(new, ends).any(-1).tolist()
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [Reply(text, end) for text, end in zip(texts, complete, strict=True)]


class EndpointChatModel:
    """A chat model behind an OpenAI-compatible endpoint: vLLM, TGI, llama.cpp, `transformers serve`, or a provider's.

    A busy or failing server is asked again, after waits that double unless it says how long to wait.

    Args:
        base_url (`str`): The endpoint's, such as `http://localhost:8000/v1`.
        model (`str`): The name that the endpoint knows the model by.
        token (`str`, *optional*): Sent as the bearer token; by default what the environment variable `MATS_CHAT_TOKEN`
            holds. Without either the user's own Hub token is *not* sent, which `InferenceClient` would do.
        batch_size (`int`): Requests at the same time.
        max_tokens (`int`), temperature, top_p (`float`): Of each request; models that think need room for it.
        timeout (`float`): Seconds for one request.
        attempts (`int`): How often a request is made before it is given up.
        first_wait (`float`): Seconds before the second attempt.
        extra_body (`dict`, *optional*): What the endpoint understands beyond that. `transformers serve` samples only
            where the model's generation config says so: `{"generation_config": '{"do_sample": true}'}`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        token: str | None = None,
        batch_size: int = 4,
        max_tokens: int = 4096,
        temperature: float = 0.8,
        top_p: float = 0.95,
        timeout: float = 300.0,
        attempts: int = 6,
        first_wait: float = 1.0,
        extra_body: dict | None = None,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"The endpoint is {base_url!r}, expected a URL such as http://localhost:8000/v1.")
        if attempts < 1:
            raise ValueError(f"attempts is {attempts}, expected at least 1.")
        # Servers without authentication ignore the word; None would make the client send the user's Hub token there.
        token = token or os.environ.get(TOKEN_VARIABLE) or "EMPTY"
        self.client = InferenceClient(base_url=base_url, token=token, timeout=timeout)
        self.base_url = base_url
        self.model = model
        self.batch_size = batch_size
        self.attempts = attempts
        self.first_wait = first_wait
        self.parameters = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "extra_body": extra_body,
        }

    def reply(self, conversations: Sequence[Conversation], seed: int) -> list[Reply]:
        """Goes on with the conversations, `batch_size` at a time.

        Raises:
            ConnectionError: the endpoint could not be reached, or stayed busy, in all attempts.
            HfHubHTTPError: it refused the request (an `OSError`, with what the server said).
        """
        with ThreadPoolExecutor(self.batch_size) as pool:
            return list(pool.map(self.ask, conversations, range(seed, seed + len(conversations))))

    def ask(self, conversation: Conversation, seed: int) -> Reply:
        """Goes on with one conversation; raises as `reply` does."""
        attempt = 1
        while True:
            try:
                output = self.client.chat_completion(conversation, model=self.model, seed=seed, **self.parameters)
                choice = output.choices[0]
                return Reply(choice.message.content or "", choice.finish_reason != "length")
            except (HfHubHTTPError, InferenceTimeoutError, httpx.TransportError) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code not in RETRIED_STATUS:
                    raise
                # The first line only: what a server says may be a page of HTML.
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                if attempt == self.attempts:
                    raise ConnectionError(f"{self.base_url}: no answer in {attempt} attempts: {reason}") from error
                wait = min(asked_wait(error) or self.first_wait * 2 ** (attempt - 1), LONGEST_WAIT)
                logger.warning("%s: %s; asking again in %.1f s.", self.base_url, reason, wait)
            # Requests that failed together do not come back together.
            time.sleep(wait * random.uniform(1.0, 1.25))
            attempt += 1


def asked_wait(error: Exception) -> float | None:
    """The seconds to wait that a busy server asks for by `Retry-After`, if it does so."""
    response = getattr(error, "response", None)
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (AttributeError, KeyError, ValueError):  # a timeout; no such header; a date
        return None


__all__ = ["TOKEN_VARIABLE", "ChatModel", "Conversation", "EndpointChatModel", "LocalChatModel", "Reply"]

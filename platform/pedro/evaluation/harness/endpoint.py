"""lm-eval over our HTTP API: `--model pedro --model_args base_url=...,model=acme.support`. Needs no torch.

A continuation is scored by echo: its prompt goes as token ids with `conditioning_length`, the number of them that are
context, so that the answer does not condition the vectors that it is judged by. lm-eval's own `local-completions` does
not send it. The key is `api_key` or the environment's PEDRO_API_KEY. Texts become ids on the server, unless `tokenizer`
names a backbone that is at hand here.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from pedro.errors import ConfigError, UnavailableError
from pedro.evaluation.harness.base import (
    GenerationRequest,
    HarnessModel,
    ScoringRequest,
    check_generation_prompt,
    whole,
)

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

BUSY = (429, 502, 503, 504)
TRIES = 6
LONGEST_WAIT_S = 60.0  # between two tries, whatever the server asks for
PASSING = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)  # a server that restarts
MAX_STOPS = 16  # that the API takes; `generate_until` cuts at all of them, so more only cost tokens
T = TypeVar("T")
R = TypeVar("R")


class EndpointModel(HarnessModel):
    """`batch_size` prompts go in one request, `concurrent` requests at a time."""

    def __init__(  # noqa: PLR0913 - as lm-eval names them
        self,
        model: str | None = None,
        base_url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        tokenizer: str | None = None,
        batch_size: int | str = 8,
        concurrent: int | str = 4,
        timeout_s: float | str = 120.0,
        answers: str = "joined",
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__(answers)
        key = api_key or os.environ.get("PEDRO_API_KEY")
        if not model or not key:
            missing = "model" if not model else "api_key"
            raise ConfigError(f"{missing}: is required (a key may be in PEDRO_API_KEY)", param=missing)
        self.model, self.batch_size = model, whole(batch_size, "batch_size")
        self._pool = ThreadPoolExecutor(whole(concurrent, "concurrent"))
        self._http = httpx.Client(
            base_url=_address(base_url),
            headers={"authorization": f"Bearer {_sendable(key)}"},
            timeout=_seconds(timeout_s, "timeout_s"),
        )
        card = self._ask("GET", f"/v1/models/{model}", want="max_model_len")
        self.max_length = whole(card["max_model_len"], "max_model_len")
        self._digest = str(card.get("digest") or card.get("root"))
        self._local = _tokenizer(tokenizer) if tokenizer else None
        self.bos = self._special("bos_token")
        self._eos = self._special("eos_token")

    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        if self._local is not None:
            return [list(ids) for ids in self._local(list(texts), add_special_tokens=False).input_ids] if texts else []
        different = list(dict.fromkeys(texts))
        known = dict(zip(different, self._at_once(self._ids, different), strict=True))
        return [known[text] for text in texts]

    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        if self._eos is None:
            raise ConfigError("answers: the tokenizer has no EOS, so use answers=joined", param="answers")
        return [ids if ids[-1:] == [self._eos] else [*ids, self._eos] for ids in self.tokenise(texts)]

    def score(self, rows: Sequence[ScoringRequest]) -> list[tuple[float, bool]]:
        def ask(part: Sequence[ScoringRequest]) -> list[tuple[float, bool]]:
            lengths = [row.conditioning_length for row in part]
            fields = {"max_tokens": 0, "echo": True, "logprobs": 1, "conditioning_length": lengths}
            choices = self._complete([row.ids for row in part], fields)
            return [likelihood(choice, length) for choice, length in zip(choices, lengths, strict=True)]

        return self._in_batches(ask, rows)

    def generate(self, rows: Sequence[GenerationRequest]) -> list[str]:
        def ask(part: Sequence[GenerationRequest]) -> list[str]:
            fields = {"max_tokens": part[0].max_tokens, "stop": list(part[0].stops[:MAX_STOPS])}
            return [choice["text"] for choice in self._complete([row.ids for row in part], fields)]

        return self._in_batches(ask, rows)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as the adapter was trained to read them, by the server."""
        check_generation_prompt(add_generation_prompt)
        ids = self._ask("POST", "/tokenize", {"model": self.model, "messages": chat_history}, "tokens")["tokens"]
        ids = ids[1:] if ids[:1] == [self.bos] else ids
        return str(self._ask("POST", "/detokenize", {"model": self.model, "tokens": ids}, "prompt")["prompt"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return f"the prompt format of {self.model} {self._digest}"

    @property
    def tokenizer_name(self) -> str:
        return f"{self.model} {self._digest}"

    def _ids(self, text: str) -> list[int]:
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return list(self._ask("POST", "/tokenize", body, "tokens")["tokens"])

    def _special(self, name: str) -> int | None:
        """The id of BOS or EOS."""
        if self._local is not None:
            own: int | None = getattr(self._local, f"{name}_id")
            return own
        text = self._ask("GET", "/tokenizer_info").get(name)
        ids = self._ids(text) if text else []
        return ids[0] if len(ids) == 1 else None

    def _complete(self, prompts: list[tuple[int, ...]], fields: dict[str, Any]) -> list[dict[str, Any]]:
        body = {"model": self.model, "prompt": [list(ids) for ids in prompts], "temperature": 0, **fields}
        choices = self._ask("POST", "/v1/completions", body, "choices")["choices"]
        return sorted(choices, key=lambda choice: choice["index"])

    def _in_batches(self, ask: Callable[[Sequence[T]], list[R]], rows: Sequence[T]) -> list[R]:
        parts = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return [answer for part in self._at_once(ask, parts) for answer in part]

    def _at_once(self, ask: Callable[[T], R], items: Sequence[T]) -> list[R]:
        return list(self._pool.map(ask, items))

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, want: str | None = None
    ) -> dict[str, Any]:
        """The answer's body, which has the field `want`; a busy server is asked again as it says.

        Raises ConfigError for what it refuses or if it is no server of ours, UnavailableError if it does not answer.
        """
        for attempt in range(1, TRIES + 1):
            try:
                response = self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                if attempt == TRIES or not isinstance(error, PASSING):
                    raise UnavailableError(f"base_url: {self._http.base_url} does not answer: {error}") from error
                wait = float(attempt)
            else:
                if response.is_success:
                    return self._fields(response, want)
                final = response.headers.get("x-should-retry") == "false"
                if response.status_code not in BUSY or final or attempt == TRIES:
                    raise ConfigError(f"{method} {path}: {response.status_code}, {_message(response)}", param="model")
                wait = wait_s(response.headers.get("retry-after"), attempt)
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _fields(self, response: httpx.Response, want: str | None) -> dict[str, Any]:
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict) or (want is not None and want not in body):
            what = "no JSON object" if not isinstance(body, dict) else f"no {want}"
            raise ConfigError(
                f"base_url: {self._http.base_url} answers {response.request.url.path} with {what}, "
                "so it is not a pedro server; give the address of one",
                param="base_url",
            )
        return body


def likelihood(choice: dict[str, Any], length: int) -> tuple[float, bool]:
    """Of an echoed prompt, what follows its first `length` tokens: nats, and whether each was the likeliest."""
    nats = choice["logprobs"]["token_logprobs"][length:]
    likeliest = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][length:]]
    return sum(nats), all(one >= best for one, best in zip(nats, likeliest, strict=True))


def wait_s(told: str | None, attempt: int) -> float:
    """Seconds until the next try: what `Retry-After` says, a number or a date (RFC 9110 section 10.2.3), within reason.

    As many as there were tries if it says nothing that makes sense.
    """
    try:
        wait = float(told or "nan")
    except ValueError:
        wait = _until(str(told))
    return min(wait, LONGEST_WAIT_S) if wait >= 0 else float(attempt)


def _until(date: str) -> float:
    """Seconds from now to a date as HTTP writes it; NaN if it is none."""
    try:
        return parsedate_to_datetime(date).timestamp() - time.time()
    except ValueError:
        return math.nan


def _address(base_url: str) -> str:
    try:
        url = httpx.URL(base_url)
        fits = url.scheme in ("http", "https") and bool(url.host)
    except (httpx.InvalidURL, TypeError):
        fits = False
    if not fits:
        raise ConfigError(f"base_url: expected http://HOST:PORT, got {base_url!r}", param="base_url")
    return base_url.rstrip("/").removesuffix("/v1")


def _sendable(key: str) -> str:
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("api_key: holds what no key does (a space, line break or letter beyond ASCII); copy it again")
    return key


def _seconds(value: float | str, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"{name}: expected seconds above 0, got {value!r}", param=name)
    return number


def _tokenizer(name: str) -> Tokenizer:
    from pedro.backbone import load_tokenizer, resolve_backbone

    tokenizer: Tokenizer = load_tokenizer(resolve_backbone(name))
    return tokenizer


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]

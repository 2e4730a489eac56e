"""Many clients that ask without end, as stock OpenAI clients with their own retries, while tests kill servers.

An answer that had begun to stream when its server died is cut short: no client repeats that by itself, so these ask
again, as an application would. What counts as a failure is an error after the client's retries, a second cut, and an
answer that ends as if it were whole and is not.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai

GUARD_S = 300
WORDS = ["play some jazz", "book a table for two", "what is the weather", "rate this book five stars"]


class SteadyClients:
    """`number` clients of one URL, each with connections of its own; every other answer streams."""

    def __init__(
        self, url: str, key: str, model: str, number: int = 64, tokens: int = 48, pause_s: float = 0.0
    ) -> None:
        self._url, self._key, self._model, self._number = url, key, model, number
        self._tokens, self._pause_s = tokens, pause_s
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(number)
        self.wanted: dict[str, str] = {}
        self.answers: list[tuple[str, str]] = []  # prompt, answer
        self.failures: list[str] = []
        self.cut = 0

    def __enter__(self) -> SteadyClients:
        calm = self._client()
        self.wanted = {prompt: self._whole(calm, prompt) for prompt in WORDS}
        for number in range(self._number):
            self._pool.submit(self._run, number)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    @property
    def wrong(self) -> list[tuple[str, str]]:
        """Answers other than those while nothing was killed."""
        return [(prompt, answer) for prompt, answer in self.answers if answer != self.wanted[prompt]]

    def go_on(self, answers: int) -> None:
        """Return when there are so many more answers."""
        until, so_far = time.monotonic() + GUARD_S, len(self.answers)
        while len(self.answers) < so_far + answers:
            assert time.monotonic() < until, f"{len(self.answers) - so_far} answers; {self.failures[:3]}"
            time.sleep(0.02)

    def _client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self._url}/v1", api_key=self._key, timeout=GUARD_S)

    def _run(self, number: int) -> None:
        client, asked = self._client(), number
        while not self._stop.is_set():
            prompt = WORDS[asked % len(WORDS)]
            try:
                self.answers.append((prompt, (self._streamed if asked % 2 else self._whole)(client, prompt)))
            except Exception as error:  # noqa: BLE001 (counted, whatever it is)
                self.failures.append(repr(error))
            asked += 3
            self._stop.wait(self._pause_s)

    def _whole(self, client: openai.OpenAI, prompt: str) -> str:
        return str(self._ask(client, prompt).choices[0].text)

    def _streamed(self, client: openai.OpenAI, prompt: str) -> str:
        for attempt in range(2):
            parts: list[str] = []
            reason: str | None = None
            try:
                for chunk in self._ask(client, prompt, stream=True):
                    parts.append(chunk.choices[0].text)
                    reason = chunk.choices[0].finish_reason or reason
            except (httpx.HTTPError, openai.APIError):
                if not parts or attempt:
                    raise
                self.cut += 1
                continue
            assert reason == "length", "a stream that was cut short looks whole"
            return "".join(parts)
        raise AssertionError("not reached")

    def _ask(self, client: openai.OpenAI, prompt: str, **options: Any) -> Any:
        fields: dict[str, Any] = {"model": self._model, "prompt": prompt, "temperature": 0, "max_tokens": self._tokens}
        return client.completions.create(**fields, extra_body={"ignore_eos": True}, **options)

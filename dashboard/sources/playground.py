"""Sends one prompt to several models at once and collects each answer as it streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pedro.errors import PedroError
from pedro.refs import without_digest

if TYPE_CHECKING:
    from sources.gateway import GatewayClient

MOST_COLUMNS = 3
OTHERS = 5  # likeliest tokens beside the one that was drawn
PIECE = "bytes:\\x"  # how the API names a token that is a piece of a character
SHORTEST_S = 0.02  # that tells a speed: what arrives in one go says nothing of how it was made


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; None is the server's default."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def fields(self) -> dict[str, Any]:
        """What a request has to say: what is off is left out."""
        off = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": None}
        return {name: value for name, value in asdict(self).items() if name not in off or value != off[name]}


@dataclass(frozen=True)
class SeenToken:
    """A token of an answer: its text and log probability, and those of the likeliest others."""

    text: str
    logprob: float
    others: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class AskedPrompt:
    """What is asked of every model: the route, and the body but for the model and how it is sent."""

    path: str
    body: dict[str, Any]


def asked_prompt(prompt: str, chat: bool, sampling: Sampling, probabilities: bool = False) -> AskedPrompt:
    """A chat of one message, or the raw text; with the probabilities of tokens, if asked."""
    if chat:
        more: dict[str, Any] = {"logprobs": True, "top_logprobs": OTHERS} if probabilities else {}
        body = {"messages": [{"role": "user", "content": prompt}], **sampling.fields(), **more}
        return AskedPrompt("/v1/chat/completions", body)
    more = {"logprobs": OTHERS} if probabilities else {}
    return AskedPrompt("/v1/completions", {"prompt": prompt, **sampling.fields(), **more})


@dataclass(frozen=True)
class StreamedAnswer:
    """One column as of a moment. Times are seconds since the request was sent."""

    model: str
    text: str = ""
    done: bool = False
    error: str = ""
    first_token_s: float | None = None
    seconds: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    finish_reason: str = ""
    version: str = ""  # which one answered: `tenant.adapter:7`
    seen: tuple[SeenToken, ...] = ()  # where probabilities were asked for

    @property
    def shown(self) -> list[SeenToken]:
        """Those that stand in the text, or are pieces of a character in it: special tokens, the end's too, do not."""
        return [token for token in self.seen if token.text.startswith(PIECE) or token.text.strip() in self.text]

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first, while they came; None where they came too fast to be timed."""
        if self.first_token_s is None or self.seconds - self.first_token_s < SHORTEST_S:
            return None
        return (self.tokens - 1) / (self.seconds - self.first_token_s)


class ParallelAnswers:
    """The same prompt to several models, a thread each: one that fails or is slow holds up no other."""

    def __init__(
        self,
        gateway: GatewayClient,
        models: Iterable[str],
        asked: AskedPrompt,
    ) -> None:
        self._gateway = gateway
        self._path = asked.path
        self._body = {**asked.body, "stream_options": {"include_usage": True}}
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._answers = [StreamedAnswer(model) for model in models]
        self._threads = [
            threading.Thread(target=self._run, args=(column,), daemon=True) for column in range(len(self._answers))
        ]
        for thread in self._threads:
            thread.start()

    def answers(self) -> list[StreamedAnswer]:
        """Every column as it is now."""
        with self._lock:
            return list(self._answers)

    @property
    def done(self) -> bool:
        return all(answer.done for answer in self.answers())

    def cancel(self) -> None:
        """Ends what still streams at its next token; the gateway frees its slot as the connection closes."""
        self._cancelled.set()

    def wait(self, timeout_s: float) -> bool:
        """Until every column is done, or the time is up; whether they are."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.done

    def _run(self, column: int) -> None:
        begun = time.monotonic()
        try:
            for event in self._gateway.stream(self._path, {**self._body, "model": self._answers[column].model}):
                self._take(column, event, time.monotonic() - begun)
                if self._cancelled.is_set():
                    self._change(column, finish_reason="cancelled")
                    break
        except PedroError as error:
            self._change(column, error=error.message)
        except Exception as error:  # noqa: BLE001 (a column of its own: the others continue)
            self._change(column, error=f"the answer cannot be read ({type(error).__name__})")
        answer = self._answers[column]
        self._change(column, done=True, seconds=answer.seconds or time.monotonic() - begun)

    def _take(self, column: int, event: Mapping[str, Any], seconds: float) -> None:
        """One event: text, how it ended, or at last the counts."""
        answer = self._answers[column]
        seen = [token for choice in event.get("choices") or () for token in seen_tokens(choice.get("logprobs"))]
        changed: dict[str, Any] = {"version": without_digest(str(event.get("system_fingerprint") or answer.version))}
        for choice in event.get("choices") or ():
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if text:
                changed |= {"text": answer.text + text, "seconds": seconds}
                changed |= {} if answer.first_token_s is not None else {"first_token_s": seconds}
            if choice.get("finish_reason"):
                changed |= {"finish_reason": choice["finish_reason"], "seconds": seconds}
        if seen:
            changed |= {"seen": (*answer.seen, *seen)}
        if usage := event.get("usage"):
            changed |= {"prompt_tokens": usage["prompt_tokens"], "tokens": usage["completion_tokens"]}
        self._change(column, **changed)

    def _change(self, column: int, **changed: Any) -> None:
        with self._lock:
            self._answers[column] = replace(self._answers[column], **changed)


def seen_tokens(logprobs: Mapping[str, Any] | None) -> list[SeenToken]:
    """The tokens of a part of an answer, in the shape of chats or of completions."""
    if not logprobs:
        return []
    if "content" in logprobs:
        return [
            SeenToken(
                entry["token"],
                entry["logprob"],
                _others(entry["token"], {other["token"]: other["logprob"] for other in entry["top_logprobs"]}),
            )
            for entry in logprobs["content"] or ()
        ]
    names, values, top = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    return [
        SeenToken(name, value, _others(name, others or {}))
        for name, value, others in zip(names, values, top, strict=True)
        if value is not None
    ]


def _others(chosen: str, top: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(((text, value) for text, value in top.items() if text != chosen), key=lambda pair: -pair[1]))


def model_names(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names to choose from: adapters first, the backbone last."""
    listed = [str(model["id"]) for model in models if isinstance(model, Mapping) and model.get("id")]
    return sorted(listed, key=lambda name: ("." not in name, name))


def beside_backbone(model: str, names: Iterable[str]) -> list[str]:
    """A model that a link asks for, and its backbone to compare it with."""
    return list(dict.fromkeys([model, *(name for name in names if "." not in name)]))[:MOST_COLUMNS]


def first_choice(names: Iterable[str]) -> list[str]:
    """Of `model_names`, what to compare unless told otherwise: the first adapter's champion and the backbone."""
    champions = [name for name in names if "@" not in name]
    backbone = [name for name in champions if "." not in name]
    return [name for name in champions if name not in backbone][:1] + backbone[:1]

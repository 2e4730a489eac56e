"""Who holds the conversations of the benchmark `chat`: transformers' `generate()` in this process, or a server.

Both render with the backbone's chat template, transformers' own code here and the gateway's there, answer greedily, and
go on with their own answers before the next turn.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, cast

import httpx
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pedro.model_protocols import Generates, Tokenizer

Messages = list[dict[str, str]]
Turns = Sequence[str]
"""What the user says, turn by turn."""


@dataclass
class Reply:
    """An answer, and when each of its tokens came, in seconds since it was asked for. Ids where they are known."""

    text: str = ""
    moments: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Held:
    """Conversations that were held at once: `replies[conversation][turn]`, and what all of them took."""

    replies: list[list[Reply]]
    seconds: float

    def figures(self) -> dict[str, float]:
        """tok_s: all answer tokens / the time from the first question to the last token. ttft_ms: the median answer's
        time to its first token. tpot_ms: the median answer's time per further token."""
        answers = [reply for turns in self.replies for reply in turns]
        further = [(r.moments[-1] - r.moments[0]) / (len(r.moments) - 1) for r in answers if len(r.moments) > 1]
        return {
            "tok_s": sum(len(reply.moments) for reply in answers) / self.seconds,
            "ttft_ms": median(reply.moments[0] for reply in answers) * 1000,
            "tpot_ms": median(further) * 1000 if further else 0.0,
        }


class Contender(Protocol):
    """Holds conversations of equally many turns, all at once."""

    def converse(self, conversations: Sequence[Turns], new: int) -> Held:
        """At most `new` tokens a turn."""
        ...


class Generate:
    """`generate()` on a batch padded on the left, a turn after the other: a batch starts and ends together."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def converse(self, conversations: Sequence[Turns], new: int) -> Held:
        """The first turn of all, then the second of all."""
        began = time.perf_counter()
        chats: list[Messages] = [[] for _ in conversations]
        replies: list[list[Reply]] = [[] for _ in conversations]
        for turn in zip(*conversations, strict=True):
            for chat, said in zip(chats, turn, strict=True):
                chat.append({"role": "user", "content": said})
            for chat, held, reply in zip(chats, replies, self._answer(chats, new), strict=True):
                held.append(reply)
                chat.append({"role": "assistant", "content": reply.text})
        return Held(replies, time.perf_counter() - began)

    @torch.inference_mode()
    def margin(self, ids: list[int]) -> float:
        """How far apart the logits of the two likeliest next tokens are."""
        first, second = self.model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
        return float(first - second)

    def prompt_ids(self, chat: Messages) -> list[int]:
        """The prompt as transformers renders it."""
        rendered: Any = self.tokenizer
        text = rendered.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def first_difference(self, theirs: Reply, ours: Reply) -> int:
        """Which of the tokens of `theirs`, made here, is the first that the other answer does not have."""
        ids, known = [token for token in theirs.token_ids if token != self.tokenizer.eos_token_id], 0
        for at in range(len(ids)):
            text = self.tokenizer.decode(ids[: at + 1], skip_special_tokens=True)
            if not ours.text.startswith(text.rstrip("\ufffd")):
                break
            if not text.endswith("\ufffd"):  # the bytes of a character may come one by one
                known = at + 1
        return known

    def _answer(self, chats: Sequence[Messages], new: int) -> list[Reply]:
        clock = _Clock()
        prompts = [self.prompt_ids(chat) for chat in chats]
        longest, pad = max(map(len, prompts)), self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        eos = self.tokenizer.eos_token_id
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=pad)
        with torch.inference_mode():
            made = cast("Generates", self.model).generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        replies = []
        for prompt, row in zip(prompts, made[:, longest:].tolist(), strict=True):
            own = row[: row.index(eos) + 1] if eos in row else row
            text = self.tokenizer.decode(own, skip_special_tokens=True)
            replies.append(Reply(text, clock.moments[: len(own)], len(prompt), prompt, own))
        return replies


class Server:
    """The chat API of a running server; conversation i asks `models[i % n]` and goes on as soon as it is answered."""

    def __init__(self, url: str, key: str, models: Sequence[str]) -> None:
        self._url, self._headers, self._models = url, {"Authorization": f"Bearer {key}"}, models

    def converse(self, conversations: Sequence[Turns], new: int) -> Held:
        """Every conversation at its own pace."""
        return asyncio.run(self._converse(conversations, new))

    async def _converse(self, conversations: Sequence[Turns], new: int) -> Held:
        async with httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=600) as client:
            await asyncio.gather(*(client.get("/health") for _ in conversations))  # connections are open already
            began = time.perf_counter()
            replies = await asyncio.gather(
                *(
                    self._hold(client, self._models[number % len(self._models)], turns, new)
                    for number, turns in enumerate(conversations)
                )
            )
            return Held(replies, time.perf_counter() - began)

    async def _hold(self, client: httpx.AsyncClient, model: str, turns: Turns, new: int) -> list[Reply]:
        chat: Messages = []
        replies = []
        for said in turns:
            chat.append({"role": "user", "content": said})
            replies.append(await self._answer(client, model, chat, new))
            chat.append({"role": "assistant", "content": replies[-1].text})
        return replies

    async def _answer(self, client: httpx.AsyncClient, model: str, chat: Messages, new: int) -> Reply:
        body = {"model": model, "messages": chat, "max_tokens": new, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        reply, began = Reply(), time.perf_counter()
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread()).decode()[:300]}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _take(json.loads(line.removeprefix("data: ")), reply, time.perf_counter() - began)
        return reply


def _take(event: dict[str, Any], reply: Reply, moment: float) -> None:
    """Add what an event brought; the usage so far says how many tokens."""
    if "error" in event:
        raise RuntimeError(str(event["error"]))
    for choice in event["choices"]:
        reply.text += choice["delta"].get("content") or ""
    used = event.get("usage") or {}
    reply.prompt_tokens = used.get("prompt_tokens", reply.prompt_tokens)
    reply.moments += [moment] * (used.get("completion_tokens", 0) - len(reply.moments))


class _Clock(StoppingCriteria):
    """Notes when each step of `generate()` was done; stops nothing."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self._began = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_options: Any) -> torch.Tensor:
        self.moments.append(time.perf_counter() - self._began)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

"""/v1/embeddings: its body, and the answer to it. A prompt's embedding is a backbone's last hidden state, of length 1.

Reference: https://platform.openai.com/docs/api-reference/embeddings/create,
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html ("Embeddings API")
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import re
import sys
from array import array
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from starlette.responses import Response

from pedro.errors import PedroError
from pedro.gateway.answer import Answer, while_connected
from pedro.gateway.body_formats import usage
from pedro.gateway.schemas import Body, ModelName, Prompts
from pedro.gateway.vllm_fields import REASONS, Harmless

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Receive, Scope, Send

    from pedro.gateway.backend import Backend, GenerateCall
    from pedro.gateway.quotas import Ticket
    from pedro.gateway.usage import UsageEntry

PROMPT = re.compile(r"\bprompt\b")


class EmbeddingsRequest(Body):
    harmless: ClassVar[Harmless] = {
        "add_special_tokens": (True,),
        "dimensions": (),
        "embed_dtype": ("float32",),
        "endianness": ("little",),
        "messages": (),
        "mm_processor_kwargs": ({},),
        "normalize": (True,),
        "priority": (0,),
        "request_id": (),
        "truncate_prompt_tokens": (),
        "truncation_side": (),
        "use_activation": (True,),
    }
    reasons: ClassVar[dict[str, str]] = {
        **REASONS,
        "add_special_tokens": "prompts are encoded as in training; token ids are used unchanged",
        "dimensions": "an embedding has the backbone's width and cannot be shortened; leave it out",
        "embed_dtype": "embeddings are float32",
        "endianness": "base64 contains little-endian numbers",
        "messages": "send the text in input",
        **dict.fromkeys(("normalize", "use_activation"), "embeddings have length 1"),
    }
    model: ModelName  # the backbone, tenant.adapter, tenant.adapter@alias or tenant.adapter:version
    input: Prompts  # one or several, as text or token ids
    encoding_format: Literal["float", "base64"] | None = None  # default float; base64 encodes little-endian float32
    user: str | None = None  # the client's end user: a canary consistently answers the same users
    cache_salt: Annotated[str | None, Field(max_length=256)] = None  # only prompts with equal salts share a cache
    pooling: Literal["last", "mean"] | None = None  # extension: the last token's hidden state (default), or the mean


class EmbeddingsAnswer(Answer):
    """The answer to calls with `pooling`, one per input. Errors name the field `input`."""

    def __init__(
        self,
        backend: Backend,
        calls: Sequence[GenerateCall],
        request: EmbeddingsRequest,
        ticket: Ticket,
        entry: UsageEntry,
    ) -> None:
        super().__init__(backend, calls, ticket, entry)
        self._in_base64 = request.encoding_format == "base64"

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await while_connected(receive, self._written())
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _written(self) -> bytes:
        """The answer as JSON. Formatting numbers is slow, so the event loop runs other tasks after each embedding."""
        try:
            frame = json.dumps(await self._collect())
        except PedroError as error:
            raise _of_input(error) from error
        data = []
        for index, [choice] in enumerate(self._choices):
            assert choice.embedding is not None, "the backend returns an embedding of each prompt"
            shown = self._encoded(choice.embedding)
            data.append(json.dumps({"object": "embedding", "index": index, "embedding": shown}))
            await asyncio.sleep(0)
        return f'{frame[:-1]}, "data": [{", ".join(data)}]}}'.encode()

    def _body(self) -> dict[str, Any]:
        """Everything but the embeddings."""
        prompt_tokens = usage(self._choices)["prompt_tokens"]
        return {
            "object": "list",
            "model": self._calls[0].model,
            "system_fingerprint": self._fingerprint,
            "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
        }

    def _encoded(self, embedding: bytes) -> str | list[float]:
        if self._in_base64:
            return base64.b64encode(embedding).decode()
        numbers = array("f", embedding)
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers.tolist()


def _of_input(error: PedroError) -> PedroError:
    """The error, with prompts renamed to `input`."""
    made = copy.copy(error)
    made.message = PROMPT.sub("input", error.message)
    made.param = "input" if error.param in ("prompt", "max_tokens") else error.param
    made.args = (made.message,)
    return made

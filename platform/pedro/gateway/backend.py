"""What the gateway asks of whatever generates tokens, independent of HTTP, of the engine and of where it runs.

An implementation conforms by shape (`typing.Protocol`); nothing is inherited. Errors meant for the tenant are
`pedro.errors.PedroError`; anything else is a fault of ours, and the tenant sees only that it happened.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from pedro.gateway.usage import CallMeter
    from pedro.store import Actor

ALL_TENANTS = "*"
"""The tenant named by a call made with an admin key: every tenant's models are visible to it."""


@dataclass(frozen=True)
class ModelCard:
    """A name that can stand in a request's `model` field."""

    id: str
    created: int  # Unix seconds
    owned_by: str  # the tenant, or "pedro" for the backbone
    backbone: str
    version: int | None = None  # of the adapter that the name means now; None for the backbone
    digest: str | None = None
    max_model_len: int | None = None  # tokens of prompt and answer together


@dataclass(frozen=True)
class VersionCard:
    """One immutable version of an adapter, as an operator sees it."""

    version: int
    digest: str
    created: str  # ISO 8601, UTC
    method: str = ""
    status: str = ""
    aliases: tuple[str, ...] = ()
    fault: str | None = None  # why the server cannot serve it, as far as it has tried
    metrics: Mapping[str, float] = field(default_factory=dict)
    parent: str | None = None  # the version whose weights its training started from


@dataclass(frozen=True)
class AdapterCard:
    """An adapter `tenant.adapter` with its versions, newest first."""

    name: str
    aliases: Mapping[str, int]
    versions: tuple[VersionCard, ...] = ()
    canary: Mapping[str, float] | None = None  # {"version": 8, "weight": 0.1}: its share of the champion's requests
    shadow: Mapping[str, float | None] | None = None  # likewise, with how what it answered differs


class AnswerShape(NamedTuple):
    """What an answer is held to; `param` is the field that asked for it.

    `kind` and `text`: "json" and a JSON schema, "regex" and a regular expression, "choice" and a JSON list of texts,
    "grammar" and a grammar in the syntax of Lark or of GBNF.
    """

    kind: str
    text: str
    param: str


@dataclass(frozen=True)
class ToolUse:
    """The tools that a prompt tells of, in OpenAI's form, and whether the answer may call some.

    `must_call`: it calls one, or this one; "" is any, None leaves it to the model. `parallel`: several at once.
    """

    tools: tuple[Mapping[str, Any], ...]
    may_call: bool = True
    must_call: str | None = None
    parallel: bool = True


@dataclass(frozen=True)
class GenerateCall:
    """One prompt to continue, `n` times.

    `request_id` is unique and never chosen by a client, so one tenant cannot name another's request; `trace_id` is
    the `x-request-id` that the client sees and may have chosen: for logs only.
    `tenant` says whose models may be used (`ALL_TENANTS` for an admin key).
    Exactly one of `prompt` and `messages` is set. Token ids are taken as they are; text is encoded as in training.
    `params` holds only what the request set, under the names of the engine's `SamplingParams`: max_tokens,
    temperature, top_p, top_k, min_p, seed, stop, stop_token_ids, ignore_eos, min_tokens, logprobs (number of
    alternatives; 0 is the chosen token's alone), presence_penalty, frequency_penalty, repetition_penalty, logit_bias
    (by token id), pooling ("last" or "mean", with max_tokens 0: an embedding is all that is made).
    `conditioning_length`: the first N tokens of the prompt condition the vectors; None: all of them.
    `conditioning`: what of `messages` does, "prompt" or "system"; None: what the adapter was trained on.
    `timeout_s`: the call ends in a DeadlineError after this time; at most the server's own limit, which None means.
    `echo`: the deltas of every choice begin with the prompt's own text, token ids and logprobs.
    `cache_salt`: the call shares what is read of its prompt only with calls of its tenant that have the same.
    `user`: whom the client asks for, if it says so; a canary answers the same ones each time.
    `tools`: what the answer to `messages` may call; None: nothing.
    `shape`: what every choice is held to, unless it ends early; None: any text.
    `meter`: told what the call uses; it stays in the gateway's process.
    """

    request_id: str
    tenant: str
    model: str
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    conditioning_length: int | None = None
    conditioning: str | None = None
    echo: bool = False
    timeout_s: float | None = None
    trace_id: str = ""
    user: str | None = None
    cache_salt: str = ""
    shape: AnswerShape | None = None
    tools: ToolUse | None = None
    meter: CallMeter | None = None


class Alternative(NamedTuple):
    """A token that could have stood at a position. `raw` are its bytes where the text alone cannot tell them."""

    token: str
    logprob: float
    raw: bytes | None = None


class TokenLogprob(NamedTuple):
    """One token's log-probability, natural logarithm; None for the first token of an echoed prompt."""

    token: str
    logprob: float | None
    top: tuple[Alternative, ...] = ()
    raw: bytes | None = None


@dataclass(frozen=True)
class Delta:
    """What one choice gained since its last delta.

    `finish_reason` ("stop" or "length") is set on the last delta of the choice and on no other.
    `prompt_tokens` and `completion_tokens` are totals of this choice so far; `cached_tokens` of the prompt's were
    not read again. `logprobs` belong to `token_ids`, one each, when the call asked for them. `fingerprint` names the
    adapter version and digest that answered.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    fingerprint: str | None = None
    queue_s: float | None = None  # on the last one: how long the choice waited in the engine
    embedding: bytes | None = None  # on the last one, where asked for: float32, little-endian


@dataclass(frozen=True)
class TokenizeResult:
    """What a prompt becomes. `token_strs` are the vocabulary's own pieces, one an id; None where they are not had."""

    ids: tuple[int, ...]
    max_model_len: int
    token_strs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class AdapterResidence:
    """One adapter version on one engine replica. A version that a replica does not have has no residence there."""

    name: str  # tenant.adapter
    version: int
    digest: str
    replica: str
    state: str  # "loading", "ready", "draining": the adapter pool's own words
    bytes: int  # of the replica's adapter budget; 0 while it loads
    pinned: bool  # by an operator: never evicted
    uses: int  # requests that hold it now


class Backend(Protocol):
    """Everything behind the HTTP edge."""

    async def list_models(self, tenant: str) -> list[ModelCard]:
        """The backbone and the adapters that `tenant` may use."""
        ...

    async def get_model(self, tenant: str, name: str) -> ModelCard:
        """Raises `pedro.errors.model_not_found(name)`, the same for an unknown and for a foreign adapter."""
        ...

    def generate(self, call: GenerateCall) -> AsyncGenerator[Delta, None]:
        """Deltas of the `n` choices, interleaved as they come.

        The first delta comes after admission: an error before it becomes an HTTP status, one after it an event in
        the stream. Cancelling the consumer or `aclose()` frees whatever the call holds.
        """
        ...

    async def tokenize(
        self,
        tenant: str,
        model: str | None,
        prompt: str | tuple[Mapping[str, str], ...],
        add_special_tokens: bool,
    ) -> TokenizeResult:
        """The ids of a text, or of messages as `generate` would render them (`add_special_tokens` is then no matter).

        With `add_special_tokens` a text has the ids that `generate` gives it, without it none that the text does not
        spell. `model` None is the backbone. Raises as `get_model` does.
        """
        ...

    async def detokenize(self, tenant: str, model: str | None, ids: tuple[int, ...]) -> str:
        """The text of the ids, special ones included. Raises PedroError for an id that the vocabulary lacks."""
        ...

    async def tokenizer_info(self) -> dict[str, Any]:
        """The backbone's tokenizer_config, as JSON can hold it: tokenizer_class, eos_token, bos_token, pad_token, ...

        Special tokens are strings; `chat_template` is there if the tokenizer has one.
        """
        ...

    async def list_adapters(self, tenant: str) -> list[AdapterCard]: ...

    async def get_adapter(self, tenant: str, name: str) -> AdapterCard:
        """One adapter by `tenant.adapter`. Raises `model_not_found(name)` for an unknown and for a foreign one."""
        ...

    async def residents(self, tenant: str) -> list[AdapterResidence]:
        """Every adapter version of `tenant` that a replica holds now."""
        ...

    async def load_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        """Makes the version that `ref` (as in a request's `model`) means now resident on every replica.

        Returns once it is; raises what a request would meet whose adapter cannot be loaded. This and the three that
        follow answer with the residences of that version.
        """
        ...

    async def pin_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        """Loads it and keeps it from being evicted, until `unpin_adapter`; doing so again changes nothing."""
        ...

    async def unpin_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]: ...

    async def unload_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        """Gives its memory back, pinned or not; requests that run keep what they hold, the next one loads it anew."""
        ...

    async def promote(
        self, tenant: str, name: str, version: int, *, expected: int | None = None, actor: Actor | None = None
    ) -> AdapterCard:
        """Makes `version` the champion, and the champion `previous`. Raises NotFoundError, or ConflictError where the
        champion is another one than `expected`.

        This and the four that follow enter `actor` into the audit; None: who runs this process.
        """
        ...

    async def rollback(self, tenant: str, name: str, *, actor: Actor | None = None) -> AdapterCard:
        """Swaps champion and previous. Raises NotFoundError, or ConflictError where there is no previous one."""
        ...

    async def set_canary(
        self, tenant: str, name: str, version: int, weight: float, *, actor: Actor | None = None
    ) -> AdapterCard:
        """Has `version` answer a share of what is asked of the champion; 0 ends it.

        Raises NotFoundError, or ConflictError where there is no champion or it is the version.
        """
        ...

    async def set_shadow(
        self, tenant: str, name: str, version: int, weight: float, *, actor: Actor | None = None
    ) -> AdapterCard:
        """Has `version` asked a share of what the champion answers, for nobody to see; 0 ends it.

        Raises as `set_canary` does.
        """
        ...

    async def delete_version(
        self, tenant: str, name: str, version: int, *, unused: bool = False, actor: Actor | None = None
    ) -> None:
        """Deletes a version. Raises NotFoundError, or ConflictError for the champion; `unused`: for every one that an
        alias, the canary or the shadow names."""
        ...

    async def metrics(self) -> str:
        """Prometheus text of every engine replica; label sets are bounded, whatever the number of adapters."""
        ...

    async def ready(self) -> bool:
        """True once a request would be answered; false (or an error) keeps traffic away."""
        ...

    async def degraded(self) -> bool:
        """True while it answers by what it knew before, since what says what names mean is away."""
        ...

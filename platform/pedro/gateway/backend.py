"""The gateway's interface to the serving layer, independent of HTTP, of the engine and of where it runs.

A structural interface (`typing.Protocol`); nothing is inherited. Errors meant for the tenant are
`pedro.errors.PedroError`; any other is an internal error, whose text the tenant does not see.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from pedro.gateway.usage import CallMeter
    from pedro.store import Actor

ALL_TENANTS = "*"
"""The tenant of calls with an admin key, to which every tenant's models are visible."""


@dataclass(frozen=True)
class ModelCard:
    """A valid value of a request's `model` field."""

    id: str
    created: int  # Unix seconds
    owned_by: str  # the tenant, or "pedro" for the backbone
    backbone: str
    version: int | None = None  # of the adapter to which the name resolves now; None for the backbone
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
    fault: str | None = None  # why the server could not serve it, if it has tried
    metrics: Mapping[str, float] = field(default_factory=dict)
    parent: str | None = None  # the version whose weights its training started from


@dataclass(frozen=True)
class AdapterCard:
    """An adapter `tenant.adapter` with its versions, newest first."""

    name: str
    aliases: Mapping[str, int]
    versions: tuple[VersionCard, ...] = ()
    canary: Mapping[str, float] | None = None  # {"version": 8, "weight": 0.1}: its share of the champion's requests
    shadow: Mapping[str, float | None] | None = None  # likewise, with counts of differing answers


class AnswerShape(NamedTuple):
    """The shape of an answer; `param` is the field that requested it.

    `kind` and `text`: "json" and a JSON schema, "regex" and a regular expression, "choice" and a JSON list of texts,
    "grammar" and a grammar in the syntax of Lark or of GBNF.
    """

    kind: str
    text: str
    param: str


@dataclass(frozen=True)
class ToolUse:
    """The tools in a prompt, in OpenAI's form, and whether the answer may call them.

    `must_call`: the tool that must be called; "" is any, None leaves it to the model. `parallel`: several at once.
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
    Exactly one of `prompt` and `messages` is set. Token ids are used unchanged; text is encoded as in training.
    `params` contains only what the request set, under the names of the engine's `SamplingParams`: max_tokens,
    temperature, top_p, top_k, min_p, seed, stop, stop_token_ids, ignore_eos, min_tokens, logprobs (number of
    alternatives; 0 is only the chosen token's), presence_penalty, frequency_penalty, repetition_penalty, logit_bias
    (by token id), pooling ("last" or "mean", with max_tokens 0: only an embedding is computed).
    `conditioning_length`: the first N tokens of the prompt condition the vectors; None: all of them.
    `conditioning`: which part of `messages` does, "prompt" or "system"; None: as the adapter was trained.
    `timeout_s`: the call ends in a DeadlineError after this time; at most the server's own limit, which None means.
    `echo`: the deltas of every choice begin with the prompt's own text, token ids and logprobs.
    `cache_salt`: the call shares its cached prefix only with calls of its tenant that have the same salt.
    `user`: the client's end user, if given; a canary consistently answers the same users.
    `tools`: tools that the answer to `messages` may call; None: none.
    `shape`: what every choice must conform to, unless it ends early; None: any text.
    `meter`: receives the call's usage; it stays in the gateway's process.
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
    """A candidate token at a position. `raw` are its bytes if the text does not determine them."""

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
    """One choice's new output since its last delta.

    `finish_reason` ("stop" or "length") is set on the last delta of the choice and on no other.
    `prompt_tokens` and `completion_tokens` are totals of this choice so far; `cached_tokens` of the prompt were found
    in the prefix cache. `logprobs` has one entry per token of `token_ids`, if the call requested them. `fingerprint`
    names the adapter version and digest that answered.
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
    queue_s: float | None = None  # on the last delta: how long the choice waited in the engine
    embedding: bytes | None = None  # on the last delta, if requested: float32, little-endian


@dataclass(frozen=True)
class TokenizeResult:
    """The tokens of a prompt. `token_strs` are the vocabulary's pieces, one per id; None if not available."""

    ids: tuple[int, ...]
    max_model_len: int
    token_strs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class AdapterResidence:
    """One adapter version on one engine replica. Versions that a replica does not have are not listed."""

    name: str  # tenant.adapter
    version: int
    digest: str
    replica: str
    state: str  # "loading", "ready", "draining": states of the adapter pool
    bytes: int  # of the replica's adapter budget; 0 while it loads
    pinned: bool  # by an operator: never evicted
    uses: int  # requests that hold it


class Backend(Protocol):
    """Everything behind the HTTP edge."""

    async def list_models(self, tenant: str) -> list[ModelCard]:
        """The backbone and the adapters that `tenant` may use."""
        ...

    async def get_model(self, tenant: str, name: str) -> ModelCard:
        """Raises `pedro.errors.model_not_found(name)`, the same for an unknown and for a foreign adapter."""
        ...

    def generate(self, call: GenerateCall) -> AsyncGenerator[Delta, None]:
        """Deltas of the `n` choices, interleaved in order of arrival.

        The first delta comes after admission: an error before it becomes an HTTP status, one after it an event in
        the stream. Cancelling the consumer or `aclose()` frees all resources of the call.
        """
        ...

    async def tokenize(
        self,
        tenant: str,
        model: str | None,
        prompt: str | tuple[Mapping[str, str], ...],
        add_special_tokens: bool,
    ) -> TokenizeResult:
        """The ids of a text, or of messages as `generate` would render them (`add_special_tokens` is then ignored).

        With `add_special_tokens` a text is encoded as in `generate`, without it no special tokens are added. `model`
        None is the backbone. Raises as `get_model` does.
        """
        ...

    async def detokenize(self, tenant: str, model: str | None, ids: tuple[int, ...]) -> str:
        """The text of the ids, special ones included. Raises PedroError for an id that the vocabulary lacks."""
        ...

    async def tokenizer_info(self) -> dict[str, Any]:
        """The backbone's tokenizer_config, as far as JSON can represent it: tokenizer_class, eos_token, bos_token,
        pad_token, ...

        Special tokens are strings; `chat_template` is there if the tokenizer has one.
        """
        ...

    async def list_adapters(self, tenant: str) -> list[AdapterCard]: ...

    async def get_adapter(self, tenant: str, name: str) -> AdapterCard:
        """One adapter by `tenant.adapter`. Raises `model_not_found(name)` for an unknown and for a foreign one."""
        ...

    async def residents(self, tenant: str) -> list[AdapterResidence]:
        """Every adapter version of `tenant` that is on a replica now."""
        ...

    async def load_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        """Makes the version to which `ref` (as in a request's `model`) resolves now resident on every replica.

        Returns once it is; raises the error of a request whose adapter cannot be loaded. This and the following three
        methods return the residences of that version.
        """
        ...

    async def pin_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        """Loads it and prevents its eviction until `unpin_adapter`; idempotent."""
        ...

    async def unpin_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]: ...

    async def unload_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        """Frees its memory, pinned or not; running requests keep it, the next request reloads it."""
        ...

    async def promote(
        self, tenant: str, name: str, version: int, *, expected: int | None = None, actor: Actor | None = None
    ) -> AdapterCard:
        """Makes `version` the champion, and the champion `previous`. Raises NotFoundError, or ConflictError if the
        champion is not `expected`.

        This and the following four methods record `actor` in the audit; None: the user of this process.
        """
        ...

    async def rollback(self, tenant: str, name: str, *, actor: Actor | None = None) -> AdapterCard:
        """Swaps champion and previous. Raises NotFoundError, or ConflictError if there is no previous one."""
        ...

    async def set_canary(
        self, tenant: str, name: str, version: int, weight: float, *, actor: Actor | None = None
    ) -> AdapterCard:
        """Lets `version` answer a share of the champion's requests; 0 ends it.

        Raises NotFoundError, or ConflictError if there is no champion or it is the version.
        """
        ...

    async def set_shadow(
        self, tenant: str, name: str, version: int, weight: float, *, actor: Actor | None = None
    ) -> AdapterCard:
        """Sends `version` copies of a share of the champion's requests, discarding its answers; 0 ends it.

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
        """True once requests can be answered; while false (or an error), no traffic should be routed here."""
        ...

    async def degraded(self) -> bool:
        """True while names are resolved from cached data because the database is away."""
        ...

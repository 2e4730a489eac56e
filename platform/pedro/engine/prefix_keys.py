"""For whom keys and values that were read of a prompt hold: the one place where this is composed.

They depend on the tokens up to their own, on the adapter that acted on those, and where that makes its vectors from the
prompt, on all of what the vectors were made from. Whatever else decides how a token is read, such as a position that
later tokens tell, belongs into the key. Beside that stands whose prompt it was: by default nothing passes from one
tenant to another, not even how long an answer takes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pedro.adapter_kinds import Adapter
    from pedro.engine.sequence import Request

ANY_TENANT = None


class PrefixKey(NamedTuple):
    """What two prompts must have in common, beside the tokens from their first on. Compared as a whole."""

    tenant: str | None  # None: whoever asks
    salt: str
    adapter: str | None  # a version with its digest; None: the bare backbone
    epoch: int  # which life of the cache: what is kept in one is never found in the next
    conditioning: bytes  # the tokens that the vectors were made from; none where vectors are the same for any prompt


class Reuse(NamedTuple):
    """A prompt's key, and how many tokens of prompt and answer hold for it and are worth keeping (None: all)."""

    key: PrefixKey
    until: int | None = None


def reuse_of(request: Request, adapter: Adapter | None, epoch: int = 0, share_bare: bool = False) -> Reuse:
    """With whom the request may share, in this epoch of the cache.

    `share_bare`: the operator lets tenants share what no adapter acted on; a request with a salt still shares with its
    own tenant alone.
    """
    named, conditioning, until = request.adapter, b"", None
    if adapter is not None:
        length = request.conditioning_length or len(request.prompt_ids)
        start = adapter.start_in(request.prompt_ids, length)
        read = adapter.conditioned_by(request.prompt_ids[:length])
        if start is None:
            named = None
        elif start:  # what comes before is the bare backbone's; the tokens that vectors are made from must be read
            pooled = len(request.prompt_ids) if adapter.generator is None else adapter.generator.first_pooled(read)
            named, until = None, min(start, pooled)
        elif adapter.generator is not None:
            conditioning = token_bytes(request.prompt_ids[:read])
            whole = request.conditioning_length is None and adapter.generator.head is None
            until = read if whole else None  # then no other prompt begins with its answer
    tenant = ANY_TENANT if share_bare and named is None and not request.cache_salt else request.tenant
    return Reuse(PrefixKey(tenant, request.cache_salt, named, epoch, conditioning), until)


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """The ids themselves, four bytes each: equal bytes are equal tokens."""
    return array("i", token_ids).tobytes()

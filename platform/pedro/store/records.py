"""The records that the store returns: frozen, independent of its tables."""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from typing import Any

from pedro.refs import ModelRef

INFER, TRAIN, READ, ADMIN = "infer", "train", "read", "admin"
SCOPES = (INFER, TRAIN, READ, ADMIN)
PLATFORM = "*"  # the tenant of an audit's entry that concerns all of them
_CHECKPOINT = re.compile(r"checkpoint: step (?P<step>\d+) of (?P<job>ftjob-[0-9a-f]+), not gated")
CHAMPION, PREVIOUS, CANDIDATE = "champion", "previous", "candidate"


class JobStatus(StrEnum):
    VALIDATING = "validating_files"  # its files and spec were not looked at yet
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return not NEXT[self]


class JobKind(StrEnum):
    FINE_TUNING = "fine-tuning"
    SWEEP = "sweep"  # many of them, by one driver


NEXT = {
    JobStatus.VALIDATING: {JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED},
    JobStatus.QUEUED: {JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED},
    JobStatus.RUNNING: {
        JobStatus.QUEUED,  # sent back after its cluster was lost
        JobStatus.PAUSED,
        JobStatus.SUCCEEDED,
        JobStatus.FAILED,
        JobStatus.CANCELLED,
    },
    JobStatus.PAUSED: {JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED},
    JobStatus.SUCCEEDED: set(),
    JobStatus.FAILED: set(),
    JobStatus.CANCELLED: set(),
}


@dataclass(frozen=True)
class Quota:
    """The most that may be asked for in a minute, and the budgets of a day and a month (UTC); None is no limit.

    Tokens are those of prompts and answers together. Hours of training are those of every worker, and a tenant's alone;
    controllers hold jobs to them. The fields are columns of `pedro_quotas`.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_per_day: int | None = None
    tokens_per_day: int | None = None
    requests_per_month: int | None = None
    tokens_per_month: int | None = None
    training_hours_per_day: int | None = None
    training_hours_per_month: int | None = None


NO_QUOTA = Quota()
LIMITS = tuple(limit.name for limit in fields(Quota))
TRAINING_LIMITS = tuple(name for name in LIMITS if name.startswith("training_hours_"))


@dataclass(frozen=True)
class Actor:
    """Who makes a change: `user:ada` at a shell, `key:acme/key_…` over HTTP, with the request that it came in."""

    name: str
    request_id: str | None = None

    @classmethod
    def of_key(cls, tenant: str, key_id: str, request_id: str) -> Actor:
        """The holder of a key, over HTTP."""
        return cls(f"key:{tenant}/{key_id}", request_id)


By = Actor | str | None
"""Who makes a change, where nothing else is known of it; None: who runs this process."""


@dataclass(frozen=True)
class KeyRecord:
    id: str
    tenant: str
    name: str
    scopes: tuple[str, ...]
    hint: str  # the secret's last four characters, to tell keys apart in a list
    created: float
    revoked: float | None
    quota: Quota = NO_QUOTA  # the key's own; its tenant's holds as well
    expires: float | None = None
    last_used: float | None = None  # to the minute
    adapters: tuple[str, ...] | None = None  # the only ones of its tenant that it may name; None: all
    replaces: str | None = None  # the key that it was made from by a rotation

    def has_expired(self, now: float) -> bool:
        """Whether its time is over."""
        return self.expires is not None and now >= self.expires

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.has_expired(now) else "active"


@dataclass(frozen=True)
class JobRecord:
    id: str
    tenant: str
    adapter: str
    spec: dict[str, Any]
    status: JobStatus
    submission_id: str | None
    created: float
    finished: float | None
    result: dict[str, Any] | None
    message: str
    started: float | None = None  # when a driver of it began last
    priority: int = 0
    attempt: int = 0
    """Which start of its driver it is at, from 1; 0 for a job that was handed to its cluster without the queue."""
    wanted: JobStatus | None = None
    """What was asked of it and has not happened yet: paused or cancelled."""
    lease_owner: str | None = None
    lease_until: float | None = None
    fence: int = 0
    """Counts the owners of its lease: what an earlier one writes is refused."""
    key_id: str | None = None
    """Of the API key that asked for it; None for a job of the command line."""
    labels: dict[str, str] | None = None
    """What its owner attached to it: `metadata` of the API."""
    estimated_finish: float | None = None
    """When its steps should be done, as its workers saw it last; what is scored after them is not counted."""

    @property
    def name(self) -> str:
        """The adapter that it trains, `tenant.adapter`."""
        return ModelRef(self.tenant, self.adapter).name

    @property
    def kind(self) -> JobKind:
        """A sweep's spec is that of its trials, with a section `sweep` that no other can have."""
        return JobKind.SWEEP if "sweep" in self.spec else JobKind.FINE_TUNING


@dataclass(frozen=True)
class FileRecord:
    """A tenant's uploaded file."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    digest: str  # "sha256:…" of its content
    location: str  # inside the storage
    created: float
    expires: float | None
    key_id: str | None  # of the key that uploaded it; none for an operator


@dataclass(frozen=True)
class Usage:
    """What was used of one kind, summed: by whom, of which model, with which key, on which day (UTC)."""

    day: str = ""
    tenant: str = ""
    model: str = ""
    """`tenant.adapter`, or the backbone's name."""
    key_id: str = ""
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts, those that needed no reading."""
    completion_tokens: int = 0
    training_tokens: int = 0
    """Of prompts and answers: all that went through the model in training."""
    training_seconds: float = 0.0
    """Of training, times its workers."""


@dataclass(frozen=True)
class JobEvent:
    """Something that a job told. `id` counts all jobs' events; a tenant is shown `public_id`, which is by chance."""

    id: int
    public_id: str
    job_id: str
    at: float
    kind: str
    level: str
    message: str
    data: dict[str, Any] | None


@dataclass(frozen=True)
class Canary:
    """A version that answers a share of what is asked of the champion."""

    version: int
    weight: float
    """Between 0 and 1, both excluded."""


@dataclass(frozen=True)
class Shadow:
    """A version that is asked a share of the champion's requests too, for nobody to see."""

    version: int
    weight: float
    """Above 0, at most 1."""


@dataclass(frozen=True)
class Standing:
    """Where the aliases of one adapter stand: what a move changes as a whole."""

    aliases: dict[str, int] = field(default_factory=dict)
    canary: Canary | None = None
    shadow: Shadow | None = None

    def names_of(self, version: int) -> tuple[str, ...]:
        """The aliases of a version."""
        return tuple(sorted(alias for alias, number in self.aliases.items() if number == version))

    @property
    def versions(self) -> set[int]:
        """Those that an alias names, the canary and the shadow."""
        return {*self.aliases.values(), *(split.version for split in (self.canary, self.shadow) if split)}

    def to_dict(self) -> dict[str, Any]:
        splits: dict[str, Canary | Shadow | None] = {"canary": self.canary, "shadow": self.shadow}
        return {"aliases": self.aliases, **{name: asdict(split) for name, split in splits.items() if split}}


@dataclass(frozen=True)
class RegisteredAdapter:
    """A name with its aliases. A name made again after a deletion is another adapter: `made` tells them apart."""

    name: str
    generation: int
    made: int
    created: float
    standing: Standing

    @property
    def aliases(self) -> dict[str, int]:
        return self.standing.aliases


@dataclass(frozen=True)
class Version:
    """One immutable version of an adapter; `aliases` is as of the reading."""

    tenant: str
    adapter: str
    version: int
    digest: str
    backbone_id: str
    backbone_digest: str
    method: str
    trainable_parameters: int
    metrics: dict[str, Any]
    spec: dict[str, Any]
    gate: str
    run_id: str
    created: str
    aliases: tuple[str, ...] = ()
    promoted: str = ""  # when it last became champion
    manifest_digest: str = ""  # of all that pedro_adapter.json says; versions of earlier releases have none

    @property
    def name(self) -> str:
        """`tenant.adapter`, as the registry and the API call it."""
        return ModelRef(self.tenant, self.adapter).name

    @property
    def ref(self) -> str:
        """`tenant.adapter:7`, which always means these weights."""
        return str(self.model_ref.without_digest)

    @cached_property  # asked for by every request
    def model_ref(self) -> ModelRef:
        """This version and its weights: it can never mean others."""
        return ModelRef(self.tenant, self.adapter, version=self.version, digest=self.digest)


@dataclass(frozen=True)
class CheckpointOf:
    """Of which job and step a version is a checkpoint."""

    job_id: str
    step: int


def checkpoint_gate(job_id: str, step: int) -> str:
    """What stands in the place of a gate's decision where there is none: the version is a checkpoint."""
    return f"checkpoint: step {step} of {job_id}, not gated"


def checkpoint_of(gate: str) -> CheckpointOf | None:
    """What `checkpoint_gate` said; None for any other version."""
    match = _CHECKPOINT.fullmatch(gate)
    return None if match is None else CheckpointOf(match["job"], int(match["step"]))


@dataclass(frozen=True)
class KnownAdapter:
    """An adapter with the versions that its aliases name, as far as serving needs them: without metrics and spec."""

    adapter: RegisteredAdapter
    versions: dict[int, Version]


@dataclass(frozen=True)
class Unmirrored:
    """What the registry has not heard of an adapter: how it stands, or that it was deleted, and its versions that
    changed, or were deleted, since."""

    adapter: RegisteredAdapter
    deleted: bool
    changed: tuple[Version, ...]
    gone: tuple[int, ...]


@dataclass(frozen=True)
class Inherited:
    """An adapter as the registry held it before aliases were the store's."""

    name: str
    created: float
    aliases: dict[str, int]
    versions: tuple[Version, ...]


@dataclass(frozen=True)
class Move:
    """One row of an adapter's history."""

    generation: int
    at: float
    actor: str
    action: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    reason: str


def utc(seconds: float) -> str:
    """Unix seconds as people and tags write them."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def hash_secret(secret: str) -> str:
    """What is kept of a key's secret, and what it is found by."""
    return hashlib.sha256(secret.encode()).hexdigest()

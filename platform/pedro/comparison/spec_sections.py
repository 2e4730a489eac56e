"""Sections of a comparison's spec that hold values alone: the search of learning rates, the judge, what a run takes of
the cluster, and what is measured of a trained model beside its scores: what it forgot, and what it costs to serve."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from pedro.comparison.untrained import LIKELIHOOD, Untrained
from pedro.data.general_text import MOST_TOKENS
from pedro.data.tasks import get_task
from pedro.errors import ConfigError
from pedro.spec_reader import Frozen

MOST_RATE = 100.0
Rate = Annotated[float, Field(gt=0, le=MOST_RATE)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
WAY = Untrained(0, LIKELIHOOD)  # how a general task is asked: its instruction, and the likeliest of its labels


class TuneSpec(Frozen):
    """The learning rate of each method on each task: every value is tried once, and the best on validation is kept."""

    lr: tuple[Rate, ...] = Field(min_length=1)
    """The learning rates to try."""
    seed: Seed = 0
    """Of these runs; where it is among `seeds`, the winning run counts as that seed's."""
    once: bool = False
    """Search at the middle budget alone, and take its learning rate for the others."""
    extend: int = Field(0, ge=0, le=20)
    """How many more values may be tried, one after the other, while the best is the smallest or the largest."""


class JudgeSpec(Frozen):
    """Who marks MT-Bench: an endpoint of the OpenAI API. Without one the answers are written and not marked."""

    base_url: str
    """Its address, up to /v1."""
    model: str
    """The model that judges."""
    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds its key."""


class RunResources(Frozen):
    """What one run takes of the cluster."""

    cpus: float = Field(1, gt=0, le=4096)
    """CPUs that Ray sets aside for it."""
    gpus: float = Field(0, ge=0, le=4096)
    """GPUs that Ray sets aside for it; 0 runs on the CPU."""


class ForgettingSpec(Frozen):
    """What tuning did to a model elsewhere: how well it predicts general text, and answers another task."""

    tokens: int = Field(2048, ge=1, le=MOST_TOKENS)
    """Tokens of the packaged text (WikiText-2 test) that are predicted."""
    task: str | None = None
    """A task that nothing is trained on, asked without examples, by its likeliest label (for instance `mmlu`)."""
    rows: int = Field(50, ge=1, le=10_000)
    """At most this many test rows of it."""
    data: str | None = None
    """Where its files are, if not where those of the others are."""

    @field_validator("task")
    @classmethod
    def _asked(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                fits = WAY.fits(get_task(value))
            except ConfigError as error:
                raise ValueError(error.message.partition(": ")[2]) from error
            if not fits:
                raise ValueError(f"{value} has no labels among which the likeliest could be taken; name one that has")
        return value


class ServingSpec(Frozen):
    """The adapter as it is saved and served: its bytes, and tokens per second of requests that run together."""

    requests: int = Field(8, ge=1, le=256)
    """How many run together, each with a prompt of the packaged text."""
    tokens: int = Field(32, ge=1, le=1024)
    """How many each is answered with."""

"""What a comparison may measure of a trained model beside its scores: what it forgot, and what it costs to serve."""

from __future__ import annotations

from pydantic import Field, field_validator

from pedro.comparison.untrained import LIKELIHOOD, Untrained
from pedro.config import Frozen
from pedro.data.general_text import MOST_TOKENS
from pedro.data.tasks import get_task
from pedro.errors import ConfigError

WAY = Untrained(0, LIKELIHOOD)  # how a general task is asked: its instruction, and the likeliest of its labels


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

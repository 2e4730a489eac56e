"""Reads the demo's result, `<PEDRO_HOME>/demo/result.json`.

Nothing here raises for a damaged file: what cannot be read is returned as a message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pedro.refs import ModelRef

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Read(BaseModel):
    """A part of the result file; keys that a later release adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class TenantResult(_Read):
    """One tenant's adapter as the demo measured it over HTTP: means of `metric` over `test_rows`.

    `zero_shot` and `few_shot` are the bare backbone's; None is what was not asked, or has no meaning for the task.
    """

    tenant: str
    adapter: str
    title: str
    version: Count
    metric: str
    score: Share
    zero_shot: Share
    few_shot: Share | None = None
    majority: Share | None = None
    test_rows: Count
    trainable_parameters: Count
    rows: Count | None = None
    steps: Count | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """`tenant.adapter`."""
        return ModelRef(self.tenant, self.adapter).name


class SwapResult(_Read):
    """What requests saw while an alias moved under load."""

    model: str
    old_version: Count
    new_version: Count
    requests: Count
    failed: Count
    mixed: Count
    answered_by_old: Count
    answered_by_new: Count
    in_flight: Count = 0
    seconds_to_first_new: float | None = None
    old_accuracy: Share | None = None
    new_accuracy: Share | None = None


@dataclass(frozen=True)
class DemoResult:
    """The demo's result. `problems` says what of the file could not be read; empty parts are simply not there."""

    path: Path
    exists: bool
    tenants: tuple[TenantResult, ...] = ()
    swap: SwapResult | None = None
    created: str = ""
    problems: tuple[str, ...] = ()


def result_path(home: Path) -> Path:
    """Where `make demo` writes its result."""
    return home / "demo" / "result.json"


def read_demo(home: Path) -> DemoResult:
    """The result; a part that is broken is left out and named in `problems`."""
    path = result_path(home)
    if not path.is_file():
        return DemoResult(path, exists=False)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return DemoResult(path, exists=True, problems=(f"not readable as JSON: {error}",))
    if not isinstance(document, dict):
        return DemoResult(path, exists=True, problems=(f"expected an object, got {type(document).__name__}",))
    problems: list[str] = []
    listed = document.get("tenants", [])
    if not isinstance(listed, list):
        problems.append(f"tenants: expected a list, got {type(listed).__name__}")
        listed = []
    tenants = [_parse(TenantResult, item, f"tenants[{index}]", problems) for index, item in enumerate(listed)]
    swap = _parse(SwapResult, document["swap"], "swap", problems) if document.get("swap") else None
    return DemoResult(
        path,
        exists=True,
        tenants=tuple(tenant for tenant in tenants if tenant is not None),
        swap=swap,
        created=str(document.get("created") or ""),
        problems=tuple(problems),
    )


def score_rows(tenants: Iterable[TenantResult]) -> list[dict[str, Any]]:
    """The chart of scores: up to four bars a tenant, on the same held-out rows."""
    return [
        {
            "adapter": tenant.name,
            "title": tenant.title,
            "metric": tenant.metric,
            "rows": tenant.test_rows,
            "answers": answers,
            "score": value,
        }
        for tenant in tenants
        for answers, value in (
            ("Majority class", tenant.majority),
            ("Backbone alone", tenant.zero_shot),
            ("Backbone with examples", tenant.few_shot),
            ("With adapter", tenant.score),
        )
        if value is not None
    ]


def mean_score(tenants: Sequence[TenantResult]) -> tuple[float, float]:
    """Mean score of the bare backbone and with the adapters, over one or more tenants."""
    backbone = sum(tenant.zero_shot for tenant in tenants) / len(tenants)
    return backbone, sum(tenant.score for tenant in tenants) / len(tenants)


Parsed = TypeVar("Parsed", bound=_Read)


def _parse(kind: type[Parsed], value: Any, where: str, problems: list[str]) -> Parsed | None:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=True):
            field = ".".join([where, *(str(part) for part in item["loc"])])
            problems.append(f"{field}: {item['msg'].replace('Input should be', 'expected')}, got {item['input']!r:.80}")
        return None

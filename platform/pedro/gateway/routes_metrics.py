"""/metrics and /metrics/history: the gateway's and the engines' metrics, current and over time.

They cover every tenant, so they need an admin key, also from this machine: requests through a local proxy come from it,
too.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from pedro import tracing
from pedro.errors import PedroError
from pedro.gateway import open_metrics
from pedro.gateway.auth import Principal, require
from pedro.gateway.traffic_sampler import TrafficSampler
from pedro.store import ADMIN
from pedro.traffic.history import LONGEST_S

LATEST = 4_102_444_800  # the year 2100, Unix seconds
router = APIRouter()
Operator = Annotated[Principal, Depends(require(ADMIN))]


@router.get("/metrics")
async def metrics(request: Request, _: Operator) -> PlainTextResponse:
    """Prometheus's text format; OpenMetrics for clients that accept it, while tracing is on."""
    if tracing.TRACER is not None and open_metrics.MEDIA_TYPE in request.headers.get("accept", ""):
        return PlainTextResponse(await _sampler(request).open_text(), media_type=open_metrics.OPEN_METRICS)
    return PlainTextResponse(await _sampler(request).text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/metrics/history")
async def metrics_history(request: Request, _: Operator) -> Response:
    """Increases of adapters' metrics between samples: intervals of the last `seconds` that ended after `after`."""
    given = dict(request.query_params)
    if unknown := next((name for name in given if name not in ("seconds", "after")), None):
        message = f"{unknown[:40]}: unknown; known are seconds, after"
        raise PedroError(message, param=unknown[:40], code="unknown_parameter")
    seconds = _number(given, "seconds", 900.0, 1.0, LONGEST_S)
    after = _number(given, "after", 0.0, 0.0, LATEST)
    return Response(await _sampler(request).window(seconds, after), media_type="application/json")


def _number(given: dict[str, str], name: str, default: float, least: float, most: float) -> float:
    text = given.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= most:  # nor NaN
        message = f"{name}: expected a number, {least:,.0f} to {most:,.0f}, got {text[:40]!r}"
        raise PedroError(message, param=name, code="invalid_value")
    return value


def _sampler(request: Request) -> TrafficSampler:
    sampler: TrafficSampler = request.app.state.sampler
    return sampler

"""Requests for fine-tuning jobs: OpenAI's fields, and the block `method.pedro` for this platform's own.

Reference: https://platform.openai.com/docs/api-reference/fine-tuning
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from pedro.errors import PedroError
from pedro.gateway.schemas import INT32, Body, Metadata, Whole
from pedro.gateway.sweep_requests import sweep_of
from pedro.refs import NAME

if TYPE_CHECKING:
    from pedro.store import Version

LEARNING_RATE = 3e-3  # base of `learning_rate_multiplier`; "auto" is 1
PEDRO_SECTIONS = ("data", "gate", "method", "resources", "training")
MAX_SPEC = 65_536  # characters: every controller reads it in each round
SWEEP = "sweep"  # the section that turns a job into many trials
PEDRO = (
    'Sections of a spec, as {"method": {"r": 8}, "training": {"lr": 0.01}}: data, gate, method, resources, training; '
    "sweep (space, search, scheduler, concurrency) runs the job as many trials."
)
OF_THE_API = {"data": ("train", "validation", "theta", "test")}  # keys with files, for which the API has fields
FILE_SHARES = ("theta", "validation")
HOST_OPTIONS = ("_path", "_file", "_dir", "_kwargs", "_config", "auto_mapping")  # of PEFT's config classes


def _auto(value: Any) -> Any:
    return None if value == "auto" else value


Positive = Annotated[float | None, Field(gt=0, le=1000)]
Batch = Annotated[int | None, Field(ge=1, le=4096)]
Beta = Annotated[float | None, Field(gt=0, le=100)]
AnyPositive = Positive | Literal["auto"]
AnyBatch = Batch | Literal["auto"]
AnyBeta = Beta | Literal["auto"]


class Hyperparameters(Body):
    n_epochs: Annotated[Positive, BeforeValidator(_auto, AnyPositive)] = None
    batch_size: Annotated[Batch, Whole, BeforeValidator(_auto, AnyBatch)] = None
    learning_rate_multiplier: Annotated[Positive, BeforeValidator(_auto, AnyPositive)] = None


class Supervised(Body):
    parts: ClassVar[dict[str, type[Body]]] = {"hyperparameters": Hyperparameters}
    hyperparameters: Hyperparameters | None = None


class PreferenceHyperparameters(Hyperparameters):
    beta: Annotated[Beta, BeforeValidator(_auto, AnyBeta)] = None


class Preference(Body):
    parts: ClassVar[dict[str, type[Body]]] = {"hyperparameters": PreferenceHyperparameters}
    hyperparameters: PreferenceHyperparameters | None = None


class JobMethod(Body):
    parts: ClassVar[dict[str, type[Body]]] = {"supervised": Supervised, "dpo": Preference}
    harmless: ClassVar[dict[str, tuple[Any, ...]]] = {"reinforcement": ()}
    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Preference | None = None
    pedro: Annotated[dict[str, Any] | None, Field(description=PEDRO)] = None  # extension


class JobRequest(Body):
    parts: ClassVar[dict[str, type[Body]]] = {"hyperparameters": Hyperparameters, "method": JobMethod}
    harmless: ClassVar[dict[str, tuple[Any, ...]]] = {"integrations": ([],)}
    model: Annotated[str, Field(max_length=200)]  # a backbone of this server, or a fine-tuned model to continue from
    training_file: Annotated[str, Field(max_length=100)]  # the id of an uploaded file
    validation_file: Annotated[str | None, Field(max_length=100)] = (
        None  # likewise; used for early stopping and to select the best checkpoint
    )
    hyperparameters: Hyperparameters | None = None  # deprecated by OpenAI in favour of `method`
    method: JobMethod | None = None  # supervised if not given
    suffix: Annotated[str | None, Field(max_length=64)] = None  # names the adapter
    seed: Annotated[int | None, Field(ge=0, lt=INT32), Whole] = None  # 0 if not given
    metadata: Metadata = None  # labels


def adapter_of(suffix: str | None, idempotency_key: str | None) -> str:
    """The adapter that a job with this suffix trains: an existing one gets a new version. Raises PedroError."""
    if suffix is None:
        seed = secrets.token_hex(8) if idempotency_key is None else idempotency_key  # repeated: the same name
        return f"ft-{hashlib.sha256(seed.encode()).hexdigest()[:8]}"
    name = re.sub(r"[^a-z0-9_-]+", "-", suffix.lower()).strip("-_")
    if not NAME.fullmatch(name):
        message = f"suffix: expected letters, digits, '-' and '_', got {suffix!r}"
        raise PedroError(message, param="suffix", code="invalid_value")
    return name


def served_backbone(parent: Version, backbones: Mapping[str, str]) -> str:
    """The location of a version's backbone on this server. Raises PedroError if the server does not have it."""
    for name, place in backbones.items():
        if parent.backbone_id in (name, place):
            return place
    message = f"model: {parent.ref} was trained on a backbone that this server does not have"
    raise PedroError(message, param="model", code="invalid_value")


def spec_of(
    asked: JobRequest, tenant: str, adapter: str, backbone: str, parent: Version | None = None
) -> dict[str, Any]:
    """The spec of the job, as in a file for `pedro submit`; its controller validates it.

    Raises PedroError for settings not allowed to tenants: through the API, data are always ids of uploaded files.
    """
    given = asked.method.pedro if asked.method and asked.method.pedro else {}
    if len(json.dumps(given)) > MAX_SPEC:  # before validation, which would explain every mistake
        message = f"method.pedro: expected at most {MAX_SPEC:,} characters"
        raise PedroError(message, param="method.pedro", code="invalid_value")
    spec: dict[str, Any] = {section: dict(_section(given, section)) for section in PEDRO_SECTIONS if section in given}
    unknown = sorted(given.keys() - {*PEDRO_SECTIONS, SWEEP})
    if unknown:
        known = ", ".join((*PEDRO_SECTIONS, SWEEP))
        message = f"method.pedro.{unknown[0][:80]}: unknown section; known: {known}"
        raise PedroError(message, param="method.pedro", code="unknown_parameter")
    _check_method(spec.get("method", {}))
    data = spec.setdefault("data", {})
    for role in OF_THE_API["data"]:
        if role in data and not (role in FILE_SHARES and isinstance(data[role], int | float)):
            message = f"method.pedro.data.{role}: files are set by training_file and validation_file only"
            raise PedroError(message, param=f"method.pedro.data.{role}", code="invalid_value")
    data["train"] = asked.training_file
    if asked.validation_file is not None:
        data["validation"] = asked.validation_file
    hyper = _hyperparameters(asked)
    training = spec.setdefault("training", {})
    asked_for = {
        "lr": hyper.learning_rate_multiplier and LEARNING_RATE * hyper.learning_rate_multiplier,
        "epochs": hyper.n_epochs,
        "batch_size": hyper.batch_size,
        "seed": asked.seed,
    }
    for option, value in asked_for.items():
        if value is None:
            continue
        if option in training:
            message = f"method.pedro.training.{option}: also given as a field of the API; leave one out"
            raise PedroError(message, param=f"method.pedro.training.{option}", code="invalid_value")
        training[option] = value
    training.setdefault("lr", LEARNING_RATE)
    if asked.method and asked.method.type == "dpo":
        spec["objective"] = "dpo"
        beta = getattr(hyper, "beta", None)
        spec |= {} if beta is None else {"dpo": {"beta": beta}}
    if parent is not None and spec.get("objective") == "dpo":
        message = "model: a job of method.type dpo starts from the backbone and compares with it; give the backbone"
        raise PedroError(message, param="model", code="invalid_value")
    if parent is not None:
        trained = (parent.spec or {}).get("method")
        if trained is None or spec.setdefault("method", trained) != trained:
            message = f"method.pedro.method: {parent.ref} keeps its method; leave it out"
            raise PedroError(message, param="method.pedro.method", code="invalid_value")
        spec["parent"] = parent.ref
    if SWEEP in given:
        spec[SWEEP] = sweep_of(given[SWEEP], spec)
        for option in (key.removeprefix("method.") for key in spec[SWEEP]["space"] if key.startswith("method.")):
            for value in spec[SWEEP]["space"][f"method.{option}"]["values"]:
                _check_method({**spec.get("method", {}), option: value})
    return {**spec, "tenant": tenant, "adapter": adapter, "backbone": backbone}


def shown_hyperparameters(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A job's hyperparameters in OpenAI's form."""
    training = spec.get("training") or {}
    preference = {"beta": (spec.get("dpo") or {}).get("beta", "auto")} if spec.get("objective") == "dpo" else {}
    return {
        **preference,
        "n_epochs": _number(training.get("epochs"), "auto"),
        "batch_size": _number(training.get("batch_size"), "auto"),
        "learning_rate_multiplier": "auto" if (lr := _number(training.get("lr"), None)) is None else lr / LEARNING_RATE,
    }


def shown_seed(spec: Mapping[str, Any]) -> int:
    return int(_number((spec.get("training") or {}).get("seed"), 0))


def _number(value: Any, otherwise: Any) -> Any:
    """A value of a spec that may be anything: its controller has not validated it, or refused it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 2**63 else otherwise


def _hyperparameters(asked: JobRequest) -> Hyperparameters:
    method = asked.method
    if method is None:
        return asked.hyperparameters or Hyperparameters()
    other = "supervised" if method.type == "dpo" else "dpo"
    if getattr(method, other) is not None:
        message = f"method.{other}: this job's method.type is {method.type}; leave it out"
        raise PedroError(message, param=f"method.{other}", code="invalid_value")
    chosen = method.dpo if method.type == "dpo" else method.supervised
    given = chosen.hyperparameters if chosen else None
    if given and asked.hyperparameters:
        raise PedroError(
            f"hyperparameters: given twice; leave it out and use method.{method.type}.hyperparameters",
            param="hyperparameters",
            code="invalid_value",
        )
    return given or asked.hyperparameters or Hyperparameters()


def _check_method(options: Mapping[str, Any]) -> None:
    """Raises PedroError for a PEFT option that may name a file, a tokenizer or a repository on the host."""
    if "peft_type" not in options and options.get("name") != "peft":
        return
    for name, value in options.items():
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        named = name.endswith(HOST_OPTIONS) or any(set(text) & set("/\\~") for text in texts)
        if named or isinstance(value, dict):
            message = f"method.pedro.method.{name[:80]}: may refer to the host's files; it cannot be set over HTTP"
            raise PedroError(message, param=f"method.pedro.method.{name[:80]}", code="invalid_value")


def _section(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(given[name], dict):
        raise PedroError(f"method.pedro.{name}: expected an object", param=f"method.pedro.{name}", code="invalid_value")
    section: Mapping[str, Any] = given[name]
    return section

"""Errors meant for users. Standard library only: no HTTP framework, no Ray, no torch.

A user's mistake raises a `PedroError`: it names the field, the value and the remedy, and carries the OpenAI
error `type` and `code` and the HTTP status under which the gateway shows it. A programmer's mistake is an
`assert` with a message, and never reaches a tenant.
"""

from __future__ import annotations

from typing import Any


class PedroError(Exception):
    """A mistake or condition that the reader can do something about; safe to show to the tenant who caused it.

    `message` says what is wrong and how to mend it. `param` is the field or argument at fault, if one is.
    """

    type = "invalid_request_error"
    code: str | None = None
    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[Any, ...]:  # keyword arguments survive the pickling between Ray processes
        return _rebuild, (type(self), self.message, self.param, self.code, self.__dict__.get("retry_after_s"))

    def body(self) -> dict[str, Any]:
        """The error object of the OpenAI API (https://platform.openai.com/docs/guides/error-codes)."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def _rebuild(
    kind: type[PedroError], message: str, param: str | None, code: str | None, retry_after_s: float | None
) -> PedroError:
    error = kind(message, param=param, code=code)
    if retry_after_s is not None:
        error.__dict__["retry_after_s"] = retry_after_s
    return error


class ConfigError(PedroError):
    """A specification, option or environment variable is wrong."""

    code = "invalid_config"


class DataError(PedroError):
    """A tenant's data file cannot be used as it is."""

    code = "invalid_data"


class BackboneError(PedroError):
    """A backbone is missing, unreadable or of an architecture that the method does not know."""

    code = "invalid_backbone"


class AdapterError(PedroError):
    """An adapter directory is damaged or was made for another backbone."""

    code = "invalid_adapter"


class AdapterUnusableError(AdapterError):
    """A registered adapter version cannot be served: no fault of who asks for it, and asking again does not help."""

    type = "server_error"
    code = "adapter_unusable"
    status = 500


class TrainingError(PedroError):
    """Training cannot continue, for instance because the loss is NaN."""

    code = "training_failed"


class AuthenticationError(PedroError):
    """No key, an unknown key or a revoked one."""

    type = "authentication_error"
    code = "invalid_api_key"
    status = 401


class ScopeError(PedroError):
    """The key is good but lacks the scope."""

    type = "permission_error"
    code = "insufficient_scope"
    status = 403


class NotFoundError(PedroError):
    """No such thing for this tenant. Says the same whether it does not exist or belongs to somebody else."""

    type = "not_found_error"
    code = "not_found"
    status = 404


class ConflictError(PedroError):
    """The state of the thing does not allow this now."""

    type = "conflict_error"
    code = "conflict"
    status = 409


class OverloadedError(PedroError):
    """A bounded queue is full; try again after `retry_after_s`."""

    type = "overloaded_error"
    code = "overloaded"
    status = 503
    retry_after_s: float | None = 1.0  # None: waiting does not help


class DeadlineError(PedroError):
    """The time that a request may take has passed."""

    type = "timeout_error"
    code = "deadline_exceeded"
    status = 504


class RateLimitError(OverloadedError):
    """The tenant's own share is used up, a quota or its queue, whatever room others leave."""

    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    status = 429


class BudgetError(RateLimitError):
    """A day's or a month's budget is used up."""

    type = "insufficient_quota"
    code = "insufficient_quota"


class UnavailableError(PedroError):
    """The machine is not ready: a port in use, no disk space, a service that does not answer."""

    type = "server_error"
    code = "environment"
    status = 503


def model_not_found(name: str) -> NotFoundError:
    """The one 404 for a model name, byte for byte the same for an unknown and for a foreign adapter."""
    return NotFoundError(
        f"The model '{name}' does not exist or you do not have access to it.", param="model", code="model_not_found"
    )

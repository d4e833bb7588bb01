"""Errors that say whether trying again can help. Foreign errors become one of these at the edge."""

from __future__ import annotations

import math
from collections.abc import Mapping

from offloadd.units import Seconds

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class OffloaddError(Exception):
    """Something foreseen went wrong; the message is fit for an operator."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class TemporaryError(OffloaddError):
    """Trying again later can help."""

    def __init__(self, message: str, *, retry_after: Seconds, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class PermanentError(OffloaddError):
    """Trying the same again cannot help: something has to change first."""


class RequestError(OffloaddError):
    """A request that ends without the backend's answer. `retry_after` is given when waiting helps."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry_after: Seconds | None = None,
        param: str | None = None,
        more: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.param = param
        self.more = more or {}
        """Numbers that a program may want, beside the sentence."""
        self.origin: Mapping[str, str] = {}
        """Headers that say which instance refused, when one did."""

    @property
    def headers(self) -> dict[str, str]:
        """Its origin, and `Retry-After` in whole seconds, at least one, where it applies."""
        wait = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return {**self.origin, **wait}

    @property
    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        return error_body(self.status, self.code, self.message, self.param, self.more)


def error_body(
    status: int, code: str, message: str, param: str | None = None, more: Mapping[str, object] | None = None
) -> dict[str, object]:
    """OpenAI's error object for a status."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "code": code, "param": param, **(more or {})}}

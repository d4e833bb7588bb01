"""Errors that say whether trying again can help. Foreign errors become one of these at the edge."""

from __future__ import annotations

from offloadd.units import Seconds


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

"""What happens, one log line each: its kind and what it is about, for the journal's fields and for whoever follows events.

An event is a log record with an `About` on it: `log.info("…", extra=about(EventKind.…, model=…))`. So nothing has to be handed
through constructors to tell something, and every sink is a `logging.Handler` that reads `event_of(record)`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

_NAMESPACE = uuid.UUID("5f3c3f6e-2c0b-5b0e-9a51-0ff10addcafe")
_ATTRIBUTE = "offloadd_event"


class EventKind(StrEnum):
    """Every kind of event. Values are public (`OFFLOADD_EVENT`) and keep their meaning; systemd/offloadd.catalog explains each."""

    DAEMON_STARTED = "daemon-started"
    DAEMON_STOPPING = "daemon-stopping"
    DAEMON_STOPPED = "daemon-stopped"
    DAEMON_REPLACED = "daemon-replaced"
    """A newer program takes its place in the same process."""
    DAEMON_SUSPENDED = "daemon-suspended"
    LISTENING = "listening"
    CONFIG_APPLIED = "config-applied"
    CONFIG_REFUSED = "config-refused"
    DECISION = "decision"
    """The planner's sentence about a model is a new one."""
    INSTANCE_SPAWNED = "instance-spawned"
    INSTANCE_ADOPTED = "instance-adopted"
    """Taken over alive from an earlier daemon."""
    INSTANCE_READY = "instance-ready"
    INSTANCE_ASLEEP = "instance-asleep"
    """It gave its GPU memory back, as its GPUs show, and lives on."""
    INSTANCE_WAKING = "instance-waking"
    """It is told to take its memory again."""
    INSTANCE_AWAKE = "instance-awake"
    """It has taken its memory again, and answers."""
    INSTANCE_DRAINING = "instance-draining"
    INSTANCE_STOPPING = "instance-stopping"
    INSTANCE_KILLED = "instance-killed"
    """It had to be killed, or left processes that had to be."""
    INSTANCE_SICK = "instance-sick"
    """It lives and cannot do its work; the planner replaces it."""
    INSTANCE_ENDED = "instance-ended"
    LOAN_GRANTED = "loan-granted"
    REQUEST_WAITS = "request-waits"
    """It was put into its model's queue."""
    REQUEST_MOVED = "request-moved"
    """Its engine was lost before the first byte of an answer, and it goes to another."""
    REQUEST_ENDED = "request-ended"
    """One inference request is over, however it ended."""
    REGISTRY_PROBLEM = "registry-problem"
    MODELS_FOUND = "models-found"
    """Model files are on disk that were not there, or are now something else than they were."""
    MODEL_GONE = "model-gone"
    MODEL_WARMED = "model-warmed"
    """The files of a model that may be next are read into the page cache, or were."""
    PULL = "pull"
    """A download began, ended or failed."""
    ADMIN_CALL = "admin-call"
    """Somebody changed something, or tried to, through the API."""
    INTERNAL_ERROR = "internal-error"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a log line is about; a name that does not apply is empty."""

    kind: EventKind
    model: str = ""
    instance: str = ""
    backend: str = ""
    request: str = ""
    data: Mapping[str, object] = field(default_factory=dict)
    """JSON values beside the sentence."""


def about(
    kind: EventKind, *, model: object = "", instance: object = "", backend: object = "", request: object = "", **data: object
) -> dict[str, About]:
    """The `extra` of a logging call."""
    return {
        _ATTRIBUTE: About(
            kind=kind, model=str(model), instance=str(instance), backend=str(backend), request=str(request), data=data
        )
    }


def event_of(record: logging.LogRecord) -> About | None:
    """What the record is about; None for a line that is no event."""
    return getattr(record, _ATTRIBUTE, None)


def message_id(kind: EventKind) -> str:
    """The kind's stable MESSAGE_ID: 32 hex digits."""
    return uuid.uuid5(_NAMESPACE, kind.value).hex

"""Which instance has a conversation in its cache, and how each has fared: what the choice among instances remembers."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from offloadd.clock import Clock
from offloadd.plan.balance import WELL, Standing, after_failure, after_success
from offloadd.state.ids import InstanceId

REMEMBERED = 4096
"""Conversations; the longest unused is forgotten first."""
_LEADING = 2
"""Messages that mark a conversation: what it begins with stays the same in all its turns."""
_TEXT = 1024
_MESSAGES = msgspec.json.Decoder(list[msgspec.Raw])


class Memory:
    """Written as requests end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._places: OrderedDict[int, InstanceId] = OrderedDict()
        self.ailing: dict[InstanceId, Standing] = {}
        """How instances have fared that have failed lately; to be read only."""

    def place(self, key: int | None) -> InstanceId | None:
        """The instance that had the conversation last."""
        return None if key is None else self._places.get(key)

    def standing(self, instance: InstanceId) -> Standing:
        """How it has fared."""
        return self.ailing.get(instance, WELL)

    def put(self, key: int | None, instance: InstanceId) -> None:
        """The conversation goes there."""
        if key is None:
            return
        self._places[key] = instance
        self._places.move_to_end(key)
        if len(self._places) > REMEMBERED:
            self._places.popitem(last=False)

    def well(self, instance: InstanceId) -> None:
        """It answered well."""
        known = self.ailing.get(instance)
        if known is None:
            return
        standing = after_success(known, now=self._clock.now())
        if standing == WELL:
            del self.ailing[instance]
        else:
            self.ailing[instance] = standing

    def ill(self, instance: InstanceId) -> None:
        """It failed."""
        self.ailing[instance] = after_failure(self.standing(instance), now=self._clock.now())

    def forget(self, instance: InstanceId) -> None:
        """It is off the books."""
        self.ailing.pop(instance, None)


def conversation(messages: msgspec.Raw, prompt: msgspec.Raw, key: msgspec.Raw) -> int | None:
    """What marks a conversation, by the JSON of a body's fields: the client's own key, or how its messages or its text begin."""
    for mark in (bytes(key), bytes(prompt)[:_TEXT]):
        if mark.startswith(b'"') and len(mark) > len('""'):
            return hash(mark)
    try:
        leading = _MESSAGES.decode(messages)[:_LEADING] if bytes(messages) else []
    except (msgspec.DecodeError, RecursionError):
        return None
    return hash(tuple(map(bytes, leading))) if leading else None

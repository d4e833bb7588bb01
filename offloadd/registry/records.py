"""Tables of the registry. Rows stay inside `registry/`; what leaves it are dataclasses of `state/`."""

from __future__ import annotations

from peewee import BigIntegerField, BooleanField, CharField, CompositeKey, Database, DoubleField, IntegerField, Model, TextField


class FootprintRecord(Model):
    """The most memory that one kind of launch was ever seen to take."""

    key = CharField(primary_key=True)
    model = CharField()
    backend = CharField()
    peak_bytes = BigIntegerField()
    samples = IntegerField()
    load_seconds = DoubleField(null=True)
    seen_at = DoubleField(index=True)

    class Meta:
        """The table's own name, so that renaming the class renames nothing on disk."""

        table_name = "footprint"


class FoundRecord(Model):
    """A model that was found on a machine's disk, as it was when it was last seen."""

    host = CharField()
    path = TextField()
    name = CharField()
    content = CharField()
    body = TextField()
    """JSON of `state/found.py:Found`."""
    gone = BooleanField()
    """Its file is not there any more; the name is kept for a while, should it come back."""
    seen_at = DoubleField()

    class Meta:
        """The table's own name and key."""

        table_name = "found"
        primary_key = CompositeKey("host", "path")


class LoadRecord(Model):
    """One launch that became ready."""

    model = CharField()
    backend = CharField()
    host = CharField()
    at = DoubleField()
    seconds = DoubleField()
    size_bytes = BigIntegerField(null=True)
    """What was read: the model's files."""

    class Meta:
        """The table's own name."""

        table_name = "load"


class EndRecord(Model):
    """The end of one instance."""

    model = CharField()
    backend = CharField()
    host = CharField()
    instance = CharField()
    at = DoubleField()
    kind = CharField()
    message = TextField()
    expected = BooleanField()
    ready_seconds = DoubleField(null=True)
    peak_bytes = BigIntegerField(null=True)

    class Meta:
        """The table's own name."""

        table_name = "ending"


class UsageRecord(Model):
    """Requests and tokens of one model on one day, over all daemons that share the registry."""

    model = CharField()
    day = CharField(max_length=10)
    """UTC, as 2026-11-25."""
    answered = BigIntegerField()
    refused = BigIntegerField()
    cancelled = BigIntegerField()
    failed = BigIntegerField()
    prompt_tokens = BigIntegerField()
    cached_tokens = BigIntegerField()
    completion_tokens = BigIntegerField()
    seconds = DoubleField()
    """From arrival to last byte, summed."""

    class Meta:
        """The table's own name and key."""

        table_name = "usage"
        primary_key = CompositeKey("model", "day")


RECORDS: tuple[type[Model], ...] = (FootprintRecord, FoundRecord, LoadRecord, EndRecord, UsageRecord)


def bind(database: Database) -> None:
    """Use this database for every table."""
    database.bind(list(RECORDS))

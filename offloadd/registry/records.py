"""Tables of the registry. Rows stay inside `registry/`; what leaves it are dataclasses of `state/`."""

from __future__ import annotations

from peewee import BigIntegerField, CharField, Database, FloatField, IntegerField, Model


class FootprintRecord(Model):
    """The most memory that one kind of launch was ever seen to take."""

    key = CharField(primary_key=True)
    model = CharField()
    backend = CharField()
    peak_bytes = BigIntegerField()
    samples = IntegerField()
    load_seconds = FloatField(null=True)
    seen_at = FloatField(index=True)

    class Meta:
        """The table's own name, so that renaming the class renames nothing on disk."""

        table_name = "footprint"


RECORDS: tuple[type[Model], ...] = (FootprintRecord,)


def bind(database: Database) -> None:
    """Use this database for every table."""
    database.bind(list(RECORDS))

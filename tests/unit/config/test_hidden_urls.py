"""Passwords in URLs are as secret as those under a key of that name."""

from __future__ import annotations

import pytest

from offloadd.backends import discover
from offloadd.config import SourceText, load
from offloadd.config.secrets import hide_in_url

CONFIG = """\
storage:
  registry: {url}
models: {{}}
"""


class NoSecrets:
    def env(self, name: str) -> str | None:
        return "s3cr3t"

    def file(self, path: str) -> str:
        raise FileNotFoundError(path)


def loaded(url: str):  # type: ignore[no-untyped-def]
    return load([SourceText("x.yaml", CONFIG.format(url=url))], backends=discover(), secrets=NoSecrets())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:hunter2@db/x", "postgresql://me:***@db/x"),
        ("postgresql://me:a:b@db/x", "postgresql://me:***@db/x"),
        ("postgresql:///x?host=/run&password=hunter2&user=me", "postgresql:///x?host=/run&password=***&user=me"),
        ("postgresql://me:${file:/run/pw}@db/x", "postgresql://me:${file:/run/pw}@db/x"),
        ("postgresql://db:5432/x", "postgresql://db:5432/x"),
        ("https://host/path?x=1", "https://host/path?x=1"),
        ("a plain text: with @ in it", "a plain text: with @ in it"),
    ],
)
def test_passwords_are_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert hide_in_url(text) == shown


def test_a_registry_url_is_taken_whole_and_shown_without_its_password() -> None:
    found = loaded("postgresql://me:hunter2@db/offloadd")
    assert found.desired is not None
    assert found.desired.storage.registry == "postgresql://me:hunter2@db/offloadd"
    assert found.shown["storage"]["registry"] == "postgresql://me:***@db/offloadd"
    assert "hunter2" not in repr(found.desired)
    filled = loaded("postgresql://me:${env:PW}@db/offloadd")
    assert filled.desired is not None
    assert filled.desired.storage.registry == "postgresql://me:s3cr3t@db/offloadd"
    assert filled.shown["storage"]["registry"] == "postgresql://me:${env:PW}@db/offloadd"


def test_a_bad_registry_url_is_refused_without_its_password() -> None:
    found = loaded("mysql://me:hunter2@db/offloadd")
    assert found.desired is None
    text = found.render()
    assert "postgresql://user@host/name" in text
    assert "hunter2" not in text

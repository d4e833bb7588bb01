"""What long fuzzing has found, each by what it came to."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from offloadd.errors import RequestError
from offloadd.migrate.ollama import import_ollama
from offloadd.observe.devices.ram import Ram, within_cgroups
from offloadd.proxy.dialects.refusals import engine_error
from offloadd.proxy.media import check_media
from offloadd.proxy.upstream import Connection
from offloadd.runtime.launchers.cgroups import Group
from offloadd.state.launch import ProbeReply
from tests.fuzz.of_engines import BACKENDS, SPEC, _Pool, _Taker, _Transport


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_an_answer_too_deep_to_be_read_is_none(name: str) -> None:
    body = b'{"data":' + b"[" * 100_000
    for path in ("/health", "/v1/models", "/slots", "/info"):
        BACKENDS[name].read_probe(SPEC, path, ProbeReply(status=200, body=body))


@pytest.mark.parametrize("line", ["\n", " \n", "\n  \t"])
def test_a_list_of_devices_full_of_blanks_is_read_soon(line: str) -> None:
    began = time.thread_time()
    assert BACKENDS["llamacpp"].read_devices("Available devices:" + line * 100_000) == frozenset()
    assert time.thread_time() - began < 1


def test_a_time_to_wait_that_is_no_time_is_a_second() -> None:
    assert engine_error(503, b"{}", retry_after="9" * 400).headers == {"Retry-After": "1"}
    assert engine_error(503, b"{}", retry_after="90").headers == {"Retry-After": "90"}


@pytest.mark.parametrize("port", ["s43", "44ok.example", "65536", "file:"])
def test_an_address_with_a_port_that_is_none_is_refused(port: str) -> None:
    body = b'{"image_url": "http://ok.example:%s/"}'
    check_media(body % b"43", {"ok.example"})
    with pytest.raises(RequestError):
        check_media(body % port.encode(), {"ok.example"})


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "sub/" * 3000])
def test_a_modelfile_may_name_what_no_file_can_be_called(name: str, tmp_path: Path) -> None:
    path = tmp_path / "Modelfile"
    path.write_text(f"FROM {name}\nADAPTER {name}\n")
    import_ollama(path)


def test_books_of_a_control_group_with_numbers_that_are_none(tmp_path: Path) -> None:
    for peak in ("4\x1f\n", "9" * 5000, "\u0663\n", ""):
        (tmp_path / "memory.peak").write_text(peak)
        (tmp_path / "memory.events").write_text(f"oom_kill {'9' * 5000}\n")
        assert Group(tmp_path).evidence().peak is None
        assert Group(tmp_path).evidence().oom_kills == 0
    (tmp_path / "memory.peak").write_text("4096\n")
    assert Group(tmp_path).evidence().peak == 4096


@pytest.mark.parametrize("membership", ["0::" + "/a" * 100_000 + "\n", "0::/a/b\n1:memory:/a/b\n" * 50_000])
def test_groups_without_end_are_looked_up_soon(tmp_path: Path, membership: str) -> None:
    (tmp_path / "cgroup").write_text(membership)
    (tmp_path / "memory.max").write_text("9" * 5000)
    (tmp_path / "memory.current").write_text("0")
    began = time.thread_time()
    assert within_cgroups(Ram(2**34, 2**33), cgroups=tmp_path, membership=tmp_path / "cgroup") == Ram(2**34, 2**33)
    assert time.thread_time() - began < 1


def test_no_body_comes_before_an_answers_head() -> None:
    """Of an interim answer, which has none."""
    taker, transport, pool = _Taker(), _Transport(), _Pool()
    connection = Connection(pool, "x")  # type: ignore[arg-type]
    connection.connection_made(_any(transport))
    connection.send(taker, b"", None, bodiless=False)
    connection.data_received(b"HTTP/1.1 141 Oh\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n")
    assert (taker.ends, taker.body) == (["lost"], b"")


def _any(value: object) -> Any:
    return value

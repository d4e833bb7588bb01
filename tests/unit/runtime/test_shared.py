"""Shared memory that dead processes have left: what is taken away, and everything that is not."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from offloadd.runtime.launchers import shared
from offloadd.runtime.launchers.shared import FOLDER, mapped, remove, still_there
from offloadd.state.life import SharedPiece

HOLDER = """
import mmap, os, sys, time
how, *paths = sys.argv[1:]
kept = []
for path in paths:
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    os.ftruncate(fd, 4096)
    kept.append(mmap.mmap(fd, 4096) if how == "map" else fd)
print("held", flush=True)
time.sleep(600)
"""
Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Two names of kinds that libraries make."""
    if not os.access(FOLDER, os.W_OK):
        pytest.skip(f"no {FOLDER} here")
    made = [f"psm_{secrets.token_hex(4)}", f"sem.mp-{secrets.token_hex(4)}"]
    yield made
    for name in made:
        (FOLDER / name).unlink(missing_ok=True)


@pytest.fixture
def hold() -> Iterator[Hold]:
    """A process that has these mapped, or only open."""
    begun: list[subprocess.Popen[str]] = []

    def start(names: list[str], how: str = "map") -> subprocess.Popen[str]:
        words = [sys.executable, "-c", HOLDER, how, *(str(FOLDER / name) for name in names)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        begun.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_what_a_dead_process_has_left_is_taken_away(names: list[str], hold: Hold) -> None:
    process = hold(names)
    pieces = mapped([process.pid])
    assert {piece.name for piece in pieces} == set(names)
    end(process)
    assert still_there(pieces) == pieces
    assert remove(pieces) == 2
    assert not any((FOLDER / name).exists() for name in names)
    assert remove(pieces) == 0


@pytest.mark.parametrize("how", ["map", "open"])
def test_what_another_still_has_is_left(names: list[str], hold: Hold, how: str) -> None:
    process = hold(names)
    other = hold(names[:1], how)
    pieces = mapped([process.pid])
    end(process)
    assert remove(pieces) == 1
    assert [(FOLDER / name).exists() for name in names] == [True, False]
    end(other)
    assert remove(pieces) == 1


def test_another_of_the_same_name_is_left(names: list[str], hold: Hold) -> None:
    process = hold(names)
    pieces = mapped([process.pid])
    end(process)
    for name in names:
        (FOLDER / name).rename(FOLDER / f"{name}.old")
        (FOLDER / name).write_bytes(b"of somebody")
        (FOLDER / f"{name}.old").unlink()
    assert remove(pieces) == 0
    assert (FOLDER / names[0]).read_bytes() == b"of somebody"


def test_what_others_may_use_is_left(names: list[str], hold: Hold) -> None:
    process = hold(names)
    pieces = mapped([process.pid])
    (FOLDER / names[0]).chmod(0o660)
    assert {piece.name for piece in mapped([process.pid])} == {names[1]}
    end(process)
    assert remove(pieces) == 1
    assert (FOLDER / names[0]).exists()


@pytest.mark.parametrize("name", ["model-{}.gguf", "psm_{}.gguf", "pulse-shm-{}"])
def test_files_that_nobody_named_by_chance_are_none_of_these(hold: Hold, name: str) -> None:
    """Some keep their models there."""
    path = FOLDER / name.format(secrets.token_hex(4))
    try:
        assert mapped([hold([path.name]).pid]) == set()
    finally:
        path.unlink(missing_ok=True)


def test_what_belongs_to_somebody_else_is_not_this_processs(names: list[str], hold: Hold) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    process = hold(names)
    os.chown(FOLDER / names[0], 65534, -1)
    assert {piece.name for piece in mapped([process.pid])} == {names[1]}


def test_a_piece_is_told_by_its_number_not_its_name(names: list[str], hold: Hold) -> None:
    process = hold(names)
    wrong = {replace(piece, inode=piece.inode + 1) for piece in mapped([process.pid])}
    end(process)
    assert still_there(wrong) == set()
    assert remove(wrong) == 0


def test_a_process_that_is_gone_has_none() -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    assert mapped([done.pid]) == set()
    assert remove([SharedPiece(name="psm_00000000", device=0, inode=0)]) == 0


def test_the_names_that_vllm_was_seen_to_leave_are_known() -> None:
    """Lines of /proc/PID/maps of its processes, as the kernel wrote them."""
    lines = (
        b"7f1c2a000000-7f1c34000000 rw-s 00000000 00:1a 4 /dev/shm/psm_26831cd9\n"
        b"7f1c3a000000-7f1c3a001000 rw-s 00000000 00:1a 5                        /dev/shm/sem.mp-_h3owbee\n"
        b"7f1c3b000000-7f1c3b001000 rw-s 00000000 00:1a 6                        /dev/shm/psm_0badcafe (deleted)\n"
    )
    assert [found[3] for found in shared._MAPPED.findall(lines)] == [b"psm_26831cd9", b"sem.mp-_h3owbee"]

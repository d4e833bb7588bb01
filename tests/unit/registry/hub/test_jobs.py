"""Pulls from a local server that speaks the hub's API: whole, broken off, damaged, refused, cancelled."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")

from offloadd.errors import RequestError
from offloadd.registry.hub import jobs as hub_jobs
from offloadd.registry.hub.fetch import STAGING
from offloadd.registry.hub.jobs import Job, Pulls
from tests.fakes import hub as fake

MODEL = os.urandom(300_000)
LARGE = os.urandom(24 * 2**20)
PIECE = 10 * 2**20
"""Bytes that the hub's library writes at once."""
REPOSITORIES = {
    "org/one-GGUF": {
        "one-Q4_K_M.gguf": MODEL,
        "one-Q8_0.gguf": MODEL * 2,
        "mmproj-one-f16.gguf": MODEL[:5000],
    },
    "org/large": {"large-Q8_0.gguf": LARGE},
    "org/folder": {"model.safetensors": MODEL, "config.json": b"{}", "1_Pooling/config.json": b"{}", "pytorch_model.bin": b"no"},
}
WAIT_S = 60


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[fake.Hub]:
    with fake.serving(REPOSITORIES) as serving:
        monkeypatch.setenv("HF_ENDPOINT", serving.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield serving


@asynccontextmanager
async def pulls_into(folder: Path, landed: Callable[[], None] = lambda: None):  # type: ignore[no-untyped-def]
    folder.mkdir(exist_ok=True)
    pulls = Pulls(folder=lambda: str(folder), wall=lambda: 1.8e9, landed=landed)
    try:
        yield pulls
    finally:
        await pulls.close()


async def ended(pulls: Pulls, job: Job) -> tuple[Job, list[str]]:
    """The job at its end, and the states that were told on the way."""
    states: list[str] = []
    async with asyncio.timeout(WAIT_S):
        async for each in pulls.follow(job.id):
            states += [each.state] if each.state not in states[-1:] else []
    return job, states


def staged(folder: Path) -> list[Path]:
    return [path for path in (folder / STAGING).rglob("*") if path.is_file() and not path.name.endswith(".lock")]


async def test_a_pull_lands_whole_and_leaves_nothing_behind(hub: fake.Hub, tmp_path: Path) -> None:
    landed = []
    async with pulls_into(tmp_path / "models", lambda: landed.append(True)) as pulls:
        job, states = await ended(pulls, pulls.start("org/one-GGUF:Q4_K_M"))
        assert (job.state, job.message) == ("landed", "")
        assert states[-1] == "landed"
        assert "downloading" in states
        target = tmp_path / "models" / "org" / "one-GGUF"
        assert {path.name: path.read_bytes() for path in target.iterdir()} == {
            "one-Q4_K_M.gguf": MODEL,
            "mmproj-one-f16.gguf": MODEL[:5000],
        }
        assert job.shown()["done_bytes"] == job.shown()["total_bytes"] == len(MODEL) + 5000
        assert job.paths[-1] == str(target / "one-Q4_K_M.gguf")
        assert staged(tmp_path / "models") == []
        assert landed == [True]


async def test_a_folder_of_safetensors_lands_as_a_folder(hub: fake.Hub, tmp_path: Path) -> None:
    async with pulls_into(tmp_path / "models") as pulls:
        job, _ = await ended(pulls, pulls.start("org/folder"))
        assert job.state == "landed"
        target = tmp_path / "models" / "org" / "folder"
        found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
        assert found == {"model.safetensors", "config.json", "1_Pooling/config.json"}


async def test_one_that_broke_off_goes_on_where_it_stopped(hub: fake.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_jobs, "PROGRESS_S", 0.05)
    hub.gate = threading.Event()
    async with pulls_into(tmp_path / "models") as pulls:
        job = pulls.start("org/large")
        async with asyncio.timeout(WAIT_S):
            async for each in pulls.follow(job.id):
                if each.done >= PIECE:
                    break
        pulls.cancel(job.id)
        job, _ = await ended(pulls, job)
        assert job.state == "cancelled"
        assert not list((tmp_path / "models").glob("org/**/*.gguf"))
        kept = max(path.stat().st_size for path in staged(tmp_path / "models"))
        assert kept >= PIECE
        hub.gate.set()
        hub.asked.clear()
        job, _ = await ended(pulls, pulls.start("org/large"))
        assert job.state == "landed"
        assert (tmp_path / "models/org/large/large-Q8_0.gguf").read_bytes() == LARGE
        ranges = [asked for method, path, asked in hub.asked if method == "GET" and path.endswith("Q8_0.gguf")]
        assert ranges == [f"bytes={kept}-"]


async def test_what_is_not_as_the_hub_says_does_not_land(hub: fake.Hub, tmp_path: Path) -> None:
    hub.lies_about = "one-Q4_K_M.gguf"
    async with pulls_into(tmp_path / "models") as pulls:
        job, _ = await ended(pulls, pulls.start("org/one-GGUF:Q4_K_M"))
        assert job.state == "failed"
        assert "its checksum is another" in job.message
        assert not list((tmp_path / "models").glob("org/**/*.gguf"))
        hub.lies_about = ""
        job, _ = await ended(pulls, pulls.start("org/one-GGUF:Q4_K_M"))
        assert job.state == "landed"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("org/none", "the hub has no org/none"),
        ("org/one-GGUF:Q2_K", "nothing of org/one-GGUF is called Q2_K; it has one-Q4_K_M"),
    ],
)
async def test_what_cannot_be_pulled_says_why(hub: fake.Hub, tmp_path: Path, source: str, said: str) -> None:
    async with pulls_into(tmp_path / "models") as pulls:
        job, _ = await ended(pulls, pulls.start(source))
        assert (job.state, said in job.message, bool(job.hint)) == ("failed", True, True), job.shown()


async def test_a_hub_that_is_away_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    async with pulls_into(tmp_path / "models") as pulls:
        job, _ = await ended(pulls, pulls.start("org/one-GGUF"))
        assert job.state == "failed"
        assert "goes on where it stopped" in job.hint


async def test_a_disk_without_room_is_refused_before_anything_is_loaded(
    hub: fake.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "repositories", {"org/big": {"big-Q4_K_M.gguf": _Pretended()}})
    async with pulls_into(tmp_path / "models") as pulls:
        job, _ = await ended(pulls, pulls.start("org/big"))
        assert job.state == "failed"
        assert "are needed on the disk of" in job.message
        assert not [path for method, path, _ in hub.asked if "/resolve/" in path]


class _Pretended(bytes):
    """Says that it is very large."""

    def __len__(self) -> int:
        return 2**60


async def test_there_is_a_bound_and_the_same_is_not_pulled_twice(
    hub: fake.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_jobs, "MAX_WAITING", 2)
    hub.gate = threading.Event()
    async with pulls_into(tmp_path / "models") as pulls:
        one = pulls.start("org/one-GGUF:Q8_0")
        assert pulls.start("org/one-GGUF:Q8_0") is one
        pulls.start("org/folder")
        with pytest.raises(RequestError) as refused:
            pulls.start("org/other")
        assert (refused.value.status, refused.value.code) == (429, "too_many_pulls")
        with pytest.raises(RequestError) as bad:
            pulls.start("../../etc")
        assert bad.value.status == 400
        with pytest.raises(RequestError) as unknown:
            pulls.get("nothing")
        assert unknown.value.status == 404

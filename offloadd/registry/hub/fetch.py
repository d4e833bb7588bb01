"""A program of its own that downloads one model: `python -m offloadd.registry.hub.fetch SOURCE FOLDER`.

It prints one JSON object per line: what it chose, where it stands, how it ended. A program, so that a pull can be ended at any
moment, holds nobody up, and brings the hub's library into no daemon. What it has downloaded stays for the next try; nothing is in
`FOLDER` under its own name before all of it is there and is what the hub says.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from offloadd.errors import OffloaddError, PermanentError, TemporaryError
from offloadd.registry.hub.choose import RemoteFile, Wanted, choose, parse_wanted
from offloadd.units import Seconds, format_bytes

STAGING = ".offloadd-pulls"
"""Below the models' folder, so that landing is a rename; a hidden folder, so that nobody takes it for models."""
SPARE = 256 * 2**20
"""Bytes that a disk keeps beside what is pulled."""
_PIECE = 2**22


def main(arguments: Sequence[str]) -> int:
    """0 when all is there; 1 after a line that says why not."""
    source, folder = arguments
    try:
        landed = pull(parse_wanted(source), Path(folder))
    except OffloaddError as error:
        _say("failed", message=error.message, hint=error.hint)
        return 1
    except BrokenPipeError:
        return 1  # nobody listens any more: whoever started us is gone
    _say("landed", paths=[str(path) for path in landed])
    return 0


def pull(wanted: Wanted, folder: Path) -> list[Path]:
    """Download, verify and land."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise PermanentError("huggingface_hub is not installed", hint="pip install 'offloadd[hub]'") from None
    staging = folder / STAGING / wanted.repository.replace("/", "--")
    with _foreseen(wanted):
        staging.mkdir(parents=True, exist_ok=True)
        with _alone(staging):
            _say("asking")
            revision, files = _listing(HfApi(), wanted)
            chosen = choose(wanted, files)
            total = sum(file.size for file in chosen)
            _say("chosen", files=[file.path for file in chosen], total_bytes=total, staging=str(staging), revision=revision)
            _check_room(staging, total)
            for file in chosen:
                _download(wanted, revision, file, staging)
            landed = _land(chosen, staging, folder / wanted.repository)
            shutil.rmtree(staging, ignore_errors=True)
    return landed


def _listing(api: Any, wanted: Wanted) -> tuple[str, list[RemoteFile]]:
    """The commit that `main` is at now, and its files: what is pulled is of one moment, however long it takes."""
    revision = str(api.model_info(wanted.repository).sha)
    found = []
    for entry in api.list_repo_tree(wanted.repository, recursive=True, revision=revision):
        if hasattr(entry, "size"):
            sha256 = entry.lfs.sha256 if entry.lfs else ""
            found.append(RemoteFile(entry.path, int(entry.size), sha256, "" if sha256 else entry.blob_id))
    return revision, found


def _check_room(staging: Path, total: int) -> None:
    have = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    needed, free = max(0, total - have) + SPARE, shutil.disk_usage(staging).free
    if needed > free:
        message = f"{format_bytes(needed)} are needed on the disk of {staging.parent.parent}, {format_bytes(free)} are free"
        raise PermanentError(message, hint="free some space, or choose a smaller quantization; what was downloaded is kept")


def _download(wanted: Wanted, revision: str, file: RemoteFile, staging: Path) -> None:
    from huggingface_hub import hf_hub_download

    _say("downloading", file=file.path, size_bytes=file.size)
    path = Path(hf_hub_download(wanted.repository, file.path, revision=revision, local_dir=staging))
    _say("verifying", file=file.path)
    if not _is_as_said(path, file):
        path.unlink(missing_ok=True)
        message = f"{file.path} is not what the hub says it is: its checksum is another"
        raise TemporaryError(
            message, retry_after=Seconds(1), hint="pull it again; if that does not help, the hub's file is damaged"
        )


def _is_as_said(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    if file.sha256:
        return _digest(path, hashlib.sha256()) == file.sha256
    return not file.blob or _digest(path, hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)) == file.blob


def _digest(path: Path, whole: Any) -> str:
    with path.open("rb") as opened:
        while piece := opened.read(_PIECE):
            whole.update(piece)
    return str(whole.hexdigest())


def _land(chosen: Sequence[RemoteFile], staging: Path, target: Path) -> list[Path]:
    """Everything on the disk for good, then renamed in order, the model's first file last."""
    is_gguf = chosen[-1].path.lower().endswith(".gguf")
    landed = []
    for file in chosen:
        _settle(staging / file.path)
    for file in chosen:
        place = target / (PurePosixPath(file.path).name if is_gguf else file.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        (staging / file.path).replace(place)
        landed.append(place)
    _settle(target)
    return landed


def _settle(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _alone(staging: Path) -> Iterator[None]:
    """Nobody else pulls the same repository into the same folder meanwhile."""
    with (staging.parent / f"{staging.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermanentError("it is being pulled already", hint="wait for that pull") from None
        yield


@contextlib.contextmanager
def _foreseen(wanted: Wanted) -> Iterator[None]:
    """The library's errors, and the disk's, as ours."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    kept = "pull it again: it goes on where it stopped"
    try:
        yield
    except (OffloaddError, BrokenPipeError):
        raise
    except GatedRepoError as error:
        hint = "accept its terms on the hub, and give the daemon a token: HF_TOKEN"
        raise PermanentError(f"{wanted.repository} is behind a gate", hint=hint) from error
    except RepositoryNotFoundError as error:
        hint = "see how it is spelled; a private one needs a token: HF_TOKEN"
        raise PermanentError(f"the hub has no {wanted.repository}", hint=hint) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError) as error:
        raise TemporaryError(f"the hub does not answer as it should: {_short(error)}", retry_after=Seconds(1), hint=kept) from error
    except OSError as error:
        what = error.strerror or _short(error)
        raise TemporaryError(f"the pull broke off: {what}", retry_after=Seconds(1), hint=kept) from error
    except Exception as error:
        raise TemporaryError(f"the pull failed: {_short(error)}", retry_after=Seconds(1), hint=kept) from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _say(event: str, **more: object) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


if __name__ == "__main__":
    os.umask(0o022)  # engines that run as other users read them; who may is for the models' folder to say
    sys.exit(main(sys.argv[1:]))

"""A cheap fingerprint of what is in a model's files: the same for a copy or a renamed file, another for other content.

Only a few blocks of each file are read, so it is no proof of equality, and nothing relies on it for that: models that it takes for
one another have the same size, the same header and the same samples, and so need the same memory.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

HEAD = 16 * 1024
"""Bytes from the beginning of each file: the header, or the begin of a long one."""
SAMPLE = 4096
"""Bytes of each block that is read further on."""
SAMPLES = 4
"""Blocks, at even distances, the last one at the end of the file."""
MAX_PARTS = 1024
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def content_of_model(path: Path) -> str:
    """The fingerprint of the model at `path`: a file, any shard of a split one, or a folder. Raises OSError."""
    return content_of(parts_of(path))


def parts_of(path: Path) -> Sequence[Path]:
    """The files that the model at `path` is made of: a file, any shard of a split one, or a folder. Raises OSError."""
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.suffix == ".safetensors" or entry.name == "config.json")
        return (files or sorted(entry for entry in path.iterdir() if entry.is_file()))[:MAX_PARTS]
    shard = SHARD.fullmatch(path.name)
    return [path] if shard is None else shards_of(path, int(shard["count"]))


def shards_of(path: Path, count: int) -> Sequence[Path]:
    """All shards of the split model that `path` is one of, the first ones of very many."""
    stem = path.name[: -len("-00001-of-00001.gguf")]
    return [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, min(count, MAX_PARTS) + 1)]


def content_of(paths: Sequence[Path]) -> str:
    """The fingerprint of a model that is all of `paths`, in their order. Raises OSError."""
    whole = hashlib.blake2b(digest_size=16)
    for path in paths:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            whole.update(_sampled(handle))
        finally:
            os.close(handle)
    return whole.hexdigest()


def _sampled(handle: int) -> bytes:
    size = os.fstat(handle).st_size
    parts = [size.to_bytes(8, "big"), os.pread(handle, HEAD, 0)]
    if size > HEAD:
        room = max(0, size - HEAD - SAMPLE)
        parts += [os.pread(handle, SAMPLE, HEAD + room * number // (SAMPLES - 1)) for number in range(SAMPLES)]
    return b"".join(parts)

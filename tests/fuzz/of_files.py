"""Model files and their metadata, and what the kernel tells in files: the names in it are other people's."""

from __future__ import annotations

import atexit
import json
import shutil
import struct
import tempfile
from pathlib import Path
from random import Random
from unittest.mock import patch

from offloadd.observe import processes
from offloadd.observe.devices.fdinfo import read_uses
from offloadd.observe.devices.ram import Ram, within_cgroups
from offloadd.registry.discovery.names import proper_aliases, repository_of, slug, uncached
from offloadd.registry.readers import HeaderError, read_model
from offloadd.registry.readers.shapes import knows_tools
from offloadd.runtime.instances import evidence
from offloadd.runtime.launchers import cgroups, identity
from offloadd.runtime.logs import printable
from tests.fuzz.mutate import bent, cut, mutated, mutated_text
from tests.fuzz.table import MIB, Parser
from tests.fuzz.test_headers import assembled, random_bytes, small_model
from tests.fuzz.test_headers import mutated as header_mutated

_PLACE = Path(tempfile.mkdtemp(prefix="offloadd-fuzz-"))
"""For files that are written anew in every run."""
atexit.register(shutil.rmtree, _PLACE, ignore_errors=True)
_SMALL = small_model()
_CONFIGS = [
    {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "torch_dtype": "bfloat16"},
    {"model_type": "gemma3", "text_config": {"num_hidden_layers": 2, "sliding_window": 512, "layer_types": ["full_attention"] * 2}},
    {
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "quantization_config": {"quant_method": "awq", "bits": 4},
    },
]
_LISTED = {
    "__metadata__": {"format": "pt"},
    **{f"model.layers.{n}.w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * n, 16 * n + 16]} for n in range(4)},
}


def _refused(path: Path) -> None:
    try:
        read_model(path)
    except HeaderError as error:
        refusal = error
    else:
        return
    assert "at byte" in refusal.message
    assert refusal.path == path or path in refusal.path.parents


def _gguf(rng: Random) -> None:
    path = _PLACE / "fuzz.gguf"
    kind = rng.randrange(4)
    if kind == 0:
        path.write_bytes(random_bytes(rng))
    elif kind == 1:
        path.write_bytes(assembled(rng))
    else:
        data = bytearray(_SMALL)
        for at, new in header_mutated(rng, _SMALL, len(_SMALL)):
            data[at : at + len(new)] = new
        path.write_bytes(data)
    _refused(path)


def _folder(rng: Random) -> None:
    """config.json and safetensors, of wrong kinds and of wrong bytes."""
    folder = _PLACE / "folder"
    folder.mkdir(exist_ok=True)
    config = json.dumps(bent(rng, rng.choice(_CONFIGS))).encode(errors="replace")
    listed = json.dumps(bent(rng, _LISTED)).encode(errors="replace")
    if rng.random() < 0.5:
        listed = mutated(rng, [listed], most=2)
    size = len(listed) if rng.random() < 0.8 else rng.choice((0, 1, 2**31, 2**64 - 1))
    (folder / "config.json").write_bytes(mutated(rng, [config], most=rng.choice((0, 0, 3))))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + listed + bytes(64))
    _refused(folder)


_TEMPLATES = (
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{% if tools %}",
    "{{ tool_calls }}",
)
_TITLES = ("Llama-3.2-3B-Q4_K_M.gguf", "models--org--name", "a" * 300, "SmolLM2 135M Instruct", "../../etc/passwd", "\x1b[31mred")


def _metadata(rng: Random) -> None:
    """Names and templates: never run, never a path, and a name is one that a config may have."""
    knows_tools(mutated_text(rng, _TEMPLATES, ("{%", "%}", "tools")))
    title = mutated_text(rng, _TITLES, ("/", "..", "--", " "))
    name = slug(uncached(title), title)
    assert name
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-"), name
    repository_of(title)
    proper_aliases([title, repository_of(title)], name)
    line = printable(title)
    assert len(line) <= 500
    assert all(character >= " " and character not in "\x7f\u2028\u2029" for character in line), repr(line)


_STAT = b"1234 (llama-server) S 1 1234 1234 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 9 0 4242 1 1 1"
_STATUS = [_STAT, _STAT.replace(b"llama-server", b") R 7 (x"), b"1 (", b""]
_ENVIRON = [b"OFFLOADD_INSTANCE=a-1@beef\0OFFLOADD_DATA_DIR=/x\0PATH=/bin\0", b"=\0==\0\xff=\xff"]
_MOUNTS = [b"30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", b"31 23 0:26 /a/b /x rw - cgroup2 c rw\n", b"- cgroup2 \n"]
_OWN = [b"0::/system.slice/a.service\n", b"0::/\n", b"5:memory:/a\n0::/../..\n", b"0::\n", b"1:memory,cpu:/x:y\n"]
_FDINFO = [b"pos:\t0\ndrm-driver:\tamdgpu\ndrm-client-id:\t7\ndrm-pdev:\t0000:03:00.0\ndrm-memory-vram:\t128 KiB\n"]
_EVENTS = [b"oom_kill 3\npopulated 1\n", b"oom 0\noom_kill -1\n", b"nr_free 1\noom_kill 99999999999999999999\n"]


def _proc(rng: Random) -> None:
    """What /proc tells of one process."""
    (_PLACE / "7").mkdir(exist_ok=True)
    for name, corpus in (("stat", _STATUS), ("environ", _ENVIRON), ("statm", [b"10 5 1 0 0 0 0"]), ("comm", [b"a b"])):
        (_PLACE / "7" / name).write_bytes(mutated(rng, corpus, (b"(", b")", b" ", b"\0", b"=")))
    with patch.object(identity, "_PROC", _PLACE), patch.object(processes, "_PROC", _PLACE):
        found = identity.stat(7)
        assert found is None or found.pid == 7
        names = identity.environment(7, frozenset({"OFFLOADD_INSTANCE"}))
        assert set(names) <= {"OFFLOADD_INSTANCE"}
        processes.tree(7, processes.read_children())
        size = processes.own_memory([7])
        assert size is None or size >= 0
        processes.program_name(7)


def _groups(rng: Random) -> None:
    """Control groups: membership, mounts, limits and books."""
    for name, corpus in (("cgroup", _OWN), ("mountinfo", _MOUNTS)):
        (_PLACE / name).write_bytes(mutated(rng, corpus, (b"0::", b"/", b"..", b" - ", b"cgroup2 ")))
    for name in ("memory.max", "memory.current", "memory.high", "memory.peak"):
        (_PLACE / name).write_bytes(mutated(rng, [b"max\n", b"1073741824\n", b"0\n"], most=2))
    for name in ("memory.events", "cgroup.events", "memory.stat", "vmstat"):
        (_PLACE / name).write_bytes(mutated(rng, _EVENTS, (b"oom_kill ", b"populated ")))
    (_PLACE / "cgroup.procs").write_bytes(b"".join(b"%d\n" % rng.randrange(10**6) for _ in range(rng.randrange(4))))
    with patch.object(cgroups, "_SELF", _PLACE), patch.object(evidence, "_VMSTAT", _PLACE / "vmstat"):
        cgroups._own_folder()
        evidence.machine_oom_kills()
    group = cgroups.Group(_PLACE)
    assert group.evidence().oom_kills >= 0
    group.pids()
    ram = within_cgroups(Ram(2**34, 2**33), cgroups=_PLACE, membership=_PLACE / "cgroup")
    assert 0 <= ram.free <= ram.total <= 2**34


def _drm(rng: Random) -> None:
    """What descriptors of graphics devices tell; the driver writes it, of processes that are not ours."""
    info = _PLACE / "proc/9/fdinfo"
    if not info.exists():
        info.mkdir(parents=True)
        (_PLACE / "proc/9/fd").mkdir()
        (_PLACE / "proc/9/fd/3").symlink_to("/dev/dri/renderD128")
    (info / "3").write_bytes(mutated(rng, _FDINFO, (b"drm-memory-vram:\t", b"KiB", b"\n", b":")))
    for uses in read_uses(_PLACE / "proc", driver="amdgpu").values():
        assert all(size is None or size >= 0 for size in uses.values())


def _cut_anywhere(rng: Random) -> None:
    """The tool of the other rows: pieces are the whole."""
    data = rng.randbytes(rng.randrange(50))
    assert b"".join(cut(rng, data)) == data


PARSERS = (
    Parser("GGUF headers", "HeaderError that names file and byte", _gguf, 2500),
    Parser("config.json and safetensors", "HeaderError that names file and byte", _folder, 1500, 48 * MIB),
    Parser("metadata of models", "names have a name's characters; templates are text", _metadata, 2000),
    Parser("/proc of a process", "unknown, or what it says", _proc, 800),
    Parser("control groups", "never more memory than there is; counts are not negative", _groups, 400),
    Parser("descriptors of GPUs", "unknown, or not negative", _drm, 800),
    Parser("pieces", "together they are the whole", _cut_anywhere, 200),
)

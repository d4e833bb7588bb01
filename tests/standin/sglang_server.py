#!/usr/bin/env python3
"""A stand-in for SGLang's server, as far as docs/adding-an-engine.md uses it: its flags, in front of the stand-in for vLLM."""

from __future__ import annotations

import argparse
import sys

import vllm_http
import vllm_server

parser = argparse.ArgumentParser(prog="launch_server.py")
parser.add_argument("--model-path", required=True)
parser.add_argument("--served-model-name", required=True)
parser.add_argument("--host", default="127.0.0.1")
parser.add_argument("--port", default="30000")
parser.add_argument("--context-length", default="2048")
parser.add_argument("--max-running-requests", default="8")
parser.add_argument("--kv-cache-dtype", default="auto")
parser.add_argument("--mem-fraction-static", default="0.9")
parser.add_argument("--tp-size", default="1")
parser.add_argument("--disable-cuda-graph", action="store_true")


class Server(vllm_http.Server):
    """With the one path more that the page asks."""

    def _app(self) -> vllm_http.web.Application:
        app = super()._app()
        app.router.add_get("/health_generate", self._health)
        return app


if __name__ == "__main__":
    given = parser.parse_args()
    vllm_http.Server = Server  # type: ignore[misc]
    flags = ["--served-model-name", given.served_model_name, "--host", given.host, "--port", given.port]
    flags += ["--max-model-len", given.context_length, "--max-num-seqs", given.max_running_requests]
    sys.exit(vllm_server.main(["serve", given.model_path, *flags]))

"""The environment that engines are given: built, not inherited."""

from __future__ import annotations

import os
from collections.abc import Mapping

_INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "XDG_CACHE_HOME", "SSL_CERT_FILE")
"""Variables that pass from the daemon to engines. All others would be surprises: LLAMA_ARG_*, VLLM_PORT, keys of the daemon."""


def engine_environment(added: Mapping[str, str]) -> dict[str, str]:
    """A whole environment: the few variables that pass, and `added`."""
    return {**{name: os.environ[name] for name in _INHERITED if name in os.environ}, **added}

"""The environment that engines are given: built, not inherited."""

from __future__ import annotations

import os
from collections.abc import Mapping

_INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "XDG_CACHE_HOME", "SSL_CERT_FILE")
"""Variables that pass from the daemon to engines. All others would be surprises: LLAMA_ARG_*, VLLM_PORT, keys of the daemon."""
_OUR_FOLDERS = frozenset({"TMPDIR", "XDG_CACHE_HOME"})
"""Of these, what another user has no business in."""


def engine_environment(added: Mapping[str, str], account: Mapping[str, str] | None = None) -> dict[str, str]:
    """A whole environment: the few variables that pass, and `added`. `account` says who it is when that is another user than we."""
    passing = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    if account is not None:
        passing = {name: value for name, value in passing.items() if name not in _OUR_FOLDERS} | dict(account)
    return {**passing, **added}

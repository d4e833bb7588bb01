"""Engines' adapters, one module each; the module's name is the name written in the config."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import cast

from offloadd.backends.base import Backend


def discover() -> Mapping[str, Backend]:
    """Import every adapter of this package: each module but `base` ends in `BACKEND = …`."""
    found: dict[str, Backend] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        adapter = cast(Backend, importlib.import_module(f"{__name__}.{module.name}").BACKEND)
        found[module.name] = adapter
    return found

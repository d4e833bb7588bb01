"""Engines' adapters, one module each; the module's name is the name written in the config."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import cast

from offloadd.backends.base import Backend


def discover() -> Mapping[str, Backend]:
    """Every adapter of this package: a module that ends in `BACKEND = …`. The others are what adapters share."""
    found: dict[str, Backend] = {}
    for module in pkgutil.iter_modules(__path__):
        adapter = getattr(importlib.import_module(f"{__name__}.{module.name}"), "BACKEND", None)
        if adapter is not None:
            found[module.name] = cast(Backend, adapter)
    return found

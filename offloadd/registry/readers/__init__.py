"""Bounded readers of model files: what a header says of the memory that the model will take."""

from __future__ import annotations

from pathlib import Path

from offloadd.registry.readers.adapters import CONFIG, read_adapter
from offloadd.registry.readers.errors import HeaderError
from offloadd.registry.readers.gguf import read_header
from offloadd.registry.readers.safetensors import read_folder
from offloadd.registry.readers.shapes import read_shape
from offloadd.state.shape import ModelShape

__all__ = ["HeaderError", "read_model"]


def read_model(path: Path) -> ModelShape:
    """The shape of the model at `path`: a GGUF file, one shard of several, or a folder in Hugging Face's layout,
    which may be that of an adapter.

    Reads headers only, in milliseconds; still it is disk access, for a thread rather than the event loop. Raises `HeaderError`.
    """
    if path.is_dir():
        return read_adapter(path) if (path / CONFIG).is_file() else read_folder(path)
    return read_shape(read_header(path))

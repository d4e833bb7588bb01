"""LoRA adapters in PEFT's layout: a folder with `adapter_config.json`, and weights of the adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from offloadd.registry.readers.errors import HeaderError
from offloadd.registry.readers.hub_extras import license_of
from offloadd.registry.readers.safetensors import MAX_TENSORS, read_tensors
from offloadd.registry.readers.source import open_source
from offloadd.state.shape import ModelShape
from offloadd.units import Bytes

CONFIG = "adapter_config.json"
MAX_CONFIG = 4 * 2**20
MAX_RANK = 2**16
MAX_FILES = 64
_MERGE = "merge it into its base model"


class _Config(msgspec.Struct):
    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    r: int = 8
    rank_pattern: dict[str, int] | None = None
    use_dora: bool = False
    modules_to_save: Any = None


def read_adapter(folder: Path) -> ModelShape:
    """What the adapter in `folder` is, and for which model. Raises `HeaderError`, also for one that no engine applies."""
    path = folder / CONFIG
    config = _config(path)
    oddity = _oddity(config)
    if oddity:
        raise HeaderError(path, 0, f"the adapter {oddity}, which engines do not apply: plain LoRA only", hint=_MERGE)
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if not all(0 < rank <= MAX_RANK for rank in ranks):
        raise HeaderError(path, 0, "its rank is impossible")
    elements, size = _weights(folder)
    return ModelShape(
        architecture="",  # which it does not say
        kind="adapter",
        name=folder.name,
        parameters=elements,
        other=Bytes(size),
        base=config.base_model_name_or_path or "",
        rank=max(ranks),
        license=license_of(folder),
    )


def _oddity(config: _Config) -> str:
    if config.peft_type.upper() != "LORA":
        return f"is of the type {config.peft_type!r:.40}"
    if config.use_dora:
        return "uses DoRA"
    return "brings whole modules (modules_to_save)" if config.modules_to_save else ""


def _config(path: Path) -> _Config:
    with open_source(path, 2 * MAX_CONFIG) as source:
        text = source.take(source.size, MAX_CONFIG)
    try:
        return msgspec.json.decode(text, type=_Config)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HeaderError(path, 0, f"cannot be read: {error}") from error


def _weights(folder: Path) -> tuple[int, int]:
    """Elements and bytes of all its tensors."""
    usual = folder / "adapter_model.safetensors"
    files = [usual] if usual.is_file() else sorted(folder.glob("*.safetensors"))[:MAX_FILES]
    if not files:
        raise HeaderError(folder, 0, "there is no *.safetensors file")
    count = elements = size = 0
    for path in files:
        for tensor in read_tensors(path):
            count += 1
            if count > MAX_TENSORS:
                raise HeaderError(path, 0, f"the adapter has more than the {MAX_TENSORS} tensors that are read")
            elements, size = elements + tensor.elements, size + tensor.bytes
    return elements, size

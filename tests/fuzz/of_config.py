"""What operators write, and what other programs' configs hold."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from offloadd.backends import discover
from offloadd.config import SourceText, load
from offloadd.config.listen import parse_listen
from offloadd.config.secrets import expand, hide_in_url
from offloadd.errors import OffloaddError, PermanentError
from offloadd.migrate.llama_swap import import_llama_swap
from offloadd.migrate.ollama import import_ollama
from offloadd.migrate.presets import import_presets
from offloadd.registry.hub.choose import RemoteFile, choose, parse_wanted
from offloadd.units import parse_bytes, parse_seconds, parse_size
from tests.fuzz.mutate import NUMBERS, bent, mutated, mutated_text
from tests.fuzz.table import MIB, Parser

SAMPLES = Path(__file__).parents[1] / "samples"
BACKENDS = discover()
YAML = [path.read_bytes() for path in sorted(SAMPLES.glob("*/*.yaml")) if "import" not in path.parts]
JSON = [path.read_bytes() for path in sorted(SAMPLES.glob("*/*.json"))]
_TREES: list[Any] = [yaml.safe_load((SAMPLES / "good" / name).read_text()) for name in ("whole.yaml", "keys.yaml", "aliases.yaml")]
_TOKENS = (
    b"&a ", b"*a", b"<<: *a", b"!!python/object", b"? ", b"- ", b": ", b"|\n", b">-\n", b"%YAML 9\n", b"---\n", b"\t", b"${env:A}",
    b"${file:/x}", b"${", b"1e999", b"0x1F", b"0o7", b".inf", b"models:", b"backends:", b"\\u0000", b"\\ud800", b"512MiB",
    "²".encode(), "\u2028".encode(),
)  # fmt: skip
_CONTROLS = {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))} | {"\u2028", "\u2029"}


class Vault:
    """Secrets that are always there."""

    def env(self, name: str) -> str | None:
        return "value" if len(name) % 2 else None

    def file(self, path: str) -> str:
        if len(path) % 2:
            raise OSError(2, "No such file or directory")
        return "secret\n"


def _loaded(data: bytes) -> None:
    text = data.decode(errors="replace")
    found = load([SourceText("c.yaml", text)], backends=BACKENDS, secrets=Vault(), trouble=lambda user, group: ("no", "hint"))
    assert found.ok == (not found.errors)
    assert found.ok or found.errors
    lines = 2 + sum(map(text.count, "\n\r\x85\u2028\u2029"))  # all that ends a line in YAML
    for each in found.diagnostics:
        assert 1 <= each.mark.line <= lines, each
        assert each.mark.column >= 1, each
    assert not _CONTROLS & set(found.render())
    json.dumps(found.shown)


def _yaml(rng: Random) -> None:
    _loaded(mutated(rng, YAML, _TOKENS))


def _json(rng: Random) -> None:
    _loaded(mutated(rng, JSON, _TOKENS))


def _tree(rng: Random) -> None:
    """Good syntax with values of wrong kinds: what the schema and the rules see."""
    _loaded(json.dumps(bent(rng, rng.choice(_TREES))).encode(errors="replace"))


_QUANTITIES = ("512MiB", "6GiB", "20%", "90s", "10m", "1.5h", "1 d", "0", "100 ms", "9e9GiB", "1_0s", "٣s", "½GiB", "+1s", "-1s")


def _units(rng: Random) -> None:
    text = mutated_text(rng, _QUANTITIES, ("GiB", "%", "ms", ".", "e", "nan", "inf"))
    for parse in (parse_bytes, parse_size, parse_seconds):
        try:
            found = parse(text)
        except ValueError:
            continue
        assert 0 <= float(getattr(found, "percent", found)) < float("inf"), (text, found)


_ADDRESSES = ("127.0.0.1:9000", "[::1]:9000", "unix:/run/a.sock", "localhost:1", "[fe80::1%eth0]:80", ":9000", "*:1", "unix:@a")


def _listen(rng: Random) -> None:
    try:
        parse_listen(mutated_text(rng, _ADDRESSES, ("unix:", "[", "]", ":", "%", "::")))
    except ValueError:
        return


_REFERENCES = ("${env:A}", "a ${file:/x} b", "$${", "${port}", "postgresql://u:p@h/d?password=x", "https://a:b@c/", "${${env:A}}")


def _references(rng: Random) -> None:
    text = mutated_text(rng, _REFERENCES, ("${", "}", "env:", "file:/", "://", "@", "password="))
    hide_in_url(text)
    try:
        expand(text, Vault())
    except ValueError:
        return


def _imported(
    name: str, importer: Callable[[Path], Any], corpus: list[bytes], tokens: tuple[bytes, ...]
) -> Callable[[Random], None]:
    def run(rng: Random) -> None:
        with tempfile.TemporaryDirectory(prefix="offloadd-fuzz-") as folder:
            path = Path(folder) / name
            path.write_bytes(mutated(rng, corpus, tokens))
            try:
                made = importer(path)
            except PermanentError:
                return
            made.text()

    return run


_FLAGS = (
    b"--model ",
    b"--port ${PORT}",
    b"-ngl 99",
    b"--host 0.0.0.0",
    b"--api-key x",
    b"'",
    b'"',
    b"\\\n",
    b"$(id)",
    b"; rm",
    b"env A=b ",
)
_MANIFEST = json.loads(
    '{"layers":[{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:' + "a" * 64 + '","size":3},'
    '{"mediaType":"application/vnd.ollama.image.params","digest":"sha256:' + "b" * 64 + '","size":3}]}'
)


def _ollama_store(rng: Random) -> None:
    with tempfile.TemporaryDirectory(prefix="offloadd-fuzz-") as folder:
        store = Path(folder)
        place = store / "manifests/registry.ollama.ai/library/m"
        place.mkdir(parents=True)
        (store / "blobs").mkdir()
        text = json.dumps(bent(rng, _MANIFEST)).encode(errors="replace")
        (place / "latest").write_bytes(mutated(rng, [text], most=rng.choice((0, 3))))
        (store / "blobs" / f"sha256-{'a' * 64}").write_bytes(b"GGUF")
        (store / "blobs" / f"sha256-{'b' * 64}").write_bytes(mutated(rng, [b'{"num_ctx": 4096, "stop": ["a"]}']))
        try:
            import_ollama(store).text()
        except PermanentError:
            return


_HUB = ("ggml-org/SmolLM2-GGUF:Q4_K_M", "a/b", "hf.co/a/b", "a/b:latest", "../x/y")
_FILES = (
    "m-Q4_K_M.gguf",
    "m-00001-of-00003.gguf",
    "model.safetensors",
    "config.json",
    "../x.gguf",
    "/etc/x.gguf",
    "a/b/m-Q8_0.gguf",
)


def _hub(rng: Random) -> None:
    """A repository's listing may hold any name; nothing outside of its folder is ever chosen."""
    files = [
        RemoteFile(mutated_text(rng, _FILES, ("..", "/", "Q4_K_M", "mmproj")), rng.choice(NUMBERS[:9]))  # type: ignore[arg-type]
        for _ in range(rng.randrange(8))
    ]
    try:
        wanted = parse_wanted(mutated_text(rng, _HUB, (":", "/", "..")))
        chosen = choose(wanted, files)
    except OffloaddError:
        return
    assert ".." not in wanted.repository
    for file in chosen:
        assert not file.path.startswith("/")
        assert ".." not in file.path.split("/")


_IMPORTS = SAMPLES / "import"
_SWAP = [(_IMPORTS / "llama-swap.yaml").read_bytes()]
_INI = [(_IMPORTS / "presets.ini").read_bytes()]
_MODELFILE = [(_IMPORTS / "Modelfile").read_bytes()]
_UNIT = (b"FROM ", b"PARAMETER ", b'"""', b"TEMPLATE ", b"ADAPTER ")

PARSERS = (
    Parser(
        "config in YAML", "only diagnostics, each at a place of the text; nothing in them steers a terminal", _yaml, 300, 64 * MIB
    ),
    Parser("config in JSON", "the same", _json, 600, 64 * MIB),
    Parser("config of wrong kinds", "the same", _tree, 300, 64 * MIB),
    Parser("sizes and spans", "ValueError, or a finite number that is not negative", _units, 4000),
    Parser("listen addresses", "ValueError", _listen, 4000),
    Parser("references to secrets", "ValueError", _references, 4000),
    Parser(
        "llama-swap's config", "PermanentError", _imported("c.yaml", import_llama_swap, _SWAP, (*_FLAGS, *_TOKENS)), 150, 64 * MIB
    ),
    Parser("llama-server's presets", "PermanentError", _imported("p.ini", import_presets, _INI, _FLAGS), 300),
    Parser("Modelfiles", "PermanentError", _imported("Modelfile", import_ollama, _MODELFILE, _UNIT), 500),
    Parser("Ollama's stores", "PermanentError", _ollama_store, 200),
    Parser("listings of a hub", "PermanentError; nothing is chosen that would land elsewhere", _hub, 2000),
)

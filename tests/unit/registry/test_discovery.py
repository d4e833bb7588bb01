"""What a look at folders finds, what it is called, and what a second look costs."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from offloadd.registry.discovery import headers, tree
from offloadd.registry.discovery.names import MAX_NAME, assign, slug
from offloadd.registry.discovery.scan import Scan, Scanner
from offloadd.registry.discovery.stores import Store, stores_of, well_known
from offloadd.registry.readers import read_model
from offloadd.state.found import Found, Shelf
from offloadd.state.ids import ModelName

OLD_NS = 10**18
_TYPES = {str: 8, int: 4, bool: 7}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(path: Path, *, age_s: float = 3600, cut: int = 0, **keys: Any) -> Path:
    """A small whole GGUF file; keys with `__` for dots."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"general__architecture": "llama", "llama__block_count": 1, "llama__embedding_length": 64, **keys}
    pairs = []
    for key, value in metadata.items():
        packed = text(value) if isinstance(value, str) else struct.pack("<?" if isinstance(value, bool) else "<I", value)
        pairs.append(text(key.replace("__", ".")) + struct.pack("<I", _TYPES[type(value)]) + packed)
    tensors = [text("blk.0.attn_q.weight") + struct.pack("<IqqIQ", 2, 64, 64, 1, 0)]
    head = b"GGUF" + struct.pack("<Iqq", 3, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    data = head + bytes(-len(head) % 32) + hashlib.sha256(path.name.encode()).digest() * 256
    path.write_bytes(data[: len(data) - cut])
    when = time.time() - age_s
    os.utime(path, (when, when))
    return path


def projector(path: Path, size: int = 64, **keys: Any) -> Path:
    vision = {"clip__has_vision_encoder": True, "clip__vision__projection_dim": size, **keys}
    return gguf(path, general__architecture="clip", general__type="mmproj", **vision)


def folder_of_weights(path: Path, config: Mapping[str, Any] | None = None, **files: str) -> Path:
    path.mkdir(parents=True)
    header = b'{"model.layers.0.w": {"dtype": "F16", "shape": [4, 4], "data_offsets": [0, 32]}}'
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    shape = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 4, "num_attention_heads": 1}
    (path / "config.json").write_text(json.dumps({**shape, **(config or {})}))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    for each in path.iterdir():
        os.utime(each, ns=(OLD_NS, OLD_NS))
    return path


class Disk:
    """One folder that is looked at again and again."""

    def __init__(self, path: Path, kind: str = "models_path", shelf: Shelf | None = None) -> None:
        self.path = path
        self.stores = [Store(kind, str(path))]
        self.scanner = Scanner(read_model, shelf)

    def scan(self) -> Scan:
        return self.scanner.scan(self.stores)

    def found(self) -> dict[str, Found]:
        return {found.name: found for found in self.scan().found.values()}

    def problem(self, name: str) -> str:
        return self.found()[name].facts.problem


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    (tmp_path / "models").mkdir()
    return Disk(tmp_path / "models")


def test_a_file_is_what_its_header_says(disk: Disk) -> None:
    template = "{% if tools %}{{ __import__('os').system('false') }}{% endif %}"
    gguf(
        disk.path / "Llama-3.2-1B-Q4_K_M.gguf",
        general__file_type=15,
        general__license="llama3.2",
        llama__context_length=8192,
        tokenizer__chat_template=template,
    )
    gguf(disk.path / "bge.gguf", general__architecture="bert", bert__block_count=1, bert__pooling_type=2)
    gguf(disk.path / "rank.gguf", llama__pooling_type=4)
    found = disk.found()
    one = found["llama-3.2-1b-q4_k_m"]
    assert one.facts.shape is not None
    shape = one.facts.shape
    assert (shape.architecture, shape.quantization, shape.context_train, shape.license) == ("llama", "Q4_K_M", 8192, "llama3.2")
    assert (shape.parameters, shape.capabilities) == (64 * 64, ("chat", "completion", "tools"))
    assert one.aliases == ("Llama-3.2-1B-Q4_K_M",)
    assert (one.facts.problem, one.facts.size) == ("", (disk.path / "Llama-3.2-1B-Q4_K_M.gguf").stat().st_size)
    assert one.facts.content
    assert found["bge"].facts.shape.capabilities == ("embedding",)  # type: ignore[union-attr]
    assert found["rank"].facts.shape.capabilities == ("rerank",)  # type: ignore[union-attr]


def test_a_projector_is_paired_with_the_models_that_it_is_made_for(disk: Disk) -> None:
    gguf(disk.path / "gemma-3-4b-it-Q4_K_M.gguf")
    gguf(disk.path / "gemma-3-4b-it-Q8_0.gguf")
    gguf(disk.path / "other-7b.gguf", llama__embedding_length=128)
    gguf(disk.path / "third-4b.gguf", general__architecture="qwen2", qwen2__embedding_length=64, qwen2__block_count=1)
    projector(disk.path / "mmproj-gemma-3-4b-it-f32.gguf", general__file_type=0)
    best = projector(disk.path / "mmproj-gemma-3-4b-it-f16.gguf", general__file_type=1)
    gguf(disk.path / "repo" / "Vision-Q4_0.gguf")
    beside = projector(disk.path / "repo" / "mmproj-BF16.gguf")
    found = disk.found()
    paired = {name: each.projector.path if each.projector else None for name, each in found.items()}
    assert paired == {
        "gemma-3-4b-it-q4_k_m": str(best),
        "gemma-3-4b-it-q8_0": str(best),
        "other-7b": None,
        "third-4b": None,
        "vision-q4_0": str(beside),
    }
    assert "vision" in found["vision-q4_0"].facts.shape.capabilities  # type: ignore[union-attr]
    assert "vision" not in found["other-7b"].facts.shape.capabilities  # type: ignore[union-attr]


def test_an_adapter_is_paired_with_its_base(disk: Disk) -> None:
    adapter: Mapping[str, Any] = {"general__type": "adapter", "adapter__type": "lora"}
    base = gguf(disk.path / "base" / "Qwen2.5-7B-Instruct-Q4_K_M.gguf", general__name="Qwen2.5 7B Instruct")
    gguf(disk.path / "base" / "Other-1B.gguf", general__name="Other 1B")
    one = gguf(disk.path / "loras" / "pirate.gguf", general__base_model__0__name="Qwen2.5 7B Instruct", **adapter)
    gguf(disk.path / "loras" / "lost.gguf", general__base_model__0__name="Nobody 3B", **adapter)
    gguf(disk.path / "pair" / "Solo-1B.gguf")
    gguf(disk.path / "pair" / "nameless.gguf", **adapter)
    found = disk.found()
    assert found["pirate"].is_adapter
    assert found["pirate"].base is not None
    assert found["pirate"].base.path == str(base) == found["pirate"].loaded.path
    assert found["qwen2.5-7b-instruct-q4_k_m"].adapters == (str(one),)
    assert found["nameless"].base is not None
    assert found["nameless"].base.path.endswith("Solo-1B.gguf")
    assert 'its base model "Nobody 3B" was not found' in found["lost"].facts.problem


def adapter_folder(path: Path, **config: Any) -> Path:
    """As PEFT saves one."""
    folder_of_weights(path, adapter_config__json=json.dumps({"peft_type": "LORA", "r": 24, **config}))
    (path / "config.json").unlink()
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    return path


def test_an_adapter_in_the_hubs_layout_finds_its_base_by_path_repository_or_name(disk: Disk) -> None:
    mine = folder_of_weights(disk.path / "org" / "Chat-1B")
    other = folder_of_weights(disk.path / "else" / "Chat-1B")
    lone = folder_of_weights(disk.path / "lone-2b")
    wanted = {
        "by-path": (str(other), other),
        "by-way": ("../org/Chat-1B", mine),
        "by-repository": ("Org/chat-1b", mine),
        "by-name": ("/home/trainer/runs/Lone_2B", lone),
        "by-none": ("org/Chat-7B", None),
        "nameless": (None, None),
    }
    for name, (base, _) in wanted.items():
        adapter_folder(disk.path / name, base_model_name_or_path=base, rank_pattern={"q_proj": 32})
    found = disk.found()
    bases = {name: each.base.path if (each := found[name]).base else None for name in wanted}
    assert bases == {name: str(base) if base else None for name, (_, base) in wanted.items()}
    shape = found["by-path"].facts.shape
    assert shape is not None
    assert (shape.kind, shape.rank, shape.parameters, shape.weights, found["by-path"].facts.problem) == ("adapter", 32, 16, 32, "")
    assert 'its base model "org/Chat-7B" was not found' in found["by-none"].facts.problem
    assert "its base model was not found" in found["nameless"].facts.problem
    (other / "model.safetensors").unlink()
    assert disk.found()["by-path"].base.path == str(mine)  # type: ignore[union-attr]  (by its name, then)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "is of the type 'IA3'"),
        ({"use_dora": True}, "uses DoRA"),
        ({"modules_to_save": ["lm_head"]}, "brings whole modules"),
        ({"r": 0}, "rank is impossible"),
        ({"r": "many"}, "cannot be read"),
    ],
)
def test_an_adapter_that_no_engine_applies_is_told_for_what_it_is(disk: Disk, config: Mapping[str, Any], said: str) -> None:
    folder_of_weights(disk.path / "base")
    adapter_folder(disk.path / "odd", **{"base_model_name_or_path": "base", **config})
    assert said in disk.problem("odd")


def test_a_split_model_is_one_and_says_what_is_missing(disk: Disk) -> None:
    names = [f"big-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        gguf(disk.path / name, split__no=number, split__count=3, split__tensors__count=3)
    found = disk.found()["big-q8_0"]
    assert (found.facts.problem, found.path) == ("", str(disk.path / names[0]))
    assert found.facts.size == sum((disk.path / name).stat().st_size for name in names)
    (disk.path / names[1]).unlink()
    assert "part 2 of 3 is missing" in disk.problem("big-q8_0")
    (disk.path / names[0]).unlink()
    assert "part 1 of 3 is missing" in disk.problem("big-q8_0")


def test_a_folder_of_safetensors_is_a_model(disk: Disk) -> None:
    folder_of_weights(
        disk.path / "org" / "Chat-1B",
        tokenizer_config__json=json.dumps({"chat_template": "{{ tools }}"}),
        README__md="---\nlicense: apache-2.0\n---\n# hello",
    )
    folder_of_weights(disk.path / "embed", {"architectures": ["BertModel"]}, modules__json="[]")
    folder_of_weights(disk.path / "judge", {"architectures": ["XForSequenceClassification"]})
    folder_of_weights(disk.path / "lora", adapter_config__json="{}")
    found = disk.found()
    chat = found["chat-1b"].facts.shape
    assert chat is not None
    assert (chat.capabilities, chat.license, chat.parameters) == (("chat", "completion", "tools"), "apache-2.0", 16)
    assert found["chat-1b"].aliases == ("Chat-1B", "org/Chat-1B")
    assert found["embed"].facts.shape.capabilities == ("embedding",)  # type: ignore[union-attr]
    assert found["judge"].facts.shape.capabilities == ("rerank",)  # type: ignore[union-attr]
    assert found["lora"].is_adapter
    (disk.path / "org" / "Chat-1B" / "config.json").unlink()
    assert "chat-1b" not in disk.found()


def test_ollamas_store_is_read_by_its_manifests(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    layers = []
    for kind, write in (("model", gguf), ("projector", projector)):
        blob = write(blobs / f"sha256-{hashlib.sha256(kind.encode()).hexdigest()}")
        layers.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": blob.name.replace("-", ":"), "size": 1})
    for name in ("registry.ollama.ai/library/llama3.2/latest", "registry.ollama.ai/library/llama3.2/1b", "hub/me/mine/latest"):
        manifest = tmp_path / "manifests" / name
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    broken = tmp_path / "manifests/registry.ollama.ai/library/broken/latest"
    broken.parent.mkdir()
    broken.write_text("not JSON")
    found = Disk(tmp_path, "ollama").found()
    assert set(found) == {"me-mine", "broken"}  # all names lead to one file, which counts once
    assert found["me-mine"].aliases == ("me/mine:latest", "me/mine", "llama3.2-1b", "llama3.2:1b", "llama3.2", "llama3.2:latest")
    assert found["me-mine"].facts.path == str(blobs / layers[0]["digest"].replace(":", "-"))
    assert found["me-mine"].projector is not None
    assert "cannot be understood" in found["broken"].facts.problem


def test_the_hubs_cache_is_read_by_its_snapshots(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--Name-GGUF"
    for revision, marks in (("aaa", "1"), ("bbb", "2")):
        blob = gguf(repository / "blobs" / marks, general__name=marks)
        link = repository / "snapshots" / revision / "Name-Q4_0.gguf"
        link.parent.mkdir(parents=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    found = Disk(tmp_path, "huggingface").found()
    assert list(found) == ["name-q4_0"]
    assert found["name-q4_0"].aliases == ("Name-Q4_0", "org/Name-GGUF:Q4_0")
    assert found["name-q4_0"].path.endswith("snapshots/bbb/Name-Q4_0.gguf")


def test_llama_cpps_cache_has_readable_names(tmp_path: Path) -> None:
    gguf(tmp_path / "ggml-org_gemma-3-4b-it-GGUF_gemma-3-4b-it-Q4_K_M.gguf")
    gguf(tmp_path / "mine.gguf")
    assert set(Disk(tmp_path, "llama.cpp").found()) == {"gemma-3-4b-it-q4_k_m", "mine"}


def test_well_known_folders_follow_the_environment() -> None:
    stores = {(store.kind, store.path) for store in well_known({"HOME": "/home/me", "HF_HOME": "/hf", "OLLAMA_MODELS": "/o"})}
    assert {("huggingface", "/hf/hub"), ("ollama", "/o"), ("llama.cpp", "/home/me/.cache/llama.cpp")} <= stores
    assert [store.kind for store in stores_of(["/a", "/b"], [], {})] == ["models_path", "models_path"]


def test_nothing_is_read_twice_and_nothing_new_is_the_same_answer(disk: Disk) -> None:
    for number in range(5):
        gguf(disk.path / f"m{number}" / "m.gguf")
    first = disk.scan()
    assert (disk.scanner.read, len(first.found)) == (5, 5)
    assert disk.scan() is first
    gguf(disk.path / "m2" / "m.gguf", general__name="another")
    second = disk.scan()
    assert (disk.scanner.read, second is first) == (6, False)
    again = Disk(disk.path, shelf=Shelf(present=second.found, names={}))
    assert again.scan().found == second.found
    assert again.scanner.read == 0  # what an earlier daemon read is true as long as the files are the same


def test_a_renamed_file_has_another_name_and_the_same_content(disk: Disk) -> None:
    path = gguf(disk.path / "one.gguf")
    before = disk.found()["one"]
    path.rename(disk.path / "two.gguf")
    after = disk.found()
    assert list(after) == ["two"]
    assert after["two"].facts.content == before.facts.content
    (disk.path / "two.gguf").unlink()
    assert disk.found() == {}


def test_what_is_not_whole_is_told_for_what_it_is(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf(disk.path / "cut.gguf", cut=100)
    gguf(disk.path / "new.gguf", cut=100, age_s=1)
    (disk.path / "empty.gguf").write_bytes(b"")
    os.utime(disk.path / "empty.gguf", ns=(OLD_NS, OLD_NS))
    gguf(disk.path / "started.gguf")
    (disk.path / "started.gguf.aria2").write_bytes(b"")
    (disk.path / "fresh.gguf").write_bytes((gguf(disk.path / "whole.gguf")).read_bytes())
    os.mkfifo(disk.path / "pipe.gguf")
    (disk.path / "loop.gguf").symlink_to("loop.gguf")
    (disk.path / "away.gguf").symlink_to("/nowhere")
    problems = {name: each.facts.problem for name, each in disk.found().items()}
    assert problems.pop("whole") == ""
    said = {
        "cut": "is truncated: ",
        "new": "is still being written",
        "empty": "is empty",
        "started": "is still being downloaded (started.gguf.aria2 is there)",
        "fresh": "is still being written",
        "pipe": "is not a regular file",
        "loop": "symbolic links",
        "away": "is a link to a file that is not there",
    }
    assert problems.keys() == said.keys()
    for name, words in said.items():
        assert words in problems[name], (name, problems[name])
    due = disk.scan().due
    assert due is not None
    assert due <= headers.SETTLE_S
    monkeypatch.setattr(headers, "SETTLE_S", 0.0)
    assert disk.problem("fresh") == ""


def test_names_that_are_weird(disk: Disk) -> None:
    gguf(disk.path / "Ünïcode Modèl (v2)!.gguf")
    gguf(disk.path / "日本語.gguf")
    gguf(disk.path / "line\nbreak.gguf")
    gguf(disk.path / ("x" * 200 + ".gguf"))
    gguf(disk.path / "a'; DROP TABLE found; --.gguf")
    raw = os.fsencode(disk.path) + b"/\xff\xfe.gguf"
    with open(raw, "wb") as file:
        file.write(b"GGUF")
    found = disk.found()
    assert {"unicode-model-v2", "line-break", "a-drop-table-found"} <= found.keys()
    assert all(len(name) <= MAX_NAME and slug(name, "") == name for name in found)
    (odd,) = (each for each in found.values() if "UTF-8" in each.facts.problem)
    odd.path.encode()  # which can be shown and kept
    assert len(found) == 6


def test_names_are_stable_and_never_two_alike(disk: Disk) -> None:
    gguf(disk.path / "b" / "model.gguf")
    assert list(disk.found()) == ["model"]
    gguf(disk.path / "a" / "model.gguf")
    gguf(disk.path / "c" / "a" / "model.gguf")
    found = {name: each.path for name, each in disk.found().items()}
    assert found["model"] == str(disk.path / "b" / "model.gguf")  # whoever came first keeps it
    assert found["a-model"] == str(disk.path / "a" / "model.gguf")
    assert len(found) == 3
    assert assign({"/x/m": "m", "/y/m": "m"}, {"/y/m": "m"}) == {"/y/m": "m", "/x/m": "x-m"}
    assert assign({"/x/n": "n"}, {"/x/n": "m"}) == {"/x/n": "n"}  # it was renamed


def test_circles_of_links_and_two_ways_to_a_file_are_seen_once(disk: Disk) -> None:
    path = gguf(disk.path / "deep" / "m.gguf")
    (disk.path / "deep" / "back").symlink_to(disk.path)
    (disk.path / "again").symlink_to(disk.path / "deep")
    (disk.path / "link.gguf").symlink_to(path)
    os.link(path, disk.path / "zz-hard.gguf")
    assert len(disk.found()) == 1
    assert disk.scan().problems == {}


def test_bounds_are_kept_and_told(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_FOLDERS", 5)
    for number in range(20):
        gguf(disk.path / f"f{number:02}" / f"m{number}.gguf")
    scan = disk.scan()
    assert 3 <= len(scan.found) <= 5
    assert "more than" in scan.problems[str(disk.path)]
    deep = disk.path / "deep"
    for _ in range(tree.MAX_DEPTH + 5):
        deep = deep / "d"
    gguf(deep / "far.gguf")
    monkeypatch.setattr(tree, "MAX_FOLDERS", 1000)
    assert "far" not in disk.found()


def test_a_store_that_is_away_has_not_lost_its_models(disk: Disk) -> None:
    gguf(disk.path / "m.gguf")
    before = disk.scan().found
    disk.path.rename(disk.path.with_name("elsewhere"))
    away = disk.scan()
    assert away.found == before
    assert "taken to be as they were" in away.problems[str(disk.path)]
    disk.path.with_name("elsewhere").rename(disk.path)
    assert disk.scan().problems == {}
    (disk.path / "m.gguf").unlink()
    assert disk.scan().found == {}


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_told(disk: Disk) -> None:
    gguf(disk.path / "closed" / "m.gguf")
    (disk.path / "closed").chmod(0)
    assert "cannot be looked at" in disk.scan().problems[str(disk.path / "closed")]


def test_a_remembered_name_comes_back_with_its_file(tmp_path: Path) -> None:
    first, second = gguf(tmp_path / "a" / "m.gguf"), gguf(tmp_path / "b" / "m.gguf")
    shelf = Shelf(names={str(second): ModelName("m")})
    found = {each.path: each.name for each in Disk(tmp_path, shelf=shelf).scan().found.values()}
    assert found == {str(first): "a-m", str(second): "m"}

"""Which files a pull takes."""

from __future__ import annotations

import pytest

from offloadd.errors import PermanentError
from offloadd.registry.hub.choose import RemoteFile, Wanted, choose, parse_wanted


def files(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 10) for path in paths]


def chosen(quantization: str, *paths: str) -> list[str]:
    return [file.path for file in choose(Wanted("o/n", quantization), files(*paths))]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("org/Name-1.5", Wanted("org/Name-1.5")),
        ("org/name:Q4_K_M", Wanted("org/name", "Q4_K_M")),
        (" hf.co/org/name:IQ2_XXS ", Wanted("org/name", "IQ2_XXS")),
    ],
)
def test_a_source_is_read(text: str, wanted: Wanted) -> None:
    assert parse_wanted(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "name", "org/", "../x", "org/na..me", "org/name:", "org/name/more", "-o/n", "o/n;ls", "/o/n", "o/n x"]
)
def test_anything_else_is_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(PermanentError, match="names no repository") as refused:
        parse_wanted(text)
    assert "ORG/NAME" in refused.value.hint


def test_one_quantization_is_taken_as_a_word() -> None:
    paths = ("m-Q4_K.gguf", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-IQ4_K_M.gguf", "README.md")
    assert chosen("q4_k_m", *paths) == ["m-Q4_K_M.gguf"]
    assert chosen("Q4_K", *paths) == ["m-Q4_K.gguf"]
    assert chosen("", *paths) == ["m-Q4_K_M.gguf"]


def test_all_parts_are_taken_the_first_one_last_and_the_projector_before() -> None:
    parts = [f"Q8_0/m-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    projectors = ("mmproj-m-f32.gguf", "mmproj-m-F16.gguf", "mmproj-m-Q8_0.gguf")
    assert chosen("Q8_0", *parts, *projectors, "m-Q4_0.gguf") == ["mmproj-m-F16.gguf", *parts[::-1]]


def test_what_cannot_be_chosen_is_told_with_what_there_is() -> None:
    with pytest.raises(PermanentError, match=r"nothing of o/n is called Q3_K; it has m-Q9_X \(10 B\), m-Q9_Y"):
        chosen("Q3_K", "m-Q9_X.gguf", "m-Q9_Y.gguf")
    with pytest.raises(PermanentError, match="there are several"):
        chosen("", "m-Q9_X.gguf", "m-Q9_Y.gguf")
    assert chosen("", "only.gguf") == ["only.gguf"]


def test_a_folder_of_safetensors_is_taken_without_other_formats() -> None:
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "README.md"]
    others = ["pytorch_model.bin", "original/consolidated.safetensors", "onnx/model.onnx", "image.png"]
    assert sorted(chosen("", *wanted, *others)) == sorted(wanted)
    assert chosen("", *wanted, *others)[-1] == "config.json"
    with pytest.raises(PermanentError, match="neither GGUF nor safetensors"):
        chosen("", "pytorch_model.bin")
    with pytest.raises(PermanentError, match="no quantization to choose"):
        chosen("Q4_K_M", *wanted)


@pytest.mark.parametrize("path", ["../m.gguf", "/etc/m.gguf", "a/../../m.gguf", "a\\m.gguf", "m\n.gguf"])
def test_a_path_that_would_lead_elsewhere_is_not_taken(path: str) -> None:
    with pytest.raises(PermanentError):
        chosen("", path)

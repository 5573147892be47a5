"""The configuration: a TOML file, and a flag of `aufsd serve` for each of its keys.

Both are made from one Struct: its fields are the keys, and `HELP` has the help of each flag. An
unknown key or a bad value ends the command with one sentence and exit status 2, before it does
anything.
"""

import argparse
import difflib
import grp
import ipaddress
import os
import pwd
import stat
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import msgspec

from aufsd.digits import number
from aufsd.store.idmap import IdMap

DEFAULT_FILE = "/etc/aufsd/aufsd.toml"


# of a file, and of a value in a message
_FILE_MAX = 1 << 20  # bytes
_SHOWN = 60  # characters
# the largest integer: a long of C
_MOST = (1 << 63) - 1


class ConfigError(Exception):
    """A configuration that cannot be used. Its text is for the operator."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every key of aufsd.toml. Sizes in bytes, times in seconds, 0 for no limit."""

    root: str = "/var/lib/aufsd"
    socket: str = "/run/aufsd/aufsd.sock"
    monitor_socket: str = "/run/aufsd/monitor.sock"
    state_dir: str = "/run/aufsd"
    backend: Literal["auto", "btrfs", "aufs", "overlay", "fuse-overlayfs"] = "auto"
    adopt: bool = False
    convert: Literal["auto", "never"] = "auto"
    sync: Literal["filesystem", "none"] = "filesystem"
    acls: bool = False
    selinux: bool = True
    uid_maps: tuple[IdMap, ...] = ()
    gid_maps: tuple[IdMap, ...] = ()
    max_layer_bytes: int = 0
    max_layer_entries: int = 0
    max_connections: int = 2000
    max_connections_per_uid: int = 0
    max_calls_per_uid: int = 0
    max_jobs_per_uid: int = 0
    max_jobs: int = 4
    stream_timeout: float = 600.0
    drain_timeout: float = 10.0
    read_users: tuple[str, ...] = ("*",)
    use_users: tuple[str, ...] = ("*",)
    change_users: tuple[str, ...] = ("*",)
    metrics_listen: str = "off"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "console"] = "auto"


_FIELDS = {field.name: field for field in msgspec.structs.fields(Config)}
_PATHS = frozenset({"root", "socket", "monitor_socket", "state_dir"})
_AT_LEAST_ONE = frozenset({"max_jobs", "max_connections"})

HELP = {
    "root": "the store: layers/, diff/ and mnt/ lie here",
    "socket": "the control socket: every method; mode 0660, group aufsd",
    "monitor_socket": "the monitoring socket: what reads only; mode 0666",
    "state_dir": "where the table of mounts is kept across restarts; on a tmpfs",
    "backend": "which union file system mounts the layers",
    "adopt": "serve a store that aufsd did not make, such as /var/lib/docker/aufs",
    "convert": "whether a layer written for another backend is converted when it is first mounted",
    "sync": "what makes a layer durable before it counts as there",
    "acls": "carry POSIX ACLs in archives",
    "selinux": "put the mount label of a new layer on what it holds, on btrfs",
    "uid_maps": "user ids between archives and the host",
    "gid_maps": "group ids likewise",
    "max_layer_bytes": "refuse an archive that makes a layer's own content larger",
    "max_layer_entries": "refuse an archive that makes a layer hold more entries",
    "max_connections": "connections at a time, for each of the two sockets",
    "max_connections_per_uid": "connections of one user for each socket; 0: 256, no limit for root",
    "max_calls_per_uid": "calls of one user at a time; 0: 1024, no limit for root",
    "max_jobs_per_uid": "archives of one user at a time; 0: 64, no limit for root",
    "max_jobs": "archives at a time; 256 more wait",
    "stream_timeout": "how long an archive may wait for a peer that moves no byte",
    "drain_timeout": "how long running calls may take once the daemon is told to stop",
    "read_users": "users and @groups that may call what reads; * for all",
    "use_users": "users and @groups that may get and put; * for all",
    "change_users": "users and @groups that may change layers; * for all",
    "metrics_listen": "where Prometheus may fetch metrics, ADDRESS:PORT of the loopback; or off",
    "log_level": "the least severe lines that are logged",
    "log_format": "auto: JSON unless standard error is a terminal",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every key. No flag has a default, so `load` sees which were given."""
    for field in msgspec.structs.fields(Config):
        shown = "" if field.default in ((), ("*",), False) else f" (default: {field.default})"
        kind: dict[str, Any] = {"help": HELP[field.name] + shown, "default": argparse.SUPPRESS}
        if field.type is bool:
            kind["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, tuple):
            kind["help"] += "; repeatable"
            kind |= {"action": "append", "metavar": metavar(field)}
        else:
            kind["metavar"] = metavar(field)
        parser.add_argument(_flag(field.name), dest=field.name, **kind)


def metavar(field: msgspec.structs.FieldInfo) -> str:
    """The word for a flag's value in its help."""
    if choices := get_args(field.type):
        names = [choice for choice in choices if isinstance(choice, str)]
        return "|".join(names) or ("CONTAINER:HOST:SIZE" if "maps" in field.name else "NAME")
    if field.name == "metrics_listen":
        return "ADDRESS:PORT"
    return {int: "N", float: "SECONDS"}.get(field.type, "PATH")


def load(file: str | None, flags: Mapping[str, Any], base: str | None = None) -> Config:
    """The file's keys, overridden by flags. `file` None: the default one, if it exists.

    Relative paths start at the directory `base`; None: the present one. A daemon changes to `/`, so
    for a reload it gives the directory that it was started in. Raises ConfigError.
    """
    path = _absolute(file or DEFAULT_FILE, base)
    keys = _read(path) if file is not None or os.path.exists(path) else {}
    found = {}
    for name, value in keys.items():
        key = f"{path}: {name}"
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, 1)
            meant = f"; {near[0]} is meant?" if near else ""
            raise ConfigError(f"{key}: there is no such key{meant}")
        found[name] = _converted(f"{key} = {{}}", name, value, base)
    for name, value in flags.items():
        found[name] = _converted(f"{_flag(name)} {{}}", name, value, base)
    config = Config(**found)
    _check_together(config)
    return config


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _absolute(path: str, base: str | None) -> str:
    if os.path.isabs(path):
        return os.path.normpath(path)
    try:
        return os.path.normpath(os.path.join(os.getcwd() if base is None else base, path))
    except OSError as error:
        raise ConfigError(f"{path}: the current directory is gone ({error.strerror})") from None


def _read(path: str) -> dict[str, Any]:
    """The keys of a file. It must be a regular file, because the event loop waits for the read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{path}: this is not a regular file")
            text = os.read(fd, _FILE_MAX + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if len(text) > _FILE_MAX:
        raise ConfigError(f"{path}: a configuration is no longer than {_FILE_MAX} bytes")
    try:
        return tomllib.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: the brackets are nested too deep") from error
    except ValueError as error:
        # tomllib's own, and that of a number with thousands of digits
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error


def _converted(given: str, name: str, value: object, base: str | None) -> Any:
    """The value of a key, checked by itself. `given` is how it was written.

    Raises ConfigError.
    """
    field = _FIELDS[name]
    try:
        if "maps" in name and given.startswith("--"):
            value = [_id_map(text) for text in cast("list[str]", value)]
        try:
            # strict=False: a flag's value is text, whatever its type
            found = msgspec.convert(value, field.type, strict=False)
        except (msgspec.ValidationError, RecursionError):
            raise ConfigError(f"must be {_expected(field)}") from None
        for text in (found,) if isinstance(found, str) else found if "users" in name else ():
            if not text.isprintable() or not text:
                raise ConfigError("must not be empty, nor hold what cannot be printed")
        if isinstance(found, int | float) and not 0 <= found <= _MOST:
            raise ConfigError(f"must be {_expected(field)}")
        if name in _PATHS:
            return _path(found, base)
        if name in _AT_LEAST_ONE and found < 1:
            raise ConfigError("must be at least 1")
        if "maps" in name:
            _check_maps(found)
        elif "users" in name:
            allowed(found)
        elif name == "metrics_listen":
            _address(found)
    except ConfigError as error:
        shown = given.format(_shown(value)).removesuffix(" ").removesuffix(" =")
        raise ConfigError(f"{shown}: {error}") from None
    return found


def _expected(field: msgspec.structs.FieldInfo) -> str:
    """The values that a key takes, in words."""
    if "maps" in field.name:
        return f"a list of tables such as {example(field)}"
    if "users" in field.name:
        return f"a list of names such as {example(field)}"
    if choices := get_args(field.type):
        return f"one of {', '.join(choices)}"
    return {
        bool: "true or false",
        int: "a whole number that is not negative",
        float: "a number of seconds that is not negative",
    }.get(field.type, "a text in quotes")


def example(field: msgspec.structs.FieldInfo) -> str:
    """A value of a key that takes a list, as TOML; "" for any other."""
    if "maps" in field.name:
        return "[{container_id = 0, host_id = 100000, size = 65536}]"
    return '["root", "@wheel"]' if "users" in field.name else ""


def _shown(value: object) -> str:
    """A value as it was written; "" if it is too long for a message."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return str(value)[:_SHOWN] if isinstance(value, int | float) else ""


def _path(path: str, base: str | None) -> str:
    if path.startswith("@"):
        raise ConfigError("an abstract socket has no owner and no mode; give a path")
    return _absolute(path, base)


def _id_map(text: str) -> dict[str, int]:
    parts = [number(part, 1 << 32) for part in text.split(":")]
    if len(parts) != 3 or None in parts:
        raise ConfigError(f"{text!r} is not CONTAINER:HOST:SIZE, such as 0:100000:65536")
    return dict(zip(("container_id", "host_id", "size"), cast("list[int]", parts), strict=True))


def _check_together(config: Config) -> None:
    for path in (config.root, config.state_dir):
        parent = os.path.dirname(path)
        if not os.path.isdir(path) and (os.path.lexists(path) or not os.path.isdir(parent)):
            raise ConfigError(f"{path}: no such directory, and none to make it in")
    for path in (config.socket, config.monitor_socket):
        parent = os.path.dirname(path)
        if not os.path.isdir(parent) and parent != config.state_dir:
            raise ConfigError(f"{path}: the directory {parent} does not exist")
    if config.socket == config.monitor_socket:
        raise ConfigError("socket and monitor_socket must differ")


def _check_maps(maps: tuple[IdMap, ...]) -> None:
    for index, span in enumerate(maps):
        least = min(span.container_id, span.host_id)
        most = max(span.container_id, span.host_id) + span.size
        if least < 0 or span.size < 1 or most > 1 << 32:
            raise ConfigError(f"{_span(span)} is not a range of ids")
        for other in maps[:index]:
            if _overlap(span.container_id, other.container_id, span.size, other.size) or _overlap(
                span.host_id, other.host_id, span.size, other.size
            ):
                raise ConfigError(f"{_span(span)} and {_span(other)} overlap")


def _span(span: IdMap) -> str:
    return f"{span.container_id}:{span.host_id}:{span.size}"


def _overlap(a: int, b: int, a_size: int, b_size: int) -> bool:
    return a < b + b_size and b < a + a_size


def metrics_address(config: Config) -> tuple[str, int] | None:
    """Address and port of `metrics_listen`; None if it is off. Raises ConfigError."""
    return _address(config.metrics_listen)


def _address(text: str) -> tuple[str, int] | None:
    # loopback only: whoever can connect can read; there is no TLS and no password
    if text == "off":
        return None
    host, _, port = text.rpartition(":")
    found = number(port, 65535)
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        address = None
    if address is None or not address.is_loopback or found is None:
        raise ConfigError(
            "not a loopback address with a port, such as 127.0.0.1:9433 or [::1]:9433, and not off"
        )
    return str(address), found


def allowed(names: Sequence[str]) -> tuple[frozenset[int], frozenset[int]] | None:
    """User and group ids for a list of names, ids, @groups; None for everybody.

    Raises ConfigError for a name that this host does not know.
    """
    if "*" in names:
        return None
    uids: set[int] = set()
    gids: set[int] = set()
    for name in names:
        bare = name.removeprefix("@")
        # the largest value means "none" to chown(2)
        id = number(bare, (1 << 32) - 2)
        try:
            if name.startswith("@"):
                gids.add(grp.getgrnam(bare).gr_gid if id is None else id)
            else:
                uids.add(pwd.getpwnam(bare).pw_uid if id is None else id)
        except (KeyError, ValueError) as error:
            kind = "group" if name.startswith("@") else "user"
            raise ConfigError(f"there is no {kind} {bare[:_SHOWN]} on this host") from error
    return frozenset(uids), frozenset(gids)

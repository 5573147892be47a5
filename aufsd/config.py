"""The configuration: a TOML file, and a flag of `aufsd serve` for every key of it.

One Struct says both: its fields are the keys, their comments in `HELP` the flags' help. An unknown
key or a bad value is one sentence and exit status 2, before anything is touched.
"""

import argparse
import grp
import ipaddress
import os
import pwd
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from aufsd.store.idmap import IdMap

DEFAULT_FILE = "/etc/aufsd/aufsd.toml"


class ConfigError(Exception):
    """A configuration that cannot be used; the text is the sentence for the operator."""


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
    "uid_maps": "CONTAINER:HOST:SIZE, user ids between archives and the host; repeatable",
    "gid_maps": "CONTAINER:HOST:SIZE, group ids likewise; repeatable",
    "max_layer_bytes": "refuse an archive that makes a layer's own content larger",
    "max_layer_entries": "refuse an archive that makes a layer hold more entries",
    "max_connections": "connections at a time, for each of the two sockets",
    "max_connections_per_uid": "connections of one user at a time, for each of the two sockets",
    "max_calls_per_uid": "calls of one user at a time, over all its connections",
    "max_jobs_per_uid": "archives of one user at a time",
    "max_jobs": "archives at a time; 256 more wait",
    "stream_timeout": "how long an archive may wait for a peer that moves no byte",
    "drain_timeout": "how long running calls may take once the daemon is told to stop",
    "read_users": "users and @groups that may call what reads; * for all, repeatable",
    "use_users": "users and @groups that may get and put; * for all, repeatable",
    "change_users": "users and @groups that may change layers; * for all, repeatable",
    "metrics_listen": "where Prometheus may fetch metrics, ADDRESS:PORT of the loopback; or off",
    "log_level": "the least severe lines that are logged",
    "log_format": "auto: JSON unless standard error is a terminal",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every key; none has a default, so that what was given can be told apart."""
    for field in msgspec.structs.fields(Config):
        flag = f"--{field.name.replace('_', '-')}"
        shown = "" if field.default in ((), ("*",), False) else f" (default: {field.default})"
        kind: dict[str, Any] = {"help": HELP[field.name] + shown, "default": argparse.SUPPRESS}
        if field.type is bool:
            kind["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, tuple):
            kind |= {"action": "append", "metavar": metavar(field)}
        else:
            kind["metavar"] = metavar(field)
        parser.add_argument(flag, dest=field.name, **kind)


def metavar(field: msgspec.structs.FieldInfo) -> str:
    """What a key's flag takes, as a word for its help."""
    if choices := get_args(field.type):
        names = [choice for choice in choices if isinstance(choice, str)]
        return "|".join(names) or ("MAP" if "maps" in field.name else "NAME")
    if field.name == "metrics_listen":
        return "ADDRESS:PORT"
    return {int: "N", float: "SECONDS"}.get(field.type, "PATH")


def load(file: str | None, flags: dict[str, Any]) -> Config:
    """The file's keys, overridden by flags. `file` None: the default one, if it exists.

    Raises ConfigError.
    """
    keys: dict[str, Any] = {}
    path = Path(file or DEFAULT_FILE)
    if file is not None or path.exists():
        try:
            keys = msgspec.toml.decode(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}: {error}") from error
    for name in ("uid_maps", "gid_maps"):
        if name in flags:
            flags = {**flags, name: [_id_map(name, text) for text in flags[name]]}
    try:
        # strict=False: a flag's value is text, whatever its type
        config = msgspec.convert({**keys, **flags}, Config, strict=False)
    except msgspec.ValidationError as error:
        origin = "the command line" if not keys else f"{path} or the command line"
        raise ConfigError(f"{origin}: {error}") from error
    _check(config)
    # the daemon leaves the caller's working directory
    paths = ("root", "socket", "monitor_socket", "state_dir")
    absolute = {name: os.path.abspath(getattr(config, name)) for name in paths}
    return msgspec.structs.replace(config, **absolute)


def _id_map(name: str, text: str) -> dict[str, int]:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag} {text}: not CONTAINER:HOST:SIZE, such as 0:100000:65536")
    return dict(zip(("container_id", "host_id", "size"), map(int, parts), strict=True))


def _check(config: Config) -> None:
    for field in msgspec.structs.fields(Config):
        value = getattr(config, field.name)
        if isinstance(value, int | float) and value < 0:
            raise ConfigError(f"{field.name} = {value}: must not be negative")
        if isinstance(value, str) and (not value or "\0" in value or "\n" in value):
            raise ConfigError(f"{field.name}: must not be empty or hold a line's end")
    if config.max_jobs < 1 or config.max_connections < 1:
        raise ConfigError("max_jobs and max_connections must be at least 1")
    for name in ("uid_maps", "gid_maps"):
        _check_maps(name, getattr(config, name))
    for path in (config.root, config.state_dir):
        parent = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(path) and (os.path.lexists(path) or not os.path.isdir(parent)):
            raise ConfigError(f"{path}: no such directory, and none to make it in")
    for path in (config.socket, config.monitor_socket):
        parent = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(parent) and parent != os.path.abspath(config.state_dir):
            raise ConfigError(f"{path}: the directory {parent} does not exist")
    if os.path.abspath(config.socket) == os.path.abspath(config.monitor_socket):
        raise ConfigError("socket and monitor_socket must differ")
    metrics_address(config)
    for name in ("read_users", "use_users", "change_users"):
        allowed(getattr(config, name))


def _check_maps(name: str, maps: tuple[IdMap, ...]) -> None:
    for index, span in enumerate(maps):
        if span.size < 1 or max(span.container_id, span.host_id) + span.size > 1 << 32:
            raise ConfigError(f"{name}: {span} is not a range of ids")
        for other in maps[:index]:
            if _overlap(span.container_id, other.container_id, span.size, other.size) or _overlap(
                span.host_id, other.host_id, span.size, other.size
            ):
                raise ConfigError(f"{name}: {span} and {other} overlap")


def _overlap(a: int, b: int, a_size: int, b_size: int) -> bool:
    return a < b + b_size and b < a + a_size


def metrics_address(config: Config) -> tuple[str, int] | None:
    """Address and port of `metrics_listen`; None if it is off. Raises ConfigError.

    Loopback only: whoever can connect may read, and there is neither TLS nor a password.
    """
    text = config.metrics_listen
    if text == "off":
        return None
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        address = None
    if address is None or not address.is_loopback or not port.isdigit() or int(port) > 65535:
        raise ConfigError(
            f"metrics_listen = {text}: not a loopback address with a port, such as "
            "127.0.0.1:9433 or [::1]:9433, and not off"
        )
    return str(address), int(port)


def allowed(names: tuple[str, ...]) -> tuple[frozenset[int], frozenset[int]] | None:
    """User and group ids for a list of names, ids, @groups; None for everybody.

    Raises ConfigError for a name that this host does not know.
    """
    if "*" in names:
        return None
    uids: set[int] = set()
    gids: set[int] = set()
    for name in names:
        bare = name.removeprefix("@")
        try:
            if name.startswith("@"):
                gids.add(int(bare) if bare.isdigit() else grp.getgrnam(bare).gr_gid)
            else:
                uids.add(int(bare) if bare.isdigit() else pwd.getpwnam(bare).pw_uid)
        except KeyError as error:
            kind = "group" if name.startswith("@") else "user"
            raise ConfigError(f"there is no {kind} {bare} on this host") from error
    return frozenset(uids), frozenset(gids)

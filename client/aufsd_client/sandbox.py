"""One command in a root file system of its own: bubblewrap, or util-linux's unshare.

The command sees the root, /proc, a small or the host's /dev and what is bound in; it has pid, ipc,
host name and mount namespaces of its own and the host's network and users. That keeps a command
from what lies elsewhere by accident: it is no boundary against one that wants out as root. All of
it ends with this process, also by kill -9 (prctl(2), PR_SET_PDEATHSIG). Standard library only.
"""

import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from aufsd_client.said import Said

Runtime = Literal["bwrap", "unshare"]

# what a command is told, unless it is told otherwise
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
}
# passed on: what a terminal and a language are is not the root's to say
_PASSED = ("TERM", "COLORTERM", "LANG")
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)

# as pid 1 of its namespace: mounts, then the command as its child, and its exit status. The mounts
# go with the namespace.
_SCRIPT = """
set -e
root=$1 proc=$2 dev=$3 wd=$4 uid=$5 gid=$6 mode=$7; shift 7
if [ "$mode" = ro ]; then mount -o bind,ro "$root" "$root"; fi
while [ "$1" != -- ]; do
    mount --bind "$1" "$2"
    if [ "$3" = ro ]; then mount -o remount,bind,ro "$2"; fi
    shift 3
done
shift
if [ "$proc" ]; then mount -t proc proc "$proc"; fi
if [ "$dev" ]; then mount --rbind /dev "$dev"; fi
trap : HUP INT QUIT TERM USR1 USR2
set +e
unshare --root="$root" --wd="$wd" --setgid "$gid" --setuid "$uid" -- "$@"
exit $?
"""


class SandboxError(Said):
    """Why a command cannot be run, as a sentence."""


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or directory of the host that the command sees."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What a command is to see. `user` is a name in the root's own /etc/passwd, or UID[:GID]."""

    root: str
    read_only: bool = False
    binds: tuple[Bind, ...] = ()
    environment: Mapping[str, str] | None = None
    directory: str = "/"
    user: str = ""


def choose(wanted: str, user: str) -> Runtime:
    """What runs the command; "" is the best there is. Raises SandboxError."""
    for runtime in ("bwrap", "unshare"):
        # bubblewrap changes the user in a user namespace only
        if (wanted or runtime) == runtime and not (runtime == "bwrap" and user and not wanted):
            if shutil.which(runtime):
                return "bwrap" if runtime == "bwrap" else "unshare"
            if wanted:
                raise SandboxError(f"{wanted} is not installed here")
    raise SandboxError("neither bwrap (bubblewrap) nor unshare (util-linux) is installed here")


def run(sandbox: Sandbox, command: Sequence[str], runtime: Runtime) -> int:
    """Run a command to its end; its exit status, 128 and its signal's number if one ended it.

    Signals that come meanwhile go to the command. Raises SandboxError, OSError.
    """
    if not os.access(sandbox.root, os.R_OK | os.X_OK):
        raise SandboxError(
            f"this user may not enter {sandbox.root}: run it as root, who owns the store"
        )
    if runtime == "bwrap" and sandbox.user:
        raise SandboxError("bubblewrap changes no user here: use --runtime unshare")
    made = _bwrap(sandbox) if runtime == "bwrap" else _unshare(sandbox)
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    environment = {**_ENVIRONMENT, **passed, **(sandbox.environment or {})}
    # the runtime's pid 1, and the command as the one child of that
    return _waited([*made, *command], environment, lambda pid: _below(_below(pid)))


def run_on_host(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command as it is, to its end; its exit status, and signals, as those of `run`.

    Raises OSError.
    """
    return _waited(command, {**os.environ, **environment}, lambda pid: pid)


def _waited(
    command: Sequence[str], environment: Mapping[str, str], receiver: Callable[[int], int]
) -> int:
    with _Signals(receiver) as signals:
        process = subprocess.Popen(command, env=environment)
        signals.process = process
        status = process.wait()
    return 128 - status if status < 0 else status


class _Signals:
    """While it is entered, signals to this process go to the command.

    `receiver` gives the command's pid for that of the process that was started.
    """

    def __init__(self, receiver: Callable[[int], int]) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._receiver = receiver
        self._before: dict[int, object] = {}

    def __enter__(self) -> "_Signals":
        for number in _FORWARDED:
            self._before[number] = signal.signal(number, self._forward)
        for number in (signal.SIGINT, signal.SIGQUIT):
            # a terminal sends them to the command as well; a function, as what is ignored would be
            # ignored by the command too (execve(2))
            self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _forward(self, number: int, _: object) -> None:
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.kill(self._receiver(self.process.pid), number)


def _below(pid: int) -> int:
    """The one child of a process, itself if it has none: of the runtime, then of its pid 1."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return next(map(int, file.read().split()), pid)
    except OSError:
        return pid


# --- what starts the command ----------------------------------------------------------------------


def _bwrap(sandbox: Sandbox) -> list[str]:
    root = sandbox.root
    command = ["bwrap", "--die-with-parent", "--unshare-pid", "--unshare-ipc", "--unshare-uts"]
    command += ["--ro-bind" if sandbox.read_only else "--bind", root, "/"]
    for bind in sandbox.binds:
        _place(sandbox, bind)
        command += ["--ro-bind" if bind.read_only else "--bind", bind.source, bind.target]
    if _is_directory(f"{root}/proc"):
        command += ["--proc", "/proc"]
    if _is_directory(f"{root}/dev"):
        command += ["--dev", "/dev"]
    return [*command, "--chdir", sandbox.directory, "--"]


def _unshare(sandbox: Sandbox) -> list[str]:
    root = sandbox.root
    uid, gid = _ids(root, sandbox.user)
    command = ["setpriv", "--pdeathsig", "KILL", "--"]
    command += ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--"]
    command += ["sh", "-c", _SCRIPT, "aufsctl-run", root]
    command += [
        f"{root}/{name}" if _is_directory(f"{root}/{name}") else "" for name in ("proc", "dev")
    ]
    command += [sandbox.directory, uid, gid, "ro" if sandbox.read_only else "rw"]
    for bind in sandbox.binds:
        target = _place(sandbox, bind)
        command += [bind.source, target, "ro" if bind.read_only else "rw"]
    return [*command, "--"]


def _is_directory(path: str) -> bool:
    """One that is itself there: a link would lead out of the root."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _place(sandbox: Sandbox, bind: Bind) -> str:
    """Where in the root something is bound to; made if it is not there. Raises SandboxError."""
    if not os.path.exists(bind.source):
        raise SandboxError(f"there is no {bind.source} to be bound")
    if not os.path.isabs(bind.target):
        raise SandboxError(f"{bind.target} has to begin with a slash: it is a path in the layer")
    root = os.path.realpath(sandbox.root)
    path = os.path.normpath(f"{root}/{bind.target}")
    if os.path.realpath(path) != path or not path.startswith(f"{root}/"):
        raise SandboxError(f"{bind.target} is, or lies behind, a symbolic link in the layer")
    if os.path.lexists(path):
        return path
    if sandbox.read_only:
        raise SandboxError(
            f"there is no {bind.target} in the layer, and it is not to be written to"
        )
    if os.path.isdir(bind.source):
        os.makedirs(path)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o644))
    return path


def _is_id(text: str) -> bool:
    # isdecimal() takes the digits of every alphabet
    return text.isascii() and text.isdecimal() and len(text) <= 10


def _ids(root: str, user: str) -> tuple[str, str]:
    """The numbers of a user. Raises SandboxError."""
    if not user:
        return "0", "0"
    uid, _, gid = user.partition(":")
    if _is_id(uid) and (_is_id(gid) or not gid):
        return uid, gid or uid
    path = f"{root}/etc/passwd"
    if os.path.realpath(path) == os.path.normpath(path):
        with suppress(OSError), open(path, errors="replace") as file:
            for line in file:
                name, _, number, group, *_ = [*line.split(":"), "", "", "", ""]
                if name == user and _is_id(number) and _is_id(group):
                    return number, group
    raise SandboxError(f"the layer's /etc/passwd has no user {user}; UID:GID works too")

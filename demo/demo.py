"""The main job, start to end, on this machine: `make demo`.

Starts a daemon on a store of its own, loads a root file system into a base layer, stacks two layers
on it, works in their mounts, exports what changed, applies it to a new layer, and compares. Each
step says what it does; the exit status is not zero if anything differs. As root it mounts on the
host and takes everything down again; without root it enters a user and mount namespace first.

AUFSD_DEMO_DIR names a directory to work in; by default the first of /var/tmp, /tmp and /dev/shm on
which a union file system can stand.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from aufsd_client import Client

CHECKOUT = Path(__file__).resolve().parent.parent
SUITE = "bookworm"
# a Debian root is built once and kept here; `make clean` removes it
CACHE = CHECKOUT / "build" / "demo" / f"{SUITE}.tar"
READY_WITHIN = 60  # seconds


def main() -> int:
    """Run the demonstration; 0 if all of it held."""
    if os.geteuid() != 0 and "AUFSD_DEMO_INSIDE" not in os.environ:
        say("not root: going on in a user and mount namespace (unshare -Urm)")
        os.environ["AUFSD_DEMO_INSIDE"] = "1"
        os.execvp("unshare", ["unshare", "-Urm", sys.executable, *sys.argv])
    started = time.monotonic()
    with work_directory() as work, daemon(work) as client:
        problems = show(client, work)
    if problems:
        for problem in problems:
            print(f"DIFFERS: {problem}", file=sys.stderr)
        return 1
    say(f"all of it held, in {time.monotonic() - started:.1f} s; nothing is left behind")
    return 0


def show(client: Client, work: Path) -> list[str]:
    """The steps; what did not come out as it should, in words."""
    tar = root_tar(work)
    say(f"create the layer `base` and load {tar.name} ({tar.stat().st_size >> 20} MiB) into it")
    client.create("base")
    began = time.monotonic()
    loaded = client.apply_diff("base", str(tar))
    took = time.monotonic() - began
    say(f"  {loaded.entries} entries, {loaded.size >> 20} MiB of content, in {took:.1f} s")
    for warning in loaded.warnings[:3]:
        say(f"  warning: {warning}")

    say("create the layers `app` on `base`, and `work` on `app`")
    client.create("app", parent="base")
    client.create("work", parent="app")

    say("mount `app`: it is read-only, since `work` stands on it")
    with client.mounted("app") as path:
        problems = [] if refuses_writes(path) else ["`app` could be written"]
    say("mount `work`; change, delete and make files through the mount")
    with client.mounted("work") as path:
        change(Path(path))
        listed = list(client.iter_changes("work"))
        say(f"  changes of `work` against `app`: {len(listed)}")
        for change_ in listed[:12]:
            say(f"    {change_.kind:<7} {change_.path}")
        if len(listed) > 12:
            say(f"    and {len(listed) - 12} more")

        out = work / "work.tar"
        exported = client.diff("work", str(out), digest=True)
        say(f"export what `work` changed: {exported.size} bytes, {exported.digest}")
        say("create `copy` on `app`, apply the export to it, and mount it beside `work`")
        client.create("copy", parent="app")
        client.apply_diff("copy", str(out))
        with client.mounted("copy") as other:
            problems += compare(Path(path), Path(other))
            again = client.diff("copy", str(work / "copy.tar"), digest=True)
    if again.digest != exported.digest:
        problems.append("the export of `copy` is not the export of `work`")
    if [change_.path for change_ in client.iter_changes("copy")] != [c.path for c in listed]:
        problems.append("`copy` does not list the changes that `work` lists")

    say("remove all layers again")
    for id in ("copy", "work", "app", "base"):
        if not client.remove(id).removed:
            problems.append(f"{id} could not be removed")
    if client.mounts().mounts:
        problems.append("a mount is left")
    return problems


def refuses_writes(path: str) -> bool:
    """Whether a mount is read-only, tried."""
    try:
        Path(path, "written").touch()
    except OSError:
        return True
    return False


def change(root: Path) -> None:
    """Change, delete, recreate: what containers do to their root file systems."""
    (root / "demo").mkdir()
    (root / "demo/new").write_text("a new file\n")
    os.symlink("new", root / "demo/link")
    os.link(root / "demo/new", root / "demo/hard")
    os.setxattr(root / "demo/new", "user.demo", b"kept")
    files = sorted(
        path for path in (root / "usr").rglob("*") if path.is_file() and not path.is_symlink()
    )
    changed, deleted = files[len(files) // 3], files[len(files) // 2]
    with changed.open("ab") as file:
        file.write(b"changed\n")
    changed.chmod(0o600)
    deleted.unlink()
    # a directory deleted and made again: what stood in it below must not show through
    again = next(path.parent for path in files if path.parent not in (changed.parent, root / "usr"))
    shutil.rmtree(again)
    again.mkdir()
    (again / "only this").write_text("made again\n")


def compare(left: Path, right: Path) -> list[str]:
    """Where two trees differ: names, types, owners, modes, contents, targets, xattrs, times."""
    say("compare the two mounts, entry by entry")
    here, there = dict(describe(left)), dict(describe(right))
    differing = [
        f"{name}: {here.get(name)} and {there.get(name)}"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    say(f"  {len(here)} entries, {len(differing)} differences")
    return differing[:20]


def describe(root: Path) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Every entry below a directory by name, with what must be equal."""
    for directory, names, files in os.walk(root):
        for name in [*names, *files]:
            path = Path(directory, name)
            found = path.lstat()
            content = ""
            if stat.S_ISREG(found.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(found.st_mode):
                content = os.readlink(path)
            xattrs = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
                if key.startswith("user.") or key == "security.capability"
            }
            yield (
                str(path.relative_to(root)),
                (
                    *(oct(found.st_mode), found.st_uid, found.st_gid, int(found.st_mtime)),
                    *(content, tuple(sorted(xattrs.items()))),
                ),
            )


# --- what it needs ----------------------------------------------------------------------------


def root_tar(work: Path) -> Path:
    """A root file system as a tar: one that debootstrap builds, or else our own files."""
    if CACHE.exists():
        say(f"the base: a Debian {SUITE} root, built by an earlier run")
        return CACHE
    real_root = Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]
    if real_root and os.geteuid() == 0 and shutil.which("debootstrap"):
        say(f"the base: a Debian {SUITE} root, built by debootstrap (a minute, once)")
        root = work / "debian"
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", SUITE, str(root)], capture_output=True, text=True
        )
        if done.returncode == 0:
            CACHE.parent.mkdir(parents=True, exist_ok=True)
            partial = CACHE.with_suffix(".partial")
            # device nodes and what apt downloaded are no use in a layer
            tar_up(partial, root, "--exclude=./dev/*", "--exclude=./var/cache/apt/archives/*.deb")
            partial.rename(CACHE)
            shutil.rmtree(root)
            return CACHE
        say("  debootstrap could not build one here:")
        say(
            f"  {done.stdout.strip().splitlines()[-1] if done.stdout.strip() else 'no reason said'}"
        )
    say("the base: this machine's own /usr/share and /bin")
    tar = work / "host.tar"
    # every owner 0: an unprivileged namespace has that one id
    tar_up(tar, Path("/"), "--owner=0", "--group=0", names=("usr/share", "usr/bin", "bin"))
    return tar


def tar_up(out: Path, root: Path, *options: str, names: tuple[str, ...] = (".",)) -> None:
    """Pack with GNU tar. What cannot be read, or changes under it, is left out (status 1 or 2)."""
    command = ["tar", "-cf", str(out), "--format=posix", "--one-file-system", *options]
    subprocess.run([*command, "-C", str(root), *names], capture_output=True, check=False)


@contextlib.contextmanager
def work_directory() -> Iterator[Path]:
    """A directory that a store can stand in, removed at the end."""
    candidates = [os.environ["AUFSD_DEMO_DIR"]] if "AUFSD_DEMO_DIR" in os.environ else None
    for base in candidates or ("/var/tmp", "/tmp", "/dev/shm"):
        with tempfile.TemporaryDirectory(prefix="aufsd-demo-", dir=base) as path:
            probe = [sys.executable, "-m", "aufsd", "probe", "--root", path]
            done = subprocess.run(probe, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                say(f"work in {path}")
                yield Path(path)
                return
            say(f"{base}: no union file system can stand there\n{done.stdout}{done.stderr}")
    sys.exit("there is no place on this machine for a store; AUFSD_DEMO_DIR may name one")


@contextlib.contextmanager
def daemon(work: Path) -> Iterator[Client]:
    """A daemon on a store in `work`, told to stop at the end; a client that is connected to it."""
    command = [
        *(sys.executable, "-m", "aufsd", "serve"),
        *("--root", f"{work}/store", "--state-dir", f"{work}/run"),
        *("--socket", f"{work}/run/aufsd.sock", "--monitor-socket", f"{work}/run/monitor.sock"),
    ]
    say("start the daemon: aufsd serve --root ... --socket ...")
    with (
        (work / "log").open("w") as log,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
    ):
        ready.bind(f"{work}/notify")
        environment = {**os.environ, "NOTIFY_SOCKET": f"{work}/notify"}
        process = subprocess.Popen(command, stderr=log, env=environment)
        try:
            await_ready(process, ready)
            with Client(f"{work}/run/aufsd.sock") as client:
                version = client.version()
                say(f"  aufsd {version.version}, backend {version.backend}")
                yield client
                client.cleanup()
        except BaseException:
            print((work / "log").read_text(), file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait()


def await_ready(process: subprocess.Popen[bytes], ready: socket.socket) -> None:
    """Return once the daemon says so; SystemExit if it ends, or takes too long."""
    ready.settimeout(0.2)
    for _ in range(READY_WITHIN * 5):
        with contextlib.suppress(TimeoutError):
            if b"READY=1" in ready.recv(4096):
                return
        if process.poll() is not None:
            sys.exit(f"the daemon ended with status {process.returncode}")
    sys.exit(f"the daemon was not ready within {READY_WITHIN} s")


def say(line: str) -> None:
    """Tell the user what happens now."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

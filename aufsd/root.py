"""Opens a root for a daemon, before the event loop: locks it, recovers it, chooses a backend.

The state directory is locked first. So a second daemon with the same `state_dir` is refused before
it makes a store.
"""

import os
import time
from dataclasses import dataclass

import structlog

from aufsd.active.statedir import Owner, StateDir, open_state_dir
from aufsd.config import Config
from aufsd.kernel import probe, sight
from aufsd.service.notify import Notifier
from aufsd.store import recovery
from aufsd.store.idmap import to_host
from aufsd.store.layers import Store
from aufsd.store.opening import open_store
from aufsd.store.recovery import Recovered
from aufsd.union.backend import Backend
from aufsd.union.choice import choose
from aufsd_client.errors import StoreLocked

log = structlog.get_logger(__name__)

_HIDDEN = (
    "the daemon is not in the mount namespace of process 1, and its mounts do not appear there: a "
    "get from outside is refused; under systemd PrivateMounts= and its like have to be off"
)

# long enough that repeated starts do not reach the unit's StartLimitBurst=
_LOCK_PATIENCE = 20.0  # seconds
_LOCK_PAUSE = 0.25  # seconds


@dataclass(frozen=True, slots=True)
class Opened:
    """A locked and recovered store, its backend, and its state directory.

    `warnings` are for `health`, until the next start.
    """

    store: Store
    state: StateDir
    backend: Backend
    recovered: list[Recovered]
    warnings: list[str]

    @property
    def owner(self) -> Owner:
        """The store, as the journal names it."""
        return Owner(self.store.format.id, self.store.layout.root)

    def close(self) -> None:
        """Release the locks."""
        self.store.close()
        self.state.close()


def open_root(config: Config) -> Opened:
    """Lock and recover the store, and choose its backend. Synchronous.

    Raises StoreLocked, StoreNotAdopted, IncompatibleFilesystem, BackendUnsupported, OSError.
    """
    root = os.path.realpath(config.root)
    if not os.path.isdir(config.state_dir):
        os.mkdir(config.state_dir, 0o755)
    state = open_state_dir(config.state_dir, root)
    try:
        if not os.path.isdir(root):
            os.mkdir(root, 0o755)
        store = open_store(
            root,
            adopt=config.adopt,
            sync=config.sync,
            uid=to_host(config.uid_maps, 0) or 0,
            gid=to_host(config.gid_maps, 0) or 0,
            xattr_namespace="user" if probe.in_user_namespace() else "trusted",
        )
    except BaseException:
        state.close()
        raise
    try:
        return _recovered(config, store, state)
    except BaseException:
        store.close()
        state.close()
        raise


def _recovered(config: Config, store: Store, state: StateDir) -> Opened:
    recovered = recovery.recover(store)
    for step in recovered:
        log.warning("recovered", action=step.action, what=step.what, name=step.name)
    warnings = [
        f"not put right: {step.what} {step.name}" for step in recovered if step.action == "failed"
    ]
    choice = choose(config.backend, store.format.backend, store.layout)
    for warning in choice.warnings:
        log.warning("backend", warning=warning)
    if choice.why:
        log.info("backend", chosen=choice.backend.name, why=choice.why)
    store.set_backend(choice.backend.name)
    opened = Opened(store, state, choice.backend, recovered, [*warnings, *choice.warnings])
    if not choice.backend.snapshots and sight.hidden_from_host(store.layout.mnt):
        log.warning("mount namespace", note=_HIDDEN)
    for sentence in state.give_to(opened.owner):
        log.warning("state directory", note=sentence)
    return opened


def open_patiently(config: Config, notifier: Notifier) -> Opened:
    """As `open_root`, but waits for a lock if a service manager has started the daemon.

    A daemon that was killed while it waited for the disk keeps its lock until the disk has
    answered. Started by hand, a second daemon is a mistake, and is refused at once.
    """
    until = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            return open_root(config)
        except StoreLocked as error:
            if not notifier.listening or time.monotonic() > until:
                raise
            notifier.tell(f"STATUS=waiting: {error.message}")
            time.sleep(_LOCK_PAUSE)

"""Chooses the backend of a store: the one that was asked for, or the first that works."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from aufsd.kernel.probe import in_user_namespace
from aufsd.store.dialect import XattrNamespace
from aufsd.store.layout import Layout
from aufsd.union import aufs, btrfs, fuse, overlay
from aufsd.union.backend import Backend, Verdict
from aufsd.union.causes import PASSING
from aufsd.union.scratch import scratch_dirs
from aufsd.union.unfit import unfit
from aufsd_client.errors import BackendUnsupported, IncompatibleFilesystem

AUTO: Final = "auto"
# in order of preference; btrfs serves only stores on a btrfs
PROBES: Final[Mapping[str, Callable[[Layout], Backend | Verdict]]] = {
    btrfs.NAME: btrfs.probe,
    "aufs": aufs.probe,
    "overlay": overlay.probe,
    fuse.NAME: fuse.probe,
}

UNTRIED: Final[Mapping[str, Callable[[Layout, XattrNamespace], Backend | Verdict]]] = {
    btrfs.NAME: btrfs.untried,
    "aufs": aufs.untried,
    "overlay": overlay.untried,
    fuse.NAME: fuse.untried,
}
# trials of a backend, and the pause between two, if the failure may pass
_TRIES: Final = 3
_PAUSE: Final = 0.1  # seconds


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend, and warnings for the operator.

    `why` is a sentence for the log about the choice, "" if there is nothing to explain.
    """

    backend: Backend
    warnings: tuple[str, ...] = ()
    why: str = ""


def choose(name: str, prior: str, layout: Layout) -> Choice:
    """Probe on the store's own file system until a backend can serve it.

    `name` is one of PROBES, or `auto`: then the store's `prior` backend comes first ("" for a new
    store), and the others in their order after it. If the prior backend fails for a reason that may
    pass, such as a full disk, it serves without a trial. Raises IncompatibleFilesystem if the
    store's file system is the reason, else BackendUnsupported. `data["reasons"]` has a sentence for
    each backend that was tried. Raises OSError if a new store cannot be written.
    """
    _refuse_unfit(layout, recorded=bool(prior))
    names = sorted(PROBES, key=lambda known: known != prior) if name == AUTO else [name]
    refused: dict[str, Verdict] = {}
    for known in names:
        found = _foreign(known, prior, layout) or _tried(known, layout, recorded=known == prior)
        if isinstance(found, Verdict) and found.passing and known == prior:
            served = UNTRIED[known](layout, "user" if in_user_namespace() else "trusted")
            if not isinstance(served, Verdict):
                return Choice(served, (_AS_BEFORE.format(name=known, reason=found.reason),))
        if not isinstance(found, Verdict):
            why = "" if name != AUTO or not found.snapshots else _WHY_SNAPSHOTS
            return Choice(found, _warnings(known, prior, refused), why)
        refused[known] = found
    reasons = {known: verdict.reason for known, verdict in refused.items()}
    said = "; ".join(f"{known}: {reason}" for known, reason in reasons.items())
    incompatible = all(verdict.incompatible for verdict in refused.values())
    error = IncompatibleFilesystem if incompatible else BackendUnsupported
    raise error(f"no union file system can serve {layout.root}: {said}", reasons=reasons)


def _refuse_unfit(layout: Layout, *, recorded: bool) -> None:
    """Raise IncompatibleFilesystem if no store can be there, OSError if it cannot be written."""
    try:
        reason = unfit(layout.probes)
    except OSError as error:
        if not recorded or error.errno not in PASSING:
            raise
        return
    if reason:
        raise IncompatibleFilesystem(
            f"no store can lie at {layout.root}: {reason}", reasons={"store": reason}
        )


def _tried(name: str, layout: Layout, *, recorded: bool) -> Backend | Verdict:
    """Probe, and once more if the failure may pass. OSError if the store cannot be written."""
    for left in reversed(range(_TRIES)):
        try:
            found = PROBES[name](layout)
        except OSError as error:
            if error.errno not in PASSING or not (left or recorded):
                raise
            where = f"{error.filename}: " if error.filename else ""
            found = Verdict(f"{where}{error.strerror}", passing=True)
        if not (isinstance(found, Verdict) and found.passing):
            break
        time.sleep(_PAUSE)
    return found


_AS_BEFORE: Final = (
    "{name} could not be tried out ({reason}); it serves the store as it did before, "
    "and a mount may fail until that is mended"
)
_WHY_SNAPSHOTS: Final = (
    "the store lies on btrfs, so that a layer is a snapshot of its parent and nothing is mounted; "
    "overlay and aufs serve there too, by name and from the first layer on"
)


def _foreign(name: str, prior: str, layout: Layout) -> Verdict | None:
    """Why a backend cannot use the layers of another one.

    A snapshot also holds its parents' content: mounted over its parents, it would show again what
    it has deleted. A layer of a union holds only its changes: by itself it would show too little.
    """
    if (name == btrfs.NAME) == (prior == btrfs.NAME) or not _has_layers(layout):
        return None
    if name == btrfs.NAME:
        return Verdict("the store's layers are no snapshots, but made for unions", True)
    return Verdict("the store's layers are snapshots of btrfs, which only btrfs can serve", True)


def _has_layers(layout: Layout) -> bool:
    try:
        with os.scandir(layout.layers) as entries:
            return next(entries, None) is not None
    except FileNotFoundError:
        return False


def survey(layout: Layout) -> Iterator[tuple[str, Backend | str]]:
    """Try each backend for a store at `layout.root`. What it can do, or why it cannot."""
    with scratch_dirs(layout.root) as at:
        if reason := unfit(at):
            yield from ((name, reason) for name in PROBES)
            return
        for name, probe in PROBES.items():
            found = probe(Layout(at))
            yield name, found.reason if isinstance(found, Verdict) else found


def _warnings(chosen: str, prior: str, refused: Mapping[str, Verdict]) -> tuple[str, ...]:
    if prior not in refused:
        return ()
    return (
        f"the store was last served by {prior}, which cannot serve it now "
        f"({refused[prior].reason}); {chosen} does, and layers are converted as they are used",
    )

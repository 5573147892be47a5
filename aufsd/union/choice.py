"""Which union file system serves a store: the one asked for, or the first that can."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from aufsd.store.layout import Layout
from aufsd.union import aufs, fuse, overlay
from aufsd.union.backend import Backend, Verdict
from aufsd.union.scratch import scratch_dirs
from aufsd_client.errors import BackendUnsupported, IncompatibleFilesystem

AUTO: Final = "auto"
# in the order of preference
PROBES: Final[Mapping[str, Callable[[Layout], Backend | Verdict]]] = {
    "aufs": aufs.probe,
    "overlay": overlay.probe,
    fuse.NAME: fuse.probe,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend, and what an operator should be told about how it came to be this one."""

    backend: Backend
    warnings: tuple[str, ...] = ()


def choose(name: str, prior: str, layout: Layout) -> Choice:
    """Probe on the store's own file system until a backend can serve it.

    `name` is one of PROBES, or `auto`: then the store's `prior` backend comes first ("" for a new
    store), and the others in their order after it. Raises IncompatibleFilesystem if it is the
    store's file system that stands in the way, else BackendUnsupported; `data["reasons"]` has a
    sentence for each backend tried. OSError if the store cannot be written.
    """
    names = sorted(PROBES, key=lambda known: known != prior) if name == AUTO else [name]
    refused: dict[str, Verdict] = {}
    for known in names:
        found = PROBES[known](layout)
        if not isinstance(found, Verdict):
            return Choice(found, _warnings(known, prior, refused))
        refused[known] = found
    reasons = {known: verdict.reason for known, verdict in refused.items()}
    said = "; ".join(f"{known}: {reason}" for known, reason in reasons.items())
    incompatible = all(verdict.incompatible for verdict in refused.values())
    error = IncompatibleFilesystem if incompatible else BackendUnsupported
    raise error(f"no union file system can serve {layout.root}: {said}", reasons=reasons)


def survey(layout: Layout) -> Iterator[tuple[str, Backend | str]]:
    """What each backend could do in a store at `layout.root`, or why not; leaves nothing there."""
    with scratch_dirs(layout.root) as at:
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

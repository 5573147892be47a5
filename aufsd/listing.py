"""What `list` and `mounts` answer: from memory, nothing is asked of disk or kernel."""

from collections.abc import Mapping

from aufsd import results
from aufsd.active.refs import Entry
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.layout import Layout


def layers(
    store: Store, entries: Mapping[LayerId, Entry], *, after: str, limit: int
) -> results.Layers:
    """The layers by id, one page, damaged ones included."""
    ids = sorted(id for id in (*store.parent, *store.damaged) if id > after)
    page = ids[:limit]
    more = page[-1] if len(ids) > limit else ""
    return results.Layers([_layer(store, entries.get(id), id) for id in page], more)


def _layer(store: Store, entry: Entry | None, id: LayerId) -> results.LayerRow:
    return results.LayerRow(
        id=id,
        parent=store.parent.get(id) or "",
        depth=0 if id in store.damaged else len(store.chain(id)),
        references=len(entry.references) if entry else 0,
        mounted=bool(entry and entry.union),
    )


def mounts(layout: Layout, entries: Mapping[LayerId, Entry]) -> results.MountTable:
    """The active-mount table, by id."""
    return results.MountTable([_mount(layout, id, entry) for id, entry in sorted(entries.items())])


def _mount(layout: Layout, id: LayerId, entry: Entry) -> results.MountRow:
    return results.MountRow(
        id=id,
        path=path(layout, id, union=entry.union),
        backend=entry.backend,
        references=len(entry.references),
        mounted=entry.union,
        read_only=entry.read_only,
        label=entry.label,
        since=entry.since,
        holders=[
            results.Reference(ref.pid, ref.uid, ref.comm, ref.hold, ref.since, ref.name)
            for ref in entry.references
        ],
    )


def path(layout: Layout, id: LayerId, *, union: bool) -> str:
    """Where a layer's root file system is: its mount, or its content if it is never mounted."""
    return layout.mount_point(id) if union else layout.content(id)

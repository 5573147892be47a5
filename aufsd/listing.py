"""The answers of `list`, `mounts` and `get_metadata`, made from memory."""

from collections.abc import Mapping, Sequence

from aufsd import results
from aufsd.active.refs import Entry
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.layout import Layout


def page(store: Store, *, after: str, limit: int, prefix: str = "") -> tuple[list[LayerId], str]:
    """The ids of one page of `list`, with damaged layers, and the cursor to the next page."""
    found = (id for id in (*store.parent, *store.damaged) if id > after)
    ids = sorted(id for id in found if id.startswith(prefix)) if prefix else sorted(found)
    shown = ids[:limit]
    return shown, shown[-1] if len(ids) > limit else ""


def layers(
    store: Store,
    entries: Mapping[LayerId, Entry],
    ids: Sequence[LayerId],
    depths: dict[LayerId, int],
) -> list[results.LayerRow]:
    """The rows of these layers, without those that are gone.

    `depths` is kept from one call to the next, so that the depth of each parent is counted once.
    """
    return [
        _layer(store, entries.get(id), id, _depth(store, id, depths))
        for id in ids
        if store.exists(id)
    ]


def _layer(store: Store, entry: Entry | None, id: LayerId, depth: int) -> results.LayerRow:
    return results.LayerRow(
        id=id,
        parent=store.parent.get(id) or "",
        depth=depth,
        references=len(entry.references) if entry else 0,
        mounted=bool(entry and entry.stands),
        created=store.created.get(id, 0.0),
        sealed=id in store.sealed,
    )


def _depth(store: Store, id: LayerId, known: dict[LayerId, int]) -> int:
    """The number of layers in the chain; 0 for a damaged layer."""
    if id in store.damaged:
        return 0
    above: LayerId | None = id
    new = []
    while above is not None and above not in known:
        new.append(above)
        above = store.parent.get(above)
    depth = 0 if above is None else known[above]
    for each in reversed(new):
        depth += 1
        known[each] = depth
    return depth


def mounts(layout: Layout, entries: Mapping[LayerId, Entry]) -> results.MountTable:
    """The active-mount table, by id."""
    return results.MountTable([_mount(layout, id, entry) for id, entry in sorted(entries.items())])


def _mount(layout: Layout, id: LayerId, entry: Entry) -> results.MountRow:
    return results.MountRow(
        id=id,
        path=path(layout, id, mounted=entry.mounted),
        backend=entry.backend,
        references=len(entry.references),
        mounted=entry.stands,
        read_only=entry.read_only,
        label=entry.label,
        since=entry.since,
        holders=[
            results.Reference(ref.pid, ref.uid, ref.comm, ref.hold, ref.since, ref.name)
            for ref in entry.references
        ],
    )


def metadata(
    store: Store,
    entry: Entry | None,
    chain: Sequence[LayerId],
    *,
    needs_mount: bool,
    backend: str,
    dialect: str,
) -> results.Metadata:
    """The answer of `get_metadata` for the first layer of a chain.

    `needs_mount`: whether a `get` mounts it.
    """
    id = chain[0]
    mounted = entry.mounted if entry else needs_mount
    found = {
        "id": id,
        "parents": " ".join(chain[1:]),
        "content": store.layout.content(id),
        "path": path(store.layout, id, mounted=mounted),
        "backend": backend,
        "dialect": dialect,
        "references": str(len(entry.references) if entry else 0),
        "mounted": _yes(bool(entry and entry.stands)),
        "sealed": _yes(id in store.sealed),
        "created": f"{store.created.get(id, 0.0):.6f}",
    }
    if entry and entry.mounted:
        found["label"] = entry.label
        found["read_only"] = _yes(entry.read_only)
    return results.Metadata(found)


def _yes(true: bool) -> str:
    return "true" if true else "false"


def path(layout: Layout, id: LayerId, *, mounted: bool) -> str:
    """The path of a layer's root file system: its mount point, or its content directory."""
    return layout.mount_point(id) if mounted else layout.content(id)

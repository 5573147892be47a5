"""What aufsd means, in plain Python: the state of a store, and what each call may answer in it.

Pure. A state is a value; `outcomes` has every answer that a call may give, each with the state
after it, as if the call were made in one go and nothing else ran.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

# what a layer says of a name: the token of its content, or None for a whiteout
Own = frozenset[tuple[str, int | None]]
View = dict[str, int]
# a call that was cut off: whether it was carried out is not known
UNKNOWN = "unknown"
ANONYMOUS = ""


class Entry(NamedTuple):
    """A line of the table. `holds` are sorted: "" counted, "name:...", "pid:...".

    `real`: the kernel has the mount. `unsure`: names that were written below the mount while it
    stood, which an overlay may show or not.
    """

    holds: tuple[str, ...]
    union: bool
    read_only: bool
    real: bool = True
    unsure: frozenset[str] = frozenset()


class Layer(NamedTuple):
    """`own` is all that shows where layers are snapshots. `moved`: names that were written there
    after a child had been made of it.
    """

    parent: str
    own: Own = frozenset()
    entry: Entry | None = None
    moved: frozenset[str] = frozenset()


class State(NamedTuple):
    """A store. `layers` is sorted by id."""

    layers: tuple[tuple[str, Layer], ...] = ()
    snapshots: bool = False

    def get(self, id: str) -> Layer | None:
        for name, layer in self.layers:
            if name == id:
                return layer
        return None

    def put(self, id: str, layer: Layer | None) -> "State":
        rest = [row for row in self.layers if row[0] != id]
        if layer is not None:
            rest.append((id, layer))
        return State(tuple(sorted(rest)), self.snapshots)

    def chain(self, id: str) -> list[str]:
        """The layer and its parents, nearest first."""
        found = []
        while id and (layer := self.get(id)):
            found.append(id)
            id = layer.parent
        return found

    def children(self, id: str) -> list[str]:
        return [name for name, layer in self.layers if layer.parent == id]

    def above(self, id: str) -> list[str]:
        """All that stand on a layer."""
        found = self.children(id)
        for each in found:
            found += self.children(each)
        return found


class Call(NamedTuple):
    """A call, or something else that happens to the store, and what of it the model knows.

    `tar`: what an archive says. `name`: of a file. `hold`: whose reference it is.
    """

    method: str
    id: str = ""
    parent: str = ""
    name: str = ""
    hold: str = ANONYMOUS
    token: int = 0
    force: bool = False
    tar: tuple[tuple[str, int | None], ...] = ()


class Beside(NamedTuple):
    """What overlaps a call, for the few answers that are not those of calls in one go.

    `readers`: pairs of layers that a diff, diff_size or changes compares meanwhile. `turning`: ids
    that are mounted or unmounted meanwhile. `torn`: names that several writes change meanwhile.
    `full`: the disk is full, for a time that overlaps. `killed`: the daemon was killed meanwhile.
    `removed`: a layer was, perhaps the last child of another. `died`: what processes hold that end.
    """

    readers: tuple[tuple[str, str], ...] = ()
    turning: frozenset[str] = frozenset()
    torn: frozenset[str] = frozenset()
    full: bool = False
    killed: bool = False
    removed: bool = False
    died: frozenset[str] = frozenset()


Answer = object
Expected = object | Callable[[Answer], bool]
Outcome = tuple[Expected, State]
NOT_FOUND, IN_USE, NO_SPACE = "LayerNotFound", "LayerInUse", "NoSpace"
GONE, READ_ONLY, THERE, ABSENT, DONE = "gone", "read-only", "there", "absent", "done"


def fits(expected: Expected, answer: Answer) -> bool:
    return expected(answer) if callable(expected) else expected == answer


def view(state: State, id: str) -> View:
    """What shows in a layer."""
    shown: View = {}
    for each in reversed(state.chain(id)):
        layer = state.get(each)
        assert layer is not None
        if state.snapshots:
            shown = {}
        for name, token in layer.own:
            if token is None:
                shown.pop(name, None)
            else:
                shown[name] = token
    return shown


def size_of(token: int) -> int:
    """How long the file of an even token is; an odd one is a symlink."""
    return 0 if token % 2 else 20 + token % 13


def compared(now: View, then: View) -> Own:
    """What has to be said to make one view out of another."""
    changed = {name: token for name, token in now.items() if then.get(name) != token}
    return frozenset([*changed.items(), *((name, None) for name in then if name not in now)])


def outcomes(state: State, call: Call, beside: Beside) -> Iterator[Outcome]:
    """Every answer that the call may give, and the state after it."""
    yield from _CALLS[call.method](state, call, beside)


# --- layers ---------------------------------------------------------------------------------------


def _exists(state: State, call: Call, _: Beside) -> Iterator[Outcome]:
    yield state.get(call.id) is not None, state


def _create(state: State, call: Call, beside: Beside) -> Iterator[Outcome]:
    if state.get(call.id) is not None:
        yield "LayerExists", state
    elif call.parent and state.get(call.parent) is None:
        yield "ParentNotFound", state
    else:
        own: Own = frozenset()
        if state.snapshots and call.parent:
            own = frozenset(view(state, call.parent).items())
        yield DONE, state.put(call.id, Layer(call.parent, own))
        if beside.full:
            yield NO_SPACE, state


def _undo_create(state: State, call: Call, _: Beside) -> Iterator[Outcome]:
    """One that was begun, and did not come to its end."""
    layer = state.get(call.id)
    if layer and layer.parent == call.parent and layer.entry is None:
        yield DONE, state.put(call.id, None)


def _remove(state: State, call: Call, beside: Beside) -> Iterator[Outcome]:
    layer = state.get(call.id)
    if layer is None:
        yield ("not-found",), state
    elif state.children(call.id):
        yield "LayerHasChildren", state
    elif layer.entry and layer.entry.holds and not call.force:
        yield ("in-use", len(layer.entry.holds)), state
    else:
        yield ("removed",), state.put(call.id, None)
        if _is_read(state, call.id, beside):
            yield ("in-use", len(layer.entry.holds) if layer.entry else 0), state


def _is_read(state: State, id: str, beside: Beside) -> bool:
    """Whether somebody reads the layer, or what it is a part of, at the same time."""
    return any(
        id in state.chain(reader) or (against and id in state.chain(against))
        for reader, against in beside.readers
    )


# --- mounts ---------------------------------------------------------------------------------------


def _get(state: State, call: Call, beside: Beside) -> Iterator[Outcome]:
    if call.hold in beside.died:
        # nobody can see any more which process that is
        yield "InvalidParams", state
    layer = state.get(call.id)
    if layer is None:
        yield NOT_FOUND, state
        return
    entry, read_only = layer.entry, bool(state.children(call.id))
    holds = entry.holds if entry else ()
    new = not (call.hold.startswith("name:") and call.hold in holds)
    more = tuple(sorted((*holds, call.hold))) if new else holds
    union = not state.snapshots and (bool(layer.parent) or read_only)
    mounts = entry is None or (entry.union and not entry.real)
    made = Entry(more, union, read_only)
    if entry is not None and not mounts:
        made = entry._replace(holds=more)
    either = beside.full or (beside.removed and mounts)
    # with the children that it had when the get began; content shown read-only is mounted
    bound = made._replace(read_only=True, union=made.union or not (state.snapshots or beside.full))
    for each in (made, bound) if either else (made,):
        answer = ("got", len(more), each.union, each.read_only, new)
        yield answer, state.put(call.id, layer._replace(entry=each))
    if beside.full:
        yield NO_SPACE, state
    if beside.killed and made.union and call.hold:
        # mounted, and not in the journal yet: whose it was is lost
        anonymous = tuple(sorted((*holds, ANONYMOUS)))
        yield UNKNOWN, state.put(call.id, layer._replace(entry=made._replace(holds=anonymous)))


def _put(state: State, call: Call, _: Beside) -> Iterator[Outcome]:
    layer = state.get(call.id)
    if layer is None or layer.entry is None:
        yield ("left", 0, False, False), state
        return
    entry = layer.entry
    if call.hold not in entry.holds and call.hold:
        yield ("left", len(entry.holds), entry.union, False), state
    elif call.hold not in entry.holds and entry.holds:
        yield IN_USE, state
    else:
        holds = list(entry.holds)
        if dropped := call.hold in holds:
            holds.remove(call.hold)
        left = entry._replace(holds=tuple(holds)) if holds else None
        answer = ("left", len(holds), bool(left and left.union), dropped)
        yield answer, state.put(call.id, layer._replace(entry=left))


def _take_down(state: State, call: Call, _: Beside) -> Iterator[Outcome]:
    """cleanup, for one layer: whether it says that this was unmounted."""
    layer = state.get(call.id)
    if layer is None or layer.entry is None or not layer.entry.union:
        yield False, state
    else:
        yield layer.entry.real, state.put(call.id, layer._replace(entry=None))


def _let_go(state: State, call: Call, _: Beside) -> Iterator[Outcome]:
    """The first step of a remove with force."""
    layer = state.get(call.id)
    if layer and layer.entry and not state.children(call.id):
        state = state.put(call.id, layer._replace(entry=None))
    yield DONE, state


def _death(state: State, call: Call, _: Beside) -> Iterator[Outcome]:
    """A process ends that holds references, `hold`, to one layer."""
    layer = state.get(call.id)
    if layer is None or layer.entry is None or call.hold not in layer.entry.holds:
        yield DONE, state
        return
    holds = tuple(each for each in layer.entry.holds if each != call.hold)
    left = layer.entry._replace(holds=holds) if holds else None
    yield DONE, state.put(call.id, layer._replace(entry=left))


def _outside(state: State, call: Call, _: Beside) -> Iterator[Outcome]:
    """Somebody unmounts it who is not aufsd."""
    layer = state.get(call.id)
    if layer is None or layer.entry is None or not (layer.entry.union and layer.entry.real):
        yield ABSENT, state
    else:
        # who has a file open in it for a moment keeps it
        yield "busy", state
        entry = layer.entry._replace(real=False, unsure=frozenset())
        yield DONE, state.put(call.id, layer._replace(entry=entry))


def _restart(state: State, _: Call, __: Beside) -> Iterator[Outcome]:
    """The daemon was killed, and started again: a mount that is not there counts nothing."""
    for id, layer in state.layers:
        entry = layer.entry
        if entry and entry.union and not entry.real:
            state = state.put(id, layer._replace(entry=None))
    yield DONE, state


# --- content --------------------------------------------------------------------------------------


def _apply(state: State, call: Call, beside: Beside) -> Iterator[Outcome]:
    layer = state.get(call.id)
    if layer is None:
        yield NOT_FOUND, state
        return
    in_use = [
        id for id in (call.id, *state.above(call.id)) if (each := state.get(id)) and each.entry
    ]
    if in_use:
        yield IN_USE, state
        return
    if _is_read(state, call.id, beside):
        yield IN_USE, state
    if state.snapshots and state.children(call.id):
        yield "LayerHasChildren", state
        return
    own = dict(layer.own) | dict(call.tar)
    if state.snapshots:
        own = {name: token for name, token in own.items() if token is not None}
    after = state.put(call.id, layer._replace(own=frozenset(own.items())))
    yield ("applied", _size(after, call.id, "", frozenset())), after
    if beside.full:
        yield NO_SPACE, state
        # a mount that is tried meanwhile and fails
        yield IN_USE, state


def _said(state: State, id: str, parent: str) -> Own:
    """What `diff` says: the layer's own content, or what differs in two views."""
    layer = state.get(id)
    assert layer is not None
    if state.snapshots or (parent and parent != layer.parent):
        return compared(view(state, id), view(state, parent or layer.parent))
    return layer.own


def _ignored(state: State, call: Call, beside: Beside) -> frozenset[str]:
    found = beside.torn
    for id in (*state.chain(call.id), *state.chain(call.parent)) if state.snapshots else ():
        layer = state.get(id)
        found |= layer.moved if layer else frozenset()
    return found


def _comparing(
    state: State, call: Call, beside: Beside, expected: Callable[[frozenset[str]], Expected]
) -> Iterator[Outcome]:
    if state.get(call.id) is None:
        yield NOT_FOUND, state
    elif call.parent and state.get(call.parent) is None:
        yield "ParentNotFound", state
    else:
        yield expected(_ignored(state, call, beside)), state


def _diff(state: State, call: Call, beside: Beside) -> Iterator[Outcome]:
    def expected(ignored: frozenset[str]) -> Expected:
        own = frozenset(row for row in _said(state, call.id, call.parent) if row[0] not in ignored)
        return lambda answer: (
            isinstance(answer, frozenset)
            and frozenset(row for row in answer if row[0] not in ignored) == own
        )

    yield from _comparing(state, call, beside, expected)


def _changes(state: State, call: Call, beside: Beside) -> Iterator[Outcome]:
    def expected(ignored: frozenset[str]) -> Expected:
        layer = state.get(call.id)
        assert layer is not None
        then = view(state, call.parent or layer.parent)
        kinds = {None: "delete", True: "modify", False: "add"}
        found = frozenset(
            (name, kinds[None if token is None else name in then])
            for name, token in _said(state, call.id, call.parent)
            if name not in ignored and not (token is None and name not in then)
        )
        return lambda answer: (
            isinstance(answer, frozenset)
            and frozenset(row for row in answer if row[0] not in ignored) == found
        )

    yield from _comparing(state, call, beside, expected)


def _size(state: State, id: str, parent: str, ignored: frozenset[str]) -> int:
    return sum(
        size_of(token)
        for name, token in _said(state, id, parent)
        if token is not None and name not in ignored
    )


def _diff_size(state: State, call: Call, beside: Beside) -> Iterator[Outcome]:
    def expected(ignored: frozenset[str]) -> Expected:
        if ignored:
            return lambda answer: isinstance(answer, int)
        return _size(state, call.id, call.parent, ignored)

    yield from _comparing(state, call, beside, expected)


# --- files in a mount -----------------------------------------------------------------------------


def _use(state: State, call: Call, beside: Beside) -> Iterator[Outcome]:
    """Something done in what `get` gave to the reference `hold`: look, read, link or unlink."""
    if beside.full and call.method in ("link", "unlink"):
        # a whiteout takes room as well
        yield NO_SPACE, state
    layer = state.get(call.id)
    held = bool(layer and layer.entry and call.hold in layer.entry.holds)
    shows = bool(layer and layer.entry and (layer.entry.real or not layer.entry.union))
    if not held or not shows:
        yield GONE, state
    if not held and call.method in ("link", "unlink", "look", "read"):
        # what the directory was that the client had open nobody knows any more
        yield (lambda _: True), state
    if layer is None or layer.entry is None or not shows:
        return
    yield from _in_place(state, layer, layer.entry, call)


def _in_place(state: State, layer: Layer, entry: Entry, call: Call) -> Iterator[Outcome]:
    shown = view(state, call.id)
    if not layer.parent:
        # its content is shown as it lies there, with whiteouts that hide nothing
        bare = frozenset(name for name, token in layer.own if token is None)
        entry = entry._replace(unsure=entry.unsure | bare)
    unsure = call.name in entry.unsure
    if call.method == "look":
        certain = frozenset(shown) - entry.unsure
        yield (
            (lambda answer: isinstance(answer, frozenset) and answer - entry.unsure == certain),
            state,
        )
    elif call.method == "read":
        yield (lambda answer: unsure or answer == shown.get(call.name, ABSENT)), state
    elif call.method == "link":
        if call.name in shown or unsure:
            yield THERE, state
        if call.name not in shown or unsure:
            if entry.read_only:
                yield READ_ONLY, state
            else:
                yield DONE, _written(state, call.id, call.name, call.token)
    else:
        if call.name not in shown or unsure:
            yield ABSENT, state
        if entry.read_only:
            yield READ_ONLY, state
        elif call.name in shown or unsure:
            yield DONE, _written(state, call.id, call.name, None)


def _written(state: State, id: str, name: str, token: int | None) -> State:
    """A name was made in a mount, or deleted."""
    layer = state.get(id)
    assert layer is not None
    below = view(state, layer.parent) if not state.snapshots else {}
    own = dict(layer.own)
    own.pop(name, None)
    if token is not None or name in below:
        own[name] = token
    moved = layer.moved
    above = state.above(id)
    if state.snapshots and above:
        moved |= {name}
    state = state.put(id, layer._replace(own=frozenset(own.items()), moved=moved))
    for each in above:
        other = state.get(each)
        if other and other.entry and not state.snapshots:
            entry = other.entry._replace(unsure=other.entry.unsure | {name})
            state = state.put(each, other._replace(entry=entry))
    return state


# --- what looks at all ----------------------------------------------------------------------------

Row = tuple[str, tuple[object, ...]]


def _rows(state: State, beside: Beside, true: Mapping[str, tuple[object, ...]]) -> Expected:
    """Rows by id; each ends with the references and whether it is mounted.

    While a mount is made or taken down it may show as mounted, with no reference yet or any more.
    """

    def matches(answer: Answer) -> bool:
        assert isinstance(answer, frozenset)
        found = dict(answer)
        for id in beside.turning:
            row = found.get(id)
            if row is not None and row[-2:] == (0, True):
                found.pop(id)
                if id not in true and row[:-2]:
                    return False
                if id in true and true[id][:-2] != row[:-2]:
                    return False
                if id in true:
                    found[id] = true[id]
        return found == dict(true)

    return matches


def _list(state: State, _: Call, beside: Beside) -> Iterator[Outcome]:
    rows = {
        id: (
            layer.parent,
            len(state.chain(id)),
            len(layer.entry.holds) if layer.entry else 0,
            bool(layer.entry and layer.entry.union),
        )
        for id, layer in state.layers
    }
    yield _rows(state, beside, rows), state


def _mounts(state: State, _: Call, beside: Beside) -> Iterator[Outcome]:
    rows = {
        id: (layer.entry.holds, layer.entry.read_only, layer.entry.union)
        for id, layer in state.layers
        if layer.entry
    }
    turning = beside.turning

    def matches(answer: Answer) -> bool:
        assert isinstance(answer, frozenset)
        found = dict(answer)
        for id in turning:
            row = found.get(id)
            if row is not None and (row[0], row[2]) == ((), True):
                found.pop(id)
                if id in rows:
                    found[id] = rows[id]
        return found == rows

    yield matches, state


def _get_metadata(state: State, call: Call, beside: Beside) -> Iterator[Outcome]:
    layer = state.get(call.id)
    if layer is None:
        yield NOT_FOUND, state
        return
    row = (
        " ".join(state.chain(call.id)[1:]),
        len(layer.entry.holds) if layer.entry else 0,
        bool(layer.entry and layer.entry.union),
    )
    expected = _rows(state, beside, {call.id: row})
    yield (
        (
            lambda answer: (
                isinstance(answer, tuple) and fits(expected, frozenset([(call.id, answer)]))
            )
        ),
        state,
    )


def _check(state: State, _: Call, __: Beside) -> Iterator[Outcome]:
    yield frozenset(), state


def _content(state: State, call: Call, _: Beside) -> Iterator[Outcome]:
    """All that shows, as it lies there; where layers are snapshots, and nothing else runs."""
    yield frozenset(view(state, call.id).items()), state


def _kernel(state: State, _: Call, __: Beside) -> Iterator[Outcome]:
    """Which layers are mounted, as the kernel says; asked when nothing else runs."""
    yield (
        frozenset(
            id
            for id, layer in state.layers
            if layer.entry and layer.entry.union and layer.entry.real
        ),
        state,
    )


_CALLS: Mapping[str, Callable[[State, Call, Beside], Iterator[Outcome]]] = {
    "exists": _exists,
    "create": _create,
    "undo_create": _undo_create,
    "remove": _remove,
    "get": _get,
    "put": _put,
    "take_down": _take_down,
    "let_go": _let_go,
    "death": _death,
    "outside": _outside,
    "restart": _restart,
    "apply_diff": _apply,
    "diff": _diff,
    "changes": _changes,
    "diff_size": _diff_size,
    "look": _use,
    "read": _use,
    "link": _use,
    "unlink": _use,
    "list": _list,
    "mounts": _mounts,
    "get_metadata": _get_metadata,
    "check": _check,
    "content": _content,
    "kernel": _kernel,
}

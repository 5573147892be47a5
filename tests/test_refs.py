"""The state machine against a model of the kernel: counts follow the mount, whatever the order."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aufsd.active import refs
from aufsd.active.refs import Entry, OnGet, OnPut, Reference, State

PIDS = st.integers(min_value=1, max_value=3)
LABELS = st.sampled_from(["", "a", "b"])


def reference(pid: int, hold: refs.Hold = "manual") -> Reference:
    return Reference(pid, 0, "test", hold, 0.0, pid)


class OneLayer(RuleBasedStateMachine):
    """One layer with parents: `kernel` is what is mounted, `held` what was got and not put."""

    def __init__(self) -> None:
        super().__init__()
        self.entry: Entry | None = None
        self.kernel: str | None = None
        self.before: Entry | None = None
        self.getting: Reference | None = None
        self.held: list[tuple[int, str]] = []

    @initialize()
    def start(self) -> None:
        self.entry = None

    def settled(self) -> bool:
        return self.entry is None or self.entry.state is State.ACTIVE

    @precondition(settled)
    @rule(pid=PIDS, hold=st.sampled_from(["manual", "process"]), label=LABELS)
    def get(self, pid: int, hold: refs.Hold, label: str) -> None:
        step = refs.on_get(self.entry, label=label, live=self.kernel is not None)
        if step is OnGet.COUNT:
            assert self.kernel == label
            assert self.entry is not None
            self.entry = refs.counted(self.entry, reference(pid, hold))
            self.held.append((pid, hold))
        elif step is OnGet.LABEL_CONFLICT:
            assert self.kernel is not None
            assert self.kernel != label
        else:
            assert step is OnGet.MOUNT
            assert self.kernel is None
            self.before, self.getting = self.entry, reference(pid, hold)
            self.entry = refs.mounting(self.entry, label=label, read_only=False, backend="x")

    @precondition(lambda self: self.entry is not None and self.entry.state is State.MOUNTING)
    @rule(works=st.booleans())
    def mount_ends(self, works: bool) -> None:
        assert self.entry is not None
        assert self.getting is not None
        assert refs.on_get(self.entry, label="", live=False) is OnGet.WAIT
        if not works:
            self.entry = self.before
            return
        self.kernel = self.entry.label
        mounted = refs.mounted(self.entry, None, read_only=False, since=1.0)
        self.entry = refs.counted(mounted, self.getting)
        self.held.append((self.getting.pid, self.getting.hold))

    @precondition(settled)
    @rule(pid=PIDS)
    def put(self, pid: int) -> None:
        live = self.kernel is not None
        step, at = refs.on_put(self.entry, pid=pid, live=live)
        gone = self.entry.references[at] if self.entry and at is not None else None
        own = [held for held in self.held if held == (pid, "process")]
        manual = [held for held in self.held if held[1] == "manual"]
        if step is OnPut.REFUSED:
            assert self.held
            assert not own
            assert not manual
            return
        if step is OnPut.NOTHING:
            assert not self.held
            assert not live
            return
        if gone is not None:
            assert (gone.pid, gone.hold) == (own or [(gone.pid, "manual")])[0]
            self.held.remove((gone.pid, gone.hold))
        if step is OnPut.COUNT:
            assert self.entry is not None
            assert at is not None
            self.entry = refs.without(self.entry, at)
            assert self.held
        else:
            assert step is OnPut.UNMOUNT
            assert not self.held
            if self.entry is not None:
                self.entry = refs.unmounting(self.entry)
            else:
                self.kernel = None

    @precondition(lambda self: self.entry is not None and self.entry.state is State.UNMOUNTING)
    @rule(works=st.booleans())
    def unmount_ends(self, works: bool) -> None:
        assert self.entry is not None
        assert refs.on_put(self.entry, pid=1, live=True) == (OnPut.WAIT, None)
        if works:
            self.entry, self.kernel = None, None
        else:
            self.entry = refs.busy(self.entry)

    @precondition(settled)
    @rule()
    def unmounted_from_outside(self) -> None:
        self.kernel = None

    @invariant()
    def counts_agree(self) -> None:
        counted = sorted((ref.pid, ref.hold) for ref in self.entry.references) if self.entry else []
        assert counted == sorted(self.held)


TestOneLayer = OneLayer.TestCase
TestOneLayer.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_layer_without_parents_only_counts() -> None:
    entry = refs.counted(Entry(State.ACTIVE, mounted=False), reference(1))
    assert refs.on_get(entry, label="any", live=False) is OnGet.COUNT
    assert refs.on_put(entry, pid=9, live=True) == (OnPut.UNMOUNT, 0)


NAMED = Reference(1, 0, "x", "manual", 1.0, 1, "engine")


def test_a_name_counts_once() -> None:
    entry = Entry(State.ACTIVE, mounted=True, references=(NAMED,))
    assert not refs.counts(entry, Reference(2, 0, "y", "manual", 2.0, 2, "engine"))
    assert refs.counts(entry, Reference(1, 0, "x", "manual", 2.0, 1, "another"))
    assert refs.counts(entry, reference(1))


def test_a_put_by_name_drops_that_one_or_nothing() -> None:
    entry = Entry(State.ACTIVE, mounted=True, references=(reference(1), NAMED, reference(2)))
    assert refs.on_put(entry, pid=9, live=True, name="engine") == (OnPut.COUNT, 1)
    assert refs.on_put(entry, pid=1, live=True, name="other") == (OnPut.NOTHING, None)
    alone = Entry(State.ACTIVE, mounted=True, references=(NAMED,))
    assert refs.on_put(alone, pid=9, live=True, name="engine") == (OnPut.UNMOUNT, 0)
    # also of what nobody counted: that somebody has it mounted is not this name's business
    assert refs.on_put(None, pid=9, live=True, name="engine") == (OnPut.NOTHING, None)


def test_a_put_without_a_name_leaves_those_that_have_one() -> None:
    entry = Entry(State.ACTIVE, mounted=True, references=(NAMED,))
    assert refs.on_put(entry, pid=1, live=True) == (OnPut.REFUSED, None)


def test_dropping_one_of_two_equal_references_leaves_one() -> None:
    entry = Entry(State.ACTIVE, mounted=True, references=(reference(1), reference(1)))
    step, at = refs.on_put(entry, pid=9, live=True)
    assert (step, at) == (OnPut.COUNT, 1)
    assert refs.without(entry, 1).references == (reference(1),)

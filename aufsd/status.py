"""The answers of `status` and `health`, from memory and statfs(2)."""

import os
import platform
from dataclasses import dataclass, field

from aufsd import results
from aufsd.active.mounts import Mounts
from aufsd.archive.jobs import Jobs
from aufsd.store.layers import Store
from aufsd.tasks import Tasks
from aufsd.union.backend import Backend

# with a smaller share of free blocks or inodes the store is degraded; with none it is failing
_LOW = 0.05


@dataclass(slots=True)
class Overview:
    """Reads the state of the store. `backing` is the file system that the store is on."""

    store: Store
    backend: Backend
    active: Mounts
    jobs: Jobs
    backing: str
    tasks: Tasks
    # what the start could not repair, in words; `health` shows it until the next start
    notes: list[str] = field(default_factory=list)

    def status(self) -> results.Status:
        """Docker's rows (moby aufs.go, Status), then more."""
        facts = dict(self.backend.facts)
        entries = self.active.table.entries
        mounted = sum(1 for entry in entries.values() if entry.stands)
        references = sum(len(entry.references) for entry in entries.values())
        layers = len(self.store.parent)
        health = self.health()
        rows = [
            ("Root Dir", self.store.layout.root),
            ("Backing Filesystem", self.backing),
            ("Dirs", str(layers + len(self.store.damaged))),
            ("Dirperm1 Supported", facts.pop("dirperm1", "false")),
            ("Backend", self.backend.name),
            ("Kernel", platform.release()),
            ("Maximum Branches", str(self.backend.max_branches)),
            ("Mounts", str(mounted)),
            ("References", str(references)),
            ("Quarantined", str(len(self.store.damaged))),
            ("Running Archives", str(len(self.jobs.running()))),
        ]
        rows += facts.items()
        return results.Status(
            driver="aufsd",
            status=rows,
            backend=self.backend.name,
            kernel=platform.release(),
            layers=layers,
            mounts=mounted,
            references=references,
            jobs=self.jobs.running(),
            degraded=[check.detail for check in health.checks if check.status != "ok"],
        )

    def health(self) -> results.Health:
        """All checks. The whole has the status of the worst."""
        checks = [
            self._identity(),
            self._space(),
            self._busy(),
            self._helpers(),
            self._archives(),
            self._quarantine(),
            self._journal(),
            self._start(),
            *self.tasks.checks(),
        ]
        worst = max((check.status for check in checks), key=_SEVERITY.index)
        return results.Health(worst, checks)

    def _identity(self) -> results.HealthCheck:
        problem = self.store.identity.problem()
        if problem is not None:
            return results.HealthCheck("store", "failing", problem.message)
        return results.HealthCheck("store", "ok", "it is what was locked, and takes writes")

    def _space(self) -> results.HealthCheck:
        try:
            found = os.statvfs(self.store.layout.root)
        except OSError as error:
            return results.HealthCheck("space", "failing", f"the store: {error.strerror}")
        blocks = found.f_bavail / found.f_blocks if found.f_blocks else 1.0
        # btrfs has no inode count and says 0
        inodes = found.f_favail / found.f_files if found.f_files else 1.0
        free = found.f_bavail * found.f_frsize
        detail = f"{free >> 20} MiB ({blocks:.0%}) and {inodes:.0%} of the inodes are free"
        if not free or not inodes:
            return results.HealthCheck("space", "failing", detail)
        low = min(blocks, inodes) < _LOW
        return results.HealthCheck("space", "degraded" if low else "ok", detail)

    def _busy(self) -> results.HealthCheck:
        busy = sorted(self.active.table.busy())
        if not busy:
            return results.HealthCheck("mounts", "ok", "no mount stands without a reference")
        named = ", ".join(f"{id} ({self.active.busy_errnos.get(id) or 'EBUSY'})" for id in busy[:5])
        detail = f"{len(busy)} mounts stand though no reference is left: {named}"
        return results.HealthCheck("mounts", "degraded", detail)

    def _helpers(self) -> results.HealthCheck:
        dead = sorted(self.active.helpers.dead)
        if not dead:
            return results.HealthCheck("helpers", "ok", "no process that serves a mount has died")
        detail = (
            f"{len(dead)} mounts are dead, the next get mounts them again: {', '.join(dead[:5])}"
        )
        return results.HealthCheck("helpers", "degraded", detail)

    def _archives(self) -> results.HealthCheck:
        stuck = self.jobs.stuck.living()
        if not stuck:
            return results.HealthCheck("archives", "ok", "no archive process waits for ever")
        named = ", ".join(f"{each.pid} ({each.kind} of {each.id})" for each in stuck[:5])
        detail = (
            f"{len(stuck)} archive processes cannot be ended until the server of a file answers or "
            f"ends: {named}; the first waits for {stuck[0].stream[:200]}"
        )
        return results.HealthCheck("archives", "degraded", detail)

    def _quarantine(self) -> results.HealthCheck:
        damaged = sorted(self.store.damaged)
        if not damaged:
            return results.HealthCheck("layers", "ok", "no layer is in quarantine")
        detail = f"{len(damaged)} layers are in quarantine: {', '.join(damaged[:5])}"
        return results.HealthCheck("layers", "degraded", detail)

    def _journal(self) -> results.HealthCheck:
        failure = self.active.table.journal.failure
        if not failure:
            return results.HealthCheck("journal", "ok", "every change of the table is written down")
        detail = f"after a crash counts may be wrong, the journal cannot be written: {failure}"
        return results.HealthCheck("journal", "degraded", detail)

    def _start(self) -> results.HealthCheck:
        if not self.notes:
            return results.HealthCheck("start", "ok", "nothing is left open from the start")
        return results.HealthCheck("start", "degraded", "; ".join(self.notes))


_SEVERITY = ("ok", "degraded", "failing")

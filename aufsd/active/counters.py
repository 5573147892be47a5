"""What has happened to the mounts since the start, for metrics."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """What happened since the start; read by metrics."""

    mounts: int = 0
    unmounts: int = 0
    busy_retries: int = 0
    busy_mounts: int = 0
    failed_mounts: int = 0
    vanished_mounts: int = 0
    # at the start: where the journal and the kernel did not agree, by kind
    differences: Counter[str] = field(default_factory=Counter)

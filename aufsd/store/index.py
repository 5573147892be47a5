"""Who stands on whom, as the parents files say; read once, at start."""

import os
from collections.abc import Mapping

from aufsd.store.ids import LayerId, is_id


def read_index(layers: str) -> tuple[dict[LayerId, LayerId | None], dict[LayerId, str]]:
    """The parent of every layer, None for a base; and what is wrong with those of no sound chain.

    `layers` is the directory of the parents files, each of which is read.
    """
    recorded: dict[LayerId, tuple[str, ...] | str] = {}
    for entry in os.scandir(layers):
        if is_id(entry.name) and entry.is_file(follow_symlinks=False):
            recorded[LayerId(entry.name)] = read_parents(entry.path)
    sound: dict[LayerId, bool] = {}
    damaged: dict[LayerId, str] = {}
    for id in recorded:
        _judge(id, recorded, sound, damaged)
    parent: dict[LayerId, LayerId | None] = {}
    for id, good in sound.items():
        if good:
            parents = recorded[id]
            parent[id] = LayerId(parents[0]) if parents else None
    return parent, damaged


def read_parents(path: str) -> tuple[str, ...] | str:
    """The parents that the file lists, nearest first; or, as a str, what is wrong with it."""
    with open(path, "rb") as file:
        text = file.read()
    try:
        lines = text.decode("ascii").split("\n")
    except UnicodeDecodeError:
        return "the parents file is not text"
    # Docker's driver skips blank lines (dirs.go, getParentIds)
    parents = tuple(line for line in lines if line)
    if not all(is_id(parent) for parent in parents):
        return "the parents file names something that is not a layer id"
    return parents


def _judge(
    id: LayerId,
    recorded: Mapping[LayerId, tuple[str, ...] | str],
    sound: dict[LayerId, bool],
    damaged: dict[LayerId, str],
) -> None:
    """Find out whether a layer's chain holds together, nearest parents first; no recursion."""
    pending = [id]
    while pending:
        current = pending[-1]
        if current in sound:
            pending.pop()
            continue
        parents = recorded[current]
        problem = ""
        if isinstance(parents, str):
            problem = parents
        elif parents:
            above = LayerId(parents[0])
            if above not in recorded:
                problem = f"its parent {above} does not exist"
            elif above in pending:
                problem = f"its parents go in a circle through {above}"
            elif above not in sound:
                pending.append(above)
                continue
            elif not sound[above]:
                problem = f"its parent {above} is damaged"
            elif recorded[above] != parents[1:]:
                problem = f"its parents file does not continue as that of its parent {above}"
        sound[current] = not problem
        if problem:
            damaged[current] = problem
        pending.pop()

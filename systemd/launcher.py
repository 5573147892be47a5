"""Writes the launcher of an installed program: launcher.py DIRECTORY MODULE [CHOOSER] >FILE.

The program's packages lie in DIRECTORY, alone, and are found there whatever else the host's Python
has. The interpreter is the one that they were installed with: compiled modules fit no other. Where
they were installed for several, CHOOSER is the program that executes one of them.
"""

import os
import sys

LAUNCHER = """\
#!{interpreter}
import sys
{named}
sys.path.insert(0, {directory!r})

from {module} import main

sys.exit(main())
"""

# the kernel names a process after what it executed last, and that is not this script any more
NAMED = """
with open("/proc/self/comm", "w") as name:
    name.write(sys.argv[0].rpartition("/")[2])
"""


def launcher(directory: str, module: str, chooser: str = "") -> str:
    """The script that runs `main` of a module in a directory."""
    return LAUNCHER.format(
        # the interpreter itself and not a link that a virtual environment made to it
        interpreter=chooser or f"{os.path.realpath(sys.executable)} -I",
        named=NAMED if chooser else "",
        directory=directory,
        module=module,
    )


if __name__ == "__main__":
    sys.stdout.write(launcher(*sys.argv[1:]))

"""Writes the launcher of an installed program: launcher.py DIRECTORY MODULE >FILE.

The program's packages lie in DIRECTORY, alone, and are found there whatever else the host's Python
has. The interpreter is the one that they were installed with: compiled modules fit no other.
"""

import os
import sys

LAUNCHER = """\
#!{python} -I
import sys

sys.path.insert(0, {directory!r})

from {module} import main

sys.exit(main())
"""


def launcher(directory: str, module: str) -> str:
    """The script that runs `main` of a module in a directory."""
    # the interpreter itself and not a link that a virtual environment made to it
    return LAUNCHER.format(
        python=os.path.realpath(sys.executable), directory=directory, module=module
    )


if __name__ == "__main__":
    sys.stdout.write(launcher(sys.argv[1], sys.argv[2]))

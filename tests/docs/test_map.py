"""The map in docs/architecture.md is the house: each module is named once, in its room."""

import re
from collections.abc import Iterator

from tests.docs.blocks import CHECKOUT


def named(tree: str) -> Iterator[str]:
    """The modules of the map with their packages: the words of a line up to the first other one."""
    package = ""
    for line in tree.splitlines():
        name = line.strip().partition(" ")[0]
        if re.match(r"  \w", line):
            package = name if name.endswith("/") else ""
        for word in line.split():
            if not re.fullmatch(r"\w+\.py", word):
                break
            yield f"{package}{word}"


def test_the_map_names_every_module_once() -> None:
    page = (CHECKOUT / "docs/architecture.md").read_text()
    tree = page.partition("aufsd/\n")[2].partition("\nclient/")[0]
    modules = [
        str(path.relative_to(CHECKOUT / "aufsd"))
        for path in CHECKOUT.glob("aufsd/**/*.py")
        if path.name != "__init__.py"
    ]
    assert sorted(named(tree)) == sorted(modules)

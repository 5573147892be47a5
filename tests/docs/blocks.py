"""The blocks of code in the documentation."""

import re
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent.parent
PAGES = sorted([CHECKOUT / "README.md", *CHECKOUT.glob("docs/**/*.md")])

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<language>[a-z]+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_SHELLS = {"sh", "bash", "shell", "console"}


@dataclass(frozen=True)
class Block:
    """One block: where it stands, its language, and why no test runs it, "" if one does."""

    page: str
    line: int
    language: str
    text: str
    why: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> str:
        """What is typed of it: of a console, what follows a prompt."""
        if self.language != "console":
            return self.text
        typed = (line for line in self.text.splitlines() if line.startswith(("# ", "$ ")))
        return "".join(f"{line[2:]}\n" for line in typed)


def blocks() -> list[Block]:
    """All of them."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("language")) + 1
            name = str(page.relative_to(CHECKOUT))
            found.append(Block(name, line, match["language"], match["text"], match["why"] or ""))
    return found


def shell_blocks() -> list[Block]:
    """Those for a shell."""
    return [block for block in blocks() if block.language in _SHELLS]


def block_with(text: str) -> Block:
    """The one block that holds this text."""
    (found,) = [block for block in blocks() if text in block.text]
    return found

"""A link in a page leads to a file that is there, and to a heading that is in it."""

import re
from pathlib import Path

import pytest

from tests.docs.blocks import CHECKOUT, PAGES

# what git hosts show beside those in docs/
BESIDE = [CHECKOUT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "SUPPORT", "CHANGELOG")]
# the page that an operator reads first has to lead to each of these
ENTRIES = sorted(page for page in [*PAGES, *BESIDE] if page.name not in {"README.md", "api.in.md"})


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text())


def anchors(page: Path) -> set[str]:
    """The headings as a git host names them: small letters, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.name)
def test_a_link_leads_somewhere(page: Path) -> None:
    lost = []
    for link in links(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", ENTRIES, ids=lambda page: page.name)
def test_the_readme_leads_to_the_page(page: Path) -> None:
    assert str(page.relative_to(CHECKOUT)) in links(CHECKOUT / "README.md")

"""`list`: what its rows say, however they are asked for."""

import pytest

from aufsd_client import Client

pytestmark = pytest.mark.service


def test_layers_are_listed_with_their_depth_whatever_the_page(client: Client) -> None:
    """In chains and trees, over several pages and pieces of a page."""
    depths: dict[str, int] = {}
    parent = ""
    for number in range(300):
        id = f"chain{number:03}"
        client.create(id, parent=parent)
        depths[id], parent = number + 1, id
    client.create("side", parent="chain007")
    depths["side"] = 9
    for limit in (7, 299, 10_000):
        found: dict[str, int] = {}
        after = ""
        while True:
            page = client.list(after=after, limit=limit)
            found |= {row.id: row.depth for row in page.layers}
            if not (after := page.next):
                break
        assert found == depths

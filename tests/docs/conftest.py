"""A daemon and a client, as the tests of the service have them."""

from tests.service.conftest import client, served

__all__ = ["client", "served"]

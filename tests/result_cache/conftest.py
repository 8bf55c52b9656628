"""The Redis server of the tests of the stores."""

from tests.store.conftest import redis_port, redis_url  # noqa: F401

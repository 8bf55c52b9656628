"""On the search path of build processes: they then use the tests' cheap backends."""

from ts_handlers import register_backend

register_backend("aot_inductor", "tests.support.file_backend:BACKEND")
register_backend("inductor", "tests.support.second_backend:BACKEND")

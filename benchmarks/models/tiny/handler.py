"""JSON `{"x": [[...]]}` to probabilities, by the default methods."""

from ts_handlers import CompiledHandler


class Handler(CompiledHandler):
    pass

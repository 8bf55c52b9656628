"""Run a real TorchServe from a test, a benchmark or a script."""

from ts_handlers.testing.server import Response, TorchServe, TorchServeError

__all__ = ["Response", "TorchServe", "TorchServeError"]

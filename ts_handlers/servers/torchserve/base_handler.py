"""TorchServe's `BaseHandler`, imported without its optional compilers.

It imports torch_tensorrt when that is installed, which takes seconds and, when the installation is broken, raises
exceptions that the base handler does not expect, so that every worker dies. While it is hidden, that import is an
ordinary ImportError.
"""

from __future__ import annotations

from typing import Any

from ts_handlers.system.patching import hidden_modules


def _import() -> Any:
    with hidden_modules("torch_tensorrt"):
        from ts.torch_handler.base_handler import BaseHandler
    return BaseHandler


BaseHandler: Any = _import()

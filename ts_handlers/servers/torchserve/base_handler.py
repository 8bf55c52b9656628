"""TorchServe's `BaseHandler`, imported without its optional compilers.

It imports torch_tensorrt when that is installed, which takes seconds and, when the installation is broken, raises
exceptions that the base handler does not expect, so that every worker dies. The entry None in `sys.modules` makes that
import an ordinary ImportError; it is removed afterwards.
"""

from __future__ import annotations

import sys
from typing import Any


def _import() -> Any:
    blocked = [name for name in ("torch_tensorrt",) if name not in sys.modules]
    for name in blocked:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        from ts.torch_handler.base_handler import BaseHandler
    finally:
        for name in blocked:
            sys.modules.pop(name, None)
    return BaseHandler


BaseHandler: Any = _import()

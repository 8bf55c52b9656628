"""A plugin of pytest (``-p downloads``): TorchServe's tests keep downloads in their checkout, not beside the package.

Their helper counts folders upwards from its own file, which is the installed package's when a server is tested.
"""

import os
from pathlib import Path
from typing import Any


def pytest_configure(config: Any) -> None:
    """Point the helper to the checkout."""
    from ts.torch_handler.unit_tests.test_utils import model_dir

    model_dir.REPO_DIR = Path(os.environ["TORCHSERVE_CHECKOUT"])

"""The refit of plans is a folder that one lazy import leads into, so that whoever does not use it need not know it."""

from __future__ import annotations

from tests.test_layers import imported_modules, package_sources

FOLDER = "ts_handlers.backends.tensorrt.refit"


def test_one_import_leads_into_the_folder() -> None:
    modules = package_sources()
    arrows = [
        (module, other)
        for module, source in modules.items()
        for _, other in imported_modules(source, modules)
        if other.startswith(FOLDER) and not module.startswith(FOLDER)
    ]
    assert arrows == [("ts_handlers.backends.tensorrt.backend", f"{FOLDER}.build")]

"""The swap beside a serving model is reached through one lazy import, so that nothing else depends on its parts."""

from __future__ import annotations

from tests.test_layers import imported_modules, package_sources

FOLDER = "ts_handlers.startup.background"


def test_one_lazy_import_leads_into_the_folder() -> None:
    modules = package_sources()
    arrows = [
        (module, other, modules[module].splitlines()[line - 1])
        for module in modules
        for line, other in imported_modules(modules[module], modules)
        if f"{other}.".startswith(f"{FOLDER}.") and not module.startswith(FOLDER)
    ]
    ((module, other, line),) = arrows
    assert (module, other) == ("ts_handlers.startup.fallback", f"{FOLDER}.build")
    assert line.startswith(" "), "at the top of the module it would cost every start its time"

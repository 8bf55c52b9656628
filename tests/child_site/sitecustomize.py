"""On the search path of build processes: they then use the tests' cheap backends."""

import ts_handlers.backends

ts_handlers.backends._MODULES.update(aot_inductor="file_backend", inductor="second_backend")

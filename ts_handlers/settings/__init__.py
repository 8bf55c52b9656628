"""Settings: the handler's section of model-config.yaml as frozen structs; `model` lists all of them."""

from ts_handlers.settings.dtypes import DTYPES as DTYPES
from ts_handlers.settings.location import default_store_root as default_store_root
from ts_handlers.settings.model import DEFAULT_STARTUP_TIMEOUT_SECONDS as DEFAULT_STARTUP_TIMEOUT_SECONDS
from ts_handlers.settings.model import PT2_SECTION as PT2_SECTION
from ts_handlers.settings.model import SECTION as SECTION
from ts_handlers.settings.model import CanarySettings as CanarySettings
from ts_handlers.settings.model import CompileSettings as CompileSettings
from ts_handlers.settings.model import Dimension as Dimension
from ts_handlers.settings.model import InputSpec as InputSpec
from ts_handlers.settings.model import Settings as Settings
from ts_handlers.settings.parsing import parse_settings as parse_settings
from ts_handlers.settings.registry import DEFAULT_BACKENDS as DEFAULT_BACKENDS
from ts_handlers.settings.registry import backend_names as backend_names
from ts_handlers.settings.registry import register_backend as register_backend

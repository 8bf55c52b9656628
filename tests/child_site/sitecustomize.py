"""On the search path of build processes: they then use the tests' cheap backend."""

from file_backend import use_file_backend

use_file_backend()

"""The command `ts-handlers`.

Every module in `ts_handlers/cli/verbs/` is a verb: its function `command` is what runs and its docstring is the help.
Nothing is registered elsewhere. A verb takes `StoreOptions` and `JsonOption` from `ts_handlers.cli.options`, imports
what is slow inside the function (so that ``--help`` and completion stay quick), and returns an `ExitCode` or None.
"""

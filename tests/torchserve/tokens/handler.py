from ts_handlers import CompiledHandler


class Handler(CompiledHandler):
    pass

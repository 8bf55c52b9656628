"""The libraries through which a remote store's objects are reached; see `ts_handlers.store.remote.clients.base`."""

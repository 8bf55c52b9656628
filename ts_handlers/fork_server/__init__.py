"""A fork server: a process that has imported what others will need, and becomes one of them by a fork.

`ts_handlers.fork_server.client` stands in an interpreter's place and asks; `ts_handlers.fork_server.server` forks;
`ts_handlers.fork_server.child` makes of the fork what a new interpreter would be. The room knows no server of models.
"""

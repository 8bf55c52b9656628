"""One process that holds a model for all workers of a server: the setting ``contexts: {across_workers: true}``.

A GPU then holds the weights, the CUDA context and the execution contexts once, however many workers TorchServe runs,
and requests of all workers meet in one pool of contexts. The workers keep what is theirs: the protocol with the server,
`preprocess` and `postprocess`, each in a process and with an interpreter of its own.

The first worker that needs the model process starts it, and a worker that finds it gone starts it again
(`ts_handlers.model_process.launch`). They find it in a private folder (`folder`), speak messages over a Unix socket
(`wire`), and exchange tensors through shared memory (`segments`). `client` is the workers' side of a call, `server` the
other one, `shared_model` what a worker's handler has as its model.

Requests survive the process: a call that it did not answer is sent again to the next one. Retried calls run one at a
time there. So a call that ends the process each time is told from those that were under way beside it, and fails alone;
`blame` says what counts as evidence against it. `watch` ends a process that gives no sign of life.
"""

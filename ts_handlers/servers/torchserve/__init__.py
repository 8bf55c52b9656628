"""The adapter to TorchServe: handlers, metrics, micro-batching, archives, prewarm; nothing else knows TorchServe."""

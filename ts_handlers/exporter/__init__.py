"""The exporter: an HTTP server beside the model server that shows what the processes of a host have recorded."""

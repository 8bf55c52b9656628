"""TensorRT plans without weights, which are refitted with those of the archive."""

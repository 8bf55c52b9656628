"""What a model is called in the store: the cache key, its parts and their digests."""

"""The artifact store: entries published by one rename, verified before every use."""

"""The store that hosts share: objects, their signatures, leases between hosts."""

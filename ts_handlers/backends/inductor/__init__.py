"""The backend `inductor`: `torch.compile` with all of the compiler's caches restored."""

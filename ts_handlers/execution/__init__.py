"""How several calls of one loaded model run at once in a worker."""

"""Files, processes, processors and interpreter: what the operating system offers."""

"""What a process tells the exporter: its counters and durations, and how far its models' starts have got."""

"""``on_miss: background``: serve eagerly while a child process builds, then swap. `build` is the way in."""

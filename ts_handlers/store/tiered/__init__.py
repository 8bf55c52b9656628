"""A local store in front of a remote one."""

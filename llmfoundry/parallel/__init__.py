"""Distributes a model over processes; lower-level packages do not depend on this one."""

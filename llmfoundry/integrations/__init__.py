"""Doors for users of other frameworks."""

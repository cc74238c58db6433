"""The commands. `scripts/*.py` are doors to the functions here."""

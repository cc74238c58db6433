"""The commands. `scripts/*.py` call the functions here."""

"""One file for each architecture family; `family.py` says what is in it."""

"""Distribution of a model over processes. Lower layers do not know about it."""

"""Memory, traffic and time of a run, estimated without a GPU."""

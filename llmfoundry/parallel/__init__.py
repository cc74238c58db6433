"""How a model is spread over processes; nothing below this room knows of it."""

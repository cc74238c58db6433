"""Entry points for users of other frameworks."""

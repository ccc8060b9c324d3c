"""rayjobs."""

"""One optimizer step, and repeating it."""

"""Tries to break runs of this installation, and judges what is left of them."""

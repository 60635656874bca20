"""Measures what the README and docs claim; each script is a program. See docs/benchmarks.md."""

"""Places that hold a run, and the run's totally ordered log of opaque records."""

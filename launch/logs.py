"""Logging, set up once: every line says the rank and the step."""

import logging
import sys

from launch.phase import Phase


def set_up_logging(rank: int, phase: Phase) -> None:
    """Log INFO of rank 0, and WARNING of the others, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_AddPlace(rank, phase))
    handler.setFormatter(
        logging.Formatter("%(asctime)s [rank %(rank)d step %(step)d] %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True
    )


class _AddPlace(logging.Filter):
    def __init__(self, rank: int, phase: Phase) -> None:
        super().__init__()
        self._rank = rank
        self._phase = phase

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self._rank
        record.step = self._phase.step
        return True

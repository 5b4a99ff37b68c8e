"""Puts this package's log lines where vLLM's are.

Only the logger `vllm` has handlers, so a line from any other name is printed nowhere. Copied
handlers would go stale when vLLM configures its logging again (it does once it has parsed
`--logging-config`), so the logger `vllm_sparse` becomes a child of `vllm` instead: handlers, level
and format, JSON included, are vLLM's at the moment a line is written.
"""

from __future__ import annotations

import functools
import logging

NAME = "vllm_sparse"


def follow_vllm() -> None:
    """Send the lines of logger `vllm_sparse`, and of the ones below it, to vLLM's handlers."""
    logger = logging.getLogger(NAME)
    logger.parent = logging.getLogger("vllm")
    logger.propagate = True


def get_logger(module: str) -> logging.Logger:
    """The logger of one of this package's modules, given its `__name__`."""
    return logging.getLogger(module)


@functools.cache
def once(logger: logging.Logger, level: int, message: str) -> None:
    """Log `message` the first time it comes up in this process."""
    logger.log(level, message, stacklevel=2)

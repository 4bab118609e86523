"""Warnings that cost no answer, also where warnings are errors."""

from __future__ import annotations

import logging
import warnings

logger = logging.getLogger(__name__)


def warn_or_log(message: str, stacklevel: int) -> None:
    """Warns; where warnings are errors, what was asked for is done nevertheless, and the message is logged.

    Args:
        stacklevel: as of `warnings.warn`, counted from this function.
    """
    try:
        warnings.warn(message, stacklevel=stacklevel)
    except UserWarning:
        logger.warning("%s", message)

"""Warnings that files of others can call forth without end: the first few, then how many more there were."""

from __future__ import annotations

import logging

MOST_WARNINGS = 20


class FewWarnings:
    """Context manager that warns of the first items of a kind, and at its end of the number of the others.

    Args:
        logger: log of the module that warns.
        what: the items, in the plural, for the last line.
        most: number of items that are warned of.
    """

    def __init__(self, logger: logging.Logger, what: str, most: int = MOST_WARNINGS) -> None:
        self._logger, self._what, self._most = logger, what, most
        self.count = 0

    def __enter__(self) -> FewWarnings:
        return self

    def __exit__(self, *_: object) -> None:
        if self.count > self._most:
            self._logger.warning("and %d more %s", self.count - self._most, self._what)

    def warn(self, message: str, *parts: object) -> None:
        """Warn of one more item, with a message as ``logging`` takes it; or only count it."""
        self.count += 1
        if self.count <= self._most:
            self._logger.warning(message, *parts)

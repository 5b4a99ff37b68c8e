"""What commands report in one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something given cannot be used; the message says what, and what is allowed."""

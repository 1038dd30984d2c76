"""The CLIP of the end-to-end tests."""

from tests.end_to_end.conftest import clip

__all__ = ["clip"]

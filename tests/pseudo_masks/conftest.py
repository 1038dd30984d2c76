"""The small CLIP that the tests of the commands use."""

from tests.end_to_end.conftest import clip  # noqa: F401  # a fixture

"""The HTML templates of this folder, filled in so that no text of others becomes markup."""

from __future__ import annotations

from importlib import resources

from wsss_pipeline.runtime.output import MARK, printable


def render(name: str, **values: object) -> str:
    """A template filled in, with the program's mark as ``generator``.

    All text is escaped for HTML, and what isn't printable is shown as an escape.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True, finalize=_shown).from_string(read(name))
    return template.render(generator=MARK, **values)


def read(name: str) -> str:
    """The text of a file of this folder."""
    return (resources.files("wsss_pipeline.pictures") / name).read_text("utf-8")


def _shown(value: object) -> object:
    """Text without what would reorder or hide its neighbours; what the template made itself stays."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(map(printable, value.split("\n")))

"""``python -m wsss_pipeline`` is ``wsss``: launchers that take a module need it."""

from wsss_pipeline.cli import main

if __name__ == "__main__":
    main(prog_name="wsss")

"""Fixtures that several files share, and those of test_mdpo.py."""

from test_mdpo import (  # noqa: F401
    bunny,
    family,
    finished,
    folder,
    llava,
    loaded,
    signals_are_heard,
    six_epochs,
    small,
)

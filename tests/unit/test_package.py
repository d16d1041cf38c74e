"""
The front door: what `celerykit` offers, and nothing else.
"""

from __future__ import annotations

import celerykit


def test_every_public_name_can_be_had() -> None:
    assert {name for name in celerykit.__all__ if getattr(celerykit, name) is None} == set()
    assert sorted(celerykit._HOMES) == sorted(celerykit.__all__)
    assert set(celerykit.__all__) <= set(dir(celerykit))


def test_the_version_is_the_distribution_s() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    assert celerykit.__version__ == project["version"]

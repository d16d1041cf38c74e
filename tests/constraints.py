"""
Pin everything `pyproject.toml` asks for to what resolves today: names and versions, nothing else.
"""

from __future__ import annotations

import subprocess
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]

HEAD = """\
# What everything was tried with: names and versions, for Python 3.11 to 3.14.
# Made by `make constraints`; read by every install the Makefile does.
"""


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [
        word for group in project["dependency-groups"] for word in ("--group", f"{ROOT / 'pyproject.toml'}:{group}")
    ]
    with tempfile.TemporaryDirectory(prefix="pins-") as folder:
        venv.create(folder, with_pip=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check"]
        install = [*pip, "install", "--quiet", "--upgrade"]
        subprocess.run([*install, "pip", *project["build-system"]["requires"]], check=True)
        subprocess.run([*install, "--only-binary", ":all:", f"{ROOT}[dev]", *groups], check=True)
        found = subprocess.run([*pip, "freeze", "--all"], check=True, capture_output=True, text=True).stdout
    pins = sorted((line for line in found.splitlines() if not line.startswith("celerykit")), key=str.lower)
    (ROOT / "constraints.txt").write_text(HEAD + "".join(f"{pin}\n" for pin in pins))


if __name__ == "__main__":
    main()

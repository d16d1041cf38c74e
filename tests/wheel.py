"""
Build the wheel, install it into an environment of its own, and use it there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: What must be in it besides the modules.
USE = """
from importlib.resources import files

import celerykit

package = files("celerykit")
assert (package / "py.typed").is_file(), "no py.typed"
assert (package / "_templates" / "grafana" / "celerykit.json").is_file(), "no templates"
assert "site-packages" in celerykit.__file__, celerykit.__file__
print(f"celerykit {celerykit.__version__}: CeleryKit, py.typed and templates are there:", celerykit.CeleryKit.__name__)
"""


def run(*command: object, cwd: Path) -> None:
    subprocess.run([str(word) for word in command], cwd=cwd, check=True, timeout=300)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        there = Path(folder)
        pip = ["-m", "pip", "--disable-pip-version-check", "--quiet"]
        pins = ["--constraint", ROOT / "constraints.txt"]
        run(sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", there, ROOT, cwd=there)
        [wheel] = there.glob("celerykit-*.whl")
        venv.create(there / "env", with_pip=True)
        python = there / "env" / "bin" / "python"
        run(python, *pip, "install", "--only-binary", ":all:", *pins, f"{wheel}[dev]", cwd=there)
        run(python, "-c", USE, cwd=there)
        run(there / "env" / "bin" / "celerykit", "--version", cwd=there)
        # The quickstart, from a copy: nothing of the repository is in reach.
        shutil.copytree(ROOT / "examples" / "quickstart", there / "quickstart")
        run(python, there / "quickstart" / "demo.py", cwd=there)


if __name__ == "__main__":
    main()

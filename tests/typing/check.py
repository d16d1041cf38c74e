"""
Check `good.py` and `bad.py` with mypy --strict and pyright strict, with and without celery-types.

Every line of `bad.py` that is marked must be an error, and nothing else may be.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
FILES = ["good.py", "bad.py"]
#: celery-types and what it installs.
STUBS = re.compile(r"celery.stubs|celery_types|kombu.stubs|amqp.stubs|billiard.stubs|vine.stubs")

Lines = set[tuple[str, int]]


def expected(*, hidden_from: str = "") -> Lines:
    """Give the marked lines, but for those marked as out of sight of *hidden_from*."""
    lines = [(name, n, line) for name in FILES for n, line in enumerate((HERE / name).read_text().splitlines(), 1)]
    unseen = f"# wrong, and {hidden_from} needs"
    return {(name, n) for name, n, line in lines if "# wrong" in line and not (hidden_from and unseen in line)}


def by_mypy(python: Path) -> Lines:
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--no-error-summary",
        "--explicit-package-bases",
    ]
    # Users without stubs have told mypy not to mind; what is untyped is Any either way.
    command += ["--ignore-missing-imports", "--cache-dir", str(python.parents[1] / ".mypy_cache")]
    out = subprocess.run(
        [*command, "--python-executable", str(python), *FILES], cwd=HERE, capture_output=True, text=True
    )
    found = re.findall(r"^(\w+\.py):(\d+): error: ", out.stdout, re.MULTILINE)
    if out.returncode not in (0, 1):
        raise SystemExit(out.stdout + out.stderr)
    return {(name, int(line)) for name, line in found}


def by_pyright(python: Path) -> Lines:
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", str(python), "--project", str(HERE)]
    out = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    if out.returncode not in (0, 1):
        raise SystemExit(out.stdout + out.stderr)
    found = json.loads(out.stdout)["generalDiagnostics"]
    return {(Path(d["file"]).name, d["range"]["start"]["line"] + 1) for d in found if d["severity"] == "error"}


@contextmanager
def environment(*, hidden: re.Pattern[str]) -> Iterator[Path]:
    """Make an environment that has all this one has, but for what is hidden."""
    with tempfile.TemporaryDirectory(prefix="typing") as root:
        venv.create(root, symlinks=True)
        here, there = (Path(purelib(python)) for python in (sys.executable, f"{root}/bin/python"))
        for entry in here.iterdir():
            if not hidden.match(entry.name) and not (there / entry.name).exists():
                (there / entry.name).symlink_to(entry)
        # Not resolved: the interpreter behind the link is outside the environment.
        yield Path(root) / "bin" / "python"


def purelib(python: str) -> str:
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def report(who: str, found: Lines, wanted: Lines) -> bool:
    missed, extra = sorted(wanted - found), sorted(found - wanted)
    print(f"{who:<30} {len(found & wanted)} of {len(wanted)} wrong calls named, {len(extra)} false errors")
    for what, lines in (("not named", missed), ("false error", extra)):
        for name, n in lines:
            print(f"  {what}: {name}:{n}: {(HERE / name).read_text().splitlines()[n - 1]}")
    return not missed and not extra


def main() -> int:
    good = True
    for stubs, hidden in (("with", re.compile(r"(?!)")), ("without", STUBS)):
        with environment(hidden=hidden) as python:
            unseen_by = "mypy" if stubs == "without" else ""
            good &= report(f"mypy --strict, {stubs} stubs", by_mypy(python), expected(hidden_from=unseen_by))
            good &= report(f"pyright strict, {stubs} stubs", by_pyright(python), expected())
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

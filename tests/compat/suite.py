"""
Celery's own integration tests, from the source distribution on the package index.

They are fetched, never kept in this repository: what is compared is the
version of Celery that is installed.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

#: Ignored by git.
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "compat"

#: Seconds for pip to find and unpack two megabytes, and to read their metadata.
DOWNLOAD_TIMEOUT = 300

#: Modules that need a service nobody can start here, with the service.
LEFT_OUT = {"t/integration/test_backend.py": "needs Azure Blob Storage"}


class NoSuite(Exception):
    """Celery's tests could not be had."""


def fetch() -> Path:
    """
    Give the folder that holds Celery's tests and its pytest settings.

    Raises:
        NoSuite: The package index did not give them.
    """
    release = f"celery-{version('celery')}"
    suite = CACHE / release
    if not suite.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            archive = _download(release, Path(scratch))
            _unpack(archive, release, into=Path(scratch))
            # In one step: an interrupted download leaves no half suite behind.
            (Path(scratch) / release).rename(suite)
    return suite


def _download(release: str, folder: Path) -> Path:
    requirement = release.replace("-", "==", 1)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "celery", "--dest", str(folder)]
    try:
        done = subprocess.run(
            [*command, requirement], capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise NoSuite(f"pip did not fetch {requirement} within {DOWNLOAD_TIMEOUT} s.") from None
    archive = folder / f"{release}.tar.gz"
    if not archive.is_file():
        raise NoSuite(f"pip could not fetch the source distribution {requirement}:\n{done.stdout}{done.stderr}")
    return archive


def _unpack(archive: Path, release: str, *, into: Path) -> None:
    """Take the tests only: the Celery they run against is the installed one."""
    wanted = (f"{release}/t/", f"{release}/pyproject.toml")
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.name.startswith(wanted)]
        tar.extractall(into, members, filter="data")
    if not (into / release / "t" / "integration").is_dir():
        raise NoSuite(f"{archive.name} has no t/integration.")

"""
Keeps the signs of life that tests leave apart from those of the developer's own workers.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

if "CELERYKIT_HEALTH_DIR" not in os.environ:
    os.environ["CELERYKIT_HEALTH_DIR"] = tempfile.mkdtemp(prefix="celerykit-health-")
    atexit.register(shutil.rmtree, os.environ["CELERYKIT_HEALTH_DIR"], ignore_errors=True)

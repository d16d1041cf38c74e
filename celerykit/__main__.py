"""
The command line, as ``python -m celerykit``.
"""

from celerykit.cli import main

main()

"""celerykit beside stock Celery, on the same server and in the same run: ``python -m tests.benchmarks``."""

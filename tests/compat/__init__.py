"""
Celery's own integration tests, run against celerykit.
"""

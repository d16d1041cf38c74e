"""
What `celerykit dev` is made of: a broker of its own, and Celery's stock commands beside it.

    servers     a Valkey or Redis server that lives as long as a ``with`` block
    processes   child processes, and one stream for what they write
    project     looks the app up, in a process of its own (probe)
    plan        what to run, decided from the options and the app
    reload      tells which files changed
    session     the broker, the worker, beat and Flower, from the first line to the last
"""

"""
The shop of failing tasks, on a queue that its user defined, with a dead letter exchange of its own.
"""

from __future__ import annotations

import kombu

from tests.integration.retry_shop import app

__all__ = ["app"]

app.conf.task_queues = [
    kombu.Queue(
        "own",
        kombu.Exchange("own", "topic"),
        "own",
        queue_arguments={"x-queue-type": "quorum", "x-dead-letter-exchange": "own.dlx"},
    )
]

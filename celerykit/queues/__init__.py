"""
How full the queues are: what is ready, what workers hold, what waits for its time, and how old the oldest is.

Nothing is taken, declared or changed by looking, and no look takes longer than
it is given. What a broker does not tell is ``None``, and never 0.

::

    depth     what is told of a queue
    names     which queues an app has
    redis     lists, and the hash of what was taken
    rabbitmq  by AMQP, and by its management plug-in if that can be reached
    others    what Kombu can do with all of them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celerykit.deadline import within
from celerykit.publishing import FAILURES, UnreachableBroker, transport_options
from celerykit.queues.depth import Depth, Depths
from celerykit.queues.names import queue_names
from celerykit.settings import mask_text

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["Depth", "Depths", "look", "queue_names"]


def look(app: CeleryKit, names: Sequence[str] = (), *, timeout: float = 3.0) -> Depths:
    """
    Look at the queues called *names*, all that the app has unless given, and at the dead letters.

    Args:
        timeout:
            Seconds for all of it, where the broker is Redis, Valkey or RabbitMQ.

    Raises:
        EnqueueError: The broker cannot be asked.
    """
    wanted = list(dict.fromkeys(names)) or queue_names(app)
    letters = app.settings.kit.dead_letter_queue
    options = transport_options(app.conf.broker_write_url, wait=timeout)
    connection: Any = app.connection_for_write(connect_timeout=timeout, heartbeat=0, transport_options=options)
    with connection, within(timeout):
        try:
            connection.ensure_connection(max_retries=1, interval_start=0)
            queues = _queues_of(connection)
            depths = queues.depths([*wanted, letters])
            delayed = queues.delayed()
        except (*FAILURES, *connection.connection_errors, *connection.channel_errors) as error:
            told = mask_text(f"{type(error).__name__}: {error}")
            problem = f"The queues at {connection.as_uri()} could not be looked at ({told})."
            raise UnreachableBroker(problem, may_have_been_sent=False) from error
    return Depths({name: depths[name] for name in wanted}, letters, depths[letters].ready, delayed)


def _queues_of(connection: Any) -> Any:
    # Each imported for its own broker only.
    kind = connection.transport.driver_type
    if kind == "redis":
        from celerykit.queues.redis import RedisQueues

        return RedisQueues(connection)
    if kind == "amqp":
        from celerykit.queues.rabbitmq import RabbitMQQueues

        return RabbitMQQueues(connection)
    from celerykit.queues.others import OtherQueues

    return OtherQueues(connection)

"""
What the broker, the result backend and the store say of themselves.

Nothing is changed there, and every wait has an end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from celerykit.check.facts import Facts
from celerykit.check.live.asking import Unanswered, within
from celerykit.check.live.rabbitmq import RabbitMQAnswers, ask_rabbitmq
from celerykit.check.live.redis import RedisAnswers, ask_redis

__all__ = ["Answers", "ask"]

#: The publish deadlines that a broker has for all questions together: some dozens, a round trip or two each.
_PATIENCE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """
    What was said.

    Attributes:
        broker_problem, backend_problem, store_problem:
            Why nothing was.

        redis:
            Of each Redis or Valkey: the broker's, the result backend's, the store's.

        rabbitmq:
            Of the broker, if it is one.

        letters:
            How many dead letters wait; None where nobody could say.
    """

    broker_problem: str = ""
    backend_problem: str = ""
    store_problem: str = ""
    redis: Sequence[RedisAnswers] = ()
    rabbitmq: RabbitMQAnswers | None = None
    letters: int | None = None


def ask(app: Any, facts: Facts) -> Answers:
    """Ask all there is to ask; who does not answer is a problem, and no error."""
    deadline = facts.kit.publish_deadline.total_seconds()
    broker, broker_problem = _asked(lambda: _ask_broker(app, facts), seconds=_PATIENCE * deadline)
    backend, backend_problem = _asked(lambda: _ask_backend(app, facts), seconds=deadline)
    store, store_problem = _asked(lambda: _ask_store(app), seconds=deadline)
    redis, rabbitmq, letters = broker or (None, None, None)
    return Answers(
        broker_problem=broker_problem,
        backend_problem=backend_problem,
        store_problem=store_problem,
        redis=_merged([answers for answers in (redis, backend, store) if answers is not None]),
        rabbitmq=rabbitmq,
        letters=letters,
    )


def _asked(question: Any, *, seconds: float) -> tuple[Any, str]:
    try:
        return within(seconds, question), ""
    except Unanswered as error:
        return None, str(error)


def _ask_broker(app: Any, facts: Facts) -> tuple[RedisAnswers | None, RabbitMQAnswers | None, int | None]:
    if facts.broker_problem:
        return None, None, None
    if facts.broker == "amqp":
        rabbitmq = ask_rabbitmq(app, facts)
        return None, rabbitmq, rabbitmq.letters.messages
    with app.connection_for_read() as connection:
        connection.connect()
        channel = connection.channel()
        redis = ask_redis(channel.client, role="broker") if facts.broker == "redis" else None
        return redis, None, _waiting(connection, channel, facts.kit.dead_letter_queue)


def _waiting(connection: Any, channel: Any, queue: str) -> int | None:
    try:
        return int(channel.queue_declare(queue=queue, passive=True).message_count)
    except connection.channel_errors:
        return 0  # nothing died yet
    except NotImplementedError:
        return None


def _ask_backend(app: Any, facts: Facts) -> RedisAnswers | None:
    if not facts.has_backend or not facts.can_join:
        return None  # none; or RabbitMQ, which is asked as the broker
    app.backend.get_task_meta("celerykit-check")
    client = getattr(app.backend, "client", None)
    return ask_redis(client, role="results") if _is_redis(client) else None


def _is_redis(client: Any) -> bool:
    return type(client).__module__.partition(".")[0] == "redis"


def _ask_store(app: Any) -> RedisAnswers | None:
    store = getattr(app, "store", None)
    if store is None:
        return None
    store.get("check")
    # With its own connection, address, and words for what goes wrong.
    return store._ask(partial(ask_redis, role="store")) if hasattr(store, "_ask") else None


def _merged(answers: Sequence[RedisAnswers]) -> list[RedisAnswers]:
    """Keep each server once, in its weightiest role: the first."""
    kept: dict[str, RedisAnswers] = {}
    for answer in answers:
        server = answer.run_id or answer.role
        known = kept.get(server, answer)
        kept[server] = replace(known, is_store=known.is_store or answer.is_store)
    return list(kept.values())

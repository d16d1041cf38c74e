"""
Celery's ``app.amqp``, where a call becomes a message and a queue is declared.

On RabbitMQ, queues that nobody defined are quorum queues, and a message that no
queue would get is an error. On every broker a message says where it was sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import cached_property, partial
from time import time
from typing import TYPE_CHECKING, Any, cast

import celery.app.amqp
import celery.app.routes
import kombu
import kombu.pools
from amqp.exceptions import NotFound, PreconditionFailed
from celery.utils.time import maybe_iso8601
from kombu.transport.native_delayed_delivery import (
    CELERY_DELAYED_DELIVERY_EXCHANGE,
    bind_queue_to_native_delayed_delivery_exchange,
    declare_native_delayed_delivery_exchanges_and_queues,
)

from celerykit import connections, deadline, events, redact, running
from celerykit.errors import InvalidSettings
from celerykit.headers import HEADER, VERSION, Headers
from celerykit.looks import STOCK, Look, plain
from celerykit.publishing import explain_precondition, is_told_of, sending
from celerykit.settings import FROM_KIT

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["AMQP", "DELIVERY_LIMIT", "Queues", "Router", "due_soon"]

#: How often RabbitMQ takes a message back before it drops it. Every hand-back counts, at each deploy too, and
#: RabbitMQ 4 stops at 20. Poison is bounded by `max_deliveries`, which counts starts only, and keeps the message.
DELIVERY_LIMIT = 10_000

#: Where `Router` leaves the queue for `AMQP.send_task_message`: Celery takes it away from a delayed message.
_QUEUE = "celerykit_queue"

#: Where `due_soon` leaves when a message is due, for `AMQP.send_task_message` to write it.
_DUE = "celerykit_due"

#: What Celery calls the exchanges of RabbitMQ's delayed delivery.
_DELAYED = "celery_delayed_"

#: How a sender may describe arguments.
_DESCRIPTIONS = ("argsrepr", "kwargsrepr")

#: The share of a deadline that Celery may sleep between two tries of sending a finished task's callback.
_NAP = 0.1


class Queues(celery.app.amqp.Queues):
    """Celery's queues; those whose type we chose are not emptied by RabbitMQ's limit of deliveries."""

    with_limit = False

    def new_missing(self, name: str) -> Any:
        """Make a queue that nobody defined."""
        queue = super().new_missing(name)
        return _limited(queue) if self.with_limit else queue


def due_soon(options: dict[str, Any], *, now: datetime) -> dict[str, Any]:
    """
    Give the options of a message that is to wait for less than a second, as of one that a worker holds.

    RabbitMQ's delays are whole seconds, and Celery raises a ``ValueError`` for what is not one yet.
    """
    countdown, eta = options.get("countdown"), options.get("eta")
    due: datetime = cast("Any", maybe_iso8601(eta)) if eta else now + timedelta(seconds=countdown or 0)
    due = due if due.tzinfo else due.replace(tzinfo=now.tzinfo)
    if not 0 < (due - now).total_seconds() < 1:
        return options
    return {**options, "countdown": None, "eta": None, _DUE: due.isoformat()}


def _limited(queue: Any) -> Any:
    arguments = queue.queue_arguments or {}
    if arguments.get("x-queue-type") == "quorum":
        queue.queue_arguments = {"x-delivery-limit": DELIVERY_LIMIT, **arguments}
    return queue


class Router(celery.app.routes.Router):
    """Celery's router, which remembers its answer, and lets a retry go where the call went."""

    def route(self, options: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        """Give the options with what says where to send."""
        home = _home(options)
        if home is not None and "redelivered" in options and options.get("queue") is None:
            # A retry, addressed as its message came, by exchange and routing key. Behind a delay that is not where
            # it was sent; and with a delay before it, Celery would send it to the default queue.
            options = {key: value for key, value in options.items() if key not in _ADDRESS} | {"queue": home}
        routed = super().route(options, name, *args, **kwargs)
        queue = routed.get("queue")
        if queue is not None and _is_addressed_to(queue, routed):
            routed[_QUEUE] = queue
        return routed


_ADDRESS = frozenset(("exchange", "routing_key", "redelivered"))


def _home(options: Mapping[str, Any]) -> str | None:
    ours = (options.get("headers") or {}).get(HEADER)
    return ours.get("queue") if isinstance(ours, Mapping) else None


def _is_addressed_to(queue: Any, options: Mapping[str, Any]) -> bool:
    # Celery adds the default queue to a call that names an exchange and a routing key.
    exchange, key = options.get("exchange"), options.get("routing_key")
    return exchange in (None, "", queue.exchange, queue.exchange.name) and key in (None, "", queue.routing_key)


class AMQP(celery.app.amqp.AMQP):
    """Celery's ``app.amqp``, for calls that arrive or say that they did not."""

    queues_cls = Queues
    app: CeleryKit
    _producer_pool: Any = None

    def __init__(self, app: CeleryKit) -> None:
        super().__init__(cast("Any", app))
        #: Queues that delayed messages were seen to reach.
        self._within_reach: set[str] = set()

    @property
    def _is_stock(self) -> bool:
        return self.app.settings.kit.profile == "stock"

    # How to connect

    @property
    def Connection(self) -> Any:  # type: ignore[override]  # noqa: N802  (Celery's name)
        """The class of connections to the broker."""
        return kombu.Connection if self._is_stock else connections.Connection

    BrokerConnection = Connection

    @property
    def Producer(self) -> Any:  # type: ignore[override]  # noqa: N802
        """The class of producers."""
        return kombu.Producer if self._is_stock else connections.Producer

    @property
    def producer_pool(self) -> Any:
        """The producers of this process."""
        if self._producer_pool is None:
            if self._is_stock:
                return super().producer_pool
            self._producer_pool = connections.ProducerPool(
                kombu.pools.connections[self.app.connection_for_write()],
                limit=cast("Any", self.app).pool.limit,
                sending=partial(sending, self.app, "no connection to send over"),
            )
        return self._producer_pool

    publisher_pool = producer_pool

    # Where to send

    def Queues(self, queues: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N802
        """Make the table of queues."""
        made: Any = super().Queues(queues, *args, **kwargs)
        # A limit of ours on a queue that exists without would be an error: only where the type is new, too.
        if not queues and self._is_our_choice("task_default_queue_type"):
            for queue in made.values():
                _limited(queue)
        made.with_limit = self._is_our_choice("task_create_missing_queue_type")
        return made

    def _is_our_choice(self, setting: str) -> bool:
        return not self._is_stock and self.app.settings.sources.get(setting) == FROM_KIT

    def Router(self, queues: Any = None, create_missing: Any = None) -> Any:  # noqa: N802
        """Make what chooses a queue for each call."""
        stock: Any = super().Router(queues, create_missing)
        make: Any = Router
        return make(stock.routes, stock.queues, stock.create_missing, app=stock.app)

    def TaskConsumer(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802
        """
        Declare a worker's queues, and consume from them.

        Raises:
            InvalidSettings: RabbitMQ has one that is different.
        """
        try:
            return super().TaskConsumer(*args, **kwargs)
        except PreconditionFailed as error:
            raise InvalidSettings(f"{error}. {explain_precondition(error)}") from error

    # What to send

    def as_task_v2(self, task_id: Any, name: Any, args: Any = None, kwargs: Any = None, *rest: Any, **more: Any) -> Any:
        """Make a message, and describe its arguments without what is secret in them, or in the run that sends it."""
        secrets = redact.running()
        if secrets:
            more |= {told: redact.scrub(more[told]) for told in _DESCRIPTIONS if isinstance(more.get(told), str)}
        if (args is None or isinstance(args, list | tuple)) and (kwargs is None or isinstance(kwargs, Mapping)):
            look = self._look(name)
            # Not only where they are not given: of an empty text, Celery makes one of its own in the worker.
            if not more.get("argsrepr"):
                more["argsrepr"] = look.positional(args or (), self.argsrepr_maxsize, self._deepest, secrets)
            if not more.get("kwargsrepr"):
                more["kwargsrepr"] = look.named(kwargs or {}, self.kwargsrepr_maxsize, self._deepest, secrets)
            args = _with_plain_result(args)
        message = super().as_task_v2(task_id, name, args, kwargs, *rest, **more)
        if secrets and isinstance(message.headers["shadow"], str):
            message.headers["shadow"] = redact.scrub(message.headers["shadow"])
        return message

    def as_task_v1(self, task_id: Any, name: Any, args: Any = None, kwargs: Any = None, *rest: Any, **more: Any) -> Any:
        """Make a message of Celery's first protocol; the event of its sending has no secrets."""
        message = super().as_task_v1(task_id, name, _with_plain_result(args), kwargs, *rest, **more)
        if message.sent_event:
            look, secrets = self._look(name), redact.running()
            shown = look.arguments(args or (), kwargs or {}, deepest=self._deepest, secrets=secrets)
            message.sent_event.update(zip(("args", "kwargs"), shown, strict=True))
        return message

    def _look(self, name: str) -> Look:
        # Not `tasks`, which would declare every task there is to send one that may live elsewhere.
        task = cast("Any", self.app)._tasks.get(name)
        return getattr(task, "look", None) or STOCK

    @cached_property
    def _deepest(self) -> int:
        return int(cast("Any", self.app.conf).task_repr_maxlevels or 100)

    @cached_property
    def send_task_message(self) -> Any:
        """Celery's last step of sending: the message is made, and its queue known."""
        send = super().send_task_message
        return partial(self._send_and_tell, partial(self._send, send))

    def _send_and_tell(self, send: Any, producer: Any, name: str, message: Any, **options: Any) -> Any:
        queue = options.get(_QUEUE)
        sent = send(producer, name, message, **options)
        # Most senders log nothing of this level.
        if events.TASK_SENT.is_wanted:
            to = queue.name if queue is not None else options.get("routing_key")
            if not is_told_of(to):
                _tell_sent(name, message.headers, to)
        return sent

    def _send(self, send: Any, producer: Any, name: str, message: Any, **options: Any) -> Any:
        queue, due = options.pop(_QUEUE, None), options.pop(_DUE, None)
        if due is not None:
            message.headers["eta"] = due
        if queue is not None and (headers := options.get("headers")):
            options["headers"] = _addressed(headers, queue.name)
        options["headers"] = _with_context(options.get("headers"), message.headers)
        if message.headers.get("expires") is not None:
            # RabbitMQ would drop the message when it has expired, and say nothing; a worker looks at the header.
            options.pop("expiration", None)
        if self._is_stock:
            deadline.mark_as_sent()
            return send(producer, name, message, **options)
        return self._send_in_time(send, producer, name, message, queue, options)

    def _send_in_time(self, send: Any, producer: Any, name: str, message: Any, queue: Any, options: Any) -> Any:
        options["retry_policy"] = self._patience(options.get("retry_policy"))
        if not connections.keeps_to_deadline(producer.connection):
            deadline.mark_as_sent()
            return send(producer, name, message, **options)
        if producer.connection.transport.driver_type != "amqp":
            return send(producer, name, message, **options)
        # RabbitMQ drops what no queue gets, and confirms it.
        options["mandatory"] = True
        if not _is_delayed(options):
            return send(producer, name, message, **options)
        self.reach(queue)
        try:
            return send(producer, name, message, **options)
        except NotFound:
            # Another broker than the one that was looked at.
            self._within_reach.clear()
            self.reach(queue)
            return send(producer, name, message, **options)

    def _patience(self, given: Any) -> dict[str, Any]:
        """Give the policy of trying again, without naps that would outlast the deadline."""
        conf: Any = self.app.conf
        policy = {**conf.task_publish_retry_policy, **(given or {})}
        nap = self.app.settings.kit.publish_deadline.total_seconds() * _NAP
        for step in ("interval_start", "interval_step", "interval_max"):
            policy[step] = min(policy.get(step, nap), nap)
        return policy

    def reach(self, queue: Any) -> None:
        """See to it that a delayed message comes to its queue: stock, only a worker of that queue does."""
        name = queue.name if queue is not None else ""
        if name in self._within_reach:
            return
        with self.app.connection_for_write() as connection:
            if not _has_delays(connection):
                kind = cast("Any", self.app.conf).broker_native_delayed_delivery_queue_type
                declare_native_delayed_delivery_exchanges_and_queues(connection, kind)
            if queue is not None:
                queue(connection.default_channel).declare()
                bind_queue_to_native_delayed_delivery_exchange(connection, queue)
        self._within_reach.add(name)


def _with_plain_result(args: Any) -> Any:
    """Give arguments whose first may be what the task before it returned, of a class that serializers may not know."""
    if not args or not isinstance(args, list | tuple) or (result := plain(args[0])) is args[0]:
        return args
    return [result, *args[1:]]


def _tell_sent(name: str, headers: Mapping[str, Any], queue: str | None) -> None:
    ours = Headers.of(headers)
    if headers.get("retries") or ours.waits:
        # Celery's record, of the run that sends it, says when the next one is.
        return
    parent_id = headers.get("parent_id")
    events.TASK_SENT.tell(
        task=name,
        id=headers.get("id"),
        root_id=headers.get("root_id"),
        parent_id=parent_id if parent_id != headers.get("id") else None,
        attempt=ours.attempt,
        queue=queue,
        key=ours.key,
        eta=headers.get("eta"),
        correlation_id=(ours.context or {}).get("correlation_id") or headers.get("root_id"),
    )


def _addressed(headers: Mapping[str, Any], queue: str) -> Mapping[str, Any]:
    ours = headers.get(HEADER)
    if not isinstance(ours, Mapping):
        return headers
    return {**headers, HEADER: {"sent_at": time(), **ours, "queue": queue}}


def _with_context(headers: Mapping[str, Any] | None, stock: Mapping[str, Any]) -> Mapping[str, Any] | None:
    ours = (headers or {}).get(HEADER)
    if isinstance(ours, Mapping) and "context" in ours:
        # It came with the message that this one goes on from.
        return headers
    context = running.travelling(stock.get("root_id"))
    if not context:
        return headers
    ours = ours if isinstance(ours, Mapping) else {"v": VERSION}
    return {**(headers or {}), HEADER: {**ours, "context": context}}


def _is_delayed(options: Mapping[str, Any]) -> bool:
    exchange = options.get("exchange")
    return isinstance(exchange, kombu.Exchange) and str(exchange.name).startswith(_DELAYED)


def _has_delays(connection: Any) -> bool:
    """Tell whether the exchanges of delayed delivery are there, by the one that is declared last."""
    try:
        kombu.Exchange(CELERY_DELAYED_DELIVERY_EXCHANGE, type="topic")(connection.channel()).declare(passive=True)
    except NotFound:
        return False
    return True

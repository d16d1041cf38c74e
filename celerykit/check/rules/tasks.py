"""Rules about tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from celerykit.check.facts import Facts, TaskFacts
from celerykit.check.findings import Finding, Severity, named

__all__ = ["RULES"]

#: Seconds after which RabbitMQ closes the channel of who does not acknowledge; its default, which AMQP cannot ask for.
_CONSUMER_TIMEOUT = 1800


def _about(tasks: Iterable[TaskFacts], code: str, severity: Severity, *, what: str, fix: str) -> Iterator[Finding]:
    names = tuple(task.name for task in tasks)
    if names:
        yield Finding(code, severity, f"{named(names)}: {what}", fix, names)


def early_acks(facts: Facts) -> Iterator[Finding]:
    """Find tasks whose message is gone once they start."""
    early = [task for task in facts.tasks if not task.acks_late and not task.has_keys]
    yield from _about(
        (task for task in early if not task.reject_on_worker_lost),
        "early-acks",
        "warning",
        what="without acks_late a message is gone once its task starts, and lost when the worker dies.",
        fix='Turn acks_late on; for a task that must not run twice, declare it with on_crash="bury".',
    )
    yield from _about(
        (task for task in early if task.reject_on_worker_lost),
        "reject-without-late-acks",
        "warning",
        what="reject_on_worker_lost does nothing without acks_late: a task whose process is killed is lost.",
        fix="Turn acks_late on.",
    )


def early_acks_with_keys(facts: Facts) -> Iterator[Finding]:
    """Find tasks whose key outlives their message."""
    yield from _about(
        (task for task in facts.tasks if not task.acks_late and task.has_keys),
        "once-early-acks",
        "warning",
        what="without acks_late a call is lost when its worker dies, and who has joined it waits in vain.",
        fix='Turn acks_late on; for a task that must not run twice, declare it with on_crash="bury".',
    )


def short_keep(facts: Facts) -> Iterator[Finding]:
    """Find calls that are forgotten before their message may come again."""
    again = facts.delivered_again_after
    if again is None:
        return
    yield from _about(
        (task for task in facts.tasks if task.keep is not None and task.keep < again),
        "short-keep",
        "warning",
        what=f"what is done is forgotten before its message may come once more, up to {again:g} s later: it would run "
        "twice.",
        fix="Make keep longer, as in once=Once(keep=timedelta(days=1)).",
    )


def untyped_results(facts: Facts) -> Iterator[Finding]:
    """Find results that a second call may not get."""
    yield from _about(
        (task for task in facts.tasks if task.has_keys and task.on_done == "reuse" and task.returns_untyped),
        "once-untyped-result",
        "info",
        what="a second call gets the first one's result, which is kept as JSON, and nobody says what it is.",
        fix="Annotate what it returns; -> None if that is nothing.",
    )


def unused_marks(facts: Facts) -> Iterator[Finding]:
    """Find keys that nobody makes."""
    yield from _about(
        (task for task in facts.tasks if task.has_marks and "once" not in task.needs),
        "key-unused",
        "warning",
        what="a parameter is marked with Key(), which does nothing without once=: two such calls run twice.",
        fix="Declare it with once=Once(), or take the mark away.",
    )


def refused_secrets(facts: Facts) -> Iterator[Finding]:
    """Find tasks whose calls are refused, every one, for the secrets they hold."""
    for task in facts.tasks:
        what, _, fix = task.secrets_problem.partition("; ")
        yield from _about(
            [task] if what else [],
            "secret-refused",
            "error",
            what=f"{what}.",
            fix=f"{fix[:1].upper()}{fix[1:]}.",
        )


def crash_not_rerun(facts: Facts) -> Iterator[Finding]:
    """Find tasks that are to run again after a crash, and will not."""
    yield from _about(
        (
            task
            for task in facts.tasks
            if task.acks_late
            and task.on_crash == "rerun"
            and not (task.reject_on_worker_lost or task.retry_on_worker_lost)
        ),
        "crash-not-rerun",
        "warning",
        what="acks_late alone does not run a task again whose process was killed.",
        fix='Turn reject_on_worker_lost on; where a second run would do harm, say on_crash="bury".',
    )


def soft_limit(facts: Facts) -> Iterator[Finding]:
    """Find soft limits that never come."""
    yield from _about(
        (
            task
            for task in facts.tasks
            if task.soft_time_limit and task.time_limit and task.soft_time_limit >= task.time_limit
        ),
        "soft-limit-unused",
        "warning",
        what="the soft time limit is not below the hard one, which kills the process first.",
        fix="Make soft_time_limit some seconds shorter than time_limit.",
    )


def consumer_timeout(facts: Facts) -> Iterator[Finding]:
    """Find tasks that RabbitMQ may take from their worker while they run."""
    if facts.broker != "amqp":
        return
    late = [task for task in facts.tasks if task.acks_late]
    what = (
        "RabbitMQ closes a worker's connection over a task that runs longer than its consumer_timeout (30 min, "
        "unless it was told otherwise), and gives it to another."
    )
    yield from _about(
        (task for task in late if task.time_limit and task.time_limit > _CONSUMER_TIMEOUT),
        "limit-over-consumer-timeout",
        "warning",
        what=what,
        fix="Raise consumer_timeout in rabbitmq.conf above the longest time limit, or split the task.",
    )
    yield from _about(
        (task for task in late if not task.time_limit),
        "no-limit-under-consumer-timeout",
        "info",
        what=f"there is no time limit, and {what}",
        fix="Give tasks a time_limit below it, or raise consumer_timeout in rabbitmq.conf.",
    )


def visibility(facts: Facts) -> Iterator[Finding]:
    """Find tasks that the broker gives to another worker while they run."""
    if facts.visibility is None:
        return
    seconds = facts.visibility
    yield from _about(
        (
            task
            for task in facts.tasks
            # With a key, what is delivered meanwhile waits for the run.
            if task.acks_late and task.time_limit and task.time_limit > seconds and not task.has_keys
        ),
        "limit-over-visibility",
        "error",
        what=f"a run that takes longer than the visibility timeout ({seconds:g} s) is started a second time.",
        fix="Set visibility_timeout in broker_transport_options above the longest time limit.",
    )
    if facts.kit.max_eta.total_seconds() > seconds:
        yield Finding(
            "eta-over-visibility",
            "warning",
            f"A countdown beyond the visibility timeout ({seconds:g} s) is delivered again, and its task runs twice.",
            "Set visibility_timeout in broker_transport_options above the longest countdown, or lower "
            "CELERYKIT_MAX_ETA.",
        )


def held_countdowns(facts: Facts) -> Iterator[Finding]:
    """Find countdowns that wait in a worker for longer than RabbitMQ allows."""
    if facts.broker != "amqp" or facts.kit.max_eta.total_seconds() <= _CONSUMER_TIMEOUT:
        return
    names = tuple(
        queue.name
        for queue in facts.queues
        if not queue.is_broadcast and (not facts.delays_natively or queue.exchange_type == "direct")
    )
    if names:
        yield Finding(
            "eta-held-by-worker",
            "warning",
            f"{named(names)}: a countdown waits in a worker, and RabbitMQ closes the worker's connection when one "
            "takes longer than its consumer_timeout (30 min).",
            "Use quorum queues with a topic exchange, where countdowns wait at the broker, or lower CELERYKIT_MAX_ETA.",
            names,
        )


def grace(facts: Facts) -> Iterator[Finding]:
    """Find tasks that a deploy cuts off."""
    seconds = float(facts.conf["worker_soft_shutdown_timeout"] or 0)
    yield from _about(
        (
            task
            for task in facts.tasks
            if task.on_crash == "bury" and (not task.time_limit or task.time_limit > seconds)
        ),
        "bury-at-deploy",
        "warning",
        what=f"a run that takes longer than the grace period ({seconds:g} s) is cut off by a deploy, and buried.",
        fix="Give it a time_limit below worker_soft_shutdown_timeout, or lengthen that.",
    )
    yield from _about(
        (
            task
            for task in facts.tasks
            # Acknowledged early it would not begin again, but be lost, and `early_acks` says so.
            if task.on_crash == "rerun" and task.acks_late and task.time_limit and task.time_limit > seconds
        ),
        "limit-over-grace",
        "info",
        what=f"a run that takes longer than the grace period ({seconds:g} s) is cut off by a deploy, and begins again.",
        fix="Make sure that a second run does no harm, or lengthen worker_soft_shutdown_timeout.",
    )


def retries(facts: Facts) -> Iterator[Finding]:
    """Find retries that are not what they look like."""
    yield from _about(
        (task for task in facts.tasks if task.has_policy and task.autoretries),
        "two-retry-policies",
        "warning",
        what="autoretry_for acts before retry=, whose attempts and waits then do not count.",
        fix="Move the exceptions of autoretry_for into retry=Retry(on={…}).",
    )
    stock = [task for task in facts.tasks if task.autoretries and not task.has_policy]
    yield from _about(
        (task for task in stock if task.max_retries is None),
        "endless-retries",
        "warning",
        what="autoretry_for with max_retries=None tries for ever.",
        fix="Set max_retries, or use retry=Retry(…).",
    )
    yield from _about(
        (task for task in stock if task.retry_backoff > task.retry_backoff_max),
        "backoff-capped",
        "warning",
        what="retry_backoff is above retry_backoff_max (600 s unless set), which silently replaces it.",
        fix="Raise retry_backoff_max, or use retry=Retry(…).",
    )


def results(facts: Facts) -> Iterator[Finding]:
    """Find results that nobody keeps."""
    if facts.has_backend or facts.backend_problem:
        return
    yield from _about(
        (task for task in facts.tasks if task.returns_value),
        "result-not-kept",
        "warning",
        what="it returns a value, and without a result backend nobody can get it.",
        fix="Set CELERY_RESULT_BACKEND, or declare it with ignore_result=True.",
    )


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    early_acks,
    early_acks_with_keys,
    short_keep,
    untyped_results,
    unused_marks,
    refused_secrets,
    crash_not_rerun,
    soft_limit,
    consumer_timeout,
    visibility,
    held_countdowns,
    grace,
    retries,
    results,
)

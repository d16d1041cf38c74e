"""
Settings: where they are read, what wins, what is refused, what is never shown.
"""

from __future__ import annotations

import json
import re
import ssl
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery.app.backends import BACKEND_ALIASES
from celery.app.defaults import DEFAULTS, NAMESPACES, flatten
from celery.schedules import crontab
from kombu import Queue
from kombu.transport import TRANSPORT_ALIASES
from pydantic import SecretStr

from celerykit.errors import InvalidSettings
from celerykit.settings import OPINIONS, Kit, Settings, UnknownSettingWarning, load, settle, shown, variable
from celerykit.settings.options import CODE_ONLY, UNLISTED

OPTIONS = {name: (option.type, option.default) for name, option in flatten(NAMESPACES)}

SECRET = "hunter2"

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


def read(environ: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
    """Load from what is handed in, and from nothing else."""
    return load(
        OPTIONS,
        **{
            "environ": environ or {},
            "env_file": None,
            "transports": TRANSPORT_ALIASES,
            "backends": BACKEND_ALIASES,
            "container": False,
            **arguments,
        },
    )


def problem(environ: Mapping[str, str] | None = None, **arguments: Any) -> str:
    """Load, and return the one thing that is wrong."""
    with pytest.raises(InvalidSettings) as caught:
        read(environ, **arguments)
    [sentence] = caught.value.problems
    return sentence


# Reading


def test_nothing_set_gives_our_defaults_and_no_more() -> None:
    settings = read()

    assert settings.celery == {
        opinion.name: opinion.value for opinion in OPINIONS if opinion.name not in {"worker_concurrency", *QUORUM}
    }
    assert settings.kit == Kit()
    assert set(settings.sources) == {*OPTIONS, *UNLISTED, *(f"kit.{name}" for name in Kit.model_fields)}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("task_acks_late", "false", False),
        ("task_acks_late", "1", True),
        ("worker_prefetch_multiplier", "3", 3),
        ("worker_concurrency", "4", 4),
        ("worker_concurrency", "AUTO", "auto"),
        ("task_time_limit", "0.5", 0.5),
        ("result_backend_max_retries", "inf", float("inf")),
        ("result_expires", "60", 60),
        ("result_expires", "PT1H", timedelta(hours=1)),
        ("result_expires", "null", None),
        ("include", "a.tasks, b.tasks", ("a.tasks", "b.tasks")),
        ("include", '["a.tasks"]', ("a.tasks",)),
        ("accept_content", "json", ["json"]),
        ("broker_transport_options", '{"visibility_timeout": 30}', {"visibility_timeout": 30}),
        ("broker_use_ssl", "true", True),
        ("broker_use_ssl", '{"ssl_cert_reqs": 2}', {"ssl_cert_reqs": 2}),
        ("broker_heartbeat", "null", None),
        ("broker_connection_max_retries", "None", None),
        ("task_routes", '{"mail.*": {"queue": "mail"}}', {"mail.*": {"queue": "mail"}}),
        ("task_routes", "shop.routers.by_tenant", "shop.routers.by_tenant"),
        ("task_default_delivery_mode", "1", 1),
        ("task_default_delivery_mode", "transient", "transient"),
        ("security_key_password", "geheim", b"geheim"),
        ("redis_backend_health_check_interval", "25", 25),
    ],
)
def test_text_becomes_what_the_setting_is(name: str, text: str, value: Any) -> None:
    settings = read({variable(name): text})

    assert settings.celery[name] == value
    assert type(settings.celery[name]) is type(value)
    assert settings.sources[name] == f"environment {variable(name)}"


#: For each type in Celery's table: what one might write, and a string that is never one.
SAMPLES = {
    "bool": "true",
    "int": "7",
    "float": "7.5",
    "dict": '{"one": {"two": 3}}',
    "list": "one,two",
    "tuple": "one,two",
    "any": '{"one": 2}',
    "string": "one",
    "str": "one",
    "bytes": "one",
}

#: Settings whose type is not what Celery's table says, and those with a URL in them.
SPECIAL = {
    **dict.fromkeys(("broker_url", "broker_read_url", "broker_write_url", "result_backend"), "redis://h/0"),
    "cassandra_auth_kwargs": '{"username": "one"}',
    "cassandra_port": "9042",
    "task_default_delivery_mode": "persistent",
    "task_default_priority": "3",
    "worker_concurrency": "auto",
    "worker_pool_start_method": "spawn",
}


def _sample(name: str) -> str:
    type_name = OPTIONS[name][0]
    return SPECIAL.get(name) or SAMPLES[type_name if isinstance(type_name, str) else type_name.__name__]


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    return json.dumps(value)


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - CODE_ONLY))
def test_every_setting_goes_through_the_environment_and_back(name: str) -> None:
    value = read({variable(name): _sample(name)}).celery[name]
    again = read({variable(name): _as_text(value)}).celery[name]

    assert again == value
    default = DEFAULTS[name]
    if default is not None and name not in ("result_expires", "broker_use_ssl", "task_default_delivery_mode"):
        number = (int, float)
        same = number if type(default) in number else (list, tuple) if isinstance(default, tuple) else type(default)
        assert isinstance(value, same)


def test_celerys_own_defaults_are_accepted_from_code() -> None:
    settings = read(code=DEFAULTS)

    assert {name: settings.celery[name] for name in DEFAULTS} == DEFAULTS


def test_an_empty_variable_is_an_absent_one() -> None:
    settings = read({"CELERY_TASK_TIME_LIMIT": "", "CELERY_BROKER_URL": "", "CELERYKIT_MAX_ETA": ""})

    assert settings.celery == read().celery
    assert settings.sources["broker_url"] == "Celery default"


@pytest.mark.parametrize("nothing", ["", None])
def test_nothing_from_code_stays_nothing(nothing: str | None) -> None:
    """Django settings often hold what ``os.environ.get`` gave."""
    celery = read(config={"broker_url": nothing, "task_time_limit": nothing, "result_backend": nothing}).celery

    assert not any((celery["broker_url"], celery["task_time_limit"], celery["result_backend"]))


def test_ours_are_read_and_typed() -> None:
    kit = read({"CELERYKIT_MAX_ETA": "3600", "CELERYKIT_PUBLISH_DEADLINE": "PT0.5S"}).kit

    assert kit.max_eta == timedelta(hours=1)
    assert kit.publish_deadline == timedelta(seconds=0.5)


def test_objects_that_only_code_can_build_pass_untouched() -> None:
    given = {
        "task_queues": (Queue("a"), Queue("b")),
        "task_routes": (lambda *_: None, {"a": "b"}),
        "beat_schedule": {"nightly": {"task": "t", "schedule": crontab(hour=3)}},
        "broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED},
        "worker_pool": object,
        "worker_state_db": Path("state"),
        "result_expires": timedelta(days=2),
        "accept_content": {"json"},
        "broker_url": ["redis://a", "redis://b"],
    }
    celery = read(code=given).celery

    for name, value in given.items():
        assert celery[name] == value
        assert type(celery[name]) is type(value)


def test_nothing_is_read_when_imported_or_from_this_process_when_handed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_TASK_TIME_LIMIT", "no number")

    assert "task_time_limit" not in read({}).celery


# Precedence


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    return {"env_file": tmp_path / ".env", "secrets_dir": secrets}


def test_each_place_wins_over_those_after_it(files: dict[str, Path]) -> None:
    def value(places: int) -> tuple[Any, str]:
        environ = {"CELERY_WORKER_PREFETCH_MULTIPLIER": "4"} if places > 3 else {}
        files["env_file"].write_text("CELERY_WORKER_PREFETCH_MULTIPLIER=3\n" if places > 2 else "")
        secret = "2\n" if places > 1 else ""
        (files["secrets_dir"] / "celery_worker_prefetch_multiplier").write_text(secret)
        settings = read(
            environ,
            code={"worker_prefetch_multiplier": 5} if places > 4 else {},
            config={"worker_prefetch_multiplier": 6} if places > 0 else {},
            config_source="Django settings",
            **files,
        )
        return settings.celery["worker_prefetch_multiplier"], settings.sources["worker_prefetch_multiplier"]

    assert [value(places) for places in range(6)] == [
        (1, "celerykit default"),
        (6, "Django settings"),
        (2, "secrets file CELERY_WORKER_PREFETCH_MULTIPLIER"),
        (3, f"{files['env_file']} CELERY_WORKER_PREFETCH_MULTIPLIER"),
        (4, "environment CELERY_WORKER_PREFETCH_MULTIPLIER"),
        (5, "code"),
    ]


def test_celery_asks_the_environment_for_urls_before_code() -> None:
    settings = read({"CELERY_BROKER_URL": "redis://env"}, code={"broker_url": "redis://code"})

    assert settings.celery["broker_url"] == "redis://env"
    assert settings.sources["broker_url"] == "environment CELERY_BROKER_URL"


def test_code_wins_over_a_url_in_an_env_file(files: dict[str, Path]) -> None:
    files["env_file"].write_text("CELERY_BROKER_URL=redis://env\n")

    assert read(code={"broker_url": "redis://code"}, **files).celery["broker_url"] == "redis://code"


def test_a_dict_replaces_the_one_below_it() -> None:
    settings = read(code={"broker_transport_options": {"a": 1}}, config={"broker_transport_options": {"b": 2}})

    assert settings.celery["broker_transport_options"] == {"a": 1}


def test_text_from_code_and_config_is_read_the_same_way() -> None:
    settings = read(code={"task_acks_late": "False"}, config={"task_always_eager": "yes"}, config_source="Django")

    assert settings.celery["task_acks_late"] is False
    assert settings.celery["task_always_eager"] is True
    assert settings.sources["task_always_eager"] == "Django"


def test_ours_can_be_set_from_code() -> None:
    settings = read({"CELERYKIT_MAX_ETA": "1"}, code={"max_eta": timedelta(days=1)})

    assert settings.kit.max_eta == timedelta(days=1)
    assert settings.sources["kit.max_eta"] == "code"


def test_our_names_are_none_of_celerys() -> None:
    """Code and config objects name both without a prefix."""
    assert not Kit.model_fields.keys() & OPTIONS.keys()


# Files


def test_an_env_file_may_hold_anything_else_too(files: dict[str, Path]) -> None:
    files["env_file"].write_text("DATABASE_URL=x\nexport CELERY_TIMEZONE='Europe/Berlin' # home\n")

    assert read(**files).celery["timezone"] == "Europe/Berlin"


def test_the_environment_names_another_env_file_and_secrets(tmp_path: Path, files: dict[str, Path]) -> None:
    other = tmp_path / "production.env"
    other.write_text("CELERYKIT_MAX_PAYLOAD_BYTES=5\n")
    (files["secrets_dir"] / "CELERY_REDIS_PASSWORD").write_text(f"{SECRET}\n")
    environ = {"CELERYKIT_ENV_FILE": str(other), "CELERYKIT_SECRETS_DIR": str(files["secrets_dir"])}
    settings = read(environ)

    assert settings.kit.max_payload_bytes == 5
    assert settings.celery["redis_password"] == SECRET
    assert settings.sources["redis_password"] == "secrets file CELERY_REDIS_PASSWORD"


def test_a_missing_file_is_fine_unless_it_was_asked_for(tmp_path: Path) -> None:
    missing = tmp_path / "missing"

    assert read(env_file=missing).kit == Kit()
    assert problem({"CELERYKIT_ENV_FILE": str(missing)}).startswith("CELERYKIT_ENV_FILE (environment): there is no")
    assert problem({"CELERYKIT_SECRETS_DIR": str(missing)}).startswith("CELERYKIT_SECRETS_DIR (environment)")


def test_a_file_that_is_no_text_is_told_without_its_content(files: dict[str, Path]) -> None:
    files["env_file"].write_bytes(b"CELERY_REDIS_PASSWORD=hunter2\xff\n")

    sentence = problem(**files)

    assert "UnicodeDecodeError" in sentence
    assert SECRET not in sentence


# Mistakes


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        (
            {"CELERY_TASK_ACK_LATE": "1"},
            "CELERY_TASK_ACK_LATE (environment) is not a setting. Did you mean CELERY_TASK_ACKS_LATE?",
        ),
        (
            {"CELERYKIT_PROFIL": "stock"},
            "CELERYKIT_PROFIL (environment) is not a setting. Did you mean CELERYKIT_PROFILE?",
        ),
        (
            {"CELERYKIT_TASK_ACKS_LATE": "1"},
            "CELERYKIT_TASK_ACKS_LATE (environment) is not a setting. Did you mean CELERY_TASK_ACKS_LATE?",
        ),
        (
            {"CELERY_TASK_ACKS_LATE": "flase"},
            "CELERY_TASK_ACKS_LATE (environment) must be true or false, not 'flase'. Correct it, or remove it.",
        ),
        (
            {"CELERYKIT_PROFILE": "fast"},
            "CELERYKIT_PROFILE (environment): input should be 'balanced' or 'stock'. Correct it, or remove it.",
        ),
        (
            {"CELERYKIT_MAX_PAYLOAD_BYTES": "0"},
            "CELERYKIT_MAX_PAYLOAD_BYTES (environment): input should be greater than 0. Correct it, or remove it.",
        ),
    ],
)
def test_a_mistake_is_one_sentence_with_the_remedy(environ: dict[str, str], sentence: str) -> None:
    assert problem(environ) == sentence


def test_a_misspelt_name_in_code_or_config_is_refused_too() -> None:
    assert problem(code={"worker_prefetch_multiplyer": 1}) == (
        "worker_prefetch_multiplyer (code) is not a setting. Did you mean worker_prefetch_multiplier?"
    )
    assert "Django settings" in problem(config={"broker_heartbeet": 1}, config_source="Django settings")


def test_all_mistakes_are_told_together() -> None:
    with pytest.raises(InvalidSettings) as caught:
        read(
            {"CELERY_TASK_ACK_LATE": "1", "CELERY_TASK_TIME_LIMIT": "x", "CELERYKIT_MAX_ETA": "soon"},
            code={"broker_url": "reddis://h"},
        )

    assert len(caught.value.problems) == 4
    assert str(caught.value).splitlines() == [
        "4 settings are wrong:",
        *(f"  {sentence}" for sentence in caught.value.problems),
    ]


@pytest.mark.parametrize(
    "name",
    [
        # Celery's worker, and its command line
        *("CELERY_LOG_LEVEL", "CELERY_LOG_REDIRECT_LEVEL", "CELERY_LOADER", "CELERY_CONFIG_MODULE"),
        *("CELERY_WORKER_LOGLEVEL", "CELERY_BEAT_MAX_INTERVAL", "CELERY_FLOWER_PORT", "celery_dummy_proxy"),
        # Kubernetes, for the services `celery`, `celery-redis` and `celerykit`
        *("CELERY_SERVICE_HOST", "CELERY_SERVICE_PORT", "CELERY_SERVICE_PORT_HTTP", "CELERY_PORT_5672_TCP"),
        *("CELERY_REDIS_SERVICE_HOST", "CELERY_REDIS_PORT_6379_TCP_ADDR", "CELERYKIT_SERVICE_HOST"),
        # and where settings are
        *("CELERYKIT_ENV_FILE", "CELERYKIT_SECRETS_DIR"),
    ],
)
def test_what_others_read_is_left_to_them(name: str, tmp_path: Path) -> None:
    options = ["CELERY_WORKER_LOGLEVEL", "CELERY_BEAT_MAX_INTERVAL", "CELERY_FLOWER_*"]

    settings = read({name: str(tmp_path)}, command_options=lambda: options)

    assert settings.celery == read().celery
    assert settings.sources == read().sources


@pytest.mark.parametrize("name", ["CELERY_REDIS_PORT", "CELERY_BROKER_PORT", "CELERY_PORT", "CELERYKIT_PORT"])
def test_a_port_that_kubernetes_wrote_is_no_setting(name: str) -> None:
    assert read({name: "tcp://10.0.0.1:6379"}).celery == read().celery


def test_beats_schedule_is_never_read_from_text(files: dict[str, Path]) -> None:
    """``CELERY_BEAT_SCHEDULE`` is the file name of ``celery beat --schedule``."""
    files["env_file"].write_text("CELERY_BEAT_SCHEDULE=/var/run/beat\n")

    assert "beat_schedule" not in read({"CELERY_BEAT_SCHEDULE": "/var/run/beat"}, **files).celery


def test_names_that_resemble_nothing_are_one_warning() -> None:
    environ = {"CELERY_SHARD": "1", "CELERY_BROKER_URL_INTERNAL": "x", "CELERY_MAX_ETA": "3"}
    with pytest.warns(UnknownSettingWarning) as caught:
        settings = read(environ)

    [warning] = caught
    assert all(name in str(warning.message) for name in environ)
    assert "Did you mean CELERYKIT_MAX_ETA?" in str(warning.message)
    assert "shard" not in settings.celery


def test_the_command_line_is_only_asked_about_unknown_names() -> None:
    def asked() -> list[str]:
        raise AssertionError("imports all of Celery's commands")

    read({"CELERY_TASK_ACKS_LATE": "1", "CELERY_LOG_LEVEL": "3"}, command_options=asked)


def test_what_packages_keep_among_celerys_settings_stays_there() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        celery = read(config={"redbeat_redis_url": "redis://h"}).celery

    assert celery["redbeat_redis_url"] == "redis://h"


# URLs


@pytest.mark.parametrize(
    ("given", "settled"),
    [
        ("valkey://h:6379/0", "redis://h:6379/0"),
        ("valkeys://:p@h/0?ssl_cert_reqs=none", "rediss://:p@h/0?ssl_cert_reqs=none"),
        ("valkey+socket:///run/v.sock?virtual_host=1", "redis+socket:///run/v.sock?virtual_host=1"),
        ("rediss://h/0", "rediss://h/0?ssl_cert_reqs=CERT_REQUIRED"),
        ("rediss://h/0?a=b", "rediss://h/0?a=b&ssl_cert_reqs=CERT_REQUIRED"),
        ("valkey://a;valkeys://b;c", "redis://a;rediss://b;c?ssl_cert_reqs=CERT_REQUIRED"),
        (["valkey://a", "amqp://b"], ["redis://a", "amqp://b"]),
        ("amqp://u:valkey@h//", "amqp://u:valkey@h//"),
        (None, None),
    ],
)
def test_urls_are_settled_once_and_for_all(given: Any, settled: Any) -> None:
    assert settle(given) == settled
    assert settle(settled) == settled


def test_tls_options_of_their_own_are_not_overruled() -> None:
    options = {"ssl_cert_reqs": ssl.CERT_NONE}
    settings = read(
        {"CELERY_BROKER_URL": "rediss://h", "CELERY_RESULT_BACKEND": "rediss://h"},
        code={"broker_use_ssl": options},
    )

    assert settings.celery["broker_url"] == "rediss://h"
    assert settings.celery["result_backend"] == "rediss://h?ssl_cert_reqs=CERT_REQUIRED"


@pytest.mark.parametrize(
    "url",
    [
        *("memory://", "SQS://a:b@", "sqla+postgresql://h/d", "my.transports:Transport://h", "redis+socket:///s"),
        *("sentinel://a:26379;b:26379", "redis://a;amqp://b", "confluentkafka://h"),
    ],
)
def test_a_broker_that_kombu_knows_is_accepted(url: str) -> None:
    assert read(code={"broker_url": url}).celery["broker_url"] == url


@pytest.mark.parametrize(
    "backend",
    [
        *("django-db", "redis", "rpc://", "db+sqlite:///x", "my.backends:Backend", "cache+memcached://a;b/"),
        *("redis+socket:///s", "mongodb://a/b", "disabled"),
    ],
)
def test_a_result_backend_that_celery_may_know_is_accepted(backend: str) -> None:
    assert read(code={"result_backend": backend}).celery["result_backend"] == backend


@pytest.mark.parametrize(
    ("name", "url", "why"),
    [
        ("broker_url", "reddis://:hunter2@h", "Celery has no transport reddis://; did you mean redis://?"),
        ("broker_url", "redis://h;reddis://:hunter2@h", "Celery has no transport reddis://; did you mean redis://?"),
        ("broker_url", "hunter2@h:6379", "a URL begins with a scheme, such as redis:// or amqp://"),
        ("broker_write_url", "foo://:hunter2@h", "Celery has no transport foo://"),
        ("result_backend", "reddis://:hunter2@h", "Celery has no result backend reddis://; did you mean redis://?"),
        ("result_backend", "amqp://u:hunter2@h", "amqp is a broker and keeps no results; use redis://, db+… or rpc://"),
    ],
)
def test_a_wrong_url_is_told_without_the_url(name: str, url: str, why: str) -> None:
    sentence = problem({variable(name): url})

    assert sentence == f"{variable(name)} (environment): {why}"


def test_a_bare_host_is_fine_beside_a_transport() -> None:
    assert read(code={"broker_url": "localhost", "broker_transport": "redis"}).celery["broker_url"] == "localhost"


# Secrets


#: A secret in every setting that may hold one, as people write them.
WITH_SECRETS = {
    "broker_url": f"redis://user:{SECRET}@h:6379/0;redis://:{SECRET}/@#? @h2/0",
    "broker_read_url": f"amqp://{SECRET}@h//",
    "broker_write_url": f"sqs://AKIA:{SECRET}/x;y@",
    "result_backend": f"azureblockblob://AccountName=a;AccountKey={SECRET}==;EndpointSuffix=x",
    "database_url": f"postgresql://u:{SECRET}@h/d?password={SECRET}",
    "cache_backend": f"cache+memcached://u:{SECRET}@a;b/",
    "broker_password": SECRET,
    "redis_password": SECRET,
    "s3_access_key_id": SECRET,
    "s3_secret_access_key": SECRET,
    "s3_endpoint_url": f"https://u:{SECRET}@h",
    "security_key": SECRET,
    "security_key_password": SECRET,
    "redis_backend_credential_provider": SECRET,
    "broker_transport_options": f'{{"sentinel_kwargs": {{"password": "{SECRET}"}}, "urls": ["redis://:{SECRET}@h"]}}',
    "result_backend_transport_options": f'{{"auth": "{SECRET}", "api_key": "{SECRET}"}}',
    "broker_use_ssl": f'{{"keyfile_password": "{SECRET}"}}',
    "redis_backend_use_ssl": f'{{"ssl_password": "{SECRET}"}}',
    "database_engine_options": f'{{"connect_args": {{"passwd": "{SECRET}"}}}}',
    "cache_backend_options": f'{{"secret": "{SECRET}"}}',
    "cassandra_auth_kwargs": f'{{"username": "u", "password": "{SECRET}"}}',
    "mongodb_backend_settings": f'{{"token": "{SECRET}"}}',
    "couchbase_backend_settings": f'{{"pwd": "{SECRET}"}}',
    "arangodb_backend_settings": f'{{"password": "{SECRET}"}}',
}


def test_keys_for_secrets_are_checked_when_they_are_read() -> None:
    key = "T2xkIGtleXMgYXJlIGtlcHQgdW50aWwgdGhleSBnbz8="

    assert read({"CELERYKIT_SECRET_KEYS": key}).kit.secret_keys == SecretStr(key)
    assert problem({"CELERYKIT_SECRET_KEYS": f"{key},{SECRET}"}).startswith(
        "CELERYKIT_SECRET_KEYS (environment): key 2 of 2 is no Fernet key (32 bytes in URL-safe base64); make one with "
    )


def test_no_key_shows_when_another_one_is_wrong() -> None:
    with pytest.raises(InvalidSettings) as told:
        read({"CELERYKIT_SECRET_KEYS": f"{SECRET},{SECRET}"})

    assert SECRET not in str(told.value) + repr(told.value.__context__)


def test_no_secret_shows_in_a_repr() -> None:
    settings = read({variable(name): text for name, text in WITH_SECRETS.items()})

    assert SECRET in settings.celery["broker_url"]
    for text in (repr(settings), str(settings), repr(settings.celery), str(settings.celery), repr(settings.sources)):
        assert SECRET not in text
    assert "redis://user:***@h" in repr(settings)


@pytest.mark.parametrize("name", WITH_SECRETS)
def test_no_secret_shows_when_it_stands_where_it_is_wrong(name: str) -> None:
    """Nor in what an error tracker finds behind the error."""
    no_table = OPTIONS.get(name, ("string",))[0] == "dict" or name in ("broker_use_ssl", "cassandra_auth_kwargs")
    wrong = f"{{{SECRET}" if no_table else f"foo://:{SECRET}@h"
    with pytest.raises(InvalidSettings) as caught:
        read({variable(name): wrong, "CELERY_TASK_TIME_LIMIT": "x"})

    error = caught.value
    assert SECRET not in f"{error!r} {error} {error.problems} {error.__cause__} {error.__context__}"


def test_no_value_shows_in_the_warning() -> None:
    with pytest.warns(UnknownSettingWarning) as caught:
        read({"CELERY_BROKER_URL_INTERNAL": SECRET})

    assert SECRET not in str(caught[0].message)


def test_a_schedules_arguments_are_payload() -> None:
    schedule = {"nightly": {"task": "t", "schedule": crontab(hour=3), "kwargs": {"card": SECRET}, "args": [SECRET]}}

    assert shown("beat_schedule", schedule) == {
        "nightly": {"task": "t", "schedule": "<crontab>", "kwargs": "***", "args": "***"},
    }


# Opinions


def test_each_opinion_differs_from_celery_and_says_why() -> None:
    for opinion in OPINIONS:
        assert opinion.value != DEFAULTS[opinion.name]
        assert opinion.reason.endswith(".")


def test_the_stock_profile_undoes_them_all() -> None:
    settings = read({"CELERYKIT_PROFILE": "stock"}, container=True)

    assert settings.celery == {}
    assert settings.sources["task_acks_late"] == "Celery default"


@pytest.mark.parametrize("place", ["environ", "code", "config"])
def test_what_is_set_anywhere_wins_over_an_opinion(place: str) -> None:
    spell: Callable[[str], str] = variable if place == "environ" else str
    settings = read(**{place: {spell("worker_soft_shutdown_timeout"): "0"}})

    assert settings.celery["worker_soft_shutdown_timeout"] == 0


def test_who_turns_late_acks_off_gets_no_second_run_after_a_crash() -> None:
    celery = read({"CELERY_TASK_ACKS_LATE": "false"}).celery

    assert "task_reject_on_worker_lost" not in celery


def test_concurrency_is_counted_in_containers() -> None:
    assert read(container=True).celery["worker_concurrency"] == "auto"
    assert read({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, container=None).celery["worker_concurrency"] == "auto"
    assert "worker_concurrency" not in read(container=False).celery


QUORUM = {
    "task_default_queue_type": "quorum",
    "task_create_missing_queue_type": "quorum",
    "task_default_exchange_type": "topic",
    "task_create_missing_queue_exchange_type": "topic",
}


@pytest.mark.parametrize(
    "url", ["amqp://nowhere", "pyamqp://nowhere;amqp://elsewhere", ["amqps://nowhere", "amqps://elsewhere"]]
)
def test_rabbitmq_gets_quorum_queues(url: Any) -> None:
    assert read(code={"broker_url": url}).celery.items() >= QUORUM.items()


@pytest.mark.parametrize(
    "told",
    [
        {"broker_url": "redis://nowhere"},
        {"broker_url": "amqp://nowhere", "broker_read_url": "redis://nowhere"},
        {"broker_url": "amqp://nowhere", "task_queue_max_priority": 10},
        {"broker_url": "amqp://nowhere", "task_default_queue_type": "classic"},
        {"broker_url": "amqp://nowhere", "task_default_exchange_type": "direct"},
    ],
)
def test_all_of_it_holds_or_nothing(told: dict[str, Any]) -> None:
    assert {name for name in QUORUM if name not in told} & read(code=told).celery.keys() == set()


# The page


def _table(heading: str) -> list[list[str]]:
    section = DOCS.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_page_lists_our_settings() -> None:
    assert _table("celerykit's settings") == [
        [f"`CELERYKIT_{name.upper()}`", f"`{field.default}`", field.description]
        for name, field in Kit.model_fields.items()
    ]


def test_the_page_lists_every_default_that_differs_from_celerys() -> None:
    assert _table("Defaults that differ from Celery's") == [
        [f"`{opinion.name}`", f"`{opinion.value}`", f"`{DEFAULTS[opinion.name]}`", opinion.reason]
        for opinion in OPINIONS
    ]


def test_the_page_lists_the_settings_celerys_table_lacks() -> None:
    page = DOCS.read_text(encoding="utf-8")

    assert all(f"`{name}`" in page for name in UNLISTED)

"""
Our own settings, ``CELERYKIT_<NAME>``.

One field here is one setting everywhere: in the environment, ``.env``,
secrets, ``docs/settings.md`` and ``celerykit check --settings``. One that may
hold a secret is a ``SecretStr``.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError

from celerykit.ciphers import keys_in

__all__ = ["Kit"]


def _number_in(text: Any) -> Any:
    """
    Return the number that *text* writes, or *text* as it came.

    pydantic reads ``"PT1H"`` and ``"01:00:00"`` as durations, but not ``"3600"``.
    """
    try:
        return float(text) if isinstance(text, str) else text
    except ValueError:
        return text


Duration = Annotated[timedelta, BeforeValidator(_number_in), Field(gt=timedelta(0))]

#: One that may be 0, which turns something off.
DurationOrNone = Annotated[timedelta, BeforeValidator(_number_in), Field(ge=timedelta(0))]


class Kit(BaseModel):
    """What celerykit itself can be told."""

    # An error repeats no input: later fields may be secrets.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    profile: Literal["balanced", "stock"] = Field(
        default="balanced",
        description="`balanced` takes celerykit's defaults; `stock` takes Celery's, all of them.",
    )

    max_payload_bytes: int = Field(
        default=1024 * 1024,
        gt=0,
        description="The largest message body that is sent. Brokers keep messages in memory.",
    )

    max_eta: Duration = Field(
        default=timedelta(days=365),
        description="The furthest a countdown or ETA may lie ahead. Seconds, or ISO 8601 such as `P30D`.",
    )

    publish_deadline: Duration = Field(
        default=timedelta(seconds=5),
        description="How long sending one message may take in all. Seconds, or ISO 8601 such as `PT5S`.",
    )

    store_url: SecretStr | None = Field(
        default=None,
        description="Where counts, marks and claims are kept: `redis://…`, `postgresql://…`, `sqlite:///path`, or "
        "`memory://` for each process its own. Without it: the broker or the result backend, whichever is Redis or "
        "Valkey; else whichever is SQL; else `memory://`.",
    )

    dead_letter_queue: str = Field(
        default="dead_letters",
        min_length=1,
        description="The queue that keeps what a worker could not finish.",
    )

    dead_letter_keep: Duration = Field(
        default=timedelta(days=30),
        description="How long a dead letter is kept. Seconds, or ISO 8601 such as `P30D`.",
    )

    dead_letter_max: int = Field(
        default=200_000,
        gt=0,
        description="How many dead letters are kept; beyond that the oldest go, and the worker's log says which.",
    )

    max_deliveries: int = Field(
        default=3,
        gt=0,
        description="How often a message may be started before it is buried as what kills its worker.",
    )

    unknown_task_grace: DurationOrNone = Field(
        default=timedelta(minutes=10),
        description="How long a message for a task that only a newer deploy may know is handed back before it is "
        "buried. 0 buries at once.",
    )

    shutdown_grace: Duration | None = Field(
        default=None,
        description="How long running tasks have after SIGTERM; then they go back to their queue. Set it a little "
        "below what the platform waits before SIGKILL (Kubernetes: 30 s, Docker: 10 s). Without it: as long as they "
        "take.",
    )

    lease: Duration = Field(
        default=timedelta(seconds=30),
        description="How long what a process holds stays its own after its last sign of life: a worker's messages "
        "(on Redis and Valkey), running keys, slots of limits, the lead among beats.",
    )

    log_format: Literal["auto", "json", "text", "celery"] = Field(
        default="auto",
        description="How a worker and beat write their log: `json`, `text` for people, or `celery` as stock. `auto`: "
        "text on a terminal and JSON elsewhere; where the program has set up logging itself, what it says.",
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        default="INFO",
        description="From which level on a worker and beat log. `-l` on the command line wins over it.",
    )

    secret_keys: SecretStr | None = Field(
        default=None,
        description="Keys that `SecretStr` fields are encrypted with on their way, separated by commas: the first one "
        "encrypts, all of them decrypt. Without it, such a call is refused. Needs `celerykit[crypto]`.",
    )

    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Where a worker serves its numbers to Prometheus. Needs `celerykit[metrics]`.",
    )

    metrics_host: str = Field(
        default="0.0.0.0",  # noqa: S104  (scraped from another machine; there are no payloads in it)
        description="The address that `CELERYKIT_METRICS_PORT` is bound to.",
    )

    health_dir: Path | None = Field(
        default=None,
        description="Where workers and beat leave the signs of life that `celerykit health` reads. Without it: "
        "`celerykit-<uid>` in the system's directory for temporary files.",
    )

    health_stall: Duration = Field(
        default=timedelta(seconds=60),
        description="How long a worker with free places may receive nothing while its queues are not empty, before "
        "it counts as stuck. Seconds, or ISO 8601 such as `PT1M`.",
    )

    @field_validator("secret_keys")
    @classmethod
    def _are_keys(cls, keys: SecretStr | None) -> SecretStr | None:
        try:
            keys_in(keys.get_secret_value() if keys else "")
        except ValueError as error:
            # A custom error's words are a template.
            raise PydanticCustomError("secret_keys", "{why}", {"why": str(error)}) from None
        return keys

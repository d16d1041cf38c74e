"""
A shop whose tasks take and give secrets.
"""

from __future__ import annotations

from typing import Annotated, Any

from celery import chord
from pydantic import BaseModel, SecretStr

from celerykit import Backoff, CeleryKit, Key, Once, Retry


class Login(BaseModel):
    user: Annotated[str, Key()]
    password: SecretStr


def make(**conf: Any) -> Any:
    app = CeleryKit("tests.integration.secrets_shop", set_as_current=False)
    app.conf.update(conf)

    @app.task(name="secrets.sign_in", shared=False)
    def sign_in(login: Login) -> SecretStr:
        return SecretStr(f"{login.password.get_secret_value()} of {login.user}")

    @app.task(name="secrets.twice", shared=False, bind=True, retry=Retry({OSError: Backoff(base=0.05, jitter=0)}))
    def twice(self: Any, login: Login) -> SecretStr:
        if self.request.retries == 0:
            raise OSError("the first time")
        return login.password

    @app.task(name="secrets.remembered", shared=False, once=Once(done="reuse"))
    def remembered(login: Login) -> SecretStr:
        return login.password

    @app.task(name="secrets.lengths", shared=False)
    def lengths(tokens: list[SecretStr]) -> list[int]:
        return [len(token.get_secret_value()) for token in tokens]

    @app.task(name="secrets.fails", shared=False)
    def fails(login: Login, amount: int) -> SecretStr:
        if amount < 0:
            raise ValueError(f"{amount} is too little")
        return login.password

    @app.task(name="secrets.all_of", shared=False)
    def all_of(logins: list[Login]) -> str:
        """Send a chord from within a task."""
        sent: Any = chord(sign_in.s(login) for login in logins)(lengths.s())
        return str(sent.id)

    return app


app = make()

"""
A shop whose money and whose keys are in one database.
"""

from __future__ import annotations

import os
from pathlib import Path

import sqlalchemy as sa

from celerykit import CeleryKit, Once, remember

app = CeleryKit("tests.integration.remember_shop")
engine = sa.create_engine(os.environ.get("SHOP_DATABASE", "sqlite://"))

payments = sa.Table("payments", sa.MetaData(), sa.Column("amount", sa.Integer, nullable=False))


@app.task(once=Once(), shared=False)
def pay(amount: int, *, dies: str = "") -> int:
    """Pay, and die behind the transaction, or in it; but only once."""
    died = Path(os.environ["SHOP_FOLDER"]) / f"{amount}-{dies}"
    with engine.begin() as db:
        db.execute(sa.insert(payments).values(amount=amount))
        remember(amount * 10, on=db)
        if dies == "inside" and not died.exists():
            died.touch()
            os._exit(3)
    if dies == "behind" and not died.exists():
        died.touch()
        os._exit(3)
    return amount * 10


@app.task(once=Once(), shared=False)
def pay_and_fail(amount: int) -> int:
    """Take the payment back by an error."""
    with engine.begin() as db:
        db.execute(sa.insert(payments).values(amount=amount))
        remember(amount * 10, on=db)
        raise ValueError(amount)


@app.task(shared=False)
def pay_without_a_key(amount: int) -> int:
    """Nothing could be recorded, and nobody would know."""
    with engine.begin() as db:
        db.execute(sa.insert(payments).values(amount=amount))
        remember(amount * 10, on=db)
    return amount * 10

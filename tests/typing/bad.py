"""
What users get wrong: each line with a mark is an error in every checker, and no other line is.

Without celery-types mypy takes Celery's `Task` for `Any`, and with it whether a task is what `then` wants.
"""

from __future__ import annotations

from good import Order, Receipt, app, charge, fetch, mail, order, pay, ship

from celerykit import Backoff, CeleryKit, Context, Once, Retry, remember

charge.delay(1)  # wrong: the type of an argument
charge.delay()  # wrong: a missing argument
charge.delay(order, currencyy="EUR")  # wrong: a misspelt argument
charge.delay(order, currency="GBP")  # wrong: a value that is not one of the literals
charge.delay(order).get().totl  # wrong: the result is a Receipt
charge(order).totl  # wrong: so is what the function returns
ship.delay(None, Receipt(total=1))  # wrong: a bound task is called without itself
fetch.delay(b"u")  # wrong: an `async def` task is as typed as any
charge.using(countdwn=5)  # wrong: a misspelt option
charge.using(countdown="5").delay(order)  # wrong: the type of an option
charge.using(countdown=5).delay(1)  # wrong: options do not loosen the parameters
charge.s(1)  # wrong: nor does a signature
charge.s(order).then(mail)  # wrong, and mypy needs celery-types to see it: a Receipt is no str
charge.s(order).then(ship, expres=True)  # wrong: a misspelt argument of the next task
charge.AsyncResult("id").get().totl  # wrong: a result by its id is typed


@app.task(queu="x")  # wrong: a misspelt option of a task
def f(order: Order) -> None: ...


@app.task(on_crash="explode")  # wrong: not one of the two
def h() -> None: ...


@app.task(once=True)  # wrong: not a policy
def i() -> None: ...


@app.task(once=Once(), on_store_down="wait")  # wrong: not one of the three
def j() -> None: ...


Once(running="reuse")  # wrong: an answer of the other question
Once(done="join")  # wrong: and the other way round
Once(keep="1d")  # wrong: the type of an option of a policy
Once(key="order_id")  # wrong: not a function
pay.using(kee="k")  # wrong: a misspelt key
pay.using(key="k").delay(order)  # wrong: a key does not loosen the parameters
pay.delay(order)  # wrong: nor does a policy
pay.delay(order).duplikate  # wrong: a misspelt attribute of the result
remember(1)  # wrong: without the transaction it is recorded in
Retry({"OSError": Backoff()})  # wrong: the name of an exception, and not its class
Retry(OSError, attempts="3")  # wrong: the type of an option of a policy
app.dead_letters.find(resaon="failed")  # wrong: a misspelt filter

CeleryKit("shop", context=Order)  # wrong: no context
Context.current().tenant  # wrong: a field of somebody else's context
Context.of_request("x-request-id")  # wrong: no headers


async def g() -> None:
    await charge.adelay(1)  # wrong: `adelay` is as typed as `delay`
    (await (await charge.adelay(order)).aget()).totl  # wrong: and so is what it gives

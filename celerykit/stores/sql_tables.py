"""
The tables of a store in an SQL database, and every statement on them.

Times are seconds since 1970, by the database's clock where it has one. A row
whose time is over is as good as none, until it is swept away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Column,
    ColumnElement,
    Double,
    Executable,
    Index,
    MetaData,
    Table,
    Text,
    bindparam,
    case,
    cast,
    delete,
    func,
    literal,
    literal_column,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

__all__ = ["COUNTS", "METADATA", "RECORDS", "SLOTS", "Statements", "statements"]

METADATA = MetaData()

#: By bytes: what begins alike stands together, whatever the database's language.
_KEY = Text().with_variant(Text(collation="C"), "postgresql")

COUNTS = Table(
    "celerykit_counts",
    METADATA,
    Column("key", _KEY, primary_key=True),
    Column("value", Text, nullable=False),
    Column("expires", Double, nullable=False),
    Index("celerykit_counts_expires", "expires"),
)

RECORDS = Table(
    "celerykit_records",
    METADATA,
    Column("key", _KEY, primary_key=True),
    Column("version", Text, nullable=False),
    Column("data", Text, nullable=False),
    Column("lease_ends", Double),
    Column("expires", Double, nullable=False),
    Index("celerykit_records_expires", "expires"),
)

SLOTS = Table(
    "celerykit_slots",
    METADATA,
    Column("key", _KEY, primary_key=True),
    Column("holder", _KEY, primary_key=True),
    Column("ends", Double, nullable=False),
    Index("celerykit_slots_ends", "ends"),
)

#: How many rows one statement sweeps away, and one page of a walk holds: they may be large.
_SWEPT_AT_ONCE = 1000
_READ_AT_ONCE = 50


@dataclass(frozen=True)
class Statements:
    """
    Each is made once: SQLAlchemy takes longer to build one than to run it.

    No parameter may have the name of a column, which SQLAlchemy would set to it.
    """

    add: Executable
    subtract: Executable
    mark: Executable
    get: Executable
    delete: Executable

    read: Executable
    read_many: Executable
    write: Executable
    replace: Executable
    replace_lapsed: Executable
    forget: Executable
    forget_lapsed: Executable
    renew: Executable
    find: Executable
    find_after: Executable

    take: Executable
    wait: Executable
    give: Executable

    sweep: tuple[Executable, ...]


def statements(dialect: str) -> Statements:
    """Make the statements for PostgreSQL, or for SQLite, where parameters *now* and *now_there* are the time."""
    if dialect == "sqlite":
        # Two of them: SQLAlchemy repeats for each row what stands in an insert's values, and would here, too.
        return _statements(sqlite.insert, bindparam("now", type_=Double), bindparam("now_there", type_=Double))
    now = literal_column("extract(epoch FROM clock_timestamp())::double precision", Double)
    return _statements(postgresql.insert, now, now)


def _statements(insert: Any, now: ColumnElement[float], now_there: ColumnElement[float]) -> Statements:
    record = RECORDS.c
    later, lease = now + bindparam("ttl", type_=Double), now + bindparam("lease", type_=Double)
    is_there = (record.key == bindparam("this_key"), record.expires > now)
    is_expected = (*is_there, record.version == bindparam("expected"))
    is_lapsed = or_(record.lease_ends.is_(None), record.lease_ends <= now)
    times = {"lease_ends": lease, "expires": later}
    content = {"version": bindparam("this_version"), "data": bindparam("this_data"), **times}
    write = _unless_there(insert(RECORDS).values(key=bindparam("this_key"), **content), RECORDS, now_there)
    replace = update(RECORDS).where(*is_expected).values(content)
    found = (record.key, record.version, record.data, (record.lease_ends - now).label("lease"))
    page = select(*found).where(record.expires > now).order_by(record.key).limit(_READ_AT_ONCE)
    return Statements(
        **_of_counts(insert, now, now_there),
        read=select(*found).where(*is_there),
        read_many=select(*found).where(record.key.in_(bindparam("keys", expanding=True)), record.expires > now),
        write=write,
        replace=replace,
        replace_lapsed=replace.where(is_lapsed),
        forget=delete(RECORDS).where(*is_expected),
        forget_lapsed=delete(RECORDS).where(*is_expected, is_lapsed),
        renew=update(RECORDS).where(*is_expected).values(times),
        find=page.where(record.key >= bindparam("prefix")),
        find_after=page.where(record.key > bindparam("after")),
        **_of_slots(insert, now),
        sweep=tuple(_sweep(table, column, now) for table, column in _ENDS),
    )


def _of_counts(insert: Any, now: ColumnElement[float], now_there: ColumnElement[float]) -> dict[str, Executable]:
    count = COUNTS.c
    key: ColumnElement[str] = bindparam("this_key")
    is_there = (count.key == key, count.expires > now)
    number = cast(count.value, BigInteger)
    later = now + bindparam("ttl", type_=Double)
    one = insert(COUNTS).values(key=key, value="1", expires=later)
    one_more = case((count.expires <= now_there, literal("1", Text)), else_=cast(number + 1, Text))
    mark = insert(COUNTS).values(key=key, value=bindparam("this_value"), expires=later)
    return {
        "add": one.on_conflict_do_update(
            index_elements=[count.key], set_={"value": one_more, "expires": one.excluded.expires}
        ).returning(count.value),
        # One that is back at nothing is over.
        "subtract": update(COUNTS)
        .where(*is_there)
        .values(value=cast(number - 1, Text), expires=case((number <= 1, 0.0), else_=count.expires)),
        "mark": _unless_there(mark, COUNTS, now_there),
        "get": select(count.value).where(*is_there),
        "delete": delete(COUNTS).where(count.key == key),
    }


def _of_slots(insert: Any, now: ColumnElement[float]) -> dict[str, Executable]:
    slot, limit = SLOTS.c, bindparam("limit", type_=BigInteger)
    key: ColumnElement[str] = bindparam("this_key")
    holder: ColumnElement[str] = bindparam("this_holder")
    taken = (slot.key == key, slot.ends > now)
    is_mine = select(literal(1)).where(*taken, slot.holder == holder).exists()
    count = select(func.count()).select_from(SLOTS).where(*taken).scalar_subquery()
    mine = select(
        bindparam("this_key", type_=Text), bindparam("this_holder", type_=Text), now + bindparam("ttl", type_=Double)
    ).where(or_(is_mine, count < limit))
    take = insert(SLOTS).from_select(["key", "holder", "ends"], mine)
    return {
        "take": take.on_conflict_do_update(
            index_elements=[slot.key, slot.holder], set_={"ends": take.excluded.ends}
        ).returning(slot.key),
        # So many must end before it is one less than the limit.
        "wait": select(slot.ends - now).where(*taken).order_by(slot.ends.desc()).limit(1).offset(limit - 1),
        "give": delete(SLOTS).where(slot.key == key, slot.holder == holder),
    }


def _unless_there(insert: Any, table: Table, now_there: ColumnElement[float]) -> Any:
    """Insert, also over a row whose time is over, and return the key; where another is, return nothing."""
    new = {column.name: insert.excluded[column.name] for column in table.c if not column.primary_key}
    is_over = table.c.expires <= now_there
    return insert.on_conflict_do_update(index_elements=[table.c.key], set_=new, where=is_over).returning(table.c.key)


_ENDS = ((COUNTS, COUNTS.c.expires), (RECORDS, RECORDS.c.expires), (SLOTS, SLOTS.c.ends))


def _sweep(table: Table, ends: Column[float], now: ColumnElement[float]) -> Executable:
    keys = tuple_(*table.primary_key.columns)
    over = select(*table.primary_key.columns).where(ends <= now).limit(_SWEPT_AT_ONCE)
    if isinstance(now, BindParameter):
        # Python counts no rows of a statement in SQLite that begins with anything but its verb.
        return delete(table).where(keys.in_(over))
    # The time is asked once, so that it can be looked up in an index; and two that sweep do not wait for each other.
    over = select(*table.primary_key.columns).where(ends <= select(now).scalar_subquery()).limit(_SWEPT_AT_ONCE)
    return delete(table).where(keys.in_(select(over.with_for_update(skip_locked=True).cte("over"))))

"""The world that the agent acts on: a folder of mails, an orders table, a payment service with a ledger, an outbox.

The payment service is a SQLite file here. Like a real one it takes an idempotency key with each request: a request that comes again
under the same key gets the first one's receipt, and no second payment is made. It notes every request, so that anybody can count.
"""

from __future__ import annotations

import csv
import os
import sqlite3
import time
from pathlib import Path

from pydantic import BaseModel

SLOW = "REFUND_APPROVAL_PAYMENT_SECONDS"  # environment variable: how long the service takes to reply, after it has paid

_TABLES = """
create table if not exists requests (key text, order_number text, cents integer, process integer);
create table if not exists refunds (key text primary key, order_number text, cents integer, receipt text);
"""


class Shop(BaseModel):
    """Where things are: absolute paths, so that any process on the machine can go on."""

    mails: str
    orders: str
    ledger: str
    outbox: str


class Mail(BaseModel):
    """A customer's mail."""

    name: str
    text: str


class Order(BaseModel):
    """A row of the orders table."""

    number: str
    customer: str
    email: str
    item: str
    cents: int
    status: str


class Request(BaseModel):
    """A request that the payment service got."""

    key: str
    order: str
    cents: int
    process: int


class Refund(BaseModel):
    """A payment that it made."""

    order: str
    cents: int
    receipt: str


def euros(cents: int) -> str:
    """An amount for people."""
    return f"{cents // 100}.{cents % 100:02} EUR"


def read_mails(folder: str) -> list[Mail]:
    """The mails of a folder, by name."""
    return [Mail(name=file.stem, text=file.read_text()) for file in sorted(Path(folder).glob("*.txt"))]


def find_order(table: str, number: str) -> Order | None:
    """The order of that number."""
    with open(table, newline="") as file:
        row = next((row for row in csv.DictReader(file) if row["order"] == number), None)
    if row is None:
        return None
    cents = round(float(row["total"]) * 100)
    return Order(
        number=number, customer=row["customer"], email=row["email"], item=row["item"], cents=cents, status=row["status"]
    )


def write_mail(outbox: str, name: str, to: str, text: str) -> str:
    """Put an answer into the outbox; done twice, it is the same file."""
    file = Path(outbox, f"{name}.txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"To: {to}\n\n{text}\n")
    return str(file)


def pay_back(ledger: str, order: str, cents: int, key: str) -> str:
    """Ask the payment service for a refund; returns its receipt."""
    with _ledger(ledger) as service:
        service.execute("insert into requests values (?, ?, ?, ?)", (key, order, cents, os.getpid()))
        service.execute("insert or ignore into refunds values (?, ?, ?, ?)", (key, order, cents, f"R-{order}"))
        (receipt,) = service.execute("select receipt from refunds where key = ?", (key,)).fetchone()
    time.sleep(float(os.environ.get(SLOW, "0")))  # paid, and the reply is on its way
    return str(receipt)


def requests_to(ledger: str) -> list[Request]:
    """Every request that the service got."""
    with _ledger(ledger) as service:
        rows = service.execute("select key, order_number, cents, process from requests").fetchall()
    return [Request(key=key, order=order, cents=cents, process=process) for key, order, cents, process in rows]


def refunds_in(ledger: str) -> list[Refund]:
    """Every payment that the service made."""
    with _ledger(ledger) as service:
        rows = service.execute("select order_number, cents, receipt from refunds order by order_number").fetchall()
    return [Refund(order=order, cents=cents, receipt=receipt) for order, cents, receipt in rows]


def _ledger(file: str) -> sqlite3.Connection:
    connection = sqlite3.connect(file, timeout=60)
    connection.executescript(_TABLES)
    return connection

"""What happens in a payment log: five kinds of fraud and the honest behaviour that looks like each of them.

A scene is a function that adds events to a `Log`. What tells a fraud from its look-alike is a relation: the order of
events, the time between them, how amounts compare with each other, whether an account is the same as before. The words
of both are the same, in like numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from deltaw.data import fraud_words as words

T = TypeVar("T")
_HOUR, _DAY = 60, 24 * 60
_WIDTH = 0.3
"""Of a pattern's season, in lengths of the whole time from the first training row to the last test row."""


@dataclass(frozen=True)
class Customer:
    """One customer: whether a business, and the names and accounts that its honest payments go to."""

    name: str
    business: bool
    payees: tuple[tuple[str, str], ...]
    employer: str
    shops: tuple[str, ...]


@dataclass(frozen=True)
class Event:
    """One event: minutes since Monday's midnight, a key of `Style.wordings`, and the fields of the wording."""

    minute: int
    kind: str
    who: str
    amount: int = 0
    account: str = ""
    note: str = ""


@dataclass
class Log:
    """A log in the making.

    Attributes:
        customer: whose account it is.
        rng: of all choices.
        season: 0 at the first training row, 1 at the last test row.
        drift: 0: pools are drawn from evenly at all times; 1: by season alone.
        minute: the present time.
        events: so far.
    """

    customer: Customer
    rng: random.Random
    season: float
    drift: float
    minute: int
    events: list[Event] = field(default_factory=list)

    def add(self, kind: str, who: str, amount: int = 0, *, account: str = "", note: str = "") -> None:
        """Adds an event at the present time."""
        self.events.append(Event(self.minute, kind, who, amount, account, note))

    def wait(self, low: int, high: int) -> None:
        """Lets `low` to `high` minutes pass."""
        self.minute += self.rng.randint(low, high)

    def soon(self) -> None:
        """Lets 1 to 9 minutes pass."""
        self.wait(1, 9)

    def later(self) -> None:
        """Lets 5 hours to 2 days pass."""
        self.wait(5 * _HOUR, 2 * _DAY)

    def pick(self, pool: Sequence[T]) -> T:
        """An entry of a pool that is in the order of its seasons."""
        if self.rng.random() >= self.drift:
            return self.rng.choice(pool)
        last = len(pool) - 1
        weights = [math.exp(-(((i / last - self.season) / _WIDTH) ** 2) / 2) for i in range(len(pool))]
        return self.rng.choices(pool, weights)[0]

    def amount(self, low: float, high: float) -> int:
        """A whole amount, even on a logarithmic scale."""
        return round(math.exp(self.rng.uniform(math.log(low), math.log(high))))

    def share(self, amount: int, low: float, high: float) -> int:
        """A part (or a multiple) of an amount."""
        return max(1, round(amount * self.rng.uniform(low, high)))

    def account(self) -> str:
        """As `new_account`."""
        return new_account(self.rng)

    def person(self) -> str:
        """As `new_person`."""
        return new_person(self.rng)

    def supplier(self) -> str:
        """As `new_supplier`."""
        return new_supplier(self.rng)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability


def new_account(rng: random.Random) -> str:
    """The last four digits of an account."""
    return str(rng.randint(1000, 9999))


def new_person(rng: random.Random) -> str:
    """Somebody."""
    return f"{rng.choice(words.INITIALS)} {rng.choice(words.SURNAMES)}"


def new_supplier(rng: random.Random) -> str:
    """A firm that sends bills, or pays wages."""
    return f"{rng.choice(words.SURNAMES)} {rng.choice(words.TRADES)}"


def everyday(log: Log, *, payment: bool = False) -> None:
    """One event that means nothing by itself, now and then one that belongs to a fraud too; or one payment."""
    rng, who = log.rng, log.customer
    kinds = _PAYMENTS if payment else _EVERYDAY
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "chip":
        log.add("chip", rng.choice(who.shops), log.amount(3, 120))
    elif kind == "out":
        payee, known = rng.choice(who.payees)
        log.add("out", payee, log.amount(40, 3000), account=known)
    elif kind == "online":
        log.add("online", log.pick(words.ONLINE), log.amount(1, 900))
    elif kind == "in":
        log.add("in", who.employer if log.chance(0.5) else log.person(), log.amount(60, 4000), note=_friendly(log))
    elif kind == "cash":
        log.add("cash", rng.choice(words.PLACES), log.amount(2, 40) * 10)
    elif kind == "deposit":
        log.add("deposit", rng.choice(words.PLACES), log.amount(100, 20000))
    elif kind == "login":
        log.add("login", log.pick(words.DEVICES))
    elif kind == "change":
        log.add("change", log.pick(words.CREDENTIALS))
    elif kind == "mail":
        pool = words.CHANGED_DETAILS if log.chance(0.3) else words.PLAIN_MAIL
        log.add("mail", log.supplier(), note=log.pick(pool))
    else:
        log.add("call", log.supplier())


_PAYMENTS = {"chip": 20, "out": 15, "online": 15, "in": 12, "cash": 8, "deposit": 10}
_EVERYDAY = {**_PAYMENTS, "login": 7, "change": 5, "mail": 6, "call": 2}
"""Kinds of event to how often they stand alone, of 100."""


def aside(log: Log) -> None:
    """Two events that some kind of fraud is made of, and that mean nothing here."""
    rng = log.rng
    kind = rng.choice(("in", "online", "mail", "deposit", "login"))
    if kind == "in":
        log.add("in", log.person(), log.amount(300, 4000), note=_friendly(log))
        log.wait(5, 12 * _HOUR)
        _onward(log, log.amount(50, 2000))
    elif kind == "mail":
        firm = log.supplier()
        pool = words.CHANGED_DETAILS if log.chance(0.5) else words.PLAIN_MAIL
        log.add("mail", firm, note=log.pick(pool))
        log.wait(10, 6 * _HOUR)
        log.add("out", firm, log.amount(600, 12000), account=log.account())
    elif kind == "login":
        log.add("login", log.pick(words.DEVICES))
        log.soon()
        log.add("change", log.pick(words.CREDENTIALS))
    else:
        for _ in range(2):
            if kind == "online":
                log.add("online", log.pick(words.ONLINE), log.amount(1, 900))
            else:
                log.add("deposit", rng.choice(words.PLACES), log.amount(1500, 15000))
            log.wait(5, 12 * _HOUR)


def mule(log: Log) -> None:
    """Money of strangers comes in and goes on within the hour, a little less than came."""
    total = 0
    for _ in range(log.rng.randint(1, 2)):
        part = log.amount(700, 4000)
        total += part
        log.add("in", log.person(), part, note=log.pick(words.STRANGER_NOTES))
        log.wait(3, 40)
    _onward(log, log.share(total, 0.88, 0.97))


def _onward(log: Log, amount: int) -> None:
    draw = log.rng.random()
    if draw < 0.5:
        log.add("out", log.pick(words.OUTLETS), amount, account=log.account())
    elif draw < 0.8:
        log.add("out", log.person(), amount, account=log.account(), note=log.pick(words.STRANGER_NOTES))
    else:
        log.add("cash", log.rng.choice(words.PLACES), amount)


def like_mule(log: Log) -> None:
    """Salary split, a purse among friends, something sold after a purchase."""
    draw = log.rng.random()
    if draw < 0.35:
        for _ in range(log.rng.randint(1, 2)):
            part = log.amount(700, 4000)
            log.add("in", log.customer.employer if log.chance(0.4) else log.person(), part, note=_friendly(log))
            log.wait(3, 40)
        _onward(log, log.share(part, 0.08, 0.35))
    elif draw < 0.7:
        part = log.amount(700, 4000)
        log.add("in", log.person(), part, note=_friendly(log))
        log.later()
        log.add("in", log.person(), part, note=_friendly(log))
        log.later()
        _onward(log, log.share(part, 2.6, 3.4))
    else:
        spent = log.amount(700, 4000)
        _onward(log, spent)
        log.wait(3, 40)
        log.add("in", log.person(), log.share(spent, 0.9, 1.1), note=_friendly(log))
        if log.chance(0.5):
            log.wait(3, 40)
            log.add("out", log.person(), log.amount(20, 90), account=log.account(), note=_friendly(log))


def _friendly(log: Log) -> str:
    return log.pick(words.FRIEND_NOTES) if log.chance(0.6) else log.pick(words.STRANGER_NOTES)


def burst(log: Log) -> None:
    """A stolen card: trials of small amounts on the web, then ever larger ones, minutes apart."""
    amount = log.amount(1, 9)
    for _ in range(log.rng.randint(3, 4)):
        log.add("online", log.pick(words.ONLINE), amount)
        amount = log.share(amount, 2.5, 9)
        log.soon()


def like_burst(log: Log) -> None:
    """A shopping spree over days, a large purchase with its small extras, a day out."""
    draw, count = log.rng.random(), log.rng.randint(3, 4)
    amounts = sorted(log.amount(1, 900) for _ in range(count))
    if draw < 0.4:
        if log.chance(0.5):
            log.rng.shuffle(amounts)
        for amount in amounts:
            log.add("online", log.pick(words.ONLINE), amount)
            log.later()
    elif draw < 0.75:
        for amount in reversed(amounts):
            log.add("online", log.pick(words.ONLINE), amount)
            log.soon()
    else:
        for amount in amounts:
            log.add("chip", log.pick(words.TRAVEL if log.chance(0.7) else words.ONLINE), amount)
            log.wait(4, 90)


def redirection(log: Log) -> None:
    """A known supplier's bill is paid to an account that it was never paid to before, after word of the change."""
    supplier, old, new = log.supplier(), log.account(), log.account()
    amount = log.amount(600, 12000)
    if log.chance(0.35):
        log.add("call", log.supplier() if log.chance(0.4) else supplier)
        log.later()
    log.add("out", supplier, log.share(amount, 0.8, 1.2), account=old)
    log.later()
    told = log.pick(words.CHANGED_DETAILS) if log.chance(0.8) else log.pick(words.PLAIN_MAIL)
    log.add("mail", supplier, note=told)
    log.wait(10, 6 * _HOUR)
    log.add("out", supplier, amount, account=new)


def like_redirection(log: Log) -> None:
    """A new supplier, a change that was checked by telephone, a letter of change that was not followed."""
    supplier, old, new = log.supplier(), log.account(), log.account()
    amount, draw = log.amount(600, 12000), log.rng.random()
    told = log.pick(words.CHANGED_DETAILS if log.chance(0.7) else words.PLAIN_MAIL)
    if draw < 0.3:
        log.add("out", log.supplier(), log.share(amount, 0.8, 1.2), account=old)
        log.later()
        log.add("mail", supplier, note=log.pick(words.CHANGED_DETAILS if log.chance(0.4) else words.PLAIN_MAIL))
        log.wait(10, 6 * _HOUR)
        log.add("out", supplier, amount, account=new)
    elif draw < 0.65:
        log.add("out", supplier, log.share(amount, 0.8, 1.2), account=old)
        log.later()
        log.add("mail", supplier, note=told)
        log.wait(10, 6 * _HOUR)
        log.add("call", supplier)
        log.wait(5, 60)
        log.add("out", supplier, amount, account=new)
    else:
        if log.chance(0.4):
            log.add("call", supplier)
            log.later()
        log.add("out", supplier, log.share(amount, 0.8, 1.2), account=old)
        log.later()
        log.add("mail", supplier, note=told)
        log.wait(10, 6 * _HOUR)
        log.add("out", supplier, amount, account=old)


def structuring(log: Log) -> None:
    """Cash in pieces that stay below the 10,000 from which banks report, at several branches."""
    floor = 9500 - round(1300 * log.drift * log.season)
    for _ in range(log.rng.randint(3, 4)):
        log.add("deposit", log.rng.choice(words.PLACES), log.rng.randint(floor, 9990))
        log.wait(2 * _HOUR, 1 * _DAY)


def like_structuring(log: Log) -> None:
    """The takings of a shop, rents collected in cash, one car sold."""
    draw, place = log.rng.random(), log.rng.choice(words.PLACES)
    count = log.rng.randint(3, 4)
    if draw < 0.45:
        amounts = [log.amount(3000, 22000) for _ in range(count)]
    elif draw < 0.75:
        level = log.amount(1500, 7500) if log.chance(0.6) else log.amount(10500, 30000)
        amounts = [log.share(level, 0.96, 1.04) for _ in range(count)]
    else:
        amounts = [log.rng.randint(9000, 9990), *(log.amount(300, 5000) for _ in range(count - 1))]
        log.rng.shuffle(amounts)
    for amount in amounts:
        log.add("deposit", place if log.chance(0.5) else log.rng.choice(words.PLACES), amount)
        log.wait(2 * _HOUR, 1 * _DAY)


def takeover(log: Log) -> None:
    """A strange device, then other credentials, then most of the money to somebody new, within minutes."""
    log.add("login", log.pick(words.DEVICES))
    log.soon()
    log.add("change", log.pick(words.CREDENTIALS))
    if log.chance(0.4):
        log.soon()
        log.add("change", log.pick(words.CREDENTIALS))
    log.soon()
    log.add("out", log.person(), log.amount(900, 9000), account=log.account())


def like_takeover(log: Log) -> None:
    """A new telephone: transfers before it, long after it, or to somebody paid before."""
    draw = log.rng.random()
    payee, account = log.person(), log.account()
    change = ("change", log.pick(words.CREDENTIALS))
    login = ("login", log.pick(words.DEVICES))
    if draw < 0.35:
        log.add("out", payee, log.amount(900, 9000), account=account)
        log.later()
        for kind, who in (login, change):
            log.add(kind, who)
            log.soon()
        log.add("out", payee, log.amount(900, 9000), account=account)
    elif draw < 0.7:
        log.add(*login)
        log.soon()
        log.add(*change)
        log.later()
        log.later()
        log.add("out", payee, log.amount(900, 9000), account=account)
    else:
        log.add("out", payee, log.amount(900, 9000), account=account)
        log.soon()
        for kind, who in (change, login) if log.chance(0.5) else (login, change):
            log.add(kind, who)
            log.soon()
        log.add("chip", log.rng.choice(log.customer.shops), log.amount(3, 120))


class Pair(NamedTuple):
    """A fraud, and the honest behaviour that looks like it."""

    fraud: Callable[[Log], None]
    honest: Callable[[Log], None]


FRAUDS = {
    "mule_account": Pair(mule, like_mule),
    "card_not_present_burst": Pair(burst, like_burst),
    "invoice_redirection": Pair(redirection, like_redirection),
    "structuring": Pair(structuring, like_structuring),
    "account_takeover": Pair(takeover, like_takeover),
}
"""Each kind of fraud by its label."""

"""Names, wordings and the three banks' ways of writing, from which `deltaw.data.fraud` makes payment logs.

Pools that drift are in the order in which their entries come into use.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


def _pool(text: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in text.split(","))


SURNAMES = _pool(
    "Weber, Novak, Rossi, Martin, Silva, Jansen, Kowalski, Berg, Dubois, Fischer, Moreau, Horvat, Lindqvist, Costa, "
    "Murphy, Petrov, Ali, Haddad, Okafor, Chen, Singh, Tanaka, Garcia, Lopez, Brown, Walsh, Evans, Clarke, Popa, Nagy, "
    "Aydin, Keller, Schmid, Meier, Baker, Turner, Hughes, Olsen, Virtanen, Marin"
)
INITIALS = "ABCDEFGHJKLMNOPRSTVW"

GROCERY = _pool(
    "Corner Market, Green Grocer, City Bakery, Daily Foods, Fresh Basket, Butcher Row, Farm Shop, Noodle House, "
    "Harbour Cafe, Pizza Roma, Coffee Point, Tea Room, Sushi Bar, Burger Yard, Main Pharmacy, Book Nook, Flower Stall, "
    "Pet Corner, Hardware Store, Fuel Station"
)
TRAVEL = _pool(
    "Grand Hotel, Airport Parking, Rail Tickets, Island Ferry, City Museum, Beach Resort, Ski Lift, Car Rental, "
    "Taxi Rank, Mountain Lodge, Duty Free, Harbour Tours, Camping Park, Zoo Entrance, Spa Baths, Motorway Toll, "
    "Opera House, Castle Visit, Wine Cellar, Surf School"
)
ONLINE = _pool(
    "Gift Card Hub, Phone World, Sneaker Drop, Laptop Direct, Voucher Store, Watch Outlet, Designer Bags, Game Keys, "
    "Console Shop, Tablet Depot, Perfume Online, Camera House, Headphone Store, Drone Centre, Luxury Wear, "
    "Ticket Exchange, Prepaid Top-up, Graphics Cards, Jewellery Web, Smart Home Shop"
)
OUTLETS = _pool(
    "CoinBridge crypto, FastRemit, Western Wire, BitHarbour exchange, QuickSend abroad, GlobalPay wallet, TokenDesk, "
    "Prepaid Card Load, EuroRemit, ChainSwap, Offshore Wallet, StableCoin Desk"
)
TRADES = _pool(
    "Roofing, Steel, Printing, Logistics, Packaging, Catering, Timber, Electrics, Plumbing, Textiles, Software, "
    "Cleaning, Machines, Glass, Paints, Freight, Media, Seeds, Tools, Motors"
)
PLACES = _pool("north, station, harbour, market, east, airport, old town, mill road, west, university, bridge, south")

DEVICES = _pool(
    "new phone, unknown browser, new laptop, other country, new tablet, emulator, remote desktop, virtual machine"
)
CREDENTIALS = _pool(
    "password reset, pin changed, recovery email changed, phone number changed, security key removed, sim replaced, "
    "voice login enrolled, passkey added"
)

CHANGED_DETAILS = _pool(
    "we changed bank use the new account, please note our updated payment details, "
    "old account closed for audit pay here instead, kindly remit to the account below, "
    "our bank is moving this invoice goes elsewhere, revised invoice attached with other coordinates, "
    "finance switched provider see corrected iban, the director asks to settle to this number, "
    "due to tax checks funds go to our subsidiary, replacement bill enclosed previous one is void, "
    "factoring partner collects from now on, treasury now receives at another institution"
)
PLAIN_MAIL = _pool(
    "invoice attached thank you, please find this month's bill, order confirmed details on page two, "
    "first order welcome as a customer, reminder the invoice is due today, urgent please pay before noon, "
    "statement of account enclosed, delivery is done bill follows, our new catalogue and price list, "
    "we moved our office see new address, deposit needed to hold the slot, final instalment for the works"
)
STRANGER_NOTES = _pool(
    "for the watch, thanks, refund, as agreed, sofa, ticket resale, loan, course fee, invoice 22, deposit flat, gift, "
    "parcel"
)
FRIEND_NOTES = _pool(
    "my share, dinner, gift for Anna, trip, tickets, rent part, thanks, sofa, loan back, as agreed, concert, club fee"
)


@dataclass(frozen=True)
class Style:
    """How one bank writes: the head of a log, the marks around events, and the wordings of each kind of event.

    Wordings have the fields `who`, `account` (the last four digits of the counterparty's account), `amount`, `note`.
    """

    head: dict[bool, str]
    days: tuple[str, ...]
    clock: str
    between: str
    judged: str
    thousands: str
    upper: bool
    wordings: dict[str, tuple[str, ...]]

    def when(self, minute: int) -> str:
        """A minute since Monday's midnight as this bank writes a time."""
        day, rest = divmod(minute, 24 * 60)
        return self.clock.format(day=self.days[day % 7], hour=rest // 60, minute=rest % 60)

    def event(self, kind: str, rng: random.Random, **fields: str | int) -> str:
        """One event without its time."""
        amount = format(fields.get("amount", 0), ",").replace(",", self.thousands)
        text = rng.choice(self.wordings[kind]).format(**{**fields, "amount": amount}).strip()
        return " ".join((text.upper() if self.upper else text).split())


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")

STYLES = {
    "bank-a": Style(
        head={False: "EUR private:", True: "EUR business:"},
        days=_DAYS,
        clock="{day} {hour:02}:{minute:02}",
        between="; ",
        judged="NOW ",
        thousands=",",
        upper=False,
        wordings={
            "chip": ("card {who} {amount}", "paid in shop {who} {amount}"),
            "online": ("online card {who} {amount}", "web payment {who} {amount}"),
            "in": ("received {amount} from {who} {note}", "incoming {amount} {who} {note}"),
            "out": ("transfer {amount} to {who} *{account} {note}",),
            "deposit": ("cash deposit {amount} {who}", "cash in {amount} branch {who}"),
            "cash": ("cash withdrawal {amount} {who}", "atm {who} {amount}"),
            "login": ("login from {who}", "signed in, {who}"),
            "change": ("{who}",),
            "mail": ("mail {who}: {note}",),
            "call": ("phoned {who}", "call with {who}"),
        },
    ),
    "bank-b": Style(
        head={False: "CHF PRIV", True: "CHF COMM"},
        days=("1", "2", "3", "4", "5", "6", "7"),
        clock="{day}/{hour:02}{minute:02}",
        between=" | ",
        judged=">> ",
        thousands="'",
        upper=True,
        wordings={
            "chip": ("pos card {who} {amount}", "ec card {who} {amount}"),
            "online": ("ecom card {who} {amount}", "web card {who} {amount}"),
            "in": ("recd {amount} {who} {note}",),
            "out": ("trf {amount} {who} /{account} {note}", "transf {amount} {who} /{account} {note}"),
            "deposit": ("cash dep {amount} {who}", "dep cash {amount} {who}"),
            "cash": ("cash wdl {amount} {who}", "atm {amount} {who}"),
            "login": ("logon {who}",),
            "change": ("chg {who}",),
            "mail": ("msg {who} {note}",),
            "call": ("tel {who}",),
        },
    ),
    "bank-c": Style(
        head={False: "Personal sterling account.", True: "Company sterling account."},
        days=_DAYS,
        clock="{day} {hour}.{minute:02}",
        between=". ",
        judged="Under review: ",
        thousands="",
        upper=False,
        wordings={
            "chip": ("bought at {who} for {amount}", "{amount} spent at {who}"),
            "online": ("{amount} charged by {who} over the internet", "internet purchase {who} {amount}"),
            "in": ("{who} paid in {amount} {note}", "credit of {amount} by {who} {note}"),
            "out": ("sent {amount} to {who} ending {account} {note}",),
            "deposit": ("banknotes of {amount} lodged at {who}", "{amount} in notes handed in, {who}"),
            "cash": ("{amount} taken out at {who}", "notes drawn {amount} {who}"),
            "login": ("access through {who}", "session opened, {who}"),
            "change": ("{who} by client",),
            "mail": ("{who} wrote: {note}",),
            "call": ("spoke to {who}", "rang {who}"),
        },
    ),
}

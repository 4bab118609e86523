"""Order notes: the domain that our own program writes.

A record of an order, then the note a clerk would write about it. Values are copied, totals are computed and the
wording follows the record, so a small model can master it, while names, numbers and phrasing keep it from looping.
"""

from __future__ import annotations

import random

FIRST = "Ada Bruno Carla Daniel Elena Felix Grace Hugo Ines Jonas Kira Leon Maria Nils Olga Pavel Rosa Samuel Tessa Viktor".split()
LAST = "Adler Berg Costa Dahl Evans Fischer Garcia Holm Ito Jansen Keller Lopez Moreau Novak Olsen Petrov Quinn Rossi Silva Weber".split()
CITIES = "Oslo Lisbon Prague Turin Ghent Bergen Malmo Porto Lyon Graz Krakow Dublin Seville Basel Tartu Split".split()
ITEMS = (
    "desk lamp, paper tray, wall clock, oak shelf, tea kettle, wool blanket, steel pan, glass jar, garden chair, "
    "bike pump, water bottle, leather belt, board game, door mat, hand mixer, reading chair"
).split(", ")
CARRIERS = {"express": "tomorrow", "standard": "in three days", "economy": "within a week"}
OPENINGS = (
    "{name} from {city} ordered {n} {items} at {price} each.",
    "We received an order for {n} {items} at {price} each from {name} in {city}.",
    "{n} {items} at {price} each go to {name} in {city}.",
)
TOTALS = (
    "The total is {n} x {price} = {total}.",
    "That makes {n} x {price} = {total} in all.",
    "The invoice says {n} x {price} = {total}.",
)
PAID = {
    "paid": ("The amount was paid in advance.", "Nothing is left to pay."),
    "invoice": ("{first} will pay the {total} after delivery.", "Please enclose an invoice over {total}."),
}
SHIPPING = (
    "The parcel leaves by {carrier} and should arrive in {city} {when}.",
    "It ships by {carrier}, so {first} can expect it {when}.",
)
GIFT = ("Wrap the {items} as a gift.", "It is a gift, so leave the prices out.")
CLOSINGS = ("Order {order} is ready.", "Please confirm order {order} to {first}.", "File this under order {order}.")


def order_note(rng: random.Random) -> tuple[str, str]:
    """One document as `(prompt, continuation)`; their concatenation is the text that models are trained on."""
    first, item = rng.choice(FIRST), rng.choice(ITEMS)
    n, price = rng.randint(2, 9), rng.randint(2, 40)
    carrier, payment, gift = rng.choice(list(CARRIERS)), rng.choice(list(PAID)), rng.random() < 0.4
    words = {
        "first": first,
        "name": f"{first} {rng.choice(LAST)}",
        "city": rng.choice(CITIES),
        "n": n,
        "items": item + "s",
        "price": price,
        "total": n * price,
        "carrier": carrier,
        "when": CARRIERS[carrier],
        "order": rng.randint(10_000, 99_999),
    }
    record = (
        f"order: {words['order']}\ncustomer: {words['name']}\ncity: {words['city']}\nitem: {item}\n"
        f"quantity: {n}\nprice: {price}\npayment: {payment}\nshipping: {carrier}\ngift: {'yes' if gift else 'no'}\nnote:"
    )
    middle = [rng.choice(PAID[payment]), rng.choice(SHIPPING)] + ([rng.choice(GIFT)] if gift else [])
    rng.shuffle(middle)
    sentences = [rng.choice(OPENINGS), rng.choice(TOTALS), *middle, rng.choice(CLOSINGS)]
    return record, " " + " ".join(sentences).format(**words)

"""Parties of secure aggregation and whole rounds among them, every message by way of JSON."""

import functools
import json

import torch

from deltaw.federated.secure import IdentityKey, SecureClient, SecureServer, SecureSettings, attempt_context, ring

STAGES = ("share", "upload", "agree", "unmask")


@functools.cache
def identity(name):
    return IdentityKey.make()


def names_of(count):
    return [f"bank-{number:02d}" for number in range(count)]


def wired(message):
    return json.loads(json.dumps(message, allow_nan=False))


def parties(count, *, context=None, **settings):
    """(server, clients by name) of one attempt."""
    settings = SecureSettings(**settings)
    peers = {name: identity(name).public for name in names_of(count)}
    clients = {name: SecureClient(name, identity(name), peers, settings=settings) for name in peers}
    return SecureServer(context or attempt_context("run", 0, 0), peers, settings=settings), clients


def share_keys(server, clients, *, absent=()):
    """Until the server has everybody's shares but those of the clients that are absent from then on."""
    for name, client in clients.items():
        server.add_advert(name, wired(client.advertise(server.context)))
    adverts = wired(server.adverts())
    for name, client in clients.items():
        if name not in absent:
            server.add_shares(name, wired(client.share(adverts)))


def upload(server, clients, vectors, *, phase=0, weights=None, absent=()):
    """Masked words by name, of all that take part and are not absent."""
    sent = {}
    if phase == 0:
        server.close_shares()
    for name in list(server.members):
        if name in absent:
            continue
        shares = wired(server.shares_for(name)) if phase == 0 else {}
        weight = 1 if weights is None else weights[name]
        sent[name] = clients[name].mask(shares, vectors[name], phase=phase, weight=weight)
        server.add_upload(name, sent[name].clone(), wired(clients[name].receipt(phase=phase)))
    return sent


def unmask(server, clients, *, phase=0, silent=(), mute=()):
    """The sum; silent ones do not agree, mute ones agree and send no shares. Gives the shares' messages back too."""
    here, gone = server.survivors()
    for name in here:
        if name not in silent:
            server.add_agreement(name, wired(clients[name].agree(here, gone, phase=phase)))
    agreements = wired(server.agreements())
    told = {name: wired(clients[name].unmask(agreements, phase=phase)) for name in agreements if name not in mute}
    for name, message in told.items():
        server.add_unmask(name, message)
    return server.result(), told


def plain_sum(server, vectors, names, weights=None):
    """What the ring gives without masks: decoded words of each, summed in float64 (exact: all are on one grid)."""
    settings, bits = server.settings, server.fraction_bits
    total = 0
    for name in names:
        weight = 1 if weights is None else weights[name]
        if settings.clip is None:
            words = vectors[name] * weight
        else:
            words = ring.encode(vectors[name], clip=settings.clip, fraction_bits=bits, weight=weight)
        total = total + ring.decode(words, fraction_bits=bits)
    return total


def random_vectors(names, length, *, generator, scale=1.0):
    return {name: (torch.rand(length, generator=generator) * 2 - 1) * scale for name in names}

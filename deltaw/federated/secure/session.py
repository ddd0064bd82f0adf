"""Secure aggregation by double masking: the protocol, its settings, and what a client and the server have in common.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS), the variant for
servers that lie: keys and the set of survivors are signed with identity keys that the clients exchanged beforehand.
Client u sends, in Z_{2^32} and for each phase p,

    y_u = x_u + PRG(b_u,p) + sum_{v > u} PRG(s_uv,p) - sum_{v < u} PRG(s_uv,p)

with the encoded vector x_u, a seed b_u,p of its own and the agreement s_uv,p of u's and v's X25519 keys for that phase.
Seeds and private keys are shared among the clients (Shamir, threshold t). Of a survivor of a phase they reveal the
seed, of one that dropped out the key, never both: the server can take every mask off the sum, and off no one vector.

One attempt of one round, all messages plain dicts for JSON, words a tensor:

    server                                              each client
                                                        advertise(context)                -> dict
    add_advert(name, dict);    adverts()                share(adverts)                    -> dict
    add_shares(name, dict);    shares_for(name)         mask(shares, x, phase=0, weight)  -> words; receipt(phase=0)
    add_upload(name, words, dict);  survivors, dropped  agree(survivors, dropped, phase=0) -> dict
    add_agreement(name, dict); agreements()             unmask(agreements, phase=0)       -> dict
    add_unmask(name, dict);    result() -> SecureSum

A second phase begins at `mask` (its shares are {}) with the survivors of the first. It has keys and seeds of its own,
made and shared in the same messages: were the mask key common, a client that survives the first phase (its seed is
revealed) and drops out of the second (its key is revealed) would have its first vector unmasked.

A client whose reply does not come in time is out of the phase; if fewer than the threshold are left the attempt ends
with a `SecureError`, and another one starts. Sums of one round over two sets of clients would show their difference, so
a client that has revealed shares in an attempt agrees in later ones of that round to the same survivors only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.federated.secure import ring, shamir
from deltaw.federated.secure.keys import PublicIdentity, check_name
from deltaw.federated.secure.statements import SecureError, canonical, check_signed, from_text, reading, to_text

#: What each kind of message says beside its kind, its sender, the attempt's context and the signature.
FIELDS = {
    "advertise": frozenset({"terms", "mask_keys", "share_key"}),
    "share": frozenset({"session", "sealed", "seeds"}),
    "upload": frozenset({"session", "phase", "sha256"}),
    "agree": frozenset({"session", "phase", "survivors", "dropped"}),
    "unmask": frozenset({"session", "phase", "seeds", "keys"}),
}


@dataclass(frozen=True, kw_only=True)
class SecureSettings:
    """What all parties of a federation agree on; a client refuses peers whose settings differ.

    Attributes:
        threshold: t, how many clients must be in a sum and how many must help to unmask it. None is more than two
            thirds of a round's clients (3 of 3, 3 of 4, 7 of 10): right even for a server that lies about who dropped
            out, with fewer than a third of the clients on its side. Lower ones, down to a majority (2 of 3), survive
            more dropouts and are right for a server that follows the protocol, with fewer than t clients on its side.
        minimum: the fewest clients that a round may have; with two, each learns the other's vector from the sum.
        phases: masked vectors in one round, 1 or 2.
        clip: the largest magnitude of a value, before the weight. None means that vectors are integers already.
        weight_bound: the largest weight, near the true ones: it costs precision. 1 where all weigh the same.
        max_norm: the largest Euclidean norm of a vector, None for any.

    Raises:
        InputError: a value outside its range.
    """

    threshold: int | None = None
    minimum: int = 3
    phases: int = 1
    clip: float | None = 8.0
    weight_bound: int = 1
    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and self.threshold < 2:
            raise InputError(
                f"threshold {self.threshold}: expected at least 2 clients in a sum, or none for two thirds"
            )
        if self.minimum < 2 or self.phases not in (1, 2):
            raise InputError(f"minimum {self.minimum}, phases {self.phases}: expected at least 2, and 1 or 2")
        if self.max_norm is not None and not self.max_norm > 0:
            raise InputError(f"max_norm {self.max_norm}: expected a positive number, or none")
        self.fraction_bits(self.minimum)

    def fraction_bits(self, clients: int) -> int:
        """Fraction bits of the words with that many clients; 0 for integer vectors. See `ring.fraction_bits`."""
        if self.clip is None:
            ring.fraction_bits(clients=clients, clip=1.0, weight_bound=self.weight_bound)
            return 0
        return ring.fraction_bits(clients=clients, clip=self.clip, weight_bound=self.weight_bound)

    def check_input(self, vector: Tensor, weight: int) -> None:
        """Raises `InputError` for a weight or a norm beyond what all agreed on, before anything is masked."""
        if isinstance(weight, bool) or not isinstance(weight, int) or not 1 <= weight <= self.weight_bound:
            raise InputError(f"weight {weight!r}: expected a whole number from 1 to {self.weight_bound}")
        if self.max_norm is not None:
            norm = float(torch.linalg.vector_norm(vector.double()))
            if not norm <= self.max_norm:
                raise InputError(f"the vector's norm is {norm:g}: expected at most {self.max_norm:g}")

    def least(self, clients: int) -> int:
        """The threshold among that many clients.

        Raises:
            SecureError: fewer clients than `minimum`, a threshold above their number, or one that is no majority (the
                halves could be asked for contradictory shares).
        """
        if clients < self.minimum:
            raise SecureError(f"{clients} clients in this round: expected at least {self.minimum}; wait for more")
        threshold = 2 * clients // 3 + 1 if self.threshold is None else self.threshold
        if not clients < 2 * threshold <= 2 * clients:
            raise SecureError(
                f"threshold {threshold} of {clients} clients: expected a majority, and at most all of them; "
                "change the threshold, or the number of clients in a round"
            )
        return threshold


@dataclass(frozen=True)
class SecureSum:
    """What the server learns.

    Attributes:
        total: (n,) float64, the sum of weight times vector over `clients`.
        weight: the sum of their weights.
        clients: whose vectors are in the sum.
    """

    total: Tensor
    weight: int
    clients: tuple[str, ...]


def attempt_context(run: str, round_: int, attempt: int) -> bytes:
    """Names one attempt of one round of a run, as every message of it carries it."""
    return canonical([run, round_, attempt])


def round_of(context: bytes) -> tuple[str, int]:
    """The run and the round of an attempt's context."""
    with reading("the attempt's context"):
        run, round_, attempt = json.loads(context)
        if not isinstance(run, str) or type(round_) is not int or attempt_context(run, round_, int(attempt)) != context:
            raise ValueError("expected a run, a round and an attempt")
        return run, round_


@dataclass(frozen=True)
class Transcript:
    """What every party of an attempt must see alike; its hash is the salt of every key."""

    session: bytes
    names: tuple[str, ...]
    mask_keys: Mapping[str, list[bytes]]
    share_keys: Mapping[str, bytes]
    threshold: int
    fraction_bits: int

    @property
    def text(self) -> str:
        """The hash as messages carry it."""
        return to_text(self.session)

    def number(self, name: str) -> int:
        """The number of a client's shares, from 1."""
        return self.names.index(name) + 1


class Party:
    """What client and server have in common: the participants, the settings, and checks of what was said."""

    def __init__(self, peers: Mapping[str, PublicIdentity], settings: SecureSettings) -> None:
        self.settings = settings
        self.peers = {check_name(name): peers[name] for name in sorted(peers)}
        if len(set(self.peers.values())) != len(self.peers):
            raise InputError("two participants have the same identity key: each organisation makes its own")
        roster = {name: identity.text for name, identity in self.peers.items()}
        self.terms = to_text(hashlib.sha256(canonical([roster, _plain(settings)])).digest())
        self.context = b""
        # By phase a share of the mask key and one of the seed, and the cipher's tag.
        self.sealed_bytes = 2 * shamir.SHARE_BYTES * settings.phases + 16

    def check(self, name: str, message: Any, *, kind: str, transcript: Transcript | None = None) -> None:
        """Refuses a message that is not that participant's, of this kind, this attempt and this view of it."""
        if name not in self.peers:
            raise SecureError(f"a {kind} message of {name!r} is refused: not among the participants")
        check_signed(message, self.peers[name], kind=kind, name=name, context=self.context, fields=FIELDS[kind])
        if transcript is not None and message["session"] != transcript.text:
            raise SecureError(
                f"{name} was shown other keys than this party in this attempt: the server contradicts itself"
            )

    def check_advert(self, name: str, message: Any) -> tuple[list[bytes], bytes]:
        """A client's public keys: for the masks by phase, and for the shares."""
        self.check(name, message, kind="advertise")
        if message["terms"] != self.terms:
            raise SecureError(f"{name} has other settings or another list of participants: compare them before the run")
        with reading(f"{name}'s advertise message"):
            mask_keys = [from_text(key, 32) for key in message["mask_keys"]]
            share_key = from_text(message["share_key"], 32)
        if len(mask_keys) != self.settings.phases:
            raise SecureError(f"{name} advertises {len(mask_keys)} mask keys, expected {self.settings.phases}")
        return mask_keys, share_key

    def transcript_of(self, adverts: Mapping[str, Any]) -> Transcript:
        """The attempt's transcript, once all advertised keys are found to be signed and the clients to be enough."""
        with reading("the list of advertised keys"):
            adverts = dict(adverts)
            names = tuple(sorted(adverts))
        threshold = self.settings.least(len(names))
        keys = {name: self.check_advert(name, adverts[name]) for name in names}
        said = {name: [[to_text(key) for key in masks], to_text(share)] for name, (masks, share) in keys.items()}
        return Transcript(
            hashlib.sha256(canonical([to_text(self.context), self.terms, said])).digest(),
            names,
            {name: masks for name, (masks, _) in keys.items()},
            {name: share for name, (_, share) in keys.items()},
            threshold,
            self.settings.fraction_bits(len(names)),
        )


def commitment(seed: bytes, *, transcript: Transcript, phase: int, name: str) -> str:
    """By which the server finds that shares gave back the seed that they were made of."""
    said = canonical(["seed", transcript.text, phase, name])
    return to_text(hashlib.sha256(said + seed).digest())


def _plain(settings: SecureSettings) -> dict[str, str]:
    """The settings for hashing; 8 and 8.0 are one number."""
    return {key: repr(None if value is None else float(value)) for key, value in asdict(settings).items()}

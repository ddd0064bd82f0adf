"""The client's side of secure aggregation; the protocol is in `session.py`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.federated.secure import ring, shamir
from deltaw.federated.secure.keys import IdentityKey, PublicIdentity
from deltaw.federated.secure.masks import Words, add_stream, agreed, derived_key, pair_key, pair_sign, self_key
from deltaw.federated.secure.session import FIELDS, Party, SecureSettings, Transcript, commitment, round_of
from deltaw.federated.secure.statements import SecureError, from_text, reading, signed, to_text


@dataclass
class _Attempt:
    """A client's secrets and what it has said in one attempt."""

    mask_keys: list[X25519PrivateKey]
    share_key: X25519PrivateKey
    seeds: list[bytes]
    advert: dict[str, Any]
    transcript: Transcript | None = None
    #: By phase, who takes part in it.
    members: dict[int, list[str]] = field(default_factory=dict)
    #: By owner, then by phase: the share of the mask key and the share of the seed.
    shares: dict[str, list[tuple[bytes, bytes]]] = field(default_factory=dict)
    receipts: dict[int, dict[str, Any]] = field(default_factory=dict)
    agreed: dict[int, dict[str, Any]] = field(default_factory=dict)
    unmasked: int = 0


class SecureClient(Party):
    """One organisation's side of the protocol that `session.py` tells; every step is refused out of its order.

    Args:
        name: the organisation's.
        identity: its private key.
        peers: all participants of the federation by name, its own among them or not.
        settings: what all agreed on.

    Raises:
        InputError: a name that is none, or participants that do not fit the key.
        SecureError: from each step, for what a peer or the server sent; the attempt is then over for this client.
    """

    def __init__(
        self, name: str, identity: IdentityKey, peers: Mapping[str, PublicIdentity], *, settings: SecureSettings
    ) -> None:
        if peers.get(name, identity.public) != identity.public:
            raise InputError(f"the list of participants has another key for {name} than this client's own")
        super().__init__({**peers, name: identity.public}, settings)
        self.name = name
        self._identity = identity
        self._attempt: _Attempt | None = None
        self._contexts: set[bytes] = set()
        self._round = ("", 0)
        #: By round and phase, over whom the sum is that this client has helped to unmask.
        self._revealed: dict[tuple[tuple[str, int], int], list[str]] = {}

    def advertise(self, context: bytes) -> dict[str, Any]:
        """Begins an attempt with fresh keys and forgets the one before.

        Args:
            context: of `attempt_context`; one that was used before is refused.
        """
        round_ = round_of(context)
        if context in self._contexts:
            raise SecureError(f"{self.name}: this attempt of this round was begun before; begin another attempt")
        self._contexts.add(context)
        self.context, self._round = context, round_
        phases = range(self.settings.phases)
        mask_keys, share_key = [X25519PrivateKey.generate() for _ in phases], X25519PrivateKey.generate()
        advert = self._sign(
            "advertise",
            terms=self.terms,
            mask_keys=[to_text(key.public_key().public_bytes_raw()) for key in mask_keys],
            share_key=to_text(share_key.public_key().public_bytes_raw()),
        )
        seeds = [os.urandom(shamir.SECRET_BYTES) for _ in phases]
        self._attempt = _Attempt(mask_keys, share_key, seeds, advert)
        return advert

    def share(self, adverts: Mapping[str, Any]) -> dict[str, Any]:
        """Shares of this client's keys and seeds, encrypted to each of those that advertised."""
        attempt = self._begun()
        if attempt.transcript is not None:
            raise SecureError(f"{self.name} has shared its keys in this attempt already")
        transcript = self.transcript_of(adverts)
        if self.name not in adverts or adverts[self.name] != attempt.advert:
            raise SecureError(f"the list of advertised keys lacks {self.name}'s own, or has others for it")
        count = len(transcript.names)
        parts = [
            (shamir.split(key.private_bytes_raw(), threshold=transcript.threshold, count=count),
             shamir.split(seed, threshold=transcript.threshold, count=count))
            for key, seed in zip(attempt.mask_keys, attempt.seeds, strict=True)
        ]  # fmt: skip
        sealed = {}
        for place, peer in enumerate(transcript.names):
            mine = [(keys[place], seeds[place]) for keys, seeds in parts]
            if peer == self.name:
                attempt.shares[peer] = mine
            else:
                box = self._box(transcript, attempt.share_key, self.name, peer)
                sealed[peer] = to_text(box.encrypt(bytes(12), b"".join(map(b"".join, mine)), None))
        attempt.transcript = transcript
        seeds = [
            commitment(seed, transcript=transcript, phase=phase, name=self.name)
            for phase, seed in enumerate(attempt.seeds)
        ]
        return self._sign("share", session=transcript.text, sealed=sealed, seeds=seeds)

    def mask(
        self,
        shares: Mapping[str, Any],
        vector: Tensor,
        *,
        phase: int = 0,
        weight: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The masked words of `vector` and `weight`; once for each phase, as two would show their difference.

        Args:
            shares: what the others encrypted to this client, by sender; {} after the first phase.
            vector: (n,) float, or of integers where the settings have no clip.
            phase: 0, or 1 after this client's `unmask` of phase 0.
            weight: within the settings' bound; the vector is multiplied by it.
            generator: for stochastic rounding; to the nearest without.

        Returns:
            (n + 1,) int32, the weight at the end.

        Raises:
            InputError: a vector or weight that is not finite or beyond its bounds.
        """
        attempt, transcript = self._shared()
        if phase != attempt.unmasked or phase >= self.settings.phases or phase in attempt.receipts:
            raise SecureError(f"{self.name} cannot mask a vector of phase {phase} now: out of order, or a second one")
        words = self._encode(vector, weight, transcript, generator)
        if phase == 0:
            attempt.members[0] = self._open(shares, attempt, transcript)
        add_stream(
            words, self_key(attempt.seeds[phase], session=transcript.session, phase=phase, name=self.name), sign=1
        )
        for peer in attempt.members[phase]:
            if peer != self.name:
                with reading(f"{peer}'s mask key"):
                    key = pair_key(
                        attempt.mask_keys[phase],
                        transcript.mask_keys[peer][phase],
                        session=transcript.session,
                        phase=phase,
                        names=(self.name, peer),
                    )
                add_stream(words, key, sign=pair_sign(self.name, peer))
        attempt.receipts[phase] = self._sign(
            "upload", session=transcript.text, phase=phase, sha256=hashlib.sha256(words.data).hexdigest()
        )
        return torch.from_numpy(words.view(np.int32))

    def receipt(self, *, phase: int = 0) -> dict[str, Any]:
        """The signed hash of `mask`'s words, to be sent with them."""
        attempt, _ = self._shared()
        if phase not in attempt.receipts:
            raise SecureError(f"{self.name} has masked no vector of phase {phase}")
        return attempt.receipts[phase]

    def agree(self, survivors: Sequence[str], dropped: Sequence[str], *, phase: int = 0) -> dict[str, Any]:
        """Signs the server's account of who is in the sum of a phase and who dropped out; once for each phase.

        Raises:
            SecureError: another account than the one signed before, fewer survivors than the threshold, this client not
                among them, or names that are not those of the phase.
        """
        attempt, transcript = self._shared()
        if phase not in attempt.receipts:
            raise SecureError(f"{self.name} masked nothing in phase {phase}: it agrees on no survivors of it")
        with reading("the list of survivors"):
            here, gone = sorted(survivors), sorted(dropped)
            complete = sorted([*here, *gone]) == attempt.members[phase]
        if not complete:
            raise SecureError(
                f"the survivors and the dropped of phase {phase} are not the clients that took part in it"
            )
        if self.name not in here:
            raise SecureError(f"{self.name} is said to have dropped out of phase {phase}; it reveals nothing")
        if len(here) < transcript.threshold:
            raise SecureError(f"{len(here)} survivors of phase {phase}: expected at least {transcript.threshold}")
        if self._revealed.get((self._round, phase), here) != here:
            raise SecureError(
                f"{self.name} has revealed shares for other survivors in another attempt of this round: "
                "the two sums would show their difference; go on to the next round"
            )
        said = self._sign("agree", session=transcript.text, phase=phase, survivors=here, dropped=gone)
        if attempt.agreed.setdefault(phase, said) != said:
            raise SecureError(f"{self.name} has signed other survivors of phase {phase} in this attempt")
        return said

    def unmask(self, agreements: Mapping[str, Any], *, phase: int = 0) -> dict[str, Any]:
        """Shares of the survivors' seeds and of the dropped clients' keys, once enough signed that set.

        Args:
            agreements: `agree`'s messages by name, at least the threshold of them.
            phase: whose masks to reveal.

        Raises:
            SecureError: too few signatures, a wrong one, or one under another set than this client signed.
        """
        attempt, transcript = self._shared()
        if phase not in attempt.agreed:
            raise SecureError(f"{self.name} has signed no survivors of phase {phase}: it reveals nothing")
        mine = attempt.agreed[phase]
        with reading("the list of agreements"):
            given = dict(agreements)
        for name, message in given.items():
            self.check(name, message, kind="agree", transcript=transcript)
            if name not in mine["survivors"] or any(message[key] != mine[key] for key in FIELDS["agree"]):
                raise SecureError(
                    f"{name} signed other survivors of phase {phase} than {self.name}: it reveals nothing"
                )
        if len(given) < transcript.threshold:
            raise SecureError(
                f"{len(given)} clients signed the survivors of phase {phase}: expected at least {transcript.threshold}"
            )
        self._revealed[self._round, phase] = list(mine["survivors"])
        if phase == attempt.unmasked:
            attempt.unmasked += 1
            attempt.members[phase + 1] = list(mine["survivors"])
        return self._sign(
            "unmask",
            session=transcript.text,
            phase=phase,
            seeds={name: to_text(attempt.shares[name][phase][1]) for name in mine["survivors"]},
            keys={name: to_text(attempt.shares[name][phase][0]) for name in mine["dropped"]},
        )

    def _sign(self, kind: str, **fields: Any) -> dict[str, Any]:
        return signed(self._identity, kind=kind, name=self.name, context=self.context, **fields)

    def _begun(self) -> _Attempt:
        if self._attempt is None:
            raise SecureError(f"{self.name} has begun no attempt: advertise comes first")
        return self._attempt

    def _shared(self) -> tuple[_Attempt, Transcript]:
        attempt = self._begun()
        if attempt.transcript is None:
            raise SecureError(f"{self.name} has not shared its keys in this attempt: share comes first")
        return attempt, attempt.transcript

    def _box(self, transcript: Transcript, key: X25519PrivateKey, sender: str, receiver: str) -> ChaCha20Poly1305:
        """Encrypts one message in one direction: its key is used once, so the nonce can be zero."""
        peer = receiver if sender == self.name else sender
        with reading(f"{peer}'s share key"):
            secret = agreed(key, transcript.share_keys[peer])
        return ChaCha20Poly1305(derived_key(secret, session=transcript.session, purpose=["shares", sender, receiver]))

    def _open(self, shares: Mapping[str, Any], attempt: _Attempt, transcript: Transcript) -> list[str]:
        """Decrypts the others' shares; gives back who takes part."""
        with reading("the list of shares"):
            senders = sorted(shares)
        if not set(senders) <= set(transcript.names) - {self.name}:
            raise SecureError(f"shares from {senders}: expected them from others that advertised keys")
        if len(senders) + 1 < transcript.threshold:
            raise SecureError(f"{len(senders) + 1} clients shared their keys: expected at least {transcript.threshold}")
        size = shamir.SHARE_BYTES
        for sender in senders:
            try:
                with reading(f"{sender}'s shares"):
                    box = self._box(transcript, attempt.share_key, sender, self.name)
                    plain = box.decrypt(bytes(12), from_text(shares[sender], self.sealed_bytes), None)
            except InvalidTag:
                raise SecureError(
                    f"{sender}'s shares for {self.name} are refused: changed on the way, or of another view"
                ) from None
            pieces = [plain[at : at + size] for at in range(0, len(plain), size)]
            attempt.shares[sender] = list(zip(pieces[::2], pieces[1::2], strict=True))
        return sorted([self.name, *senders])

    def _encode(self, vector: Tensor, weight: int, transcript: Transcript, generator: torch.Generator | None) -> Words:
        settings, clients = self.settings, len(transcript.names)
        settings.check_input(vector, weight)
        if settings.clip is None:
            encoded = ring.encode_integers(vector, clients=clients, weight=weight)
        else:
            bits = transcript.fraction_bits
            encoded = ring.encode(vector, clip=settings.clip, fraction_bits=bits, weight=weight, generator=generator)
        words = np.empty(len(encoded) + 1, dtype=np.uint32)
        words[:-1] = encoded.cpu().numpy().view(np.uint32)
        words[-1] = weight
        return words

"""The server's side of secure aggregation; the protocol is in `session.py`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor

from deltaw.federated.secure import ring, shamir
from deltaw.federated.secure.keys import PublicIdentity
from deltaw.federated.secure.masks import Words, add_stream, pair_key, pair_sign, self_key
from deltaw.federated.secure.session import Party, SecureSettings, SecureSum, Transcript, commitment, round_of
from deltaw.federated.secure.statements import SecureError, from_text, reading

_STAGES = ("advertise", "share", "upload", "agree", "unmask")


class SecureServer(Party):
    """Collects one attempt's messages and gives back the sum; holds no secret and keeps no single upload.

    An `add_` method refuses one message (forged, repeated, late, of another attempt) with a `SecureError` that names
    the reason, and the attempt goes on without it. The method that closes a stage raises one where too few are left:
    then the attempt is over.

    Args:
        context: of `attempt_context`; used once.
        peers: all participants of the federation by name.
        settings: what all agreed on.
    """

    def __init__(self, context: bytes, peers: Mapping[str, PublicIdentity], *, settings: SecureSettings) -> None:
        super().__init__(peers, settings)
        round_of(context)
        self.context = context
        self.phase = 0
        self._stage = "advertise"
        self._transcript: Transcript | None = None
        self._adverts: dict[str, Any] = {}
        self._shares: dict[str, Any] = {}
        #: Who may upload in the current phase.
        self.members: list[str] = []
        self._begin_phase()

    def _begin_phase(self) -> None:
        self._words: Words | None = None
        self._uploaded: list[str] = []
        self._agreed: dict[str, Any] = {}
        self._unmasked: dict[str, Any] = {}

    @property
    def threshold(self) -> int:
        """How many clients must go on at each stage, known once `adverts` was called."""
        return self._known().threshold

    @property
    def fraction_bits(self) -> int:
        """Of the words of this attempt, known once `adverts` was called."""
        return self._known().fraction_bits

    def add_advert(self, name: str, message: Any) -> None:
        """Takes a client's public keys."""
        self._expect("advertise", name, self._adverts)
        self.check_advert(name, message)
        self._adverts[name] = message

    def adverts(self) -> dict[str, Any]:
        """All public keys, to be sent to each client that sent one; closes the stage."""
        if self._stage == "advertise":
            self._transcript = self.transcript_of(self._adverts)
            self._stage = "share"
        return dict(self._adverts)

    def add_shares(self, name: str, message: Any) -> None:
        """Takes a client's encrypted shares."""
        self._expect("share", name, self._shares, self._adverts)
        transcript = self._known()
        self.check(name, message, kind="share", transcript=transcript)
        with reading(f"{name}'s share message"):
            complete = set(message["sealed"]) == set(transcript.names) - {name}
            seeds = [from_text(seed, 32) for seed in message["seeds"]]
            for sealed in message["sealed"].values():
                from_text(sealed, self.sealed_bytes)
        if not complete or len(seeds) != self.settings.phases:
            raise SecureError(f"{name}'s share message is refused: it has not one share for each of the others")
        self._shares[name] = message

    def close_shares(self) -> list[str]:
        """Who shared its keys, and so takes part in the first phase; closes the stage."""
        if self._stage == "share":
            self._require(self._shares, "shared their keys")
            self.members = sorted(self._shares)
            self._stage = "upload"
        return sorted(self._shares)

    def shares_for(self, name: str) -> dict[str, str]:
        """What the others encrypted to one client, by sender; closes the stage."""
        self.close_shares()
        if name not in self._shares:
            raise SecureError(f"{name} shared no keys in this attempt: it takes no further part in it")
        return {sender: said["sealed"][name] for sender, said in self._shares.items() if sender != name}

    def add_upload(self, name: str, words: Tensor, receipt: Any) -> None:
        """Adds a client's masked words (n + 1,) int32 to the phase's sum."""
        self._expect("upload", name, self._uploaded, self.members)
        self.check(name, receipt, kind="upload", transcript=self._known())
        if receipt["phase"] != self.phase:
            raise SecureError(f"{name}'s upload is refused: of phase {receipt['phase']!r}, expected {self.phase}")
        if not isinstance(words, Tensor) or words.dtype != torch.int32 or words.dim() != 1 or words.numel() < 2:
            raise SecureError(f"{name}'s upload is refused: expected a vector of int32 words")
        masked = words.cpu().contiguous().numpy().view(np.uint32)
        if hashlib.sha256(masked.data).hexdigest() != receipt["sha256"]:
            raise SecureError(f"{name}'s upload is refused: its words are not those that it signed")
        if self._words is None:
            self._words = np.zeros_like(masked)
        if len(masked) != len(self._words):
            raise SecureError(f"{name}'s upload is refused: {len(masked)} words, others sent {len(self._words)}")
        self._words += masked
        self._uploaded.append(name)

    def survivors(self) -> tuple[list[str], list[str]]:
        """Who is in the phase's sum and who dropped out of it, to be sent to the former; closes the stage."""
        if self._stage == "upload":
            self._require(self._uploaded, f"sent a vector in phase {self.phase}")
            self._stage = "agree"
        here = sorted(self._uploaded)
        return here, [name for name in self.members if name not in here]

    def add_agreement(self, name: str, message: Any) -> None:
        """Takes a client's signature under the survivors."""
        self._expect("agree", name, self._agreed, self._uploaded)
        self.check(name, message, kind="agree", transcript=self._known())
        here, gone = self.survivors()
        if message["phase"] != self.phase or message["survivors"] != here or message["dropped"] != gone:
            raise SecureError(f"{name}'s agreement is refused: it signed other survivors")
        self._agreed[name] = message

    def agreements(self) -> dict[str, Any]:
        """All signatures, to be sent to those who signed; closes the stage."""
        if self._stage == "agree":
            self._require(self._agreed, "signed the survivors")
            self._stage = "unmask"
        return dict(self._agreed)

    def add_unmask(self, name: str, message: Any) -> None:
        """Takes a client's shares of the survivors' seeds and of the dropped clients' keys."""
        self._expect("unmask", name, self._unmasked, self._agreed)
        self.check(name, message, kind="unmask", transcript=self._known())
        here, gone = self.survivors()
        with reading(f"{name}'s unmask message"):
            complete = message["phase"] == self.phase and sorted(message["seeds"]) == here
            complete = complete and sorted(message["keys"]) == gone
            parsed = {
                kind: {owner: from_text(share, shamir.SHARE_BYTES) for owner, share in message[kind].items()}
                for kind in ("seeds", "keys")
            }
        if not complete:
            raise SecureError(f"{name}'s unmask message is refused: its shares are not those of phase {self.phase}")
        self._unmasked[name] = parsed

    def result(self) -> SecureSum:
        """The phase's sum, unmasked; the next phase, if there is one, begins with its survivors.

        Raises:
            SecureError: too few clients helped, or one of them, or of those whose secrets they hold, sent wrong shares.
        """
        if self._stage != "unmask" or self._words is None:
            raise SecureError("there is no sum yet: uploads, agreements and shares come first")
        self._require(self._unmasked, "sent shares")
        words = self._words.copy()
        for key, sign in self._masks():
            add_stream(words, key, sign=-sign)
        here, _ = self.survivors()
        weight = int(words[-1])
        if not len(here) <= weight <= len(here) * self.settings.weight_bound:
            raise SecureError(f"the sum of the weights is {weight}: a client added something else than it declared")
        bits = self._known().fraction_bits
        total = ring.decode(torch.from_numpy(words[:-1].view(np.int32)), fraction_bits=bits)
        self.phase += 1
        self.members = here
        self._stage = "upload" if self.phase < self.settings.phases else "done"
        self._begin_phase()
        return SecureSum(total, weight, tuple(here))

    def _masks(self) -> Iterator[tuple[bytes, int]]:
        """Keys and signs of all streams that are left in the sum."""
        transcript, phase = self._known(), self.phase
        here, gone = self.survivors()
        for name in here:
            made = functools.partial(commitment, transcript=transcript, phase=phase, name=name)
            seed = self._recover("seeds", name, made=made, promised=self._shares[name]["seeds"][phase])
            yield self_key(seed, session=transcript.session, phase=phase, name=name), 1
        for name in gone:
            raw = self._recover("keys", name, made=_public_of, promised=transcript.mask_keys[name][phase])
            private = X25519PrivateKey.from_private_bytes(raw)
            for peer in here:
                with reading(f"{peer}'s mask key"):
                    key = pair_key(
                        private,
                        transcript.mask_keys[peer][phase],
                        session=transcript.session,
                        phase=phase,
                        names=(name, peer),
                    )
                yield key, pair_sign(peer, name)

    def _recover(self, kind: str, owner: str, *, made: Callable[[bytes], object], promised: object) -> bytes:
        """A secret from the shares of any threshold of clients; others are tried where it is not what was promised."""
        transcript = self._known()
        shares = {transcript.number(name): said[kind][owner] for name, said in self._unmasked.items()}
        points = sorted(shares)
        for start in range(len(points)):
            chosen = [*points[start:], *points[:start]][: transcript.threshold]
            try:
                secret = shamir.recover({x: shares[x] for x in chosen}, threshold=transcript.threshold)
            except ValueError:
                continue
            if made(secret) == promised:
                return secret
        raise SecureError(f"{owner}'s masks cannot be taken off: it, or some who hold its shares, sent wrong ones")

    def _known(self) -> Transcript:
        if self._transcript is None:
            raise SecureError("the clients' keys are not complete yet: adverts comes first")
        return self._transcript

    def _expect(self, stage: str, name: str, had: Any, members: Any = None) -> None:
        if self._stage != stage:
            late = self._stage not in _STAGES or _STAGES.index(self._stage) > _STAGES.index(stage)
            raise SecureError(f"{name}'s {stage} message is refused: it came too {'late' if late else 'early'}")
        if members is not None and name not in members:
            raise SecureError(f"{name}'s {stage} message is refused: it dropped out before, or never took part")
        if name in had:
            raise SecureError(f"{name}'s {stage} message is refused: it sent one before")

    def _require(self, names: Any, what: str) -> None:
        threshold = self._known().threshold
        if len(names) < threshold:
            raise SecureError(f"{len(names)} clients {what}: expected at least {threshold}; begin another attempt")


def _public_of(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()

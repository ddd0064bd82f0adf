"""Flower as the network of a real deployment: TLS, node identities, processes; the protocol stays deltaw's own.

flwr 1.41 serves every one of its APIs on one port, and its open edition authenticates nodes only: whoever reaches the
port could register a node, start a run (code, for every node) or take the server's task. `guard` closes that.
"""

from __future__ import annotations

import importlib.metadata

from deltaw.core.errors import InputError, MissingExtraError

#: The one minor version whose inside `guard` knows.
FLWR = "1.41"


def require_flower() -> None:
    """Raises unless the tested version of flwr is installed.

    Raises:
        MissingExtraError: flwr is not installed.
        InputError: another version is.
    """
    try:
        found = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError(
            "a federation over a network needs flwr, which is not installed: pip install 'deltaw[federated]'"
        ) from None
    if found.split(".")[:2] != FLWR.split("."):
        raise InputError(f"flwr {found} is installed: expected {FLWR}.*; pip install 'flwr=={FLWR}.*'")

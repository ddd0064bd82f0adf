"""Differential privacy: clipping by example, noise, accounting and the ledger. Imports no optimizer."""

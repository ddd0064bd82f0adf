"""Several organisations, one adapter: the protocol's messages, rules, transports, and secure aggregation."""

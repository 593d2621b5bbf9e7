"""``lorabatch eval``: base and adapters on the same items, as differences with intervals."""

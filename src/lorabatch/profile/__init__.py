"""``lorabatch profile``: where the time of a short run goes."""

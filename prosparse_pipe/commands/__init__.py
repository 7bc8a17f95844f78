"""One module per command; each exposes `command`, parses its options and makes one call."""

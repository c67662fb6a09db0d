"""What both sides know: the contract's bytes as numpy arrays, the formats of metrics that both
send, and how both read configuration files."""

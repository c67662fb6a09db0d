"""The `tcp_metrics` collector: TCP connections, what they carry and how they end."""

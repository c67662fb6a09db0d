"""Access: who a caller is, what it may do, and the audit of what was decided. Knows no gRPC."""

"""The collectors: which programs each one runs, its options, and how records become events.

They know nothing of gRPC, subscribers or leases.
"""

"""Coral's eBPF agent, its client and its command line."""

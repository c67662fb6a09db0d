"""Loads eBPF objects into the kernel, with libbpf or with bcc."""

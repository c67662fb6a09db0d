"""Hooks that libbpf alone does not manage for us: perf events on every CPU, functions in user
space, mappings of code.

Everything here takes descriptors of loaded programs, is synchronous, and detaches when closed.
"""

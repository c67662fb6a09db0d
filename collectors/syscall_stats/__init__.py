"""The `syscall_stats` collector: system calls by process and name."""

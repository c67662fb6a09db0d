"""What a person sees of `syscall_stats`."""

"""The kind `cpu_profile`: where the CPU time of processes goes, by stack."""

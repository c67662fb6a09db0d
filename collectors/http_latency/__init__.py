"""HTTP requests of processes."""

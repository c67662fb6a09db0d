"""`coral doctor`."""

"""`coral tap`."""

"""`coral demo`."""

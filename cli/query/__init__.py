"""`coral query`."""

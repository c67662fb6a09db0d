"""What both sides know of the contract beyond the generated stubs: its bytes as numpy arrays."""

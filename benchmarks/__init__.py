"""What it costs, measured side by side with peers."""

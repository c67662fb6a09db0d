"""What a person sees of `tcp_metrics`."""

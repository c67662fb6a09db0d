"""What the colony's rollups say, for the metrics that a house already has: by OTLP, and by
Prometheus' remote write. Both are off by default."""

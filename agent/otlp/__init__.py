"""Metrics and spans for an OpenTelemetry collector, by OTLP over gRPC."""

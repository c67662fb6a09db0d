"""The agent: supervisor, streams, and their gRPC and Prometheus faces."""

from agent.config import Config
from agent.supervisor import Session, StartRequest, Supervisor

__all__ = ["Config", "Session", "StartRequest", "Supervisor"]

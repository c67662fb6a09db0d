"""The agent: supervisor, streams, and their gRPC and Prometheus faces."""

from agent.config import Config
from agent.session import Session, StartRequest
from agent.supervisor import Supervisor

__all__ = ["Config", "Session", "StartRequest", "Supervisor"]

"""The agent: supervisor, streams, and their gRPC and Prometheus faces."""

from coral.agent.config import Config
from coral.agent.sessions.session import Session, StartRequest
from coral.agent.sessions.supervisor import Supervisor

__all__ = ["Config", "Session", "StartRequest", "Supervisor"]

"""The agent: sessions and their streams, served over gRPC and to Prometheus."""

from coral.agent.config import Config
from coral.agent.sessions.session import Session, StartRequest
from coral.agent.sessions.supervisor import Supervisor

__all__ = ["Config", "Session", "StartRequest", "Supervisor"]

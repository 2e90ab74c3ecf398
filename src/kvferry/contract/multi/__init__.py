"""MultiConnector: several connectors as one."""

from kvferry.contract.multi.connector import MultiConnector, MultiPromMetrics
from kvferry.contract.multi.scheduler import ResetOutcome

__all__ = ["MultiConnector", "MultiPromMetrics", "ResetOutcome"]

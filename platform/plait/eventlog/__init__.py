"""The server's event log, and its rolling into the event tables."""

from plait.eventlog.rolling import (
    EXPOSURES,
    FEEDBACK,
    IMPRESSIONS,
    LATER_COLUMNS,
    RollReport,
    log_folder,
    roll,
    unrolled,
)
from plait.eventlog.segments import EventLog, read_segment

__all__ = [
    "EXPOSURES",
    "FEEDBACK",
    "IMPRESSIONS",
    "LATER_COLUMNS",
    "EventLog",
    "RollReport",
    "log_folder",
    "read_segment",
    "roll",
    "unrolled",
]

"""Features computed at request time. Pure, vectorised functions: a frame of inputs in, a frame of outputs out.

Training and serving run these very functions; a change in this file changes the registered views (`feast apply`).
"""

import pandas as pd

SECONDS_PER_DAY = 86_400
_THURSDAY = 3  # 1970-01-01, with Monday = 0


def request_context(inputs: pd.DataFrame) -> pd.DataFrame:
    """Hour (0-23) and weekday (0 = Monday) of the request, UTC, and days since the user's last event (NaN if none)."""
    now = inputs["request_timestamp"].astype("int64")
    last = pd.to_numeric(inputs["user_last_event_at"]).astype("float64")
    return pd.DataFrame(
        {
            "hour": now % SECONDS_PER_DAY // 3600,
            "weekday": (now // SECONDS_PER_DAY + _THURSDAY) % 7,
            "days_since_last_event": (now - last) / SECONDS_PER_DAY,
        },
        index=inputs.index,
    )

"""Check that a logger's server responds, before a run starts."""

from __future__ import annotations

import urllib.error
import urllib.request

SECONDS_TO_REACH = 10.0


def why_unreachable(server: str) -> str:
    """Return why a server does not respond; empty if it responds with anything."""
    try:
        urllib.request.urlopen(server, timeout=SECONDS_TO_REACH).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""

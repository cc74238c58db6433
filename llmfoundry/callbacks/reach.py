"""Whether a logger's server answers, asked before a run begins."""

from __future__ import annotations

import urllib.error
import urllib.request

SECONDS_TO_REACH = 10.0


def why_unreachable(server: str) -> str:
    """Why a server does not answer; empty if it does, whatever it says."""
    try:
        urllib.request.urlopen(server, timeout=SECONDS_TO_REACH).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""

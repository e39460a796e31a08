"""Whether this container is healthy: exit code 0, or 1 with one sentence.

One image does three things. Where the container's first process is `ray start --block`, the node's agent must answer
and find its raylet, and on the head the control store, alive. Where it is `equigram serve`, the service must answer; it
is healthy without its cluster, too, which it says by itself. Anything else is one command, `equigram run` for one: it
is healthy for as long as it runs, since it ends by itself, with an exit code, when something is wrong.
"""

import http.client
import re
import sys
from pathlib import Path

AGENT_PORT = 52365
"""Where the agent of a Ray node listens, unless told otherwise."""

SERVICE_PORT = 8786
"""Where the service listens, unless its command line says otherwise."""

SECONDS = 5.0


def trouble(command_line: Path = Path("/proc/1/cmdline"), agent_port: int = AGENT_PORT) -> str | None:
    """What is wrong, in one sentence."""
    words = f" {command_line.read_text(errors='replace')} ".replace("/", " ").replace("\0", " ")
    if " ray start " in words:
        return _answer("the Ray node", agent_port, "/api/healthz")
    if " equigram serve " in words:
        port = re.search(r" --port[ =](\d+) ", words)
        return _answer("the service", int(port[1]) if port else SERVICE_PORT, "/healthz")
    return None


def _answer(who: str, port: int, path: str) -> str | None:
    """What is wrong with whoever should answer at a port of this container."""
    asked = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        asked.request("GET", path)
        answer = asked.getresponse()
        said = answer.read().decode(errors="replace").replace("\n", ", ")
    except (OSError, http.client.HTTPException) as error:
        return f"{who} does not answer: {error}"
    finally:
        asked.close()
    return None if answer.status == 200 else f"{who} is not well: {said}"


if __name__ == "__main__":
    sys.exit(trouble())

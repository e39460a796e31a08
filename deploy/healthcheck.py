"""Whether this container is healthy: exit code 0, or 1 with one sentence.

One image does two things. Where the container's first process is `ray start --block`, the node's agent must answer and
find its raylet, and on the head the control store, alive. Anything else is one command, `equigram run` for one: it is
healthy for as long as it runs, since it ends by itself, with an exit code, when something is wrong.
"""

import http.client
import sys
from pathlib import Path

PORT = 52365
"""Where the agent of a Ray node listens, unless told otherwise."""

SECONDS = 5.0


def trouble(command_line: Path = Path("/proc/1/cmdline"), port: int = PORT) -> str | None:
    """What is wrong, in one sentence."""
    if b" ray start " not in b" " + command_line.read_bytes().replace(b"/", b" ").replace(b"\0", b" "):
        return None
    agent = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        agent.request("GET", "/api/healthz")
        answer = agent.getresponse()
        said = answer.read().decode(errors="replace").replace("\n", ", ")
    except (OSError, http.client.HTTPException) as error:
        return f"the Ray node does not answer: {error}"
    finally:
        agent.close()
    return None if answer.status == 200 else f"the Ray node is not well: {said}"


if __name__ == "__main__":
    sys.exit(trouble())

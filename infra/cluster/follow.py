"""A job's log from its beginning to its end, over connections that may be lost."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from infra.cluster.jobs import exit_code, job_info
from infra.errors import ClusterError

RECONNECT_SECONDS = 1800


def follow(client: Any, job: str, on_log: Callable[[str], None]) -> int:
    """Hand a job's log to `on_log` from its beginning until it ends; returns its exit code.

    Reconnects after a lost connection and resumes the log where it broke off. 143 for a job that was stopped.
    Raises ClusterError for an unknown job, or after half an hour without a connection (the job still runs).
    """
    seen, lost_since = 0, None

    def deliver(text: str) -> None:
        nonlocal seen, lost_since
        lost_since = None  # an empty text reports an open connection
        seen += len(text)
        on_log(text)

    while True:
        try:
            info = job_info(client, job)
            if info.status.is_terminal():
                rest = client.get_job_logs(job)[seen:]
                if rest:
                    deliver(rest)
                elif not seen:  # the job never ran
                    on_log(f"{info.message}\n")
                return exit_code(client, info)
            asyncio.run(_tail(client, job, seen, deliver))
        except (OSError, RuntimeError) as error:
            if lost_since is None:
                lost_since = time.monotonic()
                on_log(f"\nnote: the connection is lost ({type(error).__name__}); the job still runs, reconnecting\n")
            elif time.monotonic() - lost_since > RECONNECT_SECONDS:
                raise ClusterError(
                    f"the job server has not answered for {RECONNECT_SECONDS // 60} minutes; job {job} may still run",
                    where=client.get_address(),
                    todo=f"ccsr jobs logs {job}",
                ) from error
        time.sleep(1)


async def _tail(client: Any, job: str, skip: int, deliver: Callable[[str], None]) -> None:
    """The log as it grows, without its first `skip` characters. Ray sends it from the beginning each time.

    Ray's own `tail_job_logs` has no heartbeat: a connection that died silently (a sleeping laptop) would never end.
    """
    import aiohttp

    url = f"{client.get_address()}/api/jobs/{job}/logs/tail"
    options: dict[str, Any] = {
        "headers": client._headers,
        "ssl": client._ssl_context,
        "heartbeat": 20,
        "max_msg_size": 0,
    }
    try:
        async with (
            aiohttp.ClientSession(cookies=client._cookies) as session,
            session.ws_connect(url, **{name: value for name, value in options.items() if value is not None}) as socket,
        ):
            deliver("")
            async for message in socket:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                fresh = message.data[skip:]
                skip = max(0, skip - len(message.data))
                if fresh:
                    deliver(fresh)
    except aiohttp.ClientError as error:
        raise ConnectionError(str(error)) from error

"""`python -m infra.cluster.leave`: what a pod does before it ends. A driver here saves and ends, then Ray drains the
node, which is a preemption notice to training ranks on it. Kubernetes' own SIGTERM reaches the container's shell alone.
"""

import os

import psutil

DRIVER, NODE = ("pipelines.cli.main", "/ccsr"), "/ray"


def leave() -> None:
    """SIGTERM to the `ccsr` drivers of this pod, then to its `ray start`; returns when they have ended. The pod's own
    grace period limits the wait."""
    for is_meant in (is_driver, is_node):
        found = [process for process in psutil.process_iter(["cmdline"]) if is_meant(process.info["cmdline"] or [])]
        for process in found:
            try:
                process.terminate()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(found)


def is_driver(words: list[str]) -> bool:
    return _is_python(words) and any(word.endswith(DRIVER) for word in words[1:3])


def is_node(words: list[str]) -> bool:
    return _is_python(words) and len(words) > 2 and words[1].endswith(NODE) and words[2] == "start"


def _is_python(words: list[str]) -> bool:
    return bool(words) and os.path.basename(words[0]).startswith("python")


if __name__ == "__main__":
    leave()

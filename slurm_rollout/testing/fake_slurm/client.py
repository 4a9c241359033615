"""Every fake command but srun: it carries its arguments to the controller and prints the answer."""

from __future__ import annotations

import os
import sys
from typing import Any

from slurm_rollout.testing.fake_slurm import wire


def ask(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the controller's answer."""
    try:
        connection = wire.connect(folder)
    except OSError as e:
        return {"code": 1, "err": f"fake_slurm: its controller has ended ({e.strerror})\n"}
    with connection:
        connection.sendall(wire.line(request))
        lines = wire.Lines(connection)
        while (messages := lines.read()) is not None:
            if messages:
                return messages[0]
    return {"code": 1, "err": "fake_slurm: its controller ended meanwhile\n"}


def main(program: str, folder: str) -> int:
    """Run one command; return its exit code."""
    request: dict[str, Any] = {"program": program, "argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}
    request["umask"] = os.umask(0)
    os.umask(request["umask"])
    answer = ask(folder, request)
    if answer.get("script"):  # sbatch: the options before it were fine
        path = answer["script"]
        try:
            if path == "-":
                request["script"] = sys.stdin.read()
            else:
                with open(path, encoding="utf-8", errors="surrogateescape") as f:
                    request["script"] = f.read()
        except OSError:
            answer = {"code": 1, "err": f"sbatch: error: Unable to open file {path}\n"}
        else:
            answer = ask(folder, request)
    sys.stderr.write(answer.get("err", ""))
    sys.stdout.write(answer.get("out", ""))
    return int(answer["code"])

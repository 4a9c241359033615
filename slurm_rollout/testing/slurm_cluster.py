"""A real Slurm cluster on one machine, for rehearsals and tests: real slurmctld, slurmd, munge, fake GPUs.

    with SlurmCluster(nodes=4, gpus=8) as cluster:
        job = cluster.sbatch("#!/bin/bash\\nsrun hostname\\n", "-N4", "--exclusive", "--gres=gpu:8")

or, by hand, as root: ``python -m slurm_rollout.testing.slurm_cluster --nodes 4``.

Every node, and the controller ``ctl``, is a set of Linux namespaces of its own (network, processes, mounts, host name)
with a first process that ends when the owner of the cluster ends, however it ends; the kernel then ends everything in
it. The machine itself is not touched: no user, no bridge, no line in /etc/hosts, no mount. All that is left of a
cluster whose owner was killed is a directory, which the next start removes.

Nodes see one shared file system, that of the machine; private are /tmp, /dev/shm and /proc. A process has therefore a
pid on its node and another one outside; ``user_pids`` gives the latter, which is what ``os.kill`` of the owner takes.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import slurm_rollout

# Owned by root, so that nobody else can put there what root would run; a name of a few letters, because socket paths
# end at 107 bytes; not /run, which is mounted noexec and nodev on many machines.
BASE = Path("/var/lib/slurm-rollout-cluster")
# The user id of a cluster's user is also its claim: clusters that live side by side have different ones.
UIDS = range(59000, 59100)
USER = "rollout"
CONTROLLER = "ctl"
CONTROLLER_PORT = 6817
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "ip", "mount", "nsenter", "setpriv", "unshare")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UNSHARE = ("unshare", "--net", "--pid", "--mount", "--uts", "--fork")

# The first process of a node. $1: directory of files for /etc, $2: host name. It prints its pid as the machine sees it
# (the new /proc would say 1), then waits for the end of its standard input, reaping orphans as a first process must.
FIRST_PROCESS = """
set -eu
read -r pid rest </proc/self/stat
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
for path in "$1"/*; do
    [ ! -e "/etc/${path##*/}" ] || mount --bind "$path" "/etc/${path##*/}"
done
hostname "$2"
ip link set lo up
exec 3<&0
cat <&3 >/dev/null &
echo "$pid"
wait
"""


class SlurmClusterError(RuntimeError):
    """The cluster, or a command in it, did not do what was asked; the message has the log's or the command's last lines."""


def why_unavailable() -> str | None:
    """One line that says why no cluster can run on this machine; None when it can."""
    if sys.platform != "linux":
        return f"real Slurm needs Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return "real Slurm needs root (for namespaces and for slurmd)"
    if missing := [program for program in PROGRAMS if shutil.which(program, path=SYSTEM_PATH) is None]:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge iproute2)"
    trial = "mount -t proc proc /proc; ip link add b0 type bridge; ip link add v0 type veth peer name v1"
    done = subprocess.run([*UNSHARE, "sh", "-euc", trial], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"no namespaces here: {done.stderr.strip() or f'unshare ended with {done.returncode}'}".replace("\n", "; ")
    return None


def wait_until[T](look: Callable[[], T], what: str, timeout_s: float, period_s: float = 0.05) -> T:
    """Call ``look`` until it gives something true, and return that; TimeoutError names ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_s:g} s still not: {what}")
        time.sleep(period_s)
    return seen

"""What goes wrong with trainers and what they say. `faults.py` has what goes wrong with all else."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from slurm_rollout.simulation import faults
from slurm_rollout.simulation.faults import Fault, Kind
from slurm_rollout.simulation.trainer import Client

if TYPE_CHECKING:
    from slurm_rollout.simulation.fleet import Fleet

TRAINER_KINDS: dict[str, Kind] = {}

kind = partial(faults.kind, among=TRAINER_KINDS)


def client_of(fleet: Fleet, fault: Fault) -> Client | None:
    return fleet.clients[int(fault.where * len(fleet.clients))] if fleet.clients else None


@kind(4, 1, 300)
def client_is_killed(fleet: Fleet, fault: Fault) -> None:
    """In whatever it does: it trains, holds, waits or pushes. The next one starts later."""
    if (client := client_of(fleet, fault)) is not None and client.alive:
        client.kill()
        fleet.start_client(client, fault.for_s)


@kind(3, 5, 4000)
def client_is_stopped(fleet: Fleet, fault: Fault) -> None:
    """It says and does nothing: what it holds, waits for, or has put to sleep stays so."""
    if (client := client_of(fleet, fault)) is not None and client.program is not None:
        client.program.stop(fault.for_s)


@kind(3, 60, 900)
def client_is_slow(fleet: Fleet, fault: Fault) -> None:
    if (client := client_of(fleet, fault)) is not None:
        client.slow_until = fleet.time.now + fault.for_s


@kind(3)
def client_forgets_to_release(fleet: Fleet, fault: Fault) -> None:
    if (client := client_of(fleet, fault)) is not None:
        client.forgets_to_release = True


@kind(3)
def trainer_goes_back(fleet: Fleet, fault: Fault) -> None:
    """To older weights."""
    if (client := client_of(fleet, fault)) is not None:
        client.goes_back = True


@kind(4)
def push_fails(fleet: Fleet, fault: Fault) -> None:
    """Half of the weights arrive; the engine goes on."""
    if (client := client_of(fleet, fault)) is not None:
        client.push_fails = True


@kind(5)
def ack_comes_again(fleet: Fleet, fault: Fault) -> None:
    """Of an older version, or of incarnations that are gone by now."""
    if (client := client_of(fleet, fault)) is not None and client.alive:
        client.repeat_an_ack(fault.which)


@kind(3, 30, 900)
def words_are_seen_late(fleet: Fleet, fault: Fault) -> None:
    """The coordinator's view of what clients write."""
    fleet.files.clients.delay_s = 1.0 + 59.0 * fault.which
    fleet.time.after(fault.for_s, fleet.see_words_soon)


@kind(2, 10, 300)
def words_are_seen_half(fleet: Fleet, fault: Fault) -> None:
    fleet.files.clients.half_until = fleet.time.now + fault.for_s


KINDS: dict[str, Kind] = faults.KINDS | TRAINER_KINDS
"""All that can go wrong."""

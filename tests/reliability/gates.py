"""All gates, in the order of the report: what each promises, how long it is, and the fault that it has to find."""

import collections
import contextlib
import io
import os
from collections.abc import Sequence
from typing import Any

from tests.model.formats import test_second_readers
from tests.reliability import alerts, counters, machine, mutated_requests, networks, overload
from tests.reliability.gate import Figures, Gate, Work
from tests.search.__main__ import main as search_costly_pictures
from tests.support.faulty_service import put_in
from tests.support.replicas import HAPROXY
from tests.support.serving import FAULT, server_process
from tests.system import (
    test_attacks,
    test_cross_talk,
    test_fuzz,
    test_reload_under_load,
    test_rolling_restart,
    test_soak,
)
from tests.system.test_conservation import ANYTHING, storm

MIB = 2**20
ATTACKS = len(test_attacks.ATTACKS)
FORMATS = len(test_fuzz.seeds())


def conservation(work: Work) -> Figures:
    counts = storm(work.folder, work.count, work.first)
    left = counts.pop(ANYTHING, 0)
    return {"requests": sum(counts.values()) + left, "left_after_their_last_byte": left} | counts


def rolls(work: Work) -> Figures:
    statuses, outcomes = test_rolling_restart.replace_both(work.folder, 5, work.count)
    assert set(statuses) == {200}, collections.Counter(statuses)
    assert outcomes == {"ok": len(statuses)}, outcomes
    return {"requests": len(statuses), "replicas_replaced": 2 * work.count}


def reloads(work: Work) -> Figures:
    answered = test_reload_under_load.swap_under_load(work.folder, work.count, "signal", behind_proxy=True)
    return {"requests": len(answered), "replicas_reloaded": 2 * work.count, "bad_files_refused": 2 * (work.count // 5)}


def cross_talk(work: Work) -> Figures:
    return test_cross_talk.cross_talk(work.folder, work.count, work.first)


def memory(work: Work) -> Figures:
    """One server for all requests of the chunk."""
    with server_process(work.folder, "--threads", "1") as server:
        samples = test_soak.soak(server, work.count)
    grown = test_soak.leaks(samples, work.count)
    held = [sample.resident_bytes / MIB for sample in samples]
    assert grown == set(), f"{grown} grow: {samples}"
    return {
        "most_bytes_kept_per_request": test_soak.slope(samples) * test_soak.SAMPLES / (work.count - test_soak.WARM_UP),
        "most_descriptors": max(sample.descriptors for sample in samples),
        "least_descriptors": min(sample.descriptors for sample in samples),
        "most_threads": max(sample.threads for sample in samples),
        "least_threads": min(sample.threads for sample in samples),
        "most_MiB": max(held),
        "least_MiB": min(held),
        "MiB": held,
    }


def plot_memory(parts: Sequence[Figures], axes: Any) -> None:
    for part in parts:
        axes.plot([100 * number / (len(part["MiB"]) - 1) for number in range(len(part["MiB"]))], part["MiB"])
    axes.set(xlabel="requests after the warm-up, %", ylabel="resident memory, MiB")
    axes.set_ylim(bottom=0)


def pictures(work: Work) -> Figures:
    statuses = test_fuzz.post_damaged(work.folder, test_fuzz.corpus(-(-work.count // FORMATS), work.first))
    return {f"answered_{status}": count for status, count in sorted(statuses.items())}


def readers(work: Work) -> Figures:
    if FAULT in os.environ:
        put_in(os.environ[FAULT])
    seen = collections.Counter[str]()
    for name in test_second_readers.seeds():
        seen += test_second_readers.compare_readers(name, -(-work.count // FORMATS), work.first)
    return {f"agreed_on_and_{what}": count for what, count in seen.items()}


def schema(work: Work) -> Figures:
    test_fuzz.ask_by_schema(work.folder, work.count, work.first)
    return {"examples_for_each_operation": work.count}


def attacks(work: Work) -> Figures:
    names = list(test_attacks.ATTACKS)
    with test_attacks.attacked(work.folder) as server:
        for number in range(work.first, work.first + work.count):
            test_attacks.test_an_attack_on_a_decoder_costs_nobody_else(server, names[number % len(names)])
    return {"attacks": work.count}


def search(work: Work) -> Figures:
    """Search each format for so many seconds."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        code = search_costly_pictures(["--seconds", str(work.count), "--seed", str(work.first)])
    assert code == 0, told.getvalue()
    lines = [line.split() for line in told.getvalue().splitlines()]
    return {f"most_{kind}_of_{name}": float(rest[rest.index(kind) + 1]) for name, _, kind, *rest in lines}


def missing_haproxy() -> str:
    return "" if HAPROXY else "needs haproxy, Debian's package of that name"


ALL = (
    Gate(
        "conservation",
        "Under random mixes of clients, the counts of clients, log and metrics agree exactly.",
        "s of load", 3600, 300, conservation, "count-twice", 1,
    ),
    Gate(
        "rolls",
        "No request is lost while both replicas behind haproxy are replaced under load, again and again.",
        "rolls", 50, 5, rolls, "close-at-once", 2, missing=missing_haproxy,
    ),
    Gate(
        "reloads",
        "No request is lost, and no answer mixes two models, while good and bad models are swapped under load.",
        "reloads", 50, 50, reloads, "reload-gap", 10, missing=missing_haproxy,
    ),
    Gate(
        "cross-talk",
        "Each of many concurrent requests, of all forms, gets the answer that it gets alone.",
        "requests", 10_000, 500, cross_talk, "mix-answers", 300,
    ),
    Gate(
        "memory",
        "Requests of mixed sizes, forms and routes leak no memory, descriptor or thread.",
        "requests", 100_000, 100_000, memory, "memory,descriptors,threads", 6_000, plot_memory,
    ),
    Gate(
        "pictures",
        "Damaged pictures of every format get an answer or a 4xx, and leak nothing.",
        "pictures", 100_000, 14_000, pictures, "forget-an-error", 700,
    ),
    Gate(
        "readers",
        "Where two other readers agree on a damaged picture, ours reads the same, or refuses it with a true reason.",
        "pictures", 100_000, 7_000, readers, "swap-colours", 700,
    ),
    Gate(
        "requests",
        "Damaged requests (raw HTTP, multipart, JSON, /v2) get an answer or a 4xx; none hangs or leaks.",
        "requests", 100_000, 10_000, mutated_requests.run, "forget-an-error", 500,
    ),
    Gate(
        "schema",
        "Every answer to a request that schemathesis makes from the OpenAPI document conforms to the document.",
        "examples", 5_000, 500, schema, "forget-an-error", 50,
    ),
    Gate(
        "network",
        "Through latency, stalls and resets every answer is right, and other clients notice nothing.",
        "requests", 10_000, 1_000, networks.run, "mix-answers", 300,
    ),
    Gate(
        "rude-clients",
        "Good clients are served beside thousands of slow, silent and half-open ones.",
        "times 340 rude clients", 10, 10, networks.run_rude, "patient", 1,
    ),
    Gate(
        "machine",
        "The service recovers from a stop, a full disk, no descriptors, a kill, little CPU, a hang and clock steps.",
        "faults", 3 * len(machine.FAULTS), 1, machine.run, "never-ill", 1,
    ),
    Gate(
        "overload",
        "Asked for 1 to 20 times a device's capacity, goodput is at least 90 %, p99 at most 1.2 × queue × time of one.",
        "rounds", 4 * 5, 1, overload.run, "no-queue-bound", 1, overload.plot,
    ),
    Gate(
        "counters",
        "Every counter of /metrics equals the clients' own counts.",
        "requests", 20_000, 2_000, counters.run, "count-twice", 200,
    ),
    Gate(
        "alerts",
        "Each injected fault fires its alert and no other; without a fault no alert fires.", "cases",
        3 * len(alerts.CASES), 1, alerts.run, "never-ill", len(alerts.CASES), missing=alerts.missing,
    ),
    Gate(
        "attacks",
        "Files of known attacks on decoders disturb no other client.",
        "attacks", 20 * ATTACKS, ATTACKS, attacks, "slow-walk", ATTACKS,
    ),
    Gate(
        "search",
        "A search for the costliest picture of each format finds none over its bounds (figures: shares of the bound).",
        "s for each format", 600, 60, search, "slow-walk", 2,
    ),
)  # fmt: skip
GATES = {gate.name: gate for gate in ALL}

"""Run the service's promises at full length, for hours. Stop and start it as you like; finished work is kept.

    python -m tests.reliability [GATE ...] [--scale F] [--state FILE] [--report PAGE] [--control] [--anew] [--list]

Each gate runs alone by its name. The report is made of the state alone. Exit code 1: a gate has a fault, or did not
find the one in a broken build.
"""

import argparse
import sys
from pathlib import Path

from tests.reliability.gate import check_control, complete
from tests.reliability.gates import GATES
from tests.reliability.report import write_report
from tests.reliability.state import State


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__.splitlines()[0])
    parser.add_argument("gate", nargs="*", help="these alone [all]")
    parser.add_argument("--scale", type=float, default=1, help="share of the full length [1]")
    parser.add_argument("--state", type=Path, default=Path(".reliability/state.jsonl"), help="file of what is done")
    parser.add_argument("--report", type=Path, default=Path("docs/reliability.md"), help="page that is written")
    parser.add_argument("--control", action="store_true", help="run each gate against a build with a fault, once")
    parser.add_argument("--anew", action="store_true", help="forget what is done of these gates")
    parser.add_argument("--list", action="store_true", help="list the gates and end")
    given = parser.parse_args(arguments)
    if unknown := set(given.gate) - set(GATES):
        parser.error(f"no gate {', '.join(sorted(unknown))}: there are {', '.join(GATES)}")
    gates = [GATES[name] for name in given.gate or GATES]
    if given.list:
        print(*(f"{gate.name:14} {gate.full:>9,} {gate.unit:22} {gate.promise}" for gate in gates), sep="\n")
        return 0
    state = State(given.state)
    if given.anew:
        state.forget([gate.name for gate in gates])
    for gate in gates:
        if reason := gate.missing():
            print(f"{gate.name}: not run: {reason}", flush=True)
        elif given.control:
            check_control(gate, state, tell)
        else:
            complete(gate, state, given.scale, tell)
        write_report(given.report, list(GATES.values()), state)
    return int(any(failed(gate.name, state) for gate in gates))


def failed(gate: str, state: State) -> bool:
    control = state.control(gate)
    return bool(state.faults(gate)) or (control is not None and not control.found)


def tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

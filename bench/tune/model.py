"""How long a multiprocessor takes for a candidate, guessed from what the compiler says and what its tile asks for.

A step of a program asks units of the multiprocessor for so many cycles each: the tensor cores or the multiply-add
units for its products, the special function units for its exponentials, shared memory for the operands, the L2 cache
or DRAM for its tile. A program alone takes the sum, and what it waits for memory besides; endlessly many programs take
as long as the busiest unit. Between the two, P programs that run at once (registers and shared memory decide P) take

    busiest + (sum + latency / stages + start / steps - busiest) / P        cycles a step, spills included,

which lies between the asymptotic bounds of operational analysis (Denning and Buzen, 1978). Large tiles ask less of the
L2 cache and of shared memory for each product and start seldom; small ones let more programs run, so that one's
exponentials or waiting pass beside another's products; stages shorten the wait and cost shared memory, hence programs.
What is compared is cycles for each useful element: what a tile computes beyond the causal diagonal is waste.

The figures are from data sheets, and for the L2 cache and latencies a guess; none was measured. The model orders
candidates, so that the ones worth timing are timed first; it decides nothing.
"""

from dataclasses import dataclass

from bench.compile.ahead_of_time import Compiled

# A cycle of a multiprocessor: FLOP by kind of product, instructions, bytes (of DRAM and the L2 cache its share).
UNITS = {
    "sm_90": {
        "half": 4096, "tf32": 2048, "ieee": 256, "exponentials": 16, "floats": 128, "shared": 128, "L2": 32, "DRAM": 18,
    },
    "sm_80": {
        "half": 2048, "tf32": 1024, "ieee": 128, "exponentials": 16, "floats": 64, "shared": 128, "L2": 32, "DRAM": 11,
    },
    "sm_86": {
        "half": 512, "tf32": 256, "ieee": 256, "exponentials": 16, "floats": 128, "shared": 128, "L2": 20, "DRAM": 7,
    },
}  # fmt: skip
LATENCY, START = 700, 1500


@dataclass(frozen=True)
class Work:
    """What one step of a program asks for. useful: elements of it that the result needs; units: amounts by name;
    steps: of a program; most_programs: of a multiprocessor, where the launch decides that and not the resources."""

    useful: float
    units: dict[str, float]
    stages: int = 1
    steps: float = 1.0
    most_programs: int = 32


def cycles(architecture: str, work: Work, compiled: Compiled) -> float:
    """For each useful element. What is spilled is taken to be stored and loaded once a step."""
    rates = UNITS[architecture]
    spilled = 2 * compiled.stack * 32 * compiled.num_warps
    units = {name: amount / rates[name] for name, amount in work.units.items()}
    units["shared"] = units.get("shared", 0.0) + spilled / rates["shared"]
    programs = max(min(compiled.occupancy // compiled.num_warps, work.most_programs), 1)
    busiest = max(units.values())
    alone = sum(units.values()) + LATENCY / work.stages + START / work.steps
    return (busiest + (alone - busiest) / programs) / work.useful

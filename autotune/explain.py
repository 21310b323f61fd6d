"""Why a config is chosen: where it comes from, what it is predicted and measured to do, and how its neighbours do."""

import json
from dataclasses import dataclass, fields, replace

from hsa_tl.autotune import cost, plan, static
from hsa_tl.autotune.journal import Journal
from hsa_tl.autotune.measure import name_of, summary
from hsa_tl.cases import Case
from hsa_tl.kernels_tilelang import config as configs

BEYOND = {"block_M": lambda x: x + 64, "num_stages": lambda x: x + 1, "threads": lambda x: 2 * x}


@dataclass(frozen=True)
class Neighbour:
    """A config that differs in one field, or the chosen one itself (change "")."""

    change: str
    config: str
    illegal: str | None  # why_illegal
    row: dict | None  # static row, where it is legal
    median_us: float | None


@dataclass(frozen=True)
class Explanation:
    program: str
    origin: str
    chosen: Neighbour
    bounds: dict[str, float]  # ns for each pair, greatest first
    neighbours: list[Neighbour]


def neighbours(program: str, problem, config) -> list[tuple[str, object]]:
    """(what changes, the config) one step away in each field, legal or not."""
    known = configs.candidates(program, problem)
    found = []
    for name in (f.name for f in fields(config)):
        value = getattr(config, name)
        values = sorted({getattr(c, name) for c in known} | {value})
        at = values.index(value)
        steps = values[max(0, at - 1) : at] + values[at + 1 : at + 2]
        if at == len(values) - 1 and name in BEYOND:
            steps.append(BEYOND[name](value))
        found += [(f"{name} {value} -> {x}", replace(config, **{name: x})) for x in steps]
    return found


def chosen_plan(program: str, case: Case, device: str) -> tuple[str, plan.Plan, str]:
    """The direction, the plan that runs the program there on the device by name, and how it came to be."""
    (direction,) = (d for d in plan.DIRECTIONS if any(program in s for s in plan.strategies(d)))
    made = plan.choose(direction, case.problem, device=device)
    if program not in dict(made.programs):
        others = " and ".join(name for name, _ in made.programs)
        made = plan.choose(direction, case.problem, json.dumps({program: {}}), device=device)
        return direction, made, f"the best prediction of its strategy; the {direction} takes {others}"
    times = "" if made.ns_per_pair is None else f", {made.ns_per_pair:.3g} ns/pair"
    how = "the best prediction of all strategies" if made.origin == "predicted" else f"measured, {made.origin}'s table"
    return direction, made, how + times


def explain(program: str, case: Case, device: str, journal: Journal, **options) -> Explanation:
    """For a device by name. options: see static.analyse_all; what the journal lacks is assembled."""
    direction, made, origin = chosen_plan(program, case, device)
    config = dict(made.programs)[program]
    near = [("", config), *neighbours(program, case.problem, config)]
    reasons = {c: configs.why_illegal(program, case.problem, c) for _, c in near}
    legal = [(program, case.problem, c) for c, reason in reasons.items() if reason is None]
    found = dict(zip((c for *_, c in legal), static.analyse_all(legal, journal=journal, **options), strict=True))
    seen = []
    for change, c in near:
        row = median = None
        if c in found:
            row = static.row(case.name, program, case.problem, c, found[c], device)
            programs = {name: configs.describe(c if name == program else x) for name, x in made.programs}
            record = journal.get(name_of({"direction": direction, "programs": programs}, case.problem, device))
            median = summary(record)["median_us"] if record else None
        seen.append(Neighbour(change, configs.describe(c), reasons[c], row, median))
    read, bounds = found[config], {}
    if not read["error"]:
        ctas = max(1, read["ctas_per_sm"])
        bounds = cost.bounds(config, case.problem, ctas, read["work"], cost.DEVICES[device])
    bounds = dict(sorted(bounds.items(), key=lambda x: -x[1]))
    return Explanation(program, origin, seen[0], bounds, seen[1:])

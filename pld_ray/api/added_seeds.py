"""Which seeds of a plan are wanted so far, where seeds are added until the methods are decided."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from analysis.tables.undecided import MethodProgress
    from pld_ray.config.planning import Plan
    from pld_ray.store.store import Store


def wanted(plan: Plan, store: Store) -> Plan:
    """Return the plan without the seeds that are not wanted yet, where they are added by a rule.

    Args:
        plan: The plan with all seeds of the rule.
        store: The store with the records so far.
    """
    from analysis.records import frames
    from analysis.tables import undecided
    from pld_ray.config.parts import Seeds

    frame = frames.frame(plan, store)
    assert isinstance(plan.experiment.seeds, Seeds)
    most = undecided.seeds_wanted(frame, plan.experiment.seeds, progress(plan, frame, store))
    places = frames.places(plan)
    seeds = (places["seed"] - plan.experiment.all_seeds[0]).tolist()
    groups = places[frames.GROUP].itertuples(index=False, name=None)
    numbered = enumerate(zip(seeds, groups, strict=True))
    return plan.part(i for i, (seed, group) in numbered if seed < most[group])


def progress(plan: Plan, frame: pd.DataFrame, store: Store) -> list[MethodProgress]:
    """Return how far the comparison of each method is, where seeds are added by a rule."""
    from analysis.tables import undecided
    from pld_ray.config.parts import Seeds
    from pld_ray.config.trial import Trial

    assert isinstance(plan.experiment.seeds, Seeds)
    unfinished = store.outcomes(plan.trials.keys() - store.finished(plan.trials))
    failed = {key for key, found in unfinished.items() if (found.failure or {}).get("final")}
    for key in unfinished:  # no trial runs without its teacher
        above = plan.trials[key].teacher
        while isinstance(above, Trial):
            failed |= {key} if above.id in failed else set()
            above = above.teacher
    return undecided.progress(frame, plan.experiment.seeds, failed)


def tell(plan: Plan, store: Store) -> None:
    """Print which methods are decided, where seeds are added by a rule."""
    from pld_ray.config.parts import Seeds

    if not isinstance(rule := plan.experiment.seeds, Seeds) or not plan.cells:
        return
    from analysis.records import frames  # pandas takes most of a second
    from analysis.tables import comparison, undecided
    from pld_ray.api import plan_table

    frame = frames.frame(plan, store)
    found, reference = progress(plan, frame, store), comparison.reference_name(frame)
    looks = ", ".join(map(str, rule.looks))
    head = f"seeds (at {looks})", "until decided [95 % interval of one comparison]"
    print(plan_table.aligned(head, undecided.described(found, reference, rule.effect)))

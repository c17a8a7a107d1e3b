"""Whole choices tried one after another by optuna: for small spaces, and as a check on the other two methods.

Trials live in optuna's storage. A journal file in the search's folder is the default: kill the search and call it again, or
start it several times at once, on one machine or on several that share the folder; all of them work on one study.
"""
from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitspike.searching.budget import Budget
from bitspike.searching.costs import Costs
from bitspike.searching.measure import Bench
from bitspike.searching.space import Choice, SearchError, Space, key_of

if TYPE_CHECKING:
    import optuna

_NAME = "bitspike"


@dataclass(frozen=True)
class Options:
    """trials: finished ones in the study, over all processes; storage: optuna's address, such as "sqlite:///search.db" or
    "mysql://..."; default a journal file in the search's folder."""

    trials: int = 100
    storage: str | None = None

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise SearchError(f"blackbox.Options: trials={self.trials}; at least 1 is needed, some hundred are sensible.")


def _storage(options: Options, folder: Path | None) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if options.storage is not None:
        from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

        for pause in (0.2, 0.4, 0.8, 1.6, 0.0):
            try:
                return optuna.storages.RDBStorage(options.storage)
            except (SQLAlchemyError, ImportError) as error:
                racing = isinstance(error, IntegrityError) or (
                    isinstance(error, OperationalError) and any(w in str(error) for w in ("already exists", "locked")))
                if racing and pause:  # another process is making the tables just now
                    time.sleep(pause)
                    continue
                raise SearchError(f"storage {options.storage!r} cannot be opened: {error}. It is an address such as "
                                  "sqlite:///search.db or mysql://user@host/name, whose driver is installed.") from None
    if folder is None:
        return optuna.storages.InMemoryStorage()
    folder.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))


def _sampler(options: Options, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # optuna 5 has another way to say it, which 4 does not know
        return optuna.samplers.NSGAIISampler(seed=seed % 2**32, population_size=min(50, max(8, options.trials // 8)),
                                             constraints_func=lambda trial: trial.user_attrs["excess"])


def _names(space: Space) -> dict[str, dict[str, Any]]:
    return {name: {key_of(s): s for s in found} for name, found in space.layers.items()}


def _to_choice(space: Space, params: dict[str, str]) -> Choice:
    named = _names(space)
    return {name: named[name][params[name]] for name in space.layers}


def run(bench: Bench, space: Space, costs: Costs, budget: Budget, options: Options, seed: int, folder: Path | None,
        tell: Callable[[str, int, int], None], cheap: str = "bytes") -> Choice:
    """The best choice within the budget: of least divergence, or for `drop` of least `cheap`, "bytes" or "energy".

    Objectives: divergence, bytes and energy, by NSGA-II with the budgets as constraints; the first trials are the uniform
    choices.
    A trial that a kill cut short is tried again.
    Errors: SearchError if no trial met the budget (with how near the nearest came); a study of another search or a damaged one.
    """
    try:
        return _search(bench, space, costs, budget, options, seed, folder, tell, cheap)
    except json.JSONDecodeError as error:  # a journal is read anew for every trial
        raise _damaged(error) from error


def _damaged(error: Exception) -> SearchError:
    return SearchError(f"the stored study cannot be read ({type(error).__name__}: {error}); it is damaged: choose another "
                       "--out or storage, or delete it.")


def _search(bench: Bench, space: Space, costs: Costs, budget: Budget, options: Options, seed: int, folder: Path | None,
            tell: Callable[[str, int, int], None], cheap: str) -> Choice:
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(study_name=_NAME, storage=_storage(options, folder), load_if_exists=True,
                                    directions=["minimize"] * 3)
    except SearchError:
        raise
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise _damaged(error) from error
    described = {"network, data": bench.fingerprint(), "budget": str(budget),
                 "costs": costs.describe(),
                 "candidates": {name: list(found) for name, found in _names(space).items()}}
    subject = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    stored = study.user_attrs.get("subject")
    if stored is None:
        study.set_user_attr("subject", subject)
    elif stored != subject:
        raise SearchError("the stored study is of another network, other data, candidates, constants or another budget; choose "
                          "another --out or storage, or the same settings to go on.")
    # running now: of a process that was killed, or of another one, whose uniform choice is then tried twice
    before = frozenset(t.number for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
    full = bench.measure({}).top1

    def objective(trial: optuna.Trial) -> tuple[float, float, float]:
        params = {name: trial.suggest_categorical(name, list(found)) for name, found in _names(space).items()}
        choice = _to_choice(space, params)
        totals, found = costs.of(choice), bench.measure(choice)
        trial.set_user_attr("excess", budget.over(totals.bits, totals.bytes, totals.energy_pj, full - found.top1))
        return found.divergence, float(totals.bytes), totals.energy_pj

    def finished() -> int:
        return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def begun() -> int:  # by anybody, less what was cut short
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
        return sum(t.state == TrialState.COMPLETE or t.number not in before for t in trials)

    done = finished()
    while done < options.trials:
        # seeded by what is there, so that a search that was killed draws what it would have drawn, and two at once differ
        study.sampler = _sampler(options, seed * 1_000_003 + begun())
        _enqueue_uniform(study, space, before)
        study.optimize(objective, n_trials=1)
        done = finished()
        tell("trials", min(done, options.trials), options.trials)
    return _best(study, space, costs, budget, cheap)


def _uniform(space: Space) -> list[Choice]:
    """Choices with the same scheme everywhere."""
    shared = [s for s in next(iter(space.layers.values())) if all(s in found for found in space.layers.values())]
    return [dict.fromkeys(space.layers, s) for s in shared]


def _enqueue_uniform(study: optuna.Study, space: Space, dead: frozenset[int]) -> None:
    """Let the first uniform choice that is not there yet be tried next.

    One at a time, so that one whose trial a kill cut short (it stays "running" for good) comes again in its turn, not behind
    the others: the trials after it are then the same as without the kill. dead: numbers of such trials.
    """
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.WAITING, TrialState.RUNNING)
    there = [t.system_attrs.get("fixed_params") or t.params for t in study.get_trials(deepcopy=False, states=states)
             if t.state != TrialState.RUNNING or t.number not in dead]
    for choice in _uniform(space):
        params = {name: key_of(s) for name, s in choice.items()}
        if params not in there:
            study.enqueue_trial(params)
            return


def _best(study: optuna.Study, space: Space, costs: Costs, budget: Budget, cheap: str) -> Choice:
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def excess(trial: optuna.trial.FrozenTrial) -> float:
        totals = costs.of(_to_choice(space, trial.params))
        return max([*trial.user_attrs["excess"], *budget.over(totals.bits, totals.bytes, totals.energy_pj)])

    fitting = [t for t in trials if excess(t) <= 1e-9]
    if not fitting:
        nearest = min((excess(t) for t in trials), default=math.inf)
        raise SearchError(f"{budget}: none of {len(trials)} trials meets it; the nearest is {nearest:.1%} over. Allow "
                          "more trials, or use method='sensitivity', which meets a budget exactly.")
    if budget.drop is not None:
        cost = 2 if cheap == "energy" else 1
        return _to_choice(space, min(fitting, key=lambda t: t.values[cost]).params)
    return _to_choice(space, min(fitting, key=lambda t: (t.values[0], t.values[1])).params)

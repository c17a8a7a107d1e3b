"""Whole choices tried one after another by optuna: for small spaces, and as a check on the other two methods.

Trials live in optuna's storage. A journal file in the search's folder is the default: kill the search and call it again, or
start it several times at once, on one machine or on several that share the folder; all of them work on one study.
"""
from __future__ import annotations

import math
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
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return optuna.storages.RDBStorage(options.storage)
        except (SQLAlchemyError, ImportError) as error:
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
        tell: Callable[[str, int, int], None]) -> Choice:
    """The best choice within the budget: of least divergence, or for `drop` of least bytes.

    Objectives: divergence, bytes and energy, by NSGA-II with the budgets as constraints; the first trials are the uniform
    choices.
    Errors: SearchError if no trial met the budget (with how near the nearest came); a study of another network.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = _storage(options, folder)
    study = optuna.create_study(study_name=_NAME, storage=storage, load_if_exists=True,
                                directions=["minimize"] * 3)
    subject = f"{bench.fingerprint()} {budget}"
    stored = study.user_attrs.get("subject")
    if stored is None:
        study.set_user_attr("subject", subject)
        for choice in _uniform(space):
            study.enqueue_trial({name: key_of(s) for name, s in choice.items()}, skip_if_exists=True)
    elif stored != subject:
        raise SearchError("the stored study is of another network, other data or another budget; choose another --out or "
                          "storage.")
    full = bench.measure({}).top1

    def objective(trial: optuna.Trial) -> tuple[float, float, float]:
        params = {name: trial.suggest_categorical(name, list(found)) for name, found in _names(space).items()}
        choice = _to_choice(space, params)
        totals, found = costs.of(choice), bench.measure(choice)
        trial.set_user_attr("excess", budget.over(totals.bits, totals.bytes, totals.energy_pj, full - found.top1))
        return found.divergence, float(totals.bytes), totals.energy_pj

    def finished() -> int:
        return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    done = finished()
    while done < options.trials:
        # seeded by what is there, so that a search that was killed draws what it would have drawn
        study.sampler = _sampler(options, seed * 1_000_003 + done)
        study.optimize(objective, n_trials=1)
        done = finished()
        tell("trials", min(done, options.trials), options.trials)
    return _best(study, space, budget)


def _uniform(space: Space) -> list[Choice]:
    """Choices with the same scheme everywhere."""
    shared = [s for s in next(iter(space.layers.values())) if all(s in found for found in space.layers.values())]
    return [dict.fromkeys(space.layers, s) for s in shared]


def _best(study: optuna.Study, space: Space, budget: Budget) -> Choice:
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    fitting = [t for t in trials if all(e <= 1e-9 for e in t.user_attrs["excess"])]
    if not fitting:
        nearest = min((max(t.user_attrs["excess"]) for t in trials), default=math.inf)
        raise SearchError(f"{budget}: none of {len(trials)} trials meets it; the nearest is {nearest:.1%} over. Allow "
                          "more trials, or use method='sensitivity', which meets a budget exactly.")
    if budget.drop is not None:
        return _to_choice(space, min(fitting, key=lambda t: t.values[1]).params)
    return _to_choice(space, min(fitting, key=lambda t: (t.values[0], t.values[1])).params)

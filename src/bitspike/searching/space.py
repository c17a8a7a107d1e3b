"""What may be chosen where: candidates per layer, and the specs they make."""
from __future__ import annotations

import fnmatch
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bitspike.layers import latent_weight, quantizable
from bitspike.spec import KINDS, QuantSpec, Scheme, SpecError

#: training-side options of a candidate: what suits weights that were trained in full precision
FITTING: Mapping[str, Mapping[str, str]] = {"uniform": {"step": "normal"}, "pow2": {"scale": "normal"},
                                            "binary": {"scale": "mean"}}
#: what a search tries where nothing else is asked for
CANDIDATES: tuple[Scheme, ...] = tuple(Scheme(kind, bits, options=FITTING[kind]) for kind, widths in (
    ("binary", (1,)), ("uniform", (2, 3, 4, 5, 6, 8)), ("pow2", (2, 3, 4))) for bits in widths)

Choice = dict[str, Scheme]  # layer name -> its scheme


class SearchError(ValueError):
    """A search that cannot be meant or cannot succeed: says what was found, what is allowed, what is reachable."""


def key_of(scheme: Scheme) -> str:
    """Short text of a scheme, as in tables and stored measurements.

    >>> key_of(Scheme("pow2", 3)), key_of(Scheme("uniform", 4, "tensor"))
    ('pow2:3,plain=True', 'uniform:4/tensor,plain=True')
    """
    fitting = FITTING.get(scheme.kind, {})
    own = dict(scheme.options) or ({"plain": True} if fitting else {})
    options = "" if own == fitting else "".join(f",{k}={v}" for k, v in sorted(own.items()))
    return f"{scheme.kind}:{scheme.bits}{'/tensor' if scheme.per == 'tensor' else ''}{options}"


def parse_candidates(text: str) -> tuple[Scheme, ...]:
    """"uniform:2,3,4 pow2:3,4 binary" -> schemes. Errors: SearchError.

    >>> [key_of(s) for s in parse_candidates("uniform:2,4 binary")]
    ['uniform:2', 'uniform:4', 'binary:1']
    """
    found: list[Scheme] = []
    for word in text.split():
        kind, colon, widths = word.partition(":")
        if kind not in KINDS or kind == "membrane":
            allowed = ", ".join(FITTING)  # others can be named, but were made to train with, not to be searched
            raise SearchError(f"candidates {text!r}: unknown scheme {kind!r}; allowed: {allowed}, each with its bits, such as "
                              "'uniform:2,3,4 pow2:3,4 binary'.")
        options = FITTING.get(kind, {})
        if colon and not all(w.isdecimal() for w in widths.split(",")):
            raise SearchError(f"candidates {word!r}: {widths!r} are no widths; allowed are whole numbers of bits separated by "
                              f"commas, such as '{kind}:{KINDS[kind][-1]}'.")
        try:
            found += [Scheme(kind, int(w), options=options) for w in (widths.split(",") if widths else KINDS[kind])]
        except (SpecError, ValueError) as error:
            raise SearchError(f"candidates {word!r}: {error}") from None
    if not found:
        raise SearchError("no candidates: name at least one scheme, such as 'uniform:2,3,4 pow2:3,4 binary'.")
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Space:
    """The candidates of every layer, in the model's order.

    layers: name -> candidates, at least one each. weights: name -> number of weights.
    """

    layers: Mapping[str, tuple[Scheme, ...]]
    weights: Mapping[str, int]

    @property
    def size(self) -> int:
        """Number of different specs."""
        return math.prod(len(c) for c in self.layers.values())

    def spec(self, choice: Mapping[str, Scheme]) -> QuantSpec:
        """A choice as a spec, one rule a layer."""
        return QuantSpec({name: choice[name] for name in self.layers})

    def bits(self, choice: Mapping[str, Scheme]) -> float:
        """Average bits of a weight."""
        return sum(self.weights[n] * s.bits for n, s in choice.items()) / sum(self.weights.values())

    def only(self, allowed: Iterable[str]) -> Space:
        """The same space with these kinds of schemes. Errors: SearchError if a layer is left without a candidate."""
        kinds = tuple(allowed)
        layers = {name: tuple(s for s in found if s.kind in kinds) for name, found in self.layers.items()}
        empty = [name for name, found in layers.items() if not found]
        if empty:
            raise SearchError(f"layer {empty[0]!r} has no candidate of kind {', '.join(kinds)}; it has "
                              f"{', '.join(map(key_of, self.layers[empty[0]]))}.")
        return Space(layers, self.weights)

    def _least(self, most_bits: float) -> Choice:
        """The choice of fewest bits. Errors: SearchError if even that has more than `most_bits`."""
        least: Choice = {name: min(found, key=lambda s: s.bits) for name, found in self.layers.items()}
        if self.bits(least) > most_bits + 1e-9:
            raise SearchError(f"bits={most_bits:g} cannot be reached: the smallest average of these candidates is "
                              f"{self.bits(least):g}.")
        return least

    def random(self, seed: int, most_bits: float, within: float = 0.05, draws: int = 10_000) -> Choice:
        """A random choice among all of most_bits - within to most_bits average bits: those of equal bits are equally likely.

        Layers are drawn independently with probabilities proportional to exp(-c * weights * bits), c such that the mean is in
        the middle, until a draw is within. Where no draw is (a space of few choices), it is the closest below.
        Errors: SearchError if nothing is below.
        """
        best, draw, total = self._least(most_bits), random.Random(seed), sum(self.weights.values())

        def shares(c: float) -> dict[str, list[float]]:
            powers = {n: [-c * self.weights[n] / total * s.bits for s in found] for n, found in self.layers.items()}
            return {n: [math.exp(p - max(row)) for p in row] for n, row in powers.items()}

        def mean(c: float) -> float:
            return sum(self.weights[n] / total * sum(p * s.bits for p, s in zip(row, self.layers[n], strict=True)) / sum(row)
                       for n, row in shares(c).items())

        low, high = -1e4, 1e4
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) > most_bits - within / 2 else (low, middle)
        odds = shares(high)
        for _ in range(draws):
            choice = {name: draw.choices(found, odds[name])[0] for name, found in self.layers.items()}
            bits = self.bits(choice)
            if bits <= most_bits + 1e-9:
                best = max(best, choice, key=self.bits)
                if bits >= most_bits - within:
                    return choice
        return best

    def random_filled(self, seed: int, most_bits: float) -> Choice:
        """A random choice of at most so many average bits, and as close below it as single steps get.

        Starts from a uniform draw, lowers layers in random order until it fits, then raises what still can be: mostly small
        layers, which get more bits that way than in a plain random choice. Errors: SearchError if nothing fits.
        """
        self._least(most_bits)
        draw, total = random.Random(seed), sum(self.weights.values())
        limit = most_bits * total + 1e-6
        choice = {name: draw.choice(found) for name, found in self.layers.items()}
        names = list(self.layers)
        for down in (True, False):
            moved = True
            while moved and (not down or self.bits(choice) * total > limit):
                moved = False
                for name in draw.sample(names, len(names)):
                    used = self.bits(choice) * total
                    if down and used <= limit:
                        break
                    now, room = choice[name].bits, (limit - used) / self.weights[name]
                    others = [s for s in self.layers[name] if (s.bits < now if down else now < s.bits <= now + room)]
                    if others:
                        choice[name] = draw.choice(others)
                        moved = True
        return choice


def make_space(model: nn.Module, candidates: Sequence[Scheme] | Mapping[str, Sequence[Scheme]] = CANDIDATES) -> Space:
    """The space of a model's Conv1d, Conv2d and Linear layers.

    candidates: the same for every layer, or pattern of layer names -> candidates; the last pattern that matches holds, a layer
    that none matches is left out of the search and stays full precision. One candidate pins a layer.
    Errors: SearchError for no layers, no candidates, a pattern without a layer, a candidate that no layer can take.

    >>> make_space(nn.Linear(4, 2), [Scheme("uniform", 2), Scheme("uniform", 4)]).size
    2
    """
    found = quantizable(model)
    if not found:
        raise SearchError(f"{type(model).__name__} has no Conv1d, Conv2d or Linear layer: there is nothing to search.")
    rules = candidates if isinstance(candidates, Mapping) else {"*": candidates}
    layers: dict[str, tuple[Scheme, ...]] = {}
    for pattern, allowed in rules.items():
        hits = [name for name in found if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise SearchError(f"candidates for {pattern!r}: no such layer; there are {len(found)}, for example "
                              f"{next(iter(found))!r} and {list(found)[-1]!r}.")
        if not allowed:
            raise SearchError(f"candidates for {pattern!r}: none; name at least one scheme.")
        for scheme in allowed:
            if not isinstance(scheme, Scheme) or scheme.kind == "membrane":
                raise SearchError(f"candidates for {pattern!r}: {scheme!r} is no scheme of weights; layers take "
                                  f"{', '.join(k for k in KINDS if k != 'membrane')}.")
        layers.update((name, tuple(dict.fromkeys(allowed))) for name in hits)
    ordered = {name: layers[name] for name in found if name in layers}
    for name, allowed in ordered.items():
        weight = latent_weight(found[name])
        flat = [s for s in allowed if s.kind == "binary"]
        if flat and weight[0].numel() == 1:
            raise SearchError(f"layer {name!r} has one weight per output, whose sign carries nothing once normalised: it "
                              f"cannot take {key_of(flat[0])}. Give it others: {{..., {name!r}: [Scheme('uniform', 8)]}}.")
    return Space(ordered, {n: latent_weight(found[n]).numel() for n in ordered})

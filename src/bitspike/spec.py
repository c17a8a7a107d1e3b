"""Which layer gets which low-bit form: plain data, standard library only.

A `QuantSpec` is an ordered list of rules, each a pattern of layer names and a `Scheme`. It round-trips through JSON, so
a search writes it, a checkpoint stores it and a person edits it.
"""
from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: kind -> allowed bit widths (None: the kind takes no width)
KINDS: dict[str, tuple[int, ...]] = {
    "full": (32,),
    "lsq": (2, 3, 4, 5, 6, 7, 8),
    "uniform": (2, 3, 4, 5, 6, 7, 8),
    "pow2": (2, 3, 4),
    "pow2_scale": (2, 3, 4, 5, 6, 7, 8),
    "max": (2, 3, 4, 5, 6, 7, 8),
    "binary": (1,),
    "membrane": (2, 3, 4, 5, 6, 7, 8, 32),  # 32: the tanh without the rounding
}
#: options that only change how a scheme trains, never what it deploys as
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "binary": {"gradient": ("ste", "ir_net"), "scale": ("none", "pow2", "mean"), "zero": ("plus", "published"),
               "normalise": (True, False)},
    "membrane": {"scale": ("running", "batch"), "tanh": (True, False)},
    "lsq": {"init": ("tensor", "channel")},
    "uniform": {"step": ("lsq", "normal")},
    "pow2": {"scale": ("max", "normal")},
    "max": {"top": ("absolute", "signed")},
}


class SpecError(ValueError):
    """A spec that cannot be meant: unknown kind, impossible width, a rule without a layer."""


@dataclass(frozen=True)
class Scheme:
    """The form of one layer's weights (or, kind "membrane", of one neuron's potential).

    kind: "full" (left alone), "lsq" (uniform signed k-bit, learned step), "uniform" (the
    same, the step follows the mean size of the weights), "pow2" (levels are powers of two),
    "pow2_scale" (uniform levels, the step is a power of two), "max" (uniform levels up to the largest weight),
    "binary" (sign of the normalised weight), "membrane" (LIF potential; 32 bits: its tanh, not rounded).
    bits: width of one code. per: "channel" (one scale per output channel) or "tensor".
    options: training-side choices, see `OPTIONS`.

    >>> Scheme("lsq", 4)
    Scheme(kind='lsq', bits=4, per='channel', options={})
    >>> Scheme("lsq", 1)
    Traceback (most recent call last):
    ...
    bitspike.spec.SpecError: Scheme 'lsq' with bits=1: allowed are 2, 3, 4, 5, 6, 7, 8. For one bit use Scheme("binary").
    """

    kind: str
    bits: int = 0
    per: str = "channel"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise SpecError(f"unknown scheme kind {self.kind!r}{_nearest(str(self.kind), KINDS)}; allowed: {', '.join(KINDS)}.")
        widths = KINDS[self.kind]
        if self.bits == 0 and len(widths) == 1:
            object.__setattr__(self, "bits", widths[0])
        if type(self.bits) is not int or self.bits not in widths:
            hint = ' For one bit use Scheme("binary").' if self.bits == 1 else ""
            raise SpecError(f"Scheme {self.kind!r} with bits={self.bits}: allowed are "
                            f"{', '.join(map(str, widths))}.{hint}")
        if self.per not in ("channel", "tensor"):
            raise SpecError(f"Scheme {self.kind!r} with per={self.per!r}: allowed are 'channel', 'tensor'.")
        if not isinstance(self.options, Mapping):
            raise SpecError(f"Scheme {self.kind!r} with options={self.options!r}: they must be an object, name -> value.")
        known = OPTIONS.get(self.kind, {})
        for name, value in self.options.items():
            if name not in known:
                raise SpecError(f"Scheme {self.kind!r} has no option {name!r}{_nearest(str(name), known)}; "
                                f"allowed: {', '.join(known) or 'none'}.")
            if value not in known[name]:
                raise SpecError(f"Scheme {self.kind!r}, option {name}={value!r}: allowed are "
                                f"{', '.join(map(repr, known[name]))}.")
        if self.kind == "membrane" and self.bits == 32 and self.options not in ({}, {"tanh": True}):
            raise SpecError(f"Scheme 'membrane' with bits=32 is the tanh alone: options={dict(self.options)} have nothing to "
                            "act on. Leave them out, or the rule where no tanh is wanted.")

    def __hash__(self) -> int:
        return hash((self.kind, self.bits, self.per, tuple(sorted(self.options.items()))))

    def to_dict(self) -> dict[str, Any]:
        """The scheme as plain JSON data."""
        return {"kind": self.kind, "bits": self.bits, "per": self.per, "options": dict(self.options)}

    @classmethod
    def from_dict(cls, data: Any) -> Scheme:
        """Inverse of `to_dict`; unknown keys are an error."""
        if not isinstance(data, dict) or "kind" not in data:
            raise SpecError(f"a scheme must be an object with a 'kind', found {data!r}.")
        unknown = set(data) - {"kind", "bits", "per", "options"}
        if unknown:
            raise SpecError(f"a scheme has no key {sorted(unknown)[0]!r}; allowed: kind, bits, per, options.")
        return cls(data["kind"], data.get("bits", 0), data.get("per", "channel"), data.get("options", {}))


@dataclass(frozen=True)
class QuantSpec:
    """Ordered rules (pattern, scheme); for each layer the LAST matching rule holds, layers without a rule stay full.

    Patterns are shell-style (`*`, `?`, `[...]`) over the layer's full dotted name.

    >>> spec = QuantSpec([("*", Scheme("lsq", 4)), ("head", Scheme("lsq", 8))])
    >>> spec.resolve(["stem.conv", "head"])["head"].bits
    8
    >>> QuantSpec.from_json(spec.to_json()) == spec
    True
    """

    rules: tuple[tuple[str, Scheme], ...]

    def __init__(self, rules: Iterable[tuple[str, Scheme]] | Mapping[str, Scheme] = ()) -> None:
        pairs = rules.items() if isinstance(rules, Mapping) else rules
        checked = []
        for pair in pairs:
            if len(tuple(pair)) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Scheme):
                raise SpecError(f"a rule is a pair (pattern, Scheme), found {pair!r}.")
            checked.append((pair[0], pair[1]))
        object.__setattr__(self, "rules", tuple(checked))

    def resolve(self, layers: Iterable[str], *, membrane: bool = False) -> dict[str, Scheme]:
        """Layer name -> scheme, for the layers some rule names.

        membrane: resolve the "membrane" rules (over neurons) instead of the weight rules (over layers).
        Raises SpecError for a rule that matches nothing.
        """
        names = list(layers)
        found: dict[str, Scheme] = {}
        for pattern, scheme in self.rules:
            if (scheme.kind == "membrane") != membrane:
                continue
            hits = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            if not hits:
                what = "neurons take a membrane scheme" if membrane else "layers can be quantized"
                sample = ", ".join(names[:1] + names[-1:] if len(names) > 1 else names)
                raise SpecError(f"rule {pattern!r} matches no layer{_nearest(pattern, names)}. {len(names)} {what}"
                                f"{', for example: ' + sample if names else ''}. List them with 'bitspike layers RECIPE' or "
                                f"bitspike.layers.{'neurons_with_membrane' if membrane else 'quantizable'}(model).")
            found.update((name, scheme) for name in hits)
        return found

    def to_json(self) -> str:
        """The spec as JSON text."""
        return json.dumps([{"layers": pattern, **scheme.to_dict()} for pattern, scheme in self.rules], indent=1)

    @classmethod
    def from_json(cls, text: str) -> QuantSpec:
        """Inverse of `to_json`; raises SpecError for anything else."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise SpecError(f"a spec must be JSON: {error}.") from error
        if not isinstance(data, list):
            raise SpecError(f"a spec must be a JSON list of rules, found {type(data).__name__}.")
        rules = []
        for entry in data:
            if not isinstance(entry, dict) or not isinstance(entry.get("layers"), str):
                raise SpecError(f"a rule must be an object with 'layers' (a pattern) and 'kind', found {entry!r}.")
            rules.append((entry["layers"], Scheme.from_dict({k: v for k, v in entry.items() if k != "layers"})))
        return cls(rules)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (nearest: {close[0]!r})" if close else ""

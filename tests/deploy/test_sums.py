"""Neurons that read the sums of a convolution in rational numbers: their spikes are those of the integers."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitspike.deploy import Net, kernels, plan
from bitspike.deploy.artifact import encode, pack_codes, parse

compiled_sets = pytest.mark.skipif(len(kernels.available()) == 1, reason="the extension is not built")
ONE = 1 << 16  # the threshold
CHANNELS, SIZE = 20, 5


def table_of(bits: int) -> np.ndarray:
    """Potentials through tanh, in so many bits."""
    high = 2 ** (bits - 1) - 1
    edges = (np.arange(-high, high) + 0.5) / high
    return (np.arctanh(edges) * ONE).round().astype(np.int32)


def network(rng: np.random.Generator, steps: int, reset: str, strict: bool, residual: str, bits: int, round_numbers: bool,
            soft: int | None = None, table: np.ndarray | None = None, left: float = 0.5) -> Net:
    """Spikes of 20 channels, a binary 3x3 convolution, a residual or not, neurons, and logits that weigh every spike.

    left: of a stored potential, at the next step, in a table that spans two thresholds.
    """
    binary, whole = {"kind": "binary", "bits": 1}, {"kind": "uniform", "bits": 8}
    # Round: potentials are sixteenths of the threshold, so many meet it. The others lie anywhere.
    scale = np.full(CHANNELS, ONE << 4) if round_numbers else rng.integers(1, ONE << 4, CHANNELS)
    tensors = {
        "first": pack_codes(np.tile(np.eye(2, dtype=int), (CHANNELS // 2, 1))[:, None, None], whole),
        "w": pack_codes(rng.choice([-1, 1], (CHANNELS, 3, 3, CHANNELS)), binary),
        "v": pack_codes(rng.choice([-1, 1], (CHANNELS, 1, 1, CHANNELS)), binary),
        "last": pack_codes(rng.integers(-99, 99, (6, 1, 1, CHANNELS)), whole),
        "ones": np.ones(CHANNELS, np.int32), "zeros": np.zeros(CHANNELS, np.int32), "m": scale.astype(np.int32),
        "b": (rng.integers(-4, 9, CHANNELS) * (ONE >> 4)).astype(np.int32), "m6": np.full(6, 1, np.int32),
        "b6": np.zeros(6, np.int32), "table": table_of(bits or 8) if table is None else table,
    }
    conv: dict[str, Any] = {"op": "conv", "scheme": binary, "stride": [1, 1], "padding": [0, 0], "groups": 1, "s": 8,
                            "shape": [CHANNELS, CHANNELS, 1, 1], "range": [0, 1]}
    program = [
        {**conv, "in": ["pixels"], "out": "p", "weight": "first", "scheme": whole, "shape": [CHANNELS, 2, 1, 1], "m": "ones",
         "b": "zeros", "s": 0, "range": [0, 255]},
        {"op": "quantize", "in": ["p"], "out": "spikes", "m": 1, "s": 7, "lo": 0, "hi": 1, "dtype": "u8"},
    ]
    if residual == "potentials":
        program.append({**conv, "in": ["spikes"], "out": "r", "weight": "v", "m": "m", "b": "b"})
        # two readers, so that it is no sum of convolutions
        program.append({"op": "add", "in": ["r", "r"], "out": "rr"})
    program.append({**conv, "in": ["spikes"], "out": "x", "weight": "w", "shape": [CHANNELS, CHANNELS, 3, 3], "padding": [1, 1],
                    "m": "m", "b": "b", "layer": "summed"})
    x = "x"
    if residual == "codes":
        program.append({"op": "affine", "in": ["spikes"], "out": "rr", "m": ONE >> 2, "s": 1, "b": -(ONE >> 4)})
    if residual != "none":
        program.append({"op": "add", "in": ["rr", "x"] if residual == "codes" else ["x", "rr"], "out": "sum"})
        x = "sum"
    neuron: dict[str, Any] = {"op": "lif", "in": [x], "out": "n", "decay": [1, 1], "gain": [1, int(rng.integers(2))],
                              "threshold": ONE, "reset": reset, "steps": steps, "strict": strict}
    if soft is not None:
        neuron["amount"] = soft
    if bits:
        high = 2 ** (bits - 1) - 1
        neuron |= {"op": "lif_packed", "bits": bits, "table": "table", "decay": [int((ONE << 8) * left / high), 8]}
    program += [
        neuron,
        {**conv, "in": ["n"], "out": "z", "weight": "last", "scheme": whole, "shape": [6, CHANNELS, 1, 1], "m": "m6", "b": "b6",
         "s": 0},
        {"op": "mean", "in": ["z"], "out": "space", "over": "space", "m": SIZE * SIZE},  # which makes sums of means
        {"op": "mean", "in": ["space"], "out": "logits", "over": "time", "m": steps},
    ]
    header = {"name": "sums", "input": {"height": SIZE, "width": SIZE, "channels": 2, "resize": None, "steps": steps},
              "classes": list("abcdef"), "time_steps": steps, "fraction_bits": 16, "program": program, "output": "logits",
              "provenance": {}}
    if steps == 1:
        del header["input"]["steps"]
    used = {value for op in program for value in op.values() if isinstance(value, str)}
    return Net(parse(encode(header, {name: tensor for name, tensor in tensors.items() if name in used})))


def same_everywhere(net: Net, images: np.ndarray) -> dict[str, bool]:
    """Every set's logits against the definition's; which sets did it on sums."""
    wanted = net.trace(images)["logits"][0, :, 0, 0, :] * np.float32(2.0**-16)
    summed = {}
    for name in kernels.available()[1:]:
        kernels.use(name)
        for _ in range(2):
            np.testing.assert_array_equal(net(images, threads=2), wanted, err_msg=name)
        inside, stages = net.executor._compiled[name].plan, net.executor._compiled[name].layout.stages
        stage = next(i for i, stage in enumerate(stages) if stage.ops[-1].output == "n")
        (summed[name],) = [layer["summed"] for layer in inside.layers() if layer["stage"] == stage]
        for index, layer in enumerate(inside.layers()):
            for variant in layer["able"]:
                inside.force(index, variant)
                np.testing.assert_array_equal(net(images, threads=1), wanted, err_msg=f"{name} {variant}")
    kernels.use(kernels.available()[-1])
    return summed


@compiled_sets
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 4), reset=st.sampled_from(["hard", "soft", "none"]),
    strict=st.booleans(), residual=st.sampled_from(["none", "codes", "potentials"]),
    bits=st.sampled_from([0, 2, 4, 8]), round_numbers=st.booleans(),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_spikes_are_those_of_the_integers(seed, steps, reset, strict, residual, bits, round_numbers, share):
    rng = np.random.default_rng(seed)
    soft = int(rng.integers(-ONE, 2 * ONE)) if reset == "soft" and rng.random() < 0.5 else None
    net = network(rng, steps, reset, strict, residual, bits, round_numbers, soft)
    shape = (3, SIZE, SIZE, 2) if steps == 1 else (steps, 3, SIZE, SIZE, 2)
    same_everywhere(net, np.where(rng.random(shape) < share, 255, 0).astype(np.uint8))


@compiled_sets
@settings(max_examples=60, deadline=None)
@example(seed=32, reset="soft", length=15.29, away=-9881.0, bend=0.67, share=0.22)  # three that once took piece 32 of 32
@example(seed=67, reset="none", length=14.92, away=-4473.0, bend=1.21, share=0.11)
@example(seed=152, reset="hard", length=14.47, away=-5966.0, bend=0.55, share=0.17)
@given(
    seed=st.integers(0, 2**32 - 1), reset=st.sampled_from(["hard", "soft", "none"]), length=st.floats(8, 16),
    away=st.one_of(st.floats(-2, 2), st.floats(-11_000, 11_000)), bend=st.floats(0.5, 2.0), share=st.floats(0.05, 0.4),
)
def test_any_table_will_do(seed, reset, length, away, bend, share):
    """Bent ones, also short ones far from 0, where floats cannot tell the pieces of a line apart."""
    table = (2**length * (away + np.linspace(0, 1, 254) ** bend - 0.5)).round().astype(np.int32)
    rng = np.random.default_rng(seed)
    net = network(rng, 3, reset, False, "none", 8, False, table=table, left=share * 2**length / (2 * ONE))
    same_everywhere(net, np.where(rng.random((3, 5, SIZE, SIZE, 2)) < 0.5, 255, 0).astype(np.uint8))


@compiled_sets
@pytest.mark.skipif("avx512" not in kernels.available(), reason="AVX-512 has such neurons")
@pytest.mark.parametrize("residual", ["none", "codes", "potentials"])
@pytest.mark.parametrize("bits", [0, 8])
def test_neurons_of_trained_networks_are_done_on_sums(residual: str, bits: int):
    rng = np.random.default_rng(3)
    net = network(rng, 3, "hard", False, residual, bits, False)
    images = np.where(rng.random((3, 2, SIZE, SIZE, 2)) < 0.4, 255, 0).astype(np.uint8)
    assert same_everywhere(net, images)["avx512"]


@compiled_sets
def test_the_density_of_spikes_over_time_is_told():
    rng = np.random.default_rng(6)
    net = network(rng, 3, "hard", False, "none", 8, False)
    images = np.where(rng.random((3, 40, SIZE, SIZE, 2)) < 0.4, 255, 0).astype(np.uint8)
    spikes = net.trace(images)["n"]
    for _ in range(2):
        net(images)
    row = [row for row in net.explain(images, repeats=2) if "conv" in row.ops][-1]
    assert row.density == pytest.approx(np.count_nonzero(spikes) / spikes.size, abs=0.05)


@compiled_sets
def test_what_the_proof_does_not_cover_is_done_on_potentials():
    rng = np.random.default_rng(4)
    net = network(rng, 3, "hard", False, "none", 2, False)  # two bits: half of all potentials would be in doubt
    images = np.where(rng.random((3, 2, SIZE, SIZE, 2)) < 0.4, 255, 0).astype(np.uint8)
    assert not any(same_everywhere(net, images).values())


def test_a_residual_of_codes_stays_codes():
    net = network(np.random.default_rng(5), 3, "hard", False, "codes", 8, False)
    layout = plan.lay_out(net.program)
    ops = [op for stage in layout.stages for op in stage.ops]
    assert "affine" not in [op.name for op in ops]
    (add,) = [op for op in ops if op.name == "add_scaled"]
    assert add.inputs == ("x", "spikes")
    (step,) = [step for stage in layout.stages for step in plan.steps(stage, layout) if step.scaled is not None]
    assert step.op is not None and step.op.name == "conv" and step.residual == "spikes"


def test_other_sums_are_left_alone():
    net = network(np.random.default_rng(5), 3, "hard", False, "potentials", 8, False)
    assert "add_scaled" not in [op.name for stage in plan.lay_out(net.program).stages for op in stage.ops]

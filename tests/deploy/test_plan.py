"""The compiled plan computes what the op-by-op path computes; stages, places and epilogues are what they should be."""
from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bitspike.deploy import Net, kernels, plan
from bitspike.deploy.artifact import encode, pack_codes, parse
from bitspike.deploy.errors import KernelError
from bitspike.deploy.program import OPS, Program

from .random_programs import random_artifact, random_images

SEEDS = range(60)


def net_of(seed: int, length: int = 14) -> Net:
    return Net(parse(encode(*random_artifact(seed, length))))


def by_trace(net: Net, images: np.ndarray) -> np.ndarray:
    """Logits of the op-by-op path on the numpy definitions."""
    before = kernels.active()
    kernels.use("numpy")
    try:
        values = net.trace(images)
    finally:
        kernels.use(before)
    return values[net.program.output][0, :, 0, 0].astype(np.float32) * np.float32(2.0 ** -net.header["fraction_bits"])


compiled_sets = pytest.mark.skipif(len(kernels.available()) == 1, reason="there is no compiled extension")


@compiled_sets
@pytest.mark.parametrize("seed", SEEDS)
def test_plan_equals_trace(seed: int):
    net = net_of(seed, length=20)
    images = random_images(net.header, 5, seed)
    expected = by_trace(net, images)
    for name in kernels.available()[1:]:
        kernels.use(name)
        for threads in (1, 2, 3, 7):
            np.testing.assert_array_equal(net(images, threads=threads), expected, err_msg=f"{name}, {threads} threads")


def overlapping(layout: plan.Layout) -> list[tuple[str, str]]:
    """Pairs of values that share bytes while both are needed, but for a sum in the place of its residual."""
    sums = {(op.output, name) for stage in layout.stages for op in stage.ops if op.name == "add" for name in op.inputs}
    born: dict[str, int] = {}
    last: dict[str, int] = dict.fromkeys(layout.outputs, len(layout.stages))
    for index, stage in enumerate(layout.stages):
        for op in stage.ops:
            born[op.output] = index
            for name in op.inputs:
                last[name] = index
    found = []
    for a, b in itertools.combinations(born, 2):
        pa, pb = layout.places[a], layout.places[b]
        if pa.where != pb.where or (pa.where == "tile" and born[a] != born[b]):
            continue
        if pa == pb and ((a, b) in sums or (b, a) in sums):
            continue
        if pa.where == "arena":
            together = born[a] <= last.get(b, born[b]) and born[b] <= last.get(a, born[a])
            size = {name: layout.values[name].image_bytes for name in (a, b)}
        else:
            together = True
            size = {n: layout.values[n].image_bytes // (layout.values[n].height * layout.values[n].width) for n in (a, b)}
        if together and pa.offset < pb.offset + size[b] and pb.offset < pa.offset + size[a]:
            found.append((a, b))
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_places_never_overlap(seed: int):
    layout = plan.lay_out(net_of(seed, length=30).program)
    assert overlapping(layout) == []
    for name, place in layout.places.items():
        assert place.offset % plan.ALIGN == 0
        if place.where == "arena":
            assert place.offset + layout.values[name].image_bytes <= layout.arena_bytes


def test_an_overlap_would_be_seen():
    layout = plan.lay_out(net_of(3, length=30).program)
    arena = [name for name, place in layout.places.items() if place.where == "arena"]
    broken = {name: plan.Place("arena", 0) if name in arena else place for name, place in layout.places.items()}
    assert overlapping(plan.Layout(layout.stages, layout.values, broken, layout.outputs, layout.arena_bytes)) != []


@pytest.mark.parametrize("seed", range(20))
def test_every_needed_value_is_made_once(seed: int):
    program = net_of(seed, length=30).program
    layout = plan.lay_out(program)
    ops = [op for stage in layout.stages for op in stage.ops]
    assert sorted(op.output for op in ops) == sorted({op.output for op in ops})
    made = {"pixels"}
    for stage in layout.stages:
        for op in stage.ops:
            assert set(op.inputs) <= made, "reads what is not there yet"
            made.add(op.output)
    assert set(layout.outputs) <= set(made)
    for stage in layout.stages:
        if not stage.compiled:
            continue
        done: list[str] = []
        for step in plan.steps(stage, layout):
            done += step.ops if step.op is None or step.op.name == "conv" else [step.op.output]
        kept = {op.output for op in stage.ops if layout.places[op.output].where == "arena"}
        assert kept <= set(done), "a value that others read is not written"
        assert len(done) == len(set(done))


@pytest.fixture(scope="module")
def cifar() -> Program:
    from bitspike.deploy import load
    return load("cifar10").program


def test_the_shipped_network_is_fused(cifar: Program):
    layout = plan.lay_out(cifar)
    assert len(layout.stages) < 0.6 * len(cifar.ops)
    convs = [step for stage in layout.stages for step in plan.steps(stage, layout) if step.op and step.op.name == "conv"]
    assert len(convs) == sum(op.name == "conv" for op in cifar.ops)
    assert sum(bool(step.codes) for step in convs) > len(convs) / 2, "quantizers run in registers"
    assert any(step.residual for step in convs), "residual sums run in registers"
    assert layout.arena_bytes < 2 * cifar.live_bytes


def test_dead_ops_are_left_out():
    net = net_of(5, length=40)
    layout = plan.lay_out(net.program)
    readers = {name for stage in layout.stages for op in stage.ops for name in op.inputs}
    assert all(op.output in readers or op.output in layout.outputs for stage in layout.stages for op in stage.ops)


def test_codes_are_pooled_instead_of_potentials():
    swapped = 0
    for seed in range(100):
        net = net_of(seed, length=30)
        ops, values = plan.pool_codes(net.program.ops, net.program.values, net.program.outputs)
        swapped += sum(values[op.inputs[0]].kind != "i32" for op in ops if op.name == "maxpool") > sum(
            net.program.values[op.inputs[0]].kind != "i32" for op in net.program.ops if op.name == "maxpool"
        )
    assert swapped > 0


def test_a_hostile_number_of_values_is_placed_quickly():
    space = plan._Space()
    for i in range(10_000):
        space.take(64, i, 10**9)
    assert space.top == 640_000
    space = plan._Space()
    for i in range(10_000):  # alive for a while each: the arena does not grow without end
        space.take(64, i, i + 500)
    assert space.top < 2 * 501 * 64


def streaming() -> tuple[Net, np.ndarray]:
    """Two convolutions whose sum is a stream, to which two more convolutions of its neurons add, one after the other."""
    rng = np.random.default_rng(2)
    scheme = {"kind": "uniform", "bits": 4}
    tensors = {name: pack_codes(rng.integers(-8, 8, (40, 3, 3, channels)), scheme)
               for name, channels in (("wa", 3), ("wb", 3), ("wc", 40), ("we", 40))}
    tensors |= {"m": rng.integers(90, 99, 40).astype(np.int32), "b": rng.integers(-99, 99, 40).astype(np.int32)}
    conv = {"op": "conv", "scheme": scheme, "stride": [1, 1], "padding": [1, 1], "groups": 1, "s": 4, "m": "m", "b": "b"}
    neuron = {"op": "quantize", "m": 1, "s": 10, "lo": 0, "hi": 4, "dtype": "u8"}

    def layer(source: str, name: str, channels: int, most: int) -> dict:
        return {**conv, "in": [source], "out": name, "weight": f"w{name}", "shape": [40, channels, 3, 3], "range": [0, most]}

    program = [
        layer("pixels", "a", 3, 255), layer("pixels", "b", 3, 255),
        {"op": "add", "in": ["a", "b"], "out": "s"}, {**neuron, "in": ["s"], "out": "n"},
        layer("n", "c", 40, 4), {"op": "add", "in": ["c", "s"], "out": "s2"}, {**neuron, "in": ["s2"], "out": "n2"},
        layer("n2", "e", 40, 4), {"op": "add", "in": ["s2", "e"], "out": "s3"},
        {"op": "mean", "in": ["s3"], "out": "logits", "over": "space", "m": 1},
    ]
    header = {"name": "stream", "input": {"height": 9, "width": 19, "channels": 3, "resize": None},
              "classes": [str(i) for i in range(40)], "time_steps": 1, "fraction_bits": 8, "program": program,
              "output": "logits", "provenance": {}}
    return Net(parse(encode(header, tensors))), rng.integers(0, 256, (3, 9, 19, 3)).astype(np.uint8)


@compiled_sets
def test_convolutions_that_are_added_are_one_stage_and_sums_take_the_place_of_their_residual():
    net, images = streaming()
    layout = plan.lay_out(net.program)
    assert [[op.output for op in stage.ops] for stage in layout.stages][:2] == [["a", "b", "s", "n"], ["c", "s2", "n2"]]
    assert layout.places["a"].where == layout.places["b"].where == "tile"
    assert layout.places["s"] == layout.places["s2"] == layout.places["s3"]
    assert overlapping(layout) == []
    wanted = by_trace(net, images)
    for name in kernels.available()[1:]:
        kernels.use(name)
        for threads in (1, 2, 5):
            for batch in (images, images[:1]):
                np.testing.assert_array_equal(net(batch, threads=threads), wanted[: len(batch)], err_msg=f"{name}, {threads}")
    kernels.use(kernels.available()[-1])


def spiking(share: float, batch: int = 3, most: int = 1) -> tuple[Net, np.ndarray]:
    """A network whose second convolution reads rare or frequent events: 0 and 1, or counts up to `most`."""
    rng = np.random.default_rng(1)
    scheme = {"kind": "uniform", "bits": 4}
    tensors = {"w": pack_codes(rng.integers(-8, 8, (128, 3, 3, 64)), scheme), "m": np.full(128, 99, np.int32),
               "w2": pack_codes(rng.integers(-8, 8, (7, 1, 1, 128)), scheme), "m2": np.full(7, 99, np.int32),
               "one": pack_codes(np.tile(np.eye(3, dtype=int), (22, 1))[:64, None, None], scheme),
               "m0": np.full(64, 1 << 12, np.int32), "b0": np.zeros(64, np.int32)}
    tensors |= {"b": np.zeros(128, np.int32), "b2": np.zeros(7, np.int32)}
    conv = {"op": "conv", "scheme": scheme, "stride": [1, 1], "padding": [0, 0], "groups": 1, "s": 8}
    program = [
        {**conv, "in": ["pixels"], "out": "x", "weight": "one", "shape": [64, 3, 1, 1], "m": "m0", "b": "b0",
         "range": [0, 255]},
        {"op": "quantize", "in": ["x"], "out": "spikes", "m": most, "s": 12, "lo": 0, "hi": most, "dtype": "u8"},
        {**conv, "in": ["spikes"], "out": "y", "weight": "w", "shape": [128, 64, 3, 3], "padding": [1, 1], "m": "m", "b": "b",
         "range": [0, most], "layer": "sparse"},
        {"op": "quantize", "in": ["y"], "out": "n", "m": 1, "s": 6, "lo": 0, "hi": 4, "dtype": "u8"},
        {**conv, "in": ["n"], "out": "z", "weight": "w2", "shape": [7, 128, 1, 1], "m": "m2", "b": "b2", "range": [0, 4]},
        {"op": "mean", "in": ["z"], "out": "logits", "over": "space", "m": 1},
    ]
    header = {"name": "events", "input": {"height": 16, "width": 16, "channels": 3, "resize": None},
              "classes": list("abcdefg"), "time_steps": 1, "fraction_bits": 8, "program": program, "output": "logits",
              "provenance": {}}
    codes = rng.integers(1, most + 1, (batch, 16, 16, 3))
    images = np.where(rng.random(codes.shape) < share, codes * 255 // most, 0).astype(np.uint8)
    return Net(parse(encode(header, tensors))), images


@compiled_sets
@compiled_sets
def test_a_plan_that_runs_in_parts_learns_the_density_of_all():
    """More parts than first calls that count codes, one stage each."""
    parts, size, channels = 12, 8, 64
    rng = np.random.default_rng(0)
    made = kernels.extension().Plan(kernels.available()[-1])
    value = made.value("u8", "pixels", (1, channels), (size, size), 0)
    for i in range(parts):
        y = made.value("u8", "arena", (1, channels), (size, size), i * size * size * channels)
        made.stage((size, size), size)
        w, ones = rng.integers(-3, 4, (channels, 1, 1, channels)).astype(np.int8), np.full(channels, 4096, np.int32)
        codes = [(y, np.array([1], np.int32), 3, 0, 4)]
        made.conv(value, w, (1, 1), (0, 0), 1, np.zeros(channels, np.int16), ones, 12, 0 * ones, (0, 4), -1, -1, codes)
        value = y
    end = parts * size * size * channels
    made.done(made.value("i32", "arena", (1, channels), (1, 1), end), 1.0, end + 4 * channels)
    arena, images = np.zeros(end + 4 * channels, np.uint8), rng.integers(0, 5, (1, 1, size, size, channels)).astype(np.uint8)
    for _ in range(64):
        for stage in range(parts):
            made.run_part(images, arena, stage, stage + 1, 1, np.empty(0))
    for i, layer in enumerate(made.layers()[1:]):
        codes = arena[i * size * size * channels : (i + 1) * size * size * channels]
        assert layer["density"] == pytest.approx((codes != 0).mean())


def test_the_variant_follows_the_density():
    kernels.use(kernels.available()[-1])
    for share, expected in ((0.01, {"events"}), (0.9, {"dense", "narrow", "winograd", "matrix"})):
        net, images = spiking(share)
        wanted = by_trace(net, images)
        for _ in range(3):  # the first call does not know the density yet, the others do
            np.testing.assert_array_equal(net(images, threads=2), wanted)
        (row,) = [row for row in net.explain(images) if row.layer == "sparse"]
        assert row.density == pytest.approx((images != 0).mean(), abs=0.02)
        if "events" in row.able:  # a matrix unit may be faster than any number of events
            assert row.variant in expected or row.variant == "matrix"


@compiled_sets
@pytest.mark.parametrize("most", [2, 4, 9, 15])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_counts_are_events_one_by_one_or_bit_by_bit(most: int, share: float):
    """The first call lists a code as often as it says, later ones by its bits where those are fewer."""
    net, images = spiking(share, most=most)
    wanted = by_trace(net, images)
    for name in kernels.available()[1:]:
        kernels.use(name)
        np.testing.assert_array_equal(net(images, threads=1), wanted, err_msg=name)
        inside = net.executor._compiled[name].plan
        for index, layer in enumerate(inside.layers()):
            inside.force(index, "events" if "events" in layer["able"] else "")
        for _ in range(2):
            np.testing.assert_array_equal(net(images, threads=2), wanted, err_msg=name)
        (_, sparse, _) = inside.layers()
        assert sparse["by_bits"] == (name in ("avx512", "amx") and share > 0.1)
    kernels.use(kernels.available()[-1])


@compiled_sets
@pytest.mark.parametrize("seed", range(12))
def test_every_variant_gives_the_same_numbers(seed: int):
    """Forced on every layer that is able, one after the other."""
    for name in kernels.available()[1:]:
        kernels.use(name)
        net = net_of(seed, length=20)
        images = random_images(net.header, 2, seed)
        wanted = by_trace(net, images)
        net(images, threads=1)
        inside = net.executor._compiled[name].plan
        for index, layer in enumerate(inside.layers()):
            for variant in layer["able"]:
                inside.force(index, variant)
                np.testing.assert_array_equal(net(images, threads=2), wanted, err_msg=f"{name} {variant}")


@compiled_sets
def test_explain_times_every_stage():
    kernels.use(kernels.available()[-1])
    for seed in range(6):  # with and without ops that are left to numpy
        net = net_of(seed, length=20)
        rows = net.explain(random_images(net.header, 2), threads=2, repeats=2)
        layout = plan.lay_out(net.program)
        assert [row.ops for row in rows] == [tuple(op.name for op in stage.ops) for stage in layout.stages]
        assert all(row.ms >= 0 for row in rows) and any(row.ms > 0 for row in rows)
        assert sum(row.macs for row in rows) == sum(op.macs for stage in layout.stages for op in stage.ops)
        assert all((row.variant is None) == ("conv" not in row.ops) for row in rows)
    kernels.use("numpy")
    try:
        with pytest.raises(KernelError, match="op by op"):
            net.explain(random_images(net.header, 1))
    finally:
        kernels.use(kernels.available()[-1])


@compiled_sets
def test_several_threads_share_one_net_and_its_plan():
    net, images = spiking(0.3, batch=8)
    wanted = by_trace(net, images)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda n: net(images, threads=1 + n % 3), range(24)):
            np.testing.assert_array_equal(found, wanted)


@compiled_sets
@pytest.mark.parametrize("missing", ["lif", "affine", "mean", "coincidences", "quantize", "conv"])
def test_ops_without_a_kernel_are_left_to_their_definition(missing: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "_COMPILED", {name: known for name, known in plan._COMPILED.items() if name != missing})
    kernels.use(kernels.available()[-1])
    left = 0
    for seed in range(8):
        net = net_of(seed, length=20)
        images = random_images(net.header, 3, seed)
        np.testing.assert_array_equal(net(images, threads=2), by_trace(net, images))
        left += not net.executor._compiled[kernels.active()].whole
        assert len(net.explain(images, repeats=1)) == len(plan.lay_out(net.program).stages)
    assert left > 0


def test_every_op_of_the_format_has_a_compiled_step():
    assert set(plan._COMPILED) == set(OPS) | {"add_scaled"}

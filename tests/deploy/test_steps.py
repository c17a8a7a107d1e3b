"""Step by step gives the integers of the whole sequence; state is stored at its bits; memory does not grow."""
from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitspike.deploy import Net, kernels
from bitspike.deploy.artifact import encode, pack_codes, parse
from bitspike.deploy.errors import StepError
from bitspike.deploy.steps import Steps, pack_state, unpack_state

from .random_programs import random_artifact, random_images


def step_nets(count: int = 80) -> list[int]:
    """Seeds of random programs that can be stepped."""
    seeds = []
    for seed in range(count):
        try:
            Steps(Net(parse(encode(*random_artifact(seed)))))
        except StepError:
            continue
        seeds.append(seed)
    return seeds


SEEDS = step_nets()


def test_most_random_programs_can_be_stepped():
    assert len(SEEDS) > 40


@pytest.mark.parametrize("seed", SEEDS)
def test_after_T_pushes_the_logits_are_those_of_the_whole_sequence(seed: int):
    net = Net(parse(encode(*random_artifact(seed))))
    images = random_images(net.header, 3, seed)
    expected = net(images)
    steps = Steps(net, batch=3)
    for _ in range(2):                        # a second time, after a reset
        for t in range(net.time_steps):
            assert steps.t == t
            logits = steps.push(images[t] if net.input_steps > 1 else images if t % 2 == 0 else None)
        np.testing.assert_array_equal(logits, expected)
        steps.reset()


def packed_net(bits: int, T: int = 6, frames: int = 6, side: int = 8, width: int = 16) -> Net:
    """A convolution, a neuron whose potential has `bits` bits (32: int32), a mean over space and time."""
    rng = np.random.default_rng(bits)
    scheme = {"kind": "uniform", "bits": 4}
    tensors = {"w": pack_codes(rng.integers(-8, 8, (width, 3, 3, 2)), scheme), "m": np.full(width, 900, np.int32),
               "b": rng.integers(-9999, 9999, width).astype(np.int32)}
    neuron = {"in": ["x"], "out": "s", "decay": [1, 1], "gain": [1, 0], "threshold": 1 << 16, "reset": "soft", "steps": T,
              "strict": False}
    if bits == 32:
        neuron["op"] = "lif"
    else:
        high = 2 ** (bits - 1) - 1
        tensors["t"] = ((np.arange(-high + 1, high + 1) - 0.5) / high * (1 << 16)).astype(np.int32)
        neuron |= {"op": "lif_packed", "bits": bits, "table": "t", "decay": [(1 << 15) // high, 0]}
    program = [
        {"op": "conv", "in": ["pixels"], "out": "x", "weight": "w", "scheme": scheme, "shape": [width, 2, 3, 3],
         "stride": [1, 1], "padding": [1, 1], "groups": 1, "m": "m", "s": 3, "b": "b", "range": [0, 255]},
        neuron, {"op": "mean", "in": ["s"], "out": "a", "over": "space", "m": 1 << 16},
        {"op": "mean", "in": ["a"], "out": "logits", "over": "time", "m": 1}]
    source = {"height": side, "width": side, "channels": 2, "resize": None, "steps": frames}
    header = {"name": "packed", "input": source, "classes": [str(i) for i in range(width)], "time_steps": T,
              "fraction_bits": 16, "program": program, "output": "logits", "provenance": {}}
    return Net(parse(encode(header, tensors)))


@pytest.mark.parametrize("bits", range(2, 9))
def test_potentials_are_stored_at_their_bits(bits: int):
    net, full = packed_net(bits), packed_net(32)
    steps, wide = Steps(net, batch=2), Steps(full, batch=2)
    assert wide.state_bytes == 4 * 2 * 8 * 8 * 16
    frames = random_images(net.header, 2)
    for frame in frames:
        logits = steps.push(frame)
        assert steps.state_bytes * 32 == wide.state_bytes * bits    # really: the arrays that are held
    np.testing.assert_array_equal(logits, net(frames))
    assert 0 < logits.mean() < 1


def test_logits_in_between_are_the_mean_so_far():
    net = packed_net(32)
    frames = random_images(net.header, 1)
    spikes = net.trace(frames)["s"].mean((2, 3))
    steps = Steps(net)
    for t, frame in enumerate(frames):
        logits = steps.push(frame[0])         # one frame without its batch
        np.testing.assert_allclose(logits, spikes[: t + 1].mean(0), atol=2**-15)


def test_what_a_picture_gives_is_computed_once_and_a_new_picture_is_noticed():
    net = packed_net(4, frames=1)
    images = random_images(net.header, 2)
    count = 0
    real = net.executor.bound_ops()[0]

    def counted(inputs, threads):
        nonlocal count
        count += 1
        return real(inputs, threads)

    net.executor._bound[kernels.active()][0] = counted
    steps = Steps(net)
    for _ in range(net.time_steps):
        logits = steps.push(images[:1])
    assert count == 1
    np.testing.assert_array_equal(logits, net(images[:1]))
    before = count
    steps.reset()
    steps.push(images[:1])
    assert count == before
    picture = images[1:2].copy()
    steps.reset()
    steps.push(picture)
    assert count == before + 1
    picture[:] = 0                            # the caller's array is the caller's
    for _ in range(net.time_steps - 1):
        logits = steps.push()
    np.testing.assert_array_equal(logits, net(images[1:2]))


def test_more_than_T_steps_in_constant_memory():
    net = packed_net(8, side=16)
    steps = Steps(net)
    assert steps.endless
    frame = random_images(net.header, 1)[0]
    for _ in range(5):
        steps.push(frame)
    tracemalloc.start()
    steps.push(frame)
    once = tracemalloc.get_traced_memory()[1]
    for _ in range(100):
        steps.push(frame)
    assert tracemalloc.get_traced_memory()[1] < 1.2 * once
    tracemalloc.stop()
    assert steps.t == 106


def test_what_cannot_go_on_says_so():
    one = packed_net(32, T=1, frames=1)
    steps = Steps(one)
    image = random_images(one.header, 1)
    with pytest.raises(StepError, match="first push needs one"):
        steps.push()
    np.testing.assert_array_equal(steps.push(image), one(image))
    with pytest.raises(StepError, match=r"1 steps were pushed.*reset"):
        steps.push(image)
    frames = Steps(packed_net(4))
    with pytest.raises(StepError, match="needs one at every step"):
        frames.push()
    with pytest.raises(ValueError, match="shape"):
        frames.push(image[..., :1])
    with pytest.raises(ValueError, match="batch of 2"):
        frames.push(np.concatenate([image, image]))
    with pytest.raises(TypeError, match="uint8"):
        frames.push(image.astype(float))
    for batch in (0, True, 1.5):
        with pytest.raises(ValueError, match="batch"):
            Steps(one, batch=batch)


def test_a_network_that_looks_ahead_is_refused():
    net = packed_net(32)
    header = dict(net.header)
    neuron = {**header["program"][1], "in": ["logits"], "out": "late"}
    again = {"op": "mean", "in": ["late"], "out": "end", "over": "time", "m": 1}
    header |= {"program": [*header["program"], neuron, again], "output": "end"}
    ahead = Net(parse(encode(header, net._artifact.tensors)))
    with pytest.raises(StepError, match="mean over all T steps"):
        Steps(ahead)


def test_a_mean_of_a_mean_is_taken_once():
    net = packed_net(32)
    header = dict(net.header)
    header |= {"program": [*header["program"], {"op": "mean", "in": ["logits"], "out": "end", "over": "time", "m": 1}],
               "output": "end"}
    twice = Net(parse(encode(header, net._artifact.tensors)))
    images = random_images(header, 2)
    steps = Steps(twice, batch=2)
    for frame in images:
        logits = steps.push(frame)
    np.testing.assert_array_equal(logits, twice(images))


@given(st.integers(2, 8), st.integers(0, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_state_survives_packing(bits: int, count: int, seed: int):
    high = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(seed).integers(-high, high + 1, (1, count, 1, 1)).astype(np.int8)
    packed = pack_state(codes, bits)
    assert packed.nbytes == (count * bits + 7) // 8
    np.testing.assert_array_equal(unpack_state(packed, bits, codes.shape), codes)

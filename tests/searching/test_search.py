"""The three methods on one interface: they keep budgets, repeat themselves, go on after a kill, and say what is wrong."""
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import nn

from bitspike.cost import technology
from bitspike.layers import codes, quantize_
from bitspike.neurons import IELIF, LIF
from bitspike.searching import CANDIDATES, Budget, SearchData, SearchError, make_space, parse_candidates, search
from bitspike.searching.blackbox import Options as BlackBox
from bitspike.searching.costs import Costs
from bitspike.searching.differentiable import Options as Differentiable
from bitspike.searching.measure import Bench, Journal, plain_copy, renew_norms
from bitspike.spec import QuantSpec, Scheme

FEW = parse_candidates("binary uniform:2 pow2:4 uniform:8")
METHODS = [("sensitivity", "loss", None), ("sensitivity", "fisher", None),
           ("differentiable", "loss", Differentiable(steps=6, batch=8)), ("blackbox", "loss", BlackBox(trials=12))]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), IELIF(4), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), IELIF(4),
                         nn.Flatten(), nn.Linear(8 * 4, 3)).eval()


def pictures(count=40):
    draw = torch.Generator().manual_seed(1)
    return SearchData(torch.randn(count, 1, 6, 6, generator=draw), torch.randint(3, (count,), generator=draw), count // 2)


class Stop(Exception):
    pass


def stop_at(number):
    calls = []

    def tell(text, done, total):
        calls.append(text)
        if len(calls) == number:
            raise Stop

    return tell


@pytest.mark.parametrize("method,measure,options", METHODS)
@pytest.mark.parametrize("budget", ["bits=3", "bytes=650", "energy=1uJ bits=5"])
def test_budgets_hold_and_the_spec_fits(method, measure, options, budget):
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    spec, report = search(net, FEW, budget, pictures(), method=method, measure=measure, options=options)
    limits, found = Budget.parse(*budget.split()), report.searched.totals
    assert limits.bits is None or found.bits <= limits.bits + 1e-9
    assert limits.bytes is None or found.bytes <= limits.bytes
    assert limits.energy_pj is None or found.energy_pj <= limits.energy_pj
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    quantize_(net, QuantSpec.from_json(spec.to_json()))
    assert all(codes(net[int(name)])[0].dtype == torch.int32 for name in spec.resolve(["0", "3", "7"]))
    names = [p.name for p in report.points]
    assert names[0] == "full precision" and "uniform, 2 bits" in names and "power of two, 4 bits" in names
    assert json.loads(json.dumps(report.to_dict()))["searched"]["bits"] == found.bits
    assert report.point("full precision").totals.bytes == 4 * (72 + 576 + 96)


@pytest.mark.parametrize("method,measure,options", METHODS)
def test_a_killed_search_goes_on_to_the_same_result(tmp_path, method, measure, options):
    if isinstance(options, Differentiable):
        options = Differentiable(steps=6, batch=8, save_every=2)
    asked = {"method": method, "measure": measure, "options": options, "seed": 3}
    whole, report = search(network(), FEW, "bits=3", pictures(), out=tmp_path / "whole", **asked)
    with pytest.raises(Stop):
        search(network(), FEW, "bits=3", pictures(), out=tmp_path / "cut", tell=stop_at(5), **asked)
    resumed, again = search(network(), FEW, "bits=3", pictures(), out=tmp_path / "cut", **asked)
    assert resumed == whole and again.damage == report.damage
    assert [p.to_dict() for p in again.points] == [p.to_dict() for p in report.points]


def test_what_was_measured_is_not_measured_again(tmp_path):
    search(network(), FEW, "bits=3", pictures(), out=tmp_path)
    size = (tmp_path / "measurements.jsonl").stat().st_size
    search(network(), FEW, "bits=3", pictures(), out=tmp_path)
    assert (tmp_path / "measurements.jsonl").stat().st_size == size


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, {"a": 1}).get("x", lambda: {"v": 1})
    path.write_text(path.read_text() + '{"key": "y", "resu')
    again = Journal(path, {"a": 1})
    assert again.get("x", lambda: {"v": 2}) == {"v": 1} and again.get("y", lambda: {"v": 3}) == {"v": 3}
    assert Journal(path, {"a": 1}).results == {"x": {"v": 1}, "y": {"v": 3}}


def test_a_folder_of_another_search_is_refused(tmp_path):
    search(network(), FEW, "bits=3", pictures(), out=tmp_path)
    other = network()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(SearchError, match="another search"):
        search(other, FEW, "bits=3", pictures(), out=tmp_path)


def test_sensitivity_beats_the_worst_at_equal_bits():
    """Of all choices within the budget, its sum of measured damages is the least."""
    _, report = search(network(), FEW, "bits=3", pictures())
    total = sum(report.damage[n][f"{s.kind}:{s.bits}"] for n, s in report.searched.choice.items())
    space = make_space(network(), FEW)
    for seed in range(20):
        choice = space.random(seed, 3)
        assert total <= sum(report.damage[n][f"{s.kind}:{s.bits}"] for n, s in choice.items()) + 1e-9


def test_drop_finds_the_cheapest_that_keeps_it():
    _, tight = search(network(), FEW, "drop=0", pictures())
    _, loose = search(network(), FEW, "drop=60", pictures())
    full = tight.point("full precision").top1
    assert full - tight.searched.top1 <= 0 and full - loose.searched.top1 <= 60
    assert loose.searched.totals.bytes <= tight.searched.totals.bytes
    assert loose.searched.totals.bits == 1


def test_unreachable_budgets_are_refused_before_any_work(tmp_path):
    for method in ("sensitivity", "differentiable", "blackbox"):
        with pytest.raises(SearchError, match="down to bits=1, bytes="):
            search(network(), FEW, "bits=0.5", pictures(), method=method, out=tmp_path / method)
        assert not (tmp_path / method).exists()
    net, data = network(), pictures()
    own = SearchData(data.images, net(data.images).argmax(1), data.norms)  # the full-precision network is always right
    with pytest.raises(SearchError, match=r"drop=0\.0001.*loses"):
        search(net, [Scheme("binary")], "drop=0.0001", own)
    with pytest.raises(SearchError, match="must be known beforehand"):
        search(network(), FEW, "drop=1", pictures(), method="differentiable")


def test_losses_that_are_not_finite_name_the_candidate():
    net = network()
    with pytest.raises(SearchError, match="full-precision network gives logits"):
        search(net, FEW, "bits=3", pictures(), forward=lambda model, x: model(x) * float("inf"))
    with torch.no_grad():
        net[7].weight[0, 0] = float("nan")
    with pytest.raises(SearchError, match=r"7\.weight holds values that are not finite"):
        search(net, FEW, "bits=3", pictures())

    class Overflows(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            weight = self.net[3].weight
            y = self.net(x)
            return y if len(weight.unique()) > 32 else y * float("inf")  # "overflows" once conv 3 has few levels

    with pytest.raises(SearchError, match=r"net\.3 binary:1.*not finite"):
        search(Overflows(), FEW, "bits=3", pictures())


@pytest.mark.parametrize("asked,match", [({"method": "magic"}, "sensitivity, differentiable, blackbox"),
                                         ({"measure": "hope"}, "fisher"),
                                         ({"cheap": "time"}, "bytes, energy")])
def test_unknown_methods(asked, match):
    with pytest.raises(SearchError, match=match):
        search(network(), FEW, "bits=3", pictures(), **asked)


def test_options_that_cannot_be_meant():
    with pytest.raises(SearchError, match="trials=0; at least 1"):
        BlackBox(trials=0)
    with pytest.raises(SearchError, match="steps=0; it must be"):
        Differentiable(steps=0)
    for storage in ("nonsense://x", "nothing", "sqlite:////no/such/folder/x.db"):
        with pytest.raises(SearchError, match="cannot be opened"):
            search(network(), FEW, "bits=3", pictures(), method="blackbox", options=BlackBox(2, storage))


def test_a_data_base_is_shared_between_searches(tmp_path):
    shared = f"sqlite:///{tmp_path / 'search.db'}"
    search(network(), FEW, "bits=3", pictures(), method="blackbox", options=BlackBox(4, shared))
    said = []
    search(network(), FEW, "bits=3", pictures(), method="blackbox", options=BlackBox(6, shared),
           tell=lambda text, done, total: said.append((text, done)))
    assert [done for text, done in said if text == "trials"] == [5, 6]


def test_data_that_cannot_be_meant():
    with pytest.raises(SearchError, match="needs data"):
        search(network(), FEW, "bits=3")
    with pytest.raises(SearchError, match="as many are needed"):
        SearchData(torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(SearchError, match=r"norms=9; allowed: 0\.\.3"):
        SearchData(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), 9)


def test_any_module_and_any_call():
    """A network with its own neurons and state, called in its own way."""

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.v = nn.Linear(5, 16), nn.Linear(16, 2), None

        def forward(self, x):
            self.v = self.a(x) if self.v is None else self.v + self.a(x)
            return self.b((self.v > 0.5).float())

    def forward(model, x):
        model.v = None
        return torch.stack([model(x) for _ in range(2)])

    data = SearchData(torch.randn(20, 5), torch.randint(2, (20,)))
    spec, report = search(Foreign(), FEW, "bits=4", data, forward=forward)
    assert set(dict(spec.rules)) == {"a", "b"} and report.searched.totals.bits <= 4


def test_quantized_networks_are_searched_from_their_trained_weights():
    net = network()
    latent = net[3].weight.detach().clone()
    quantize_(net, QuantSpec({"*": Scheme("uniform", 2)}))
    assert torch.equal(plain_copy(net)[3].weight, latent)
    assert not torch.equal(net[3].weight, latent)


def test_bench_measures_and_restores():
    bench = Bench(network(), pictures())
    before = {k: v.clone() for k, v in bench.model.state_dict().items()}
    first = bench.measure({"0": Scheme("uniform", 2)})
    assert first.divergence > 0 and bench.measure({"0": Scheme("uniform", 2)}) == first
    assert bench.measure({}).divergence == pytest.approx(0, abs=1e-7)
    assert all(torch.equal(v, before[k]) for k, v in bench.model.state_dict().items())
    eight, two = (bench.measure({n: Scheme("uniform", b, options={"step": "normal"}) for n in ("0", "3", "7")}) for b in (8, 2))
    assert eight.divergence < two.divergence


def test_renewed_norms_are_those_of_the_images():
    net, x = network(), pictures().images
    renew_norms(net, x, batch=40)
    assert torch.allclose(net[1].running_mean, net[0](x).mean((0, 2, 3)), atol=1e-6)
    assert not net[1].training and net[1].momentum == 0.1


def test_costs_add_up():
    space = make_space(network(), FEW)
    costs = Costs(network(), pictures().images[:4], space, overhead_bytes=50)
    choice = {n: Scheme("uniform", 2) for n in space.layers}
    totals = costs.of(choice)
    assert totals.weight_bytes == (72 + 576 + 96) // 4 and totals.bits == 2
    assert totals.bytes == 50 + totals.weight_bytes + 8 * (8 + 8 + 3)
    assert costs.of_float().energy_pj > totals.energy_pj
    part = make_space(network(), {"0": CANDIDATES})
    left = Costs(network(), pictures().images[:4], part).of({"0": Scheme("uniform", 2)})
    assert left.bytes == (72 // 4 + 64) + (576 + 64) + (96 + 24)  # the others are stored with 8 bits


def test_energy_counts_the_state_of_neurons():
    class Net(nn.Module):
        def __init__(self, steps):
            super().__init__()
            torch.manual_seed(0)
            self.steps, self.conv, self.lif, self.head = steps, nn.Conv2d(1, 4, 3), LIF(), nn.Linear(64, 2)

        def forward(self, x):
            s = self.lif(self.conv(x).unsqueeze(0).repeat(self.steps, 1, 1, 1, 1))
            return self.head(s.flatten(2))

    def fixed(steps):
        net = Net(steps)
        return Costs(net, pictures().images[:4], make_space(net, FEW)).fixed_energy(1e3)

    assert fixed(1) == 0 and fixed(4) == pytest.approx(2 * 4 * 64 * 4 / 8 * 10)


def test_a_study_of_other_settings_is_refused(tmp_path):
    """Constraints are stored with the trials, so another technology or other candidates must not read them."""
    asked = {"method": "blackbox", "options": BlackBox(2), "out": tmp_path}
    search(network(), FEW, "bits=3", pictures(), **asked)
    for other in ({"technology": technology("bit_proportional")}, {"candidates": FEW[:3]}):
        with pytest.raises(SearchError, match="candidates, constants"):
            search(network(), **{"candidates": FEW, "budget": "bits=3", "data": pictures(), **asked, **other})


def test_a_trial_that_a_kill_cut_short_is_tried_again(tmp_path, monkeypatch):
    """The first trial, a uniform choice, dies with its process; nothing may be lost by that."""
    only = parse_candidates("uniform:2,8")
    whole, _ = search(network(), only, "bits=2", pictures(), method="blackbox", options=BlackBox(3), out=tmp_path / "a")
    measure, calls = Bench.measure, []

    def dies(self, choice):
        calls.append(choice)
        if len(calls) == 2:  # the first is the network without a spec
            raise SystemExit
        return measure(self, choice)

    monkeypatch.setattr(Bench, "measure", dies)
    with pytest.raises(SystemExit):
        search(network(), only, "bits=2", pictures(), method="blackbox", options=BlackBox(3), out=tmp_path / "b")
    monkeypatch.undo()
    again, _ = search(network(), only, "bits=2", pictures(), method="blackbox", options=BlackBox(3), out=tmp_path / "b")
    assert again == whole


@pytest.mark.parametrize("at", [2, 3, 7])
def test_a_killed_black_box_search_tries_what_it_would_have_tried(tmp_path, monkeypatch, at):
    """In the same order too: with as many trials as uniform choices, each of them counts."""
    only, asked = parse_candidates("uniform:2,4,8"), {"method": "blackbox", "options": BlackBox(7)}
    measure, tried = Bench.measure, []

    def counted(self, choice, dies_at=0):
        tried.append(choice)
        if len(tried) == dies_at:
            raise SystemExit
        return measure(self, choice)

    monkeypatch.setattr(Bench, "measure", counted)
    whole, _ = search(network(), only, "bits=4", pictures(), out=tmp_path / "a", **asked)
    wanted = tried[1:8]
    tried.clear()
    monkeypatch.setattr(Bench, "measure", lambda self, choice: counted(self, choice, at))
    with pytest.raises(SystemExit):
        search(network(), only, "bits=4", pictures(), out=tmp_path / "b", **asked)
    before = tried[1:at - 1]  # those that ended
    tried.clear()
    monkeypatch.setattr(Bench, "measure", counted)
    again, _ = search(network(), only, "bits=4", pictures(), out=tmp_path / "b", **asked)
    assert again == whole and before + tried[1:9 - len(before) - 1] == wanted


def test_measurements_and_steps_of_another_form_are_named(tmp_path):
    search(network(), FEW, "bits=3", pictures(), out=tmp_path)
    stored = tmp_path / "measurements.jsonl"
    head = stored.read_text().splitlines()[0]
    for line in ('{"x": 1}', '{"key": "float", "result": 3}', "5"):
        stored.write_text(f"{head}\n{line}\n")
        with pytest.raises(SearchError, match="no measurement"):
            search(network(), FEW, "bits=3", pictures(), out=tmp_path)
    asked = {"method": "differentiable", "options": Differentiable(steps=2, batch=8), "out": tmp_path / "d"}
    search(network(), FEW, "bits=3", pictures(), **asked)
    steps = tmp_path / "d" / "differentiable.pt"
    settings = torch.load(steps, weights_only=True)["settings"]
    for content in (3, {"step": 1}, {"settings": 3}, {"settings": settings, "step": 1}):
        torch.save(content, steps)
        with pytest.raises(SearchError, match="damaged"):
            search(network(), FEW, "bits=3", pictures(), **asked)


def test_black_box_makes_small_what_is_asked():
    found = {cheap: search(network(), FEW, "drop=100", pictures(), method="blackbox", options=BlackBox(30), cheap=cheap)[1]
             for cheap in ("bytes", "energy")}
    assert found["energy"].searched.totals.energy_pj <= found["bytes"].searched.totals.energy_pj
    assert found["bytes"].searched.totals.bytes <= found["energy"].searched.totals.bytes


@pytest.mark.parametrize("name,method", [("optuna.journal", "blackbox"), ("differentiable.pt", "differentiable"),
                                         ("measurements.jsonl", "sensitivity")])
@pytest.mark.parametrize("content", [b"[]\n", b"5\n", b'{"subject": 5}\n', b"\xff\xfe\x80garbage\n"])
def test_damaged_files_of_a_search_are_named(tmp_path, name, method, content):
    (tmp_path / name).write_bytes(content)
    options = {"blackbox": BlackBox(2), "differentiable": Differentiable(steps=2, batch=8)}.get(method)
    with pytest.raises(SearchError, match="another --out"):
        search(network(), FEW, "bits=3", pictures(), method=method, options=options, out=tmp_path)
    assert (tmp_path / name).read_bytes().startswith(content)


def test_a_study_cut_in_half_is_named(tmp_path):
    asked = {"method": "blackbox", "options": BlackBox(3), "out": tmp_path}
    search(network(), FEW, "bits=3", pictures(), **asked)
    stored = tmp_path / "optuna.journal"
    lines = stored.read_bytes().splitlines(keepends=True)
    stored.write_bytes(b"".join(lines[:-4]) + lines[-4][:20] + b"\n" + b"".join(lines[-3:]))
    with pytest.raises(SearchError, match="damaged"):
        search(network(), FEW, "bits=3", pictures(), **asked)


def test_steps_of_other_costs_are_refused(tmp_path):
    asked = {"method": "differentiable", "options": Differentiable(steps=2, batch=8), "out": tmp_path}
    search(network(), FEW, "bits=3", pictures(), **asked)
    with pytest.raises(SearchError, match="another search"):
        search(network(), FEW, "bits=3", pictures(), technology=technology("bit_proportional"), **asked)


def test_a_network_with_dropout_goes_on_to_the_same_result(tmp_path):
    def dropping():
        net = network()
        net.insert(7, nn.Dropout(0.5))
        return net

    asked = {"method": "differentiable", "options": Differentiable(steps=6, batch=8, save_every=2), "seed": 1}
    logits = []
    for folder, kill in (("whole", False), ("cut", True)):
        if kill:
            with pytest.raises(Stop):
                search(dropping(), FEW, "bits=3", pictures(), out=tmp_path / folder, tell=stop_at(4), **asked)
        search(dropping(), FEW, "bits=3", pictures(), out=tmp_path / folder, **asked)
        logits.append(torch.load(tmp_path / folder / "differentiable.pt", weights_only=True)["logits"])
    assert all(torch.equal(logits[0][n], logits[1][n]) for n in logits[0])


@pytest.mark.slow
def test_processes_that_start_together_on_a_new_data_base_share_it(tmp_path):
    shared = f"sqlite:///{tmp_path / 'search.db'}"
    processes = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=processes) as pool:
        done = [pool.submit(shared_search, shared) for _ in range(3)]
        assert all(d.result(timeout=120) for d in done)


def shared_search(storage):
    torch.set_num_threads(1)
    return search(network(), FEW, "bits=3", pictures(), method="blackbox", options=BlackBox(9, storage))[0] is not None

"""A batch norm over two processes is the plain one on the whole batch: outputs, statistics and gradients."""
from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from bitspike.processes import SharedBatchNorm, share_, unshare_  # noqa: E402

#: how many of the six samples each of two processes has
PARTS = ((3, 3), (5, 1), (6, 0))
NORMS = {"plain": lambda: nn.BatchNorm2d(4), "fixed": lambda: nn.BatchNorm2d(4, affine=False, momentum=None),
         "sequence": lambda: nn.BatchNorm1d(4)}


def inputs(name: str):
    draw = torch.Generator().manual_seed(3)
    shape = (6, 4, 5) if name == "sequence" else (6, 4, 5, 2)
    x = torch.randn(shape, generator=draw, dtype=torch.float64) * 3 + 40
    return x, torch.randn(shape, generator=draw, dtype=torch.float64)


def through(name: str, part: slice, shared: bool) -> dict[str, torch.Tensor]:
    """Twice through the norm, with a loss that is no mean; the gradients of this part."""
    torch.manual_seed(0)
    net = nn.Sequential(NORMS[name]()).double()
    for p in net.parameters():
        nn.init.normal_(p)
    if shared:
        share_(net)
        assert isinstance(net[0], SharedBatchNorm)
    x, weight = (t[part] for t in inputs(name))
    x = x.clone().requires_grad_()
    y = net(net(x) + x)
    (y.sin() * weight).sum().backward()
    state = {f"state {key}": value.double() for key, value in net.state_dict().items()}
    grads = {f"grad {key}": p.grad for key, p in net.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **state, **grads}


def go(out: str) -> None:
    """What each of two processes runs."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name in NORMS:
        for first, second in PARTS:
            part = slice(first * rank, first + second * rank)
            torch.save(through(name, part, True), f"{out}/{name}{first}{second}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_over_two_processes(tmp_path: Path, two_processes):
    two_processes(__name__, __file__, tmp_path)
    for name in NORMS:
        whole = through(name, slice(None), False)
        for first, second in PARTS:
            parts = [torch.load(tmp_path / f"{name}{first}{second}{rank}.pt", weights_only=True) for rank in (0, 1)]
            for key, value in whole.items():
                if key in ("y", "dx"):
                    found = torch.cat([part[key] for part in parts])
                elif key.startswith("grad"):
                    found = parts[0][key] + parts[1][key]
                else:
                    found = parts[0][key]
                    assert torch.equal(found, parts[1][key]), key
                assert torch.allclose(found, value, rtol=1e-9, atol=1e-10), (name, first, key)


def test_alone_it_is_the_plain_norm():
    x = inputs("plain")[0].float()
    plain, shared = nn.BatchNorm2d(4), share_(nn.BatchNorm2d(4))
    assert torch.allclose(plain(x), shared(x), atol=1e-4) and torch.allclose(plain.running_var, shared.running_var)
    assert shared.state_dict().keys() == plain.state_dict().keys() and isinstance(shared, nn.BatchNorm2d)
    assert torch.equal(plain.eval()(x), shared.eval()(x))
    assert type(unshare_(shared)) is nn.BatchNorm2d


def test_what_is_shared():
    class Counts(nn.Module):
        over_processes = False

    net = nn.Sequential(nn.BatchNorm1d(2), Counts())
    share_(net, norms=False)
    assert type(net[0]) is nn.BatchNorm1d and net[1].over_processes
    assert not unshare_(share_(net))[1].over_processes
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        share_(net)[0](torch.zeros(1, 2, 3, 4))

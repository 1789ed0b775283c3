"""Residual adapters in a small convolutional net."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lora import peft
from lit_lora.peft.core.modules import own_modules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 4, 3, stride=2), nn.Linear(4, 5)
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def images() -> Tensor:
    return torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def adapted() -> Net:
    net = Net()
    peft.freeze(net)
    peft.methods()["residual"]().apply(net)
    return net


def test_nothing_changes_at_first_and_the_count_is_channels_squared_and_the_norms():
    assert torch.equal(adapted().eval()(images()), Net().eval()(images()))
    assert peft.count_parameters(adapted()).trainable == 36 + 16 + 2 * 6


def test_it_computes_its_equation():
    net = adapted().eval()
    adapter = own_modules(net)["first.adapter"]
    adapter.alpha.data.normal_()
    y = Net().first(images())
    expected = y + torch.einsum("oi,bihw->bohw", adapter.alpha[:, :, 0, 0], y)
    torch.testing.assert_close(net.first(images()), expected, atol=1e-5, rtol=1e-5)


def test_it_learns_while_the_base_and_its_statistics_stay_bit_for_bit():
    net = adapted().train()
    before = {name: value.clone() for name, value in peft.trainable_state(net).items()}
    labels = torch.arange(8) % 5
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(net(images()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(torch.equal(value, before[name]) for name, value in peft.trainable_state(net).items())
    peft.remove(net)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), Net().state_dict().values(), strict=True))
    assert torch.equal(net.eval()(images()), Net().eval()(images()))


def test_saved_and_loaded_it_gives_the_same(tmp_path):
    net = adapted()
    for value in peft.trainable_state(net).values():
        value.normal_()
    peft.save_adapter(net, peft.methods()["residual"](), tmp_path / "adapter", base="some/net")
    fresh = Net()
    peft.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh.eval()(images()), net.eval()(images()))

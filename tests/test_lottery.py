import copy

import pytest
import torch
from torch import nn

from core_helpers import same, small_net
from fastsparse.lottery import Snapshot, save_ticket
from fastsparse.sparsifier import Sparsifier


def train(model, opt=None, steps=2):
    model.train()
    for _ in range(steps):
        model(torch.randn(4, 3, 8, 8)).pow(2).sum().backward()
        if opt is not None: opt.step(), opt.zero_grad()


@pytest.mark.parametrize('make', [lambda ps: torch.optim.SGD(ps, .1, momentum=.9), lambda ps: torch.optim.Adam(ps, .1)])
def test_everything_comes_back_in_place(make):
    "Weights, BatchNorm statistics and optimizer state"
    model = small_net()
    opt = make(model.parameters())
    train(model, opt)
    before, state, ids = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict()['state']), [(id(p), p.data_ptr()) for p in model.parameters()]
    snapshot = Snapshot(model, opt)
    train(model, opt)
    assert not any(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    snapshot.restore(model, opt)
    assert same(before, model.state_dict()) and ids == [(id(p), p.data_ptr()) for p in model.parameters()]
    assert opt.state_dict()['state'].keys() == state.keys() and all(torch.equal(torch.as_tensor(v), torch.as_tensor(opt.state_dict()['state'][i][k])) for i,
        s in state.items() for k, v in s.items())
    train(model, opt)


def test_an_optimizer_without_state_is_without_state_again():
    model = small_net()
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    snapshot = Snapshot(model, opt)
    train(model, opt)
    snapshot.restore(model, opt)
    assert not opt.state_dict()['state']


def test_hyperparameters_stay_as_they_are_now():
    model = small_net()
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    snapshot = Snapshot(model, opt)
    opt.param_groups[0]['lr'] = .01
    snapshot.restore(model, opt)
    assert opt.param_groups[0]['lr'] == .01


def test_a_snapshot_can_be_restored_again_and_again():
    model = small_net()
    opt = torch.optim.Adam(model.parameters())
    train(model, opt, 1)
    before, snapshot = copy.deepcopy(model.state_dict()), Snapshot(model, opt)
    for _ in range(3):
        snapshot.restore(model, opt)
        assert same(before, model.state_dict())
        train(model, opt, 1)


@pytest.mark.parametrize('take,give', [(False, True), (True, False), (False, False)])
def test_without_an_optimizer(take, give):
    model = small_net()
    opt = torch.optim.Adam(model.parameters())
    before, snapshot = copy.deepcopy(model.state_dict()), Snapshot(model, opt if take else None)
    train(model, opt)
    state = copy.deepcopy(opt.state_dict()['state'])
    snapshot.restore(model, opt if give else None)
    assert same(before, model.state_dict()) and opt.state_dict()['state'].keys() == state.keys()


class Odd(nn.Module):
    "State in unusual places"
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.table = nn.ParameterList([nn.Parameter(torch.ones(2))])
        self.register_buffer('seen', torch.zeros((), dtype=torch.long))


def test_any_module():
    model = Odd()
    snapshot = Snapshot(model)
    for t in (*model.parameters(), *model.buffers()): t.data.add_(5)
    snapshot.restore(model)
    assert (model.scale, model.table[0].tolist(), model.seen) == (1, [1, 1], 0)


def test_a_rewound_network_is_a_ticket():
    "Kept weights at their beginning, the others zero"
    model = small_net()
    snapshot, initial = Snapshot(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    s = Sparsifier(model)
    train(model, torch.optim.SGD(model.parameters(), .1))
    s.prune_model(50)
    snapshot.restore(model)
    s.apply_masks()
    for n, p in model.named_parameters(): assert torch.equal(p, initial[n]*s.masks.get(n, True))
    assert s.sparsity() == 50


def test_a_ticket_is_a_plain_file(tmp_path):
    model = small_net()
    s = Sparsifier(model)
    s.prune_model(50)
    file = save_ticket(model, tmp_path/'deep'/'tickets', s.sparsity())
    assert file == tmp_path/'deep'/'tickets'/'ticket_50.00.pth'
    plain = small_net()
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert same(plain.state_dict(), model.state_dict())
    assert save_ticket(model, tmp_path/'deep'/'tickets', 75).exists() and file.exists()


@pytest.mark.parametrize('percent,name', [(5, 'ticket_05.00.pth'), (99.5, 'ticket_99.50.pth'), (100, 'ticket_100.00.pth'), (100/3, 'ticket_33.33.pth')])
def test_the_name_has_the_percent(percent, name, tmp_path):
    assert save_ticket(nn.Linear(1, 1), tmp_path, percent).name == name

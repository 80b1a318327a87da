import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attention_helpers import Packed, behead, by_hand, fused
from core_helpers import bits
from fastsparse.compact import compact
from fastsparse.dependants import dependants, find_followers
from fastsparse.granularity import output_groups
from fastsparse.sparsifier import Sparsifier, SparsityWarning

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def stir(model):
    "Biases and statistics under which no channel is zero by chance"
    for m in model.modules():
        if getattr(m, 'bias', None) is not None: m.bias.data.uniform_(.5, 1)
        if isinstance(m, NORMS) and m.weight is not None: m.weight.data.uniform_(.5, 1)
        if getattr(m, 'running_mean', None) is not None: m.running_mean.uniform_(.1, .3), m.running_var.uniform_(.5, 2)
    return model


def sparsify(model, percent=50, granularity='filter', **kw):
    stir(model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        s = Sparsifier(model, granularity, 'local', **kw)
        s.prune_model(percent)
    return s


def dead(layer): return ~output_groups(layer).alive(layer.weight.detach() != 0)[0]


def silent(t): return (t == 0).transpose(0, 1).flatten(1).all(1)


def check_channels(model, *shape, direct=False):
    """Run `model`: pruned filters put out exactly 0, and so does every norm behind them; and no norm lost a channel that was alive.
    With `direct`, only norms that get the very tensor that a convolution put out are asked to be silent"""
    seen, makers, handles = {}, {}, []

    def hook(m, args, out):
        if isinstance(m, NORMS): # noted at once, for what follows may write into these tensors
            maker = makers.get(id(args[0]), (None,))[0]
            need = dead(maker) if maker else torch.zeros(len(m.running_mean)).bool() if direct else silent(args[0])
            seen.setdefault(m, []).append((silent(args[0]), silent(out), need))
        elif hasattr(m, 'weight'):
            makers[id(out)] = m, out
            assert silent(out)[dead(m)].all()
    for m in model.modules(): handles.append(m.register_forward_hook(hook))
    for training in (True, False):
        seen.clear(), makers.clear()
        model.train(training)
        with torch.no_grad(): model(torch.randn(2, *shape))
        for m, calls in seen.items():
            for inp, out, need in calls:
                assert out[need].all(), f'a pruned channel of {m} is heard'
                if m.weight is not None: assert inp[m.weight == 0].all(), f'{m} lost a channel that is alive'
    for h in handles: h.remove()
    return sum(int(out.sum()) for calls in seen.values() for _, out, _ in calls)


def names(s): return sorted(f.name for f in s._followers)


class Net(nn.Module):
    "Modules by name, and a forward"
    def __init__(self, forward, **modules):
        super().__init__()
        self._forward = forward
        for n, m in modules.items(): setattr(self, n, m)

    def forward(self, x): return self._forward(self, x)


def test_by_hand():
    "Filter 1 of 3 is pruned: its bias, and entry 1 of weight and bias of the BatchNorm"
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1, bias=False))
    model[0].weight.data.copy_(torch.tensor([3., 1, 2]).view(3, 1, 1, 1))
    s = sparsify(model, 100/3, layers='0')
    assert names(s) == ['0.bias', '1.bias', '1.weight']
    for t in (model[0].weight.flatten(), model[0].bias, model[1].weight, model[1].bias): assert bits(t != 0) == [1, 0, 1]
    assert (model[3].weight != 0).all() and model[1].running_mean.all()


def test_after_every_step_of_an_optimizer():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    s = sparsify(model)
    opt = torch.optim.AdamW(model.parameters(), lr=.1)
    for _ in range(3):
        (model(torch.randn(4, 2, 7, 7))**3).mean().backward()
        opt.step()
        opt.zero_grad()
        s.apply_masks()
        assert check_channels(model, 2, 7, 7) == 5


def test_what_is_masked_is_exactly_zero_whatever_stood_there():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    s = sparsify(model)
    for t in (model[0].bias, model[1].weight, model[1].bias): t.data.fill_(torch.nan)
    s.apply_masks()
    gone = dead(model[0])
    for t in (model[0].bias, model[1].weight, model[1].bias): assert t[gone].tolist() == [0] and t[~gone].isnan().all()


def test_nothing_follows_where_nothing_is_pruned():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
    s = sparsify(model, 0)
    assert (model[0].bias != 0).all() and (model[1].weight != 0).all()
    s.prune_model(50)
    assert check_channels(model, 1, 3, 3) == 2


@pytest.mark.parametrize('granularity', ['weight', 'kernel', 'channel', 'shared_kernel', '1:2'])
def test_granularities_without_whole_outputs_have_no_followers(granularity):
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4))
    s = sparsify(model, 50, granularity)
    assert names(s) == [] and (model[0].bias != 0).all() and (model[1].weight != 0).all()


def test_granularity_layer_takes_all_its_outputs_along():
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4))
    sparsify(model, 100, 'layer')
    assert check_channels(model, 2, 3, 3) == 4


def test_at_100_percent_everything_is_silent():
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
    sparsify(model, 100)
    assert check_channels(model, 2, 3, 3) == 7


# where the data flows

def test_a_batchnorm_that_is_registered_elsewhere():
    "The one registered behind each convolution is the norm of the other"
    model = Net(lambda m, x: m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x))))), conv1=nn.Conv2d(2, 6, 1), bn2=nn.BatchNorm2d(6), conv2=nn.Conv2d(6, 6, 1), bn1=nn.BatchNorm2d(6))
    s = sparsify(model)
    assert check_channels(model, 2, 3, 3) == 6 and torch.equal(model.bn1.weight == 0, dead(model.conv1)) and torch.equal(model.bn2.weight == 0, dead(model.conv2))
    assert s.untraced is None


def test_a_sum_is_zero_where_both_are():
    model = Net(lambda m, x: m.bn(m.a(x) + m.b(x)), a=nn.Conv2d(2, 8, 1), b=nn.Conv2d(2, 8, 1), bn=nn.BatchNorm2d(8))
    for t in (model.a, model.b): torch.nn.init.constant_(t.weight, .5)
    model.a.weight.data[:5] = .1
    model.b.weight.data[3:] = .1
    sparsify(model, 62.5)
    assert bits(dead(model.a)) == [1]*5 + [0]*3 and bits(dead(model.b)) == [0]*3 + [1]*5
    assert bits(model.bn.weight == 0) == [0, 0, 0, 1, 1, 0, 0, 0] and check_channels(model, 2, 3, 3) == 2


def test_a_residual_from_the_input_keeps_a_channel_alive():
    model = Net(lambda m, x: m.bn(m.conv(x) + x), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4))
    s = sparsify(model)
    assert names(s) == ['conv.bias'] and (model.bn.weight != 0).all()
    check_channels(model, 4, 3, 3)


@pytest.mark.parametrize('add', [lambda a, b: a + b, lambda a, b: torch.add(a, b), lambda a, b: a.add(b), lambda a, b: a.add_(b)])
def test_residual_blocks(add):
    def forward(m, x):
        x = F.relu(m.bn0(m.conv0(x)))
        for c, b in ((m.conv1, m.bn1), (m.conv2, m.bn2)): x = F.relu(add(b(c(x)), x))
        return m.last(x)
    model = Net(forward, last=nn.BatchNorm2d(8), bn0=nn.BatchNorm2d(8), bn1=nn.BatchNorm2d(8), bn2=nn.BatchNorm2d(8),
                conv0=nn.Conv2d(2, 8, 1), conv1=nn.Conv2d(8, 8, 1), conv2=nn.Conv2d(8, 8, 1))
    for c in (model.conv0, model.conv1, model.conv2): c.weight.data[:2] = 1e-3
    sparsify(model, 25)
    assert check_channels(model, 2, 4, 4) == 8 and bits(model.last.weight == 0) == [1, 1] + [0]*6


@pytest.mark.parametrize('cat', [lambda *xs: torch.cat(xs, 1), lambda *xs: torch.cat(xs, dim=1), lambda *xs: torch.cat(list(xs), dim=1)])
def test_concatenation_as_in_densenet(cat):
    def forward(m, x):
        x = m.stem(x)
        for i in (1, 2): x = cat(x, m.get_submodule(f'conv{i}')(F.relu(m.get_submodule(f'bn{i}')(x))))
        return m.bn3(x)
    model = Net(forward, stem=nn.Conv2d(2, 4, 1), conv1=nn.Conv2d(4, 4, 3, padding=1), conv2=nn.Conv2d(8, 4, 3, padding=1), bn1=nn.BatchNorm2d(4),
        bn2=nn.BatchNorm2d(8), bn3=nn.BatchNorm2d(12))
    sparsify(model)
    assert check_channels(model, 2, 4, 4) == 2 + 4 + 6
    assert torch.equal(model.bn3.weight == 0, torch.cat([dead(model.stem), dead(model.conv1), dead(model.conv2)]))


def test_a_concatenation_with_something_unknown_leaves_that_part_alone():
    model = Net(lambda m, x: m.bn(torch.cat([x, m.conv(x)], 1)), conv=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm2d(6))
    sparsify(model)
    check = (model.bn.weight == 0)
    assert not check[:2].any() and not (check[2:] & ~dead(model.conv)).any()


def test_a_shared_batchnorm_loses_what_is_dead_everywhere():
    model = Net(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=nn.Conv2d(2, 4, 1), b=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm2d(4))
    for c, weights in ((model.a, [1, 2, 3, 4]), (model.b, [1, 4, 3, 2])): c.weight.data.copy_(torch.tensor(weights).view(4, 1, 1, 1).expand(4, 2, 1, 1))
    sparsify(model)
    assert bits(model.bn.weight == 0) == [1, 0, 0, 0] == bits(model.bn.bias == 0)


@pytest.mark.parametrize('forward',
    [lambda m, x: m.bn(m.conv(x)) + m.bn(x), lambda m, x: m.bn(m.conv(m.bn(x))), lambda m, x: m.bn(m.conv(x)) + m.bn(torch.sigmoid(m.conv(x)))])
def test_a_shared_batchnorm_that_also_sees_something_unknown_is_left_alone(forward):
    model = Net(forward, conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4))
    sparsify(model)
    assert (model.bn.weight != 0).all()


def test_a_convolution_used_twice():
    model = Net(lambda m, x: m.bn1(m.conv(x)) + m.bn2(m.conv(x*2)), conv=nn.Conv2d(2, 4, 1), bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4))
    sparsify(model)
    assert check_channels(model, 2, 3, 3) == 4


def test_one_output_into_two_norms():
    model = Net(lambda m, x: (lambda y: m.bn1(y) + m.bn2(y))(m.conv(x)), conv=nn.Conv2d(2, 4, 1), bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4))
    sparsify(model)
    assert check_channels(model, 2, 3, 3) == 4


def test_shared_weights_with_a_bias_each():
    model = Net(lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(2, 4, 1), b=nn.Conv2d(2, 4, 1))
    model.b.weight = model.a.weight
    sparsify(model)
    assert torch.equal(model.a.bias == 0, dead(model.a)) and torch.equal(model.b.bias == 0, dead(model.a))


def test_a_shared_bias_loses_what_is_dead_everywhere():
    model = Net(lambda m, x: m.a(x) + m.b(x), a=nn.Conv2d(2, 4, 1), b=nn.Conv2d(2, 4, 1))
    model.b.bias = model.a.bias
    for c, weights in ((model.a, [1, 2, 3, 4]), (model.b, [1, 4, 3, 2])): c.weight.data.copy_(torch.tensor(weights).view(4, 1, 1, 1).expand(4, 2, 1, 1))
    sparsify(model)
    assert bits(model.a.bias == 0) == [1, 0, 0, 0]


def test_batchnorm_without_affine():
    "Its running mean follows, so that it puts out 0 in eval too"
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    s = sparsify(model)
    assert '1.running_mean' in names(s) and '4.running_mean' not in names(s)
    model.eval()
    with torch.no_grad(): assert silent(model[:2](torch.randn(2, 2, 3, 3)))[dead(model[0])].all()
    assert check_channels(model, 2, 3, 3) >= 5 and bits(model[1].running_mean == 0) == bits(dead(model[0]))


def test_batchnorm_without_affine_or_statistics():
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6, affine=False, track_running_stats=False))
    sparsify(model)
    assert check_channels(model, 2, 3, 3) == 3


@pytest.mark.parametrize('flatten',
    [lambda x: x.flatten(1), lambda x: x.flatten(start_dim=1), lambda x: torch.flatten(x, 1), lambda x: x.view(x.size(0), -1), lambda x: x.reshape(x.shape[0], -1)])
def test_flatten_into_a_batchnorm_of_features(flatten):
    "Each channel has become four features"
    model = Net(lambda m, x: m.bn(flatten(m.conv(x))), conv=nn.Conv2d(2, 4, 2), bn=nn.BatchNorm1d(16))
    sparsify(model)
    assert check_channels(model, 2, 3, 3) == 8 and bits(model.bn.weight == 0) == bits(dead(model.conv).repeat_interleave(4))


def test_flatten_as_a_module():
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Flatten(), nn.BatchNorm1d(16))
    sparsify(model)
    assert check_channels(model, 2, 3, 3) == 8


def test_other_ways_to_flatten_are_not_guessed_at():
    "Features of one channel lie apart, or it cannot be known"
    for flatten in (lambda x: x.permute(0, 2, 3, 1).flatten(1), lambda x: x.transpose(1, 2).reshape(x.shape[0], -1), lambda x: x.flatten(2).mean(1).repeat(1, 4)):
        model = Net(lambda m, x: m.bn(flatten(m.conv(x))), conv=nn.Conv2d(2, 4, 2), bn=nn.BatchNorm1d(16))
        sparsify(model)
        assert (model.bn.weight != 0).all()


@pytest.mark.parametrize('pool',
    [nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Dropout(.3), nn.Upsample(scale_factor=2), nn.GELU(), nn.LeakyReLU(), nn.Hardswish(), nn.Tanh()])
def test_what_keeps_zero_at_zero_is_passed_through(pool):
    model = nn.Sequential(nn.Conv2d(2, 6, 1), pool, nn.BatchNorm2d(6))
    sparsify(model)
    assert check_channels(model, 2, 4, 4) == 3


@pytest.mark.parametrize('act', [nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid(), nn.Softmax(1), nn.ConstantPad2d(1, 1.), nn.ChannelShuffle(2)])
def test_what_does_not_ends_the_way(act):
    "0 becomes something else, or goes elsewhere"
    model = nn.Sequential(nn.Conv2d(2, 6, 1), act, nn.BatchNorm2d(6))
    sparsify(model)
    check_channels(model, 2, 4, 4, direct=True)
    assert (model[2].weight != 0).all()


@pytest.mark.parametrize('op',
    [lambda x: x + 1, lambda x: 1 - x, torch.sigmoid, lambda x: x.permute(0, 1, 3, 2).exp(), lambda x: x.flip(1), lambda x: x[:, [1, 0, 3, 2]],
    lambda x: torch.roll(x, 1, 1), lambda x: x.transpose(1, 2)])
def test_an_operation_that_moves_channels_or_zeros_ends_the_way(op):
    model = Net(lambda m, x: m.bn(op(m.conv(x))), conv=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm2d(4))
    sparsify(model, 25)
    check_channels(model, 2, 4, 4, direct=True)


@pytest.mark.parametrize('op', [lambda x: x.add_(1), lambda x: x.sigmoid_(), lambda x: torch.sigmoid_(x), lambda x: x.__setitem__((slice(None), 0), 1.)])
def test_what_is_written_into_a_tensor_counts_though_nobody_takes_the_result(op):
    model = Net(lambda m, x: (lambda y: (op(y), m.bn(y))[1])(m.conv(x)), conv=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm2d(4))
    model.conv.weight.data[0] = 1e-3
    sparsify(model)
    assert model.bn.weight[0] != 0


@pytest.mark.parametrize('op',
    [lambda x: x*2, lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), lambda x: x.relu(), lambda x: F.max_pool2d(x, 2), lambda x: F.dropout(x, .1),
    lambda x: F.interpolate(x, scale_factor=2)])
def test_an_operation_that_keeps_zeros_goes_on(op):
    model = Net(lambda m, x: m.bn(op(m.conv(x))), conv=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm2d(4))
    sparsify(model)
    assert check_channels(model, 2, 4, 4) == 2


@pytest.mark.parametrize('conv,bn,shape', [
    (nn.Conv1d(2, 6, 2), nn.BatchNorm1d(6), (2, 5)), (nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), (2, 3, 3, 3)), (nn.ConvTranspose1d(2, 6, 2), nn.BatchNorm1d(6), (2, 5)),
    (nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), (4, 3, 3)), (nn.ConvTranspose3d(2, 6, 2), nn.BatchNorm3d(6), (2, 3, 3, 3)),
    (nn.Conv2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), (4, 3, 3)),
    (nn.Conv2d(3, 6, 2, groups=3), nn.BatchNorm2d(6), (3, 3, 3)), (nn.Conv2d(2, 6, 2), nn.GroupNorm(2, 6), (2, 3, 3)),
    (nn.Conv2d(2, 6, 2, bias=False), nn.SyncBatchNorm(6).eval(), (2, 3, 3))])
def test_every_layer_and_norm(conv, bn, shape):
    model = nn.Sequential(conv, bn)
    s = sparsify(model)
    assert torch.equal(bn.weight == 0, dead(conv)) and torch.equal(bn.bias == 0, dead(conv)) and int(dead(conv).sum()) == 3
    if not isinstance(bn, nn.SyncBatchNorm): assert check_channels(model, *shape) == 3
    assert s.untraced is None


def test_linear_rows_take_bias_and_batchnorm():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4))
    s = sparsify(model, granularity='row')
    assert names(s) == ['0.bias', '1.bias', '1.weight', '3.bias', '4.bias', '4.weight'] and check_channels(model, 4) == 5


def test_linear_columns_take_nothing():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    assert names(sparsify(model, granularity='column')) == [] and (model[0].bias != 0).all()


def test_what_is_not_pruned_has_no_followers():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    assert names(sparsify(model, exclude='0')) == ['2.bias', '3.bias', '3.weight'] and (model[1].weight != 0).all()


class Standardized(nn.Conv2d):
    "Nobody can know what it does to its weight"
    def forward(self, x): return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def test_a_layer_with_a_forward_of_its_own_is_not_guessed_at():
    model = nn.Sequential(Standardized(2, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match='no layer to prune by filter .0: it has a forward of its own .Standardized.'): Sparsifier(model, 'filter')
    Sparsifier(model, 'filter', 'local', layers='0').prune_model(50)
    assert (model[0].weight == 0).any() and (model[1].weight != 0).all()


# what cannot be traced

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        if x.sum() > 0: return self.bn(self.conv(x))
        return self.bn(-self.conv(x))


def test_where_the_flow_cannot_be_traced_nothing_is_guessed_and_the_report_says_so():
    model = Branch()
    s = sparsify(model)
    assert 'TraceError' in s.untraced and (model.bn.weight != 0).all() and torch.equal(model.conv.bias == 0, dead(model.conv))
    assert 'The data flow could not be traced, so no BatchNorm follows the pruned outputs (TraceError: ' in str(s.report())
    assert 'traced' not in str(Sparsifier(model, 'weight').report()), 'single weights need no trace'


def test_the_reason_is_one_line():
    def fail(m, x): raise RuntimeError('never\nrun me')
    _, _, why = find_followers(m := Net(fail, conv=nn.Conv2d(2, 4, 1)), {'conv.weight': m.conv})
    assert why == 'RuntimeError: never'


def test_a_traceable_model_has_no_note():
    assert 'traced' not in str(sparsify(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))).report())


def test_find_followers_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3))
    found, _, why = find_followers(model, {'0.weight': model[0]})
    assert why is None and sorted(f.name for f in found) == ['0.bias', '1.bias', '1.weight']
    for f in found:
        assert f.tensor is model.get_parameter(f.name)
        assert bits(f.mask({'0.weight': torch.tensor([1, 0, 1]).bool()})) == [1, 0, 1]


# models that people use

@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'mobilenet_v2'])
def test_pruned_channels_of_torchvision_models_put_out_zero(name):
    import torchvision
    model = getattr(torchvision.models, name)(weights=None, num_classes=5)
    s = sparsify(model, 50)
    assert s.untraced is None
    assert check_channels(model, 3, 32, 32, direct=name == 'mobilenet_v2') >= sum(int(dead(t.layer).sum()) for t in s.targets.values())


class Through(nn.Module):
    "A convolution, something, a BatchNorm"
    def __init__(self, between):
        super().__init__()
        self.conv, self.bn, self.between = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), between
    def forward(self, x): return self.bn(self.between(self.conv(x)))


@pytest.mark.parametrize('between', [lambda x: x/2, lambda x: nn.functional.pad(x, (1, 1, 1, 1)), lambda x: nn.functional.dropout(x, .5)])
def test_what_maps_zero_to_zero_is_followed(between):
    model = Through(between)
    s = Sparsifier(model, 'filter', 'local')
    s.prune_model(50)
    dead = ~s.masks['conv.weight'].flatten(1).any(1)
    assert dead.sum() == 2 and not model(torch.randn(3, 2, 5, 5))[:, dead].any() and not any('followed' in n for n in s.report().notes)


@pytest.mark.parametrize('between', [lambda x: x.flip(1), lambda x: nn.functional.pad(x, (1, 1, 1, 1), value=1.), lambda x: 1/(x+1), torch.sigmoid])
def test_what_is_not_followed_is_told(between):
    model = Through(between)
    s = Sparsifier(model, 'filter', 'local')
    s.prune_model(50)
    assert model.bn.weight.all() and s.untraced is None
    assert [n for n in s.report().notes if n.startswith('bn: what flows in could not be followed')]


def test_a_norm_of_the_input_is_nobodys_follower_and_no_news():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 1))
    assert not Sparsifier(model, 'filter').report().notes


def test_a_model_in_eval_mode_is_traced_as_it_trains():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)
        def forward(self, x): return self.bn(self.conv(x)) if self.training else self.conv(x)
    model = Aux().eval()
    assert {f.name for f in Sparsifier(model, 'filter')._followers} == {'conv.bias', 'bn.weight', 'bn.bias'} and not model.training


def test_a_layer_with_a_forward_of_its_own_is_named():
    class Standardized(nn.Conv2d):
        def forward(self, x): return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)
    notes = Sparsifier(nn.Sequential(Standardized(2, 4, 1), nn.Conv2d(4, 4, 1))).report().notes
    assert len(notes) == 1 and notes[0].startswith('0 has a forward of its own (Standardized)')


def test_a_batchnorm_that_is_replaced_by_its_synchronised_form_still_follows():
    "`convert_sync_batchnorm` makes new modules around the same parameters"
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    s = Sparsifier(model, 'filter', 'local')
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    s.prune_model(50)
    dead = ~s.masks['0.weight'].flatten(1).any(1)
    assert isinstance(model[1], nn.SyncBatchNorm) and not model[1].weight[dead].any() and not model[1].bias[dead].any()
    assert {f.name for f in Sparsifier(model, 'filter')._followers} == {'0.bias', '1.weight', '1.bias'}


# with an example, the forward is watched

def followed(model, x, percent=50, layers=None):
    stir(model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        s = Sparsifier(model, 'filter' if layers is None or x.dim() > 3 else 'row', 'local', layers=layers, example_input=x)
        s.prune_model(percent)
    assert s.untraced is None
    return s


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'mobilenet_v3_small', 'shufflenet_v2_x0_5'])
def test_pruned_channels_of_watched_models_put_out_zero(name):
    import torchvision
    model = getattr(torchvision.models, name)(weights=None, num_classes=5)
    s = followed(model, torch.randn(2, 3, 32, 32))
    assert check_channels(model, 3, 32, 32, direct=name != 'resnet18') > 500 and not s._lost


class Frozen(nn.Module):
    "As torchvision's FrozenBatchNorm2d"
    def __init__(self, n):
        super().__init__()
        for k in ('weight', 'bias', 'running_mean', 'running_var'): self.register_buffer(k, torch.rand(n) + .5)

    def forward(self, x):
        w, b, m, v = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var))
        scale = w*(v + 1e-5).rsqrt()
        return x*scale + (b - m*scale)


class Functional(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(n)), nn.Parameter(torch.ones(n))
        self.register_buffer('m', torch.rand(n)), self.register_buffer('v', torch.rand(n))

    def forward(self, x): return F.batch_norm(x, self.m, self.v, self.w, self.b, self.training)


class Shift(nn.Module):
    def __init__(self, n): super().__init__(); self.w, self.b = nn.Parameter(torch.rand(n, 1, 1)), nn.Parameter(torch.rand(n, 1, 1))
    def forward(self, x): return self.w*x + self.b


LayerNorm2d = type('LayerNorm2d', (nn.LayerNorm,), dict(forward=lambda self, x: F.layer_norm(x.movedim(1, -1), (x.shape[1],), self.weight, self.bias).movedim(-1, 1)))


@pytest.mark.parametrize('norm, names', [(Frozen, ['1.bias', '1.weight']), (Functional, ['1.b', '1.w']), (Shift, ['1.b']), (LayerNorm2d, ['1.bias', '1.weight']),
                                         (lambda n: nn.GroupNorm(2, n), ['1.bias', '1.weight']), (lambda n: nn.InstanceNorm2d(n, affine=True), ['1.bias', '1.weight'])])
def test_every_norm_follows(norm, names):
    model = nn.Sequential(nn.Conv2d(2, 8, 1), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    s = followed(model, torch.randn(2, 2, 4, 4), layers='0')
    assert sorted(f.name for f in s._followers) == ['0.bias', *names]
    with torch.no_grad():
        assert dead(model[0]).sum() == 4
        for mode in (True, False):
            out = silent(model.train(mode)[:2](torch.randn(2, 2, 4, 4)))
            assert torch.equal(out, dead(model[0]))


def test_a_depthwise_convolution_is_silent_behind_silence():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8), nn.BatchNorm2d(16))
    followed(model, torch.randn(2, 3, 8, 8), layers='0')
    with torch.no_grad(): assert bits(silent(model.eval()(torch.randn(2, 3, 8, 8)))) == bits(dead(model[0]).repeat_interleave(2))
    followed(model, torch.randn(2, 3, 8, 8), 25)
    with torch.no_grad(): assert bits(silent(model.eval()(torch.randn(2, 3, 8, 8)))) == bits(dead(model[0]).repeat_interleave(2) | dead(model[3]))


def test_where_channels_move_they_are_followed():
    for move in (lambda x: x.permute(0, 2, 3, 1).flatten(1), lambda x: x.flip(1).flatten(1), lambda x: x.reshape(x.shape[0], -1)):
        model = Net(lambda m, x, move=move: m.bn(move(m.conv(x))), conv=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm1d(16))
        followed(model, torch.randn(3, 2, 2, 2), layers='conv')
        with torch.no_grad():
            inp, out = move(model.conv(x := torch.randn(5, 2, 2, 2))), model.eval()(x)
        assert (inp == 0).all(0).sum() == 8 and torch.equal((inp == 0).all(0), (out == 0).all(0))


def test_frames_of_a_clip():
    model = Net(lambda m, x: m.bn(m.conv(x).reshape(x.shape[0]//2, -1)), conv=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm1d(32))
    followed(model, torch.randn(6, 2, 2, 2), layers='conv')
    assert bits(model.bn.weight == 0) == bits(dead(model.conv).repeat_interleave(4).repeat(2))


def test_a_norm_over_another_axis_is_left_alone_and_told():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    s = followed(model, torch.randn(5, 8, 4), layers='0')
    assert model[1].weight.all() and model[1].bias.all() and s._lost == ['1']


def test_what_other_uses_need_is_left_alone():
    "A parameter that is zero for a pruned channel would be missed elsewhere"
    for forward in (lambda m, x: m.bn(m.conv(x)) + x[:, :1]*m.bn.bias.exp().view(-1, 1, 1), lambda m, x: (m.bn(m.conv(x)), m.bn.bias)):
        model = Net(forward, conv=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm2d(4))
        s = followed(model, torch.randn(2, 2, 3, 3), layers='conv')
        assert model.bn.bias.all() and s._lost == ['bn']


def test_a_shared_norm_is_silent_only_where_all_are_and_the_rest_is_told():
    model = Net(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=nn.Conv2d(2, 4, 1), b=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm2d(4))
    for c, weights in ((model.a, [1, 2, 3, 4]), (model.b, [1, 4, 3, 2])): c.weight.data.copy_(torch.tensor(weights).view(4, 1, 1, 1).expand(4, 2, 1, 1))
    followed(model, torch.randn(2, 2, 3, 3))
    assert bits(model.bn.weight == 0) == [1, 0, 0, 0] == bits(model.bn.bias == 0)


@pytest.mark.parametrize('run', [False, True])
def test_what_a_forward_leaves_on_the_model_makes_no_difference(run):
    import threading

    def forward(m, x):
        m.kept = m.conv(x)
        return m.bn(m.kept)
    for lock in (False, True):
        for kw in ({}, dict(example_input=torch.randn(2, 2, 3, 3))):
            model = Net(forward, conv=nn.Conv2d(2, 4, 1), bn=nn.BatchNorm2d(4))
            if lock: model.lock = threading.Lock()
            if run: model(torch.randn(2, 2, 3, 3))
            sparsify(model, **kw)
            assert torch.equal(model.bn.weight == 0, dead(model.conv)) and (model.bn.weight == 0).sum() == 2


def test_without_an_example_a_frozen_norm_is_told():
    for norm in (Frozen, Functional):
        s = sparsify(nn.Sequential(nn.Conv2d(2, 4, 1), norm(4)))
        assert [n for n in s.report().notes if n.startswith('1: what flows in could not be followed')], norm


def test_an_embedding_has_no_channels_for_outputs():
    from fastsparse.granularity import _layer_types, register_layer
    before = dict(_layer_types)
    register_layer(nn.Embedding, 'out in', {'row': 'out'})
    try:
        for kw in ({}, dict(example_input=torch.arange(8))):
            model = nn.Sequential(nn.Embedding(8, 8), nn.BatchNorm1d(8))
            sparsify(model, granularity='row', **kw)
            assert model[1].weight.all()
    finally: _layer_types.update(before)


def test_heads_that_only_training_uses_are_followed():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.aux, self.bn = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x): return (self.conv(x), self.bn(self.aux(self.conv(x)))) if self.training else self.conv(x)
    model = Aux().eval()
    followed(model, torch.randn(2, 2, 3, 3), layers='aux')
    assert torch.equal(model.bn.weight == 0, dead(model.aux)) and not model.training


class Behind(nn.Module):
    "A norm right behind an attention, one channel after the other"
    def __init__(self, attn):
        super().__init__()
        self.q, self.k, self.v, self.norm, self.o, self.attn = *(nn.Linear(8, 8) for _ in range(3)), nn.LayerNorm(8), nn.Linear(8, 2), attn

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (4, 2)).transpose(1, 2) for m in (self.q, self.k, self.v))
        self.heads = self.attn(q, k, v).transpose(1, 2).flatten(2)
        return self.o(self.norm(self.heads))


@pytest.mark.parametrize('attn', [fused, by_hand])
def test_behind_an_attention_the_values_alone_decide(attn):
    m, x = Behind(attn), torch.randn(2, 5, 8)
    for p in (m.norm.weight, m.norm.bias): nn.init.uniform_(p, .5, 1)
    found = {f.name: f for f in dependants(m, {f'{n}.weight': getattr(m, n) for n in 'qkv'}, x).followers}
    assert sorted(found) == ['k.bias', 'norm.bias', 'norm.weight', 'q.bias', 'v.bias'] and found['norm.bias'].targets == ['v.weight']
    assert dependants(m, {'q.weight': m.q}, x).lost == [] and [f.name for f in dependants(m, {'q.weight': m.q}, x).followers] == ['q.bias']
    s = Sparsifier(m, 'row', 'local', layers=[m.q, m.k, m.v], example_input=x)
    s.prune_model(50)
    gone = (m.v.weight == 0).all(1)
    m(x)
    out = m.norm(m.heads)
    assert gone.sum() == 4 and (m.heads[..., gone] == 0).all() and (out[..., gone] == 0).all()
    assert all(torch.equal((getattr(m, n).weight == 0).all(1), getattr(m, n).bias == 0) for n in 'qkv')


def test_a_norm_behind_values_that_are_not_followed_is_told():
    m = Behind(lambda q, k, v: fused(q, k, v.sigmoid()))
    d = dependants(m, {'v.weight': m.v}, torch.randn(2, 5, 8))
    assert d.lost == ['norm'] and [f.name for f in d.followers] == ['v.bias']


def test_grouped_values_behind_an_attention():
    def run(m, x):
        q, k, v = m.q(x).unflatten(-1, (4, 2)).transpose(1, 2), *(t(x).unflatten(-1, (2, 2)).transpose(1, 2) for t in (m.k, m.v))
        return m.o(m.norm(fused(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)))
    m = Behind(None)
    m.k, m.v, m.forward = nn.Linear(8, 4), nn.Linear(8, 4), lambda x: run(m, x)
    found = {f.name: f for f in dependants(m, {'v.weight': m.v}, torch.randn(2, 5, 8)).followers}
    alive = {'v.weight': torch.tensor([True, False, True, True])}
    assert found['norm.bias'].mask(alive).tolist() == [True, False, True, False, True, True, True, True]


def test_heads_that_are_pruned_whole_are_cut_to_nothing():
    m, x = Packed(), torch.randn(2, 5, 16)
    s = Sparsifier(m, 'row', 'local', layers=m.qkv, example_input=x)
    behead(m, 0, 2)
    s.prune_model(50) # the rows of two heads of four are zero already
    assert (m.qkv.bias.view(3, 4, 4)[:, [0, 2]] == 0).all() and (m.qkv.bias.view(3, 4, 4)[:, [1, 3]] != 0).all()
    small = compact(m, x)
    assert small.shapes['qkv.weight'] == (24, 16) and small.model.num_heads == 2

"Which entries are one channel, and that looking changes nothing"
import copy
import random
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from attention_helpers import Llama, Packed, Separate, by_hand, fused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastsparse.flow import flow
from fastsparse.labels import components, reshaped
from fastsparse.watch import call, undisturbed, watch


class Forward(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        for n, m in modules.items(): setattr(self, n, m)
        self._run = forward

    def forward(self, *x): return self._run(self, *x)


conv = lambda i=3, o=4, k=3, **kw: nn.Conv2d(i, o, k, padding=k//2, **kw)  # noqa: E731
image = torch.randn(2, 3, 8, 8)


def one(f, *places):
    "Whether entry i of each of these axes is one channel"
    first, *more = [f.axes[p] for p in places]
    return all(torch.equal(first, m) for m in more)


def apart(f, name, axis=0): return len(f.axes[name, axis].unique()) == len(f.axes[name, axis])


def test_a_chain_by_hand():
    f = flow(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 5), nn.Flatten(), nn.Linear(5*64, 2)), image)
    assert one(f, ('0.weight', 0), ('0.bias', 0), ('1.weight', 0), ('1.bias', 0), ('1.running_mean', 0), ('1.running_var', 0), ('3.weight', 1))
    assert apart(f, '0.weight') and not f.stays('0.weight').any()
    assert torch.equal(f.axes['5.weight', 1], f.axes['3.weight', 0].repeat_interleave(64))
    assert f.outputs('5.weight').all() and f.outputs('5.bias').all() and not f.outputs('3.weight').any()
    groups = f.groups()
    assert len(groups) == 9 and sorted(len(g) for g in groups.values()) == [3]*5 + [7]*4
    assert [r.where for r in f.reads] == ['3', '5']
    assert f.macs() == 2*(64*27*4 + 64*36*5 + 320*2) == f.macs(set())
    assert f.macs(set(f.axes['0.weight', 0].tolist()[:2])) == 2*(64*27*2 + 64*18*5 + 320*2)


def test_what_is_added_is_one_and_what_is_concatenated_is_not():
    f = flow(Forward(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(), b=conv(), c=conv(4, 2)), image)
    assert one(f, ('a.weight', 0), ('b.weight', 0), ('c.weight', 1)) and apart(f, 'a.weight')
    f = flow(Forward(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(), b=conv(), c=conv(8, 2)), image)
    assert torch.equal(torch.cat([f.axes['a.weight', 0], f.axes['b.weight', 0]]), f.axes['c.weight', 1]) and apart(f, 'c.weight', 1)


def test_groups_and_depthwise():
    f = flow(nn.Sequential(conv(3, 8), conv(8, 8, groups=8), conv(8, 6, groups=2), conv(6, 2)), image)
    assert one(f, ('0.weight', 0), ('1.weight', 0), ('1.bias', 0))
    a = f.axes['0.weight', 0]
    assert torch.equal(a[:4], a[4:]) and torch.equal(a[:4], f.axes['2.weight', 1])
    b = f.axes['2.weight', 0]
    assert torch.equal(b[:3], b[3:]) and torch.equal(b, f.axes['3.weight', 1]) and len(b.unique()) == 3


def test_pixel_shuffle_takes_four_together():
    f = flow(nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 2)), image)
    assert torch.equal(f.axes['0.weight', 0], f.axes['2.weight', 1].repeat_interleave(4)) and not f.stays('0.weight').any()


def test_a_channel_shuffle_keeps_the_groups_balanced():
    f = flow(nn.Sequential(conv(3, 6), nn.ChannelShuffle(2), conv(6, 6, groups=6, bias=False), conv(6, 2)), image)
    a = f.axes['0.weight', 0]
    assert torch.equal(a[:3], a[3:]) and torch.equal(f.axes['2.weight', 0], a.view(2, 3).t().flatten())


def test_heads():
    class Attention(nn.Module):
        def __init__(self): super().__init__(); self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        def forward(self, x):
            q, k, v = self.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            a = (q@k.transpose(2, 3)*.5).softmax(-1)
            return self.out((a@v).transpose(1, 2).reshape(2, 5, 8))
    f = flow(nn.Sequential(nn.Linear(6, 8), Attention()), torch.randn(2, 5, 6))
    rows = f.axes['1.qkv.weight', 0].view(3, 2, 4)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2]) and torch.equal(rows[0].flatten(), f.axes['1.out.weight', 1])
    assert one(f, ('0.weight', 0), ('1.qkv.weight', 1)) and not f.stays('0.weight').any()


tokens = torch.randn(2, 5, 16)


@pytest.mark.parametrize('attn', [fused, by_hand])
def test_a_head_is_one_class_in_all_projections(attn):
    f = flow(Packed(attn=attn), tokens)
    rows = f.axes['qkv.weight', 0].view(3, 4, 4)
    heads = rows[0, :, 0]
    assert torch.equal(rows, heads[None, :, None].expand(3, 4, 4)) and len(heads.unique()) == 4 and set(heads.tolist()) <= f.heads
    assert torch.equal(f.axes['proj.weight', 1], heads.repeat_interleave(4)) and not f.stays('qkv.weight').any()
    assert [r.where for r in f.reads] == ['proj'] and set(f.alive()) == set(heads.tolist())
    assert f.macs(set(heads.tolist()[:1])) == .75*f.macs()


@pytest.mark.parametrize('attn', [fused, by_hand])
def test_a_group_of_queries_is_one_class(attn):
    for m in (Separate(heads=6, kv=3, attn=attn), Separate(heads=6, kv=3, repeat=False), Llama(kv=2, attn=attn)):
        f = flow(m, tokens)
        k = f.axes['k.weight', 0]
        assert torch.equal(k, f.axes['v.weight', 0]) and len(k.unique()) == m.n_kv_heads and not f.stays('q.weight').any()
        assert torch.equal(f.axes['q.weight', 0], k.view(-1, 4).repeat_interleave(m.groups, 0).flatten()) and one(f, ('q.weight', 0), ('o.weight', 1))


@pytest.mark.parametrize('why, m, x', [
    ('width of a head', Forward(lambda m, x: m.o(fused(*(t[:, None] for t in (m.q(x), m.k(x), x)))), q=nn.Linear(16, 16), k=nn.Linear(16, 16), o=nn.Linear(16, 2)), tokens),
    ('beside numbers', Separate(), (tokens, torch.zeros(1, 4, 1, 1).expand(1, 4, 5, 5))),
    ('samples or tokens', Forward(lambda m, x: fused(m.q[None], x, x), q=nn.Parameter(torch.randn(4, 3, 4))), torch.randn(1, 4, 5, 4))])
def test_what_keeps_heads_is_named(why, m, x):
    f = flow(m, x)
    at = ('q', 1) if ('q', 1) in f.axes else ('q.weight', 0)
    assert f.stays(*at).all() and why in f.why(*at), f.why(*at)


def test_tokens_of_a_mask_stay():
    m = Forward(lambda m, x: m.a(x, m.mask), a=Separate(), mask=nn.Buffer(torch.randn(5, 5)))
    f = flow(m, tokens)
    assert f.stays('mask', 0).all() and f.stays('mask', 1).all() and 'samples or tokens' in f.why('mask', 0) and not f.stays('a.q.weight').any()


def test_a_table_beside_heads_stays_and_a_norm_of_all_does_not():
    f = flow(Llama(), tokens)
    assert f.stays('inv_freq').all() and f.stays('table', 1).all() and not f.stays('q.weight').any()
    m = Forward(lambda m, x: m.b(m.n(m.a(x).view(2, 4, 3, 3))), a=nn.Linear(6, 36), n=nn.BatchNorm2d(4), b=conv(4, 2))
    f = flow(m, torch.randn(2, 6)) # here channels go, and places stay
    assert torch.equal(f.axes['a.weight', 0], f.axes['n.weight', 0].repeat_interleave(9)) and apart(f, 'n.weight') and not f.stays('n.weight').any()


@pytest.mark.parametrize('why, op', [('native_layer_norm', lambda m, x: F.layer_norm(x, x.shape[1:])), ('_softmax', lambda m, x: x.softmax(1)),
                                     ('native_group_norm', lambda m, x: F.group_norm(x, 2)), ('cummax', lambda m, x: torch.cummax(x, 1)[0]),
                                     ('slice', lambda m, x: torch.cat([x[:, 2:], x[:, :2]], 1)), ('mul', lambda m, x: x*torch.arange(4.).view(4, 1, 1)),
                                     ('mean', lambda m, x: x.mean(1, keepdim=True).expand(x.shape)), ('roll', lambda m, x: x.roll(1, 1)),
                                     ('index', lambda m, x: x[:, [3, 2, 1, 0]]), ('svd', lambda m, x: torch.linalg.svd(x)[0])])
def test_what_needs_all_channels_pins_them_and_is_named(why, op):
    f = flow(nn.Sequential(conv(), Forward(op), conv(4, 2)), image)
    assert f.stays('0.weight').all() and why in f.why('0.weight') and 'in 1' in f.why('0.weight'), f.why('0.weight')


def test_a_channel_added_to_the_input_stays():
    f = flow(Forward(lambda m, x: m.b(m.a(x) + x), a=conv(3, 3), b=conv(3, 2)), image)
    assert f.stays('a.weight').all() and 'add' in f.why('a.weight')


def test_unused_parameters_stay():
    f = flow(Forward(lambda m, x: m.a(x).sum(), a=conv(), b=conv()), image)
    assert f.stays('b.weight').all() and 'b.weight is not used' in f.why('b.weight')


def test_an_axis_that_is_not_there():
    with pytest.raises(ValueError, match="no axis 0 of 'a'.*'weight' 0"): flow(nn.Linear(2, 2), torch.ones(1, 2)).outputs('a')


def test_the_outputs_of_several_heads():
    m = Forward(lambda m, x: {'a': m.a(m.c(x)), 'b': [m.b(m.c(x))]}, c=conv(), a=conv(4, 2), b=conv(4, 3))
    f = flow(m, image)
    assert f.outputs('a.weight').all() and f.outputs('b.weight').all() and not f.outputs('c.weight').any()


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_components_are_those_of_the_graph(pairs):
    root = components(20, torch.tensor(pairs, dtype=torch.long).view(-1, 2).t())
    slow = list(range(20))
    for _ in range(20):
        for a, b in pairs: slow[a] = slow[b] = min(slow[a], slow[b])
    assert root.tolist() == slow


@settings(deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4), st.data())
def test_labels_of_a_view_are_the_view_of_the_labels(shape, data):
    n = torch.Size(shape).numel()
    t = torch.randint(0, 3, [s if data.draw(st.booleans()) else 1 for s in shape])
    new, rest = [], n
    while rest > 1:
        new.append(data.draw(st.sampled_from([d for d in range(2, rest+1) if rest % d == 0] + [1])))
        rest //= new[-1]
    got = reshaped(t, tuple(shape), tuple(new))
    assert torch.equal(got.expand(new), t.expand(shape).reshape(new))


class Restless(nn.Module):
    "Leaves something everywhere"
    def __init__(self, fail=False):
        super().__init__()
        self.bn, self.log, self.seen, self.w, self.fail = nn.BatchNorm2d(3), [], {}, nn.Parameter(torch.ones(3)), fail
        self.register_buffer('count', torch.zeros(()))

    def forward(self, x):
        F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)
        self.kept = x.detach()
        self.log.append(1)
        self.seen['x'] = x
        self.count += 1
        self.count = self.count + 1
        self.w.data.mul_(2)
        self.register_forward_hook(lambda *a: None)
        self.extra = nn.Linear(2, 2)
        random.random()
        if self.fail: raise RuntimeError('no')
        return x + torch.rand(())


@pytest.mark.parametrize('fail', [False, True])
@pytest.mark.parametrize('train', [False, True])
def test_looking_changes_nothing(fail, train):
    m = Restless(fail).train(train)
    m.bn.eval()
    m.w.grad = torch.ones(3)
    hook = m.bn.register_forward_hook(lambda *a: None)
    state, seeds, keys = copy.deepcopy(m.state_dict()), (torch.get_rng_state(), random.getstate()), {k for k in vars(m)}
    fast, params = torch.backends.mha.get_fastpath_enabled(), {n: id(p) for n, p in [*m.named_parameters(), *m.named_buffers()]}
    if fail:
        with pytest.raises(ValueError, match='fails on the example .2×3×8×8.*RuntimeError: no'): flow(m, image)
    else: flow(m, image)
    assert all(map(torch.equal, state.values(), m.state_dict().values())) and state.keys() == m.state_dict().keys()
    assert torch.equal(seeds[0], torch.get_rng_state()) and seeds[1] == random.getstate()
    assert {k for k in vars(m)} == keys and m.log == [] and m.seen == {} and not m._forward_hooks and list(m._modules) == ['bn']
    assert m.training == train and not m.bn.training and torch.equal(m.w.grad, torch.ones(3)) and torch.is_grad_enabled()
    assert {n: id(p) for n, p in [*m.named_parameters(), *m.named_buffers()]} == params and list(m.bn._forward_hooks) == [hook.id]
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks


def test_a_graph_that_waits_for_its_backward_is_not_broken():
    m = nn.Sequential(conv(), nn.BatchNorm2d(4), conv(4, 2))
    loss = m(image).sum()
    flow(m, image)
    loss.backward()
    assert m[0].weight.grad is not None


def test_examples():
    two = Forward(lambda m, a, b: m.a(a) + m.a(b), a=nn.Linear(3, 2))
    assert flow(two, (torch.ones(1, 3), torch.ones(1, 3))).outputs('a.weight').all()

    class Named(nn.Module):
        def forward(self, x, scale=1): return x*scale
    assert call(Named(), {'x': torch.ones(2), 'scale': 3}).sum() == 6

    class Batch(nn.Module):
        def forward(self, batch): return batch['x']
    assert call(Batch(), {'x': 5}) == 5


def test_the_recording_names_the_modules():
    m = nn.Sequential(OrderedDict(a=conv(), b=nn.Sequential(nn.ReLU(), conv(4, 2))))
    assert [op.where for op in watch(m, image).ops if op.name in ('convolution', 'relu')] == ['a', 'b.0', 'b.1']


def test_undisturbed_runs_in_eval_mode_without_gradients():
    m = nn.Sequential(nn.Dropout(.9), nn.Linear(3, 3))
    with undisturbed(m):
        assert not m.training and not m[0].training and not torch.is_grad_enabled()
    assert m[0].training


def test_numbers_read_out_of_parameters_are_no_decision():
    flow(Forward(lambda m, x: m.a(x)*float(m.s), a=nn.Linear(3, 2), s=nn.Parameter(torch.ones(()))), torch.ones(1, 3))
    x, branch = torch.ones(1, 3), Forward(lambda m, x: x*2 if x.max() > 0 else x)
    with pytest.raises(ValueError, match='0 reads a number.*depends on the input.*take that part out'):
        flow(nn.Sequential(branch, nn.Linear(3, 2)), x)
    f = flow(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), branch), x) # after all parameters it does no harm
    assert f.outputs('1.weight').all() and not f.stays('0.weight').any()


def test_a_change_in_place_through_another_view_pins():
    def write(m, x):
        y = m.a(x)
        y[:, :, 0].add_(1)
        return m.b(y)
    f = flow(Forward(write, a=conv(), b=conv(4, 2)), image)
    assert f.stays('a.weight').all() and 'in place' in f.why('a.weight')


def test_what_meets_places_without_a_channel_stays():
    "A shortcut that is padded with zeros: the two new places are always there"
    f = flow(Forward(lambda m, x: m.c(m.b(x) + F.pad(m.a(x), (0, 0, 0, 0, 1, 1))), a=conv(3, 2), b=conv(3, 4), c=conv(4, 2)), image)
    assert f.stays('b.weight').tolist() == [True, False, False, True] and not f.stays('a.weight').any()


def test_what_is_left_of_a_split_axis_is_a_block():
    def shuffle(m, x):
        y = m.a(x)
        n, c, h, w = y.shape
        return m.b(y.view(n, 2, c//2, h, w).transpose(1, 2).reshape(n, c, h, w))
    a = flow(Forward(shuffle, a=conv(3, 6), b=conv(6, 2)), image).axes['a.weight', 0]
    assert torch.equal(a[:3], a[3:]) and len(a.unique()) == 3


def test_a_pool_with_padding_keeps_no_constant_but_zero():
    m = nn.Sequential(conv(), nn.AvgPool2d(3, 1, 1), conv(4, 2))
    with torch.no_grad(): m[0].weight.zero_(), m[0].bias.copy_(torch.tensor([0., 1, 2, 0]))
    assert [k == 0 for k in flow(m, image).reads[-1].known.tolist()] == [True, False, False, True]
    assert flow(m, image).reads[-1].known[1:3].isnan().all()
    m[1] = nn.MaxPool2d(3, 1, 1)
    assert flow(m, image).reads[-1].known.tolist() == [0, 1, 2, 0]

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from core_helpers import CRITERIA, DTYPES, EACH, LAYERS, PERCENTS, bits, fill, invent, linear, naive_groups, naive_mask, nearest, rows, same, small_net
from fastsparse.criteria import elementwise, large_final
from fastsparse.granularity import NM, Granularity
from fastsparse.mask import PIECE
from fastsparse.plan import Plan, SparsityWarning, check_sparsity
from fastsparse.select import find_targets
from fastsparse.sparsifier import Sparsifier


def count(s): return sum(int((t.weight == 0).sum()) for t in s.targets.values())


def quietly(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        return f(*args, **kw)


# requested and achieved

@pytest.mark.parametrize('method', ['local', 'global'])
@pytest.mark.parametrize('kind,name', EACH)
def test_one_layer_loses_the_nearest_number_of_its_lowest_groups(kind, name, method):
    "Every granularity of every layer type, every dtype, all-equal weights: those that a stable sort would take"
    for dtype, values in [(d, None) for d in DTYPES] + [(torch.float32, -.3), (torch.bfloat16, .3)]:
        layer = fill(LAYERS[kind]().to(dtype), values)
        w, groups, floor = layer.weight.detach().clone(), naive_groups(layer, name), name != 'layer'
        n, size = int(groups.max())+1, w.numel()//(int(groups.max())+1)
        s = Sparsifier(layer, name, method)
        for percent in PERCENTS: # in rising order, so that they nest as well
            quietly(s.prune_model, percent)
            lost, rest = divmod(count(s), size)
            assert rest == 0 and abs(count(s) - percent*w.numel()/100) == nearest(percent, n, size, floor and percent < 100), (dtype, percent)
            parts = layer.groups if name == 'filter' and getattr(layer, 'groups', 1) not in (1, getattr(layer, 'in_channels', 1)) else 1
            expected = naive_mask(w.abs().float() if values is None else torch.ones(w.shape), groups, lost, parts)
            assert torch.equal(s.masks['weight'], expected) and torch.equal(layer.weight, w*expected), (dtype, percent)
            assert s.sparsity() == 100*count(s)/w.numel()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', ['weight', 'kernel', 'filter', 'row', 'column', 'channel', 'shared_kernel', 'shared_weight', 'vertical_slice', 'layer'])
def test_global_is_off_by_half_the_largest_group_at_most(name, dtype):
    "Several layers with groups of different size; single weights, that all have the same, are exact"
    for values in (None, .3):
        for percent in PERCENTS:
            torch.manual_seed(1)
            model = nn.Sequential(*(fill(make().to(dtype), values) for kind, make in LAYERS.items() if (kind, name) in EACH))
            s = Sparsifier(model, name, 'global')
            quietly(s.prune_model, percent)
            total, largest = sum(m.weight.numel() for m in model), max(t.groups.size for t in s.targets.values())
            most = total if percent == 100 or name == 'layer' else sum(t.weight.numel()-t.groups.size for t in s.targets.values())
            asked = min(percent*total/100, most)
            assert abs(count(s) - asked) <= largest/2, percent
            assert percent == 100 or name == 'layer' or all((m.weight != 0).any() for m in model)
            for t in s.targets.values():
                alive = t.groups.alive(t.weight != 0)
                assert torch.equal(t.groups.expand(alive), t.weight != 0) and torch.equal(s.masks[t.name], t.weight != 0), 'whole groups'


@pytest.mark.parametrize('dtype', DTYPES)
def test_global_of_equal_groups_is_one_stable_sort(dtype):
    layers = [fill(nn.Linear(7, n).to(dtype)) for n in (5, 3, 8)]
    scores = torch.cat([x.weight.detach().abs().flatten() for x in layers])
    model = nn.Sequential(*layers)
    s = Sparsifier(model)
    for percent in (1, 10, 50, 70):
        quietly(s.prune_model, percent)
        lost = set(scores.sort(stable=True).indices[:round(percent*112/100)].tolist())
        assert torch.equal(torch.cat([m.flatten() for m in s.masks.values()]), torch.tensor([i not in lost for i in range(112)]))


@pytest.mark.parametrize('method', ['local', 'global'])
def test_the_same_again_gives_the_same(method):
    masks = []
    for _ in range(2):
        torch.manual_seed(0)
        s = Sparsifier(small_net(), 'weight', method)
        s.prune_model(70)
        masks.append(s.masks)
    assert same(*masks)


@pytest.mark.parametrize('criteria', CRITERIA)
def test_every_criterion_meets_the_target(criteria):
    model = small_net()
    s = invent(Sparsifier(model, criteria=criteria))
    for m in model.modules():
        if hasattr(m, 'weight'): m.weight.data.add_(torch.randn_like(m.weight)/10)
    s.prune_model(75)
    assert count(s) == 75*(216+1152+64)/100 and s.sparsity() == 75


@pytest.mark.parametrize('percent', [0, 1, 33, 50, 99, 100, 50., np.float32(50), np.int64(50)])
def test_any_real_number_is_a_percentage(percent):
    s = Sparsifier(linear([1]*10, [2]*10))
    quietly(s.prune_model, percent)
    assert count(s) == (20 if percent == 100 else min(round(percent/5), 19))


def test_half_a_group_is_the_nearest_there_is():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s = Sparsifier(linear([1, 2, 3]))
        s.prune_model(50) # 1.5 weights
        assert count(s) in (1, 2)


def test_a_layer_keeps_one_group_below_100_percent_also_with_local():
    model = nn.Sequential(linear([1, 2]), linear([3, 4]))
    s = Sparsifier(model, method='local')
    quietly(s.prune_model, 99)
    assert [rows(m.weight) for m in model] == [[[0, 2]], [[0, 4]]]
    s.prune_model(100)
    assert count(s) == 4


def test_granularity_layer_may_empty_a_layer():
    model = nn.Sequential(linear([1, 2]), linear([3, 4]))
    Sparsifier(model, 'layer').prune_model(50)
    assert [rows(m.weight) for m in model] == [[[0, 0]], [[3, 4]]]


# warnings

def test_a_warning_has_both_numbers():
    with pytest.warns(SparsityWarning, match=r'asked for 50 % zeros, got 33.33 % \(.*\): the nearest that whole groups of row allow') as seen:
        Sparsifier(nn.Linear(5, 3), 'row').prune_model(50 - 1e-9)
    assert len(seen) == 1 and issubclass(SparsityWarning, UserWarning)


def test_a_warning_names_the_layers_that_are_off_with_local():
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4))
    with pytest.warns(SparsityWarning, match=r'asked for 25 % zeros, got 29.63 % \(.*\): .* \(0 has 33.33 % of 25 %\)$'): Sparsifier(model, 'row', 'local').prune_model(25)


def test_a_warning_says_that_zeros_were_there():
    s = Sparsifier(linear([0, 0, 0, 1]))
    with pytest.warns(SparsityWarning, match=r'asked for 50 % zeros, got 75 % \(.*\): these zeros were there before'): s.prune_model(50)


def test_a_warning_says_round_to():
    with pytest.warns(SparsityWarning, match=r'asked for 50 % zeros, got 33.33 % \(.*\): .*round_to=8'): Sparsifier(nn.Linear(5, 12), 'row').prune_model(50, round_to=8)


@pytest.mark.parametrize('prune', [lambda s: s.prune_model(40), lambda s: s.prune_layer(s.model, 40)])
def test_a_warning_points_at_the_line_that_asked(prune):
    s = Sparsifier(nn.Linear(5, 3), 'row')
    with pytest.warns(SparsityWarning) as seen: prune(s)
    assert seen[0].filename == __file__


@pytest.mark.parametrize('granularity,percent', [('weight', 70), ('filter', 75), ('filter', 0), ('weight', 100), ('kernel', 50)])
def test_no_warning_where_it_is_met(granularity, percent):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Sparsifier(nn.Sequential(nn.Conv2d(5, 8, 2), nn.Conv2d(8, 4, 5)), granularity, 'local').prune_model(percent)


# N:M

@pytest.mark.parametrize('kind',
    ['Conv1d', 'Conv2d', 'Conv2d grouped', 'Conv3d', 'ConvTranspose1d', 'ConvTranspose2d', 'ConvTranspose2d grouped', 'ConvTranspose3d grouped', 'Linear'])
@pytest.mark.parametrize('values', [None, .3])
@pytest.mark.parametrize('dtype', DTYPES)
def test_nm_keeps_exactly_n_of_every_block(kind, values, dtype):
    layer = fill(LAYERS[kind]().to(dtype), values)
    w = layer.weight.detach().clone()
    Sparsifier(layer, NM(1, 2)).prune_model(50)
    inputs = naive_groups(layer, 'column' if kind == 'Linear' else 'shared_kernel').flatten()
    outputs = naive_groups(layer, 'row' if kind == 'Linear' else 'channel').flatten() # an output at one place of the kernel
    kept = {}
    for i, o, v, old in zip(inputs.tolist(), outputs.tolist(), layer.weight.flatten().tolist(), w.flatten().tolist(), strict=True):
        kept.setdefault((i//2, o), []).append((v, old))
    for (v1, w1), (v2, w2) in kept.values(): assert (v1, v2) == ((w1, 0) if abs(w1) > abs(w2) else (0, w2)), 'the larger stays, of equals the second'


def test_nm_by_hand():
    layer = linear([1, 2, 3, 4, 4, 3, 2, 1], [5, 5, 5, 5, -9, 0.5, 8, -7])
    Sparsifier(layer, '2:4').prune_model(50)
    assert rows(layer.weight) == [[0, 0, 3, 4, 4, 3, 0, 0], [0, 0, 5, 5, -9, 0, 8, 0]]
    layer = linear([1, 2, 3, 4, 4, 3, 2, 1])
    Sparsifier(layer, NM(1, 4)).prune_model(75)
    assert rows(layer.weight) == [[0, 0, 0, 4, 4, 0, 0, 0]]


def test_nm_names_what_it_leaves_dense():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(6, 4))
    s = Sparsifier(model, '2:4')
    s.prune_model(50)
    assert list(s.targets) == ['1.weight'] and s.sparsity() == 50
    assert s.left_dense == {'0': 'its 3 inputs do not divide into blocks of 4', '2': 'its 6 inputs do not divide into blocks of 4'}
    assert '0 is left dense: its 3 inputs do not divide into blocks of 4' in str(s.report())
    assert (model[0].weight != 0).all() and (model[2].weight != 0).all()


@pytest.mark.parametrize('ask', [lambda s, p: s.prune_model(p), lambda s, p: s.prune_layer('1', p), lambda s, p: s.prune_model({'1': p})])
def test_nm_refuses_another_percent(ask):
    s = Sparsifier(nn.Sequential(nn.ReLU(), nn.Linear(8, 4)), '2:4')
    with pytest.raises(ValueError, match='sparsity=70 does not go with the pattern 2:4, which always makes 50 % zero; ask for 50'): ask(s, 70)
    ask(s, 0)
    assert s.sparsity() == 0
    ask(s, 50)
    assert s.sparsity() == 50


@pytest.mark.parametrize('n,m', [(1, 3), (2, 3), (3, 7)])
def test_nm_accepts_the_percent_that_it_asks_for(n, m):
    s = Sparsifier(nn.Linear(21, 4), NM(n, m))
    with pytest.raises(ValueError) as e: s.prune_model(50)
    s.prune_model(float(str(e.value).rpartition('ask for ')[2]))
    assert count(s) == 84*(m-n)//m


def test_nm_without_a_layer_it_divides_is_refused_with_the_reasons():
    with pytest.raises(ValueError, match='no layer to prune by 2:4 .*its 3 inputs do not divide'): Sparsifier(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), '2:4')


def test_nm_does_not_round():
    with pytest.raises(ValueError, match='round_to=8 does not go with 2:4'): Sparsifier(nn.Linear(8, 8), '2:4').prune_model(50, round_to=8)


# round_to

@pytest.mark.parametrize('percent,remain', [(0, 24), (1, 24), (16, 24), (17, 16), (40, 16), (50, 16), (60, 8), (70, 8), (90, 8), (99, 8), (100, 8)])
def test_round_to_local(percent, remain):
    s = Sparsifier(nn.Linear(3, 24), 'row', 'local')
    quietly(s.prune_model, percent, round_to=8)
    kept = int(s.masks['weight'][:, 0].sum())
    assert kept == remain if percent != 50 else kept in (8, 16)


def test_round_to_leaves_a_multiple_where_the_layer_is_none():
    model = nn.Sequential(nn.Linear(3, 20), nn.Linear(3, 9), nn.Linear(3, 8))
    s = Sparsifier(model, 'row', 'local')
    quietly(s.prune_model, 30, round_to=8)
    assert [int(m[:, 0].sum()) for m in s.masks.values()] == [16, 8, 8]


@pytest.mark.parametrize('percent', [10, 30, 50, 70, 90, 99, 100])
def test_round_to_global(percent):
    model = nn.Sequential(*(nn.Conv2d(3, n, 3) for n in (16, 24, 64, 20, 8)))
    s = Sparsifier(model, 'filter', 'global')
    quietly(s.prune_model, percent, round_to=8)
    kept = [int(m.flatten(1).any(1).sum()) for m in s.masks.values()]
    assert all(k % 8 == 0 and k >= 8 for k in kept)
    assert abs(132-sum(kept) - min(1.32*percent, 132-40)) <= 4 or percent == 10


def test_round_to_global_with_little_wanted_where_some_have_to_go():
    "Of 20 rows four have to go, however little is wanted; as in the first step of a schedule"
    s = Sparsifier(nn.Sequential(nn.Linear(3, 20), nn.Linear(3, 20)), 'row')
    assert s.advance(s.plan(50, round_to=8), .01) == 20
    assert s.advance(s.plan(50, round_to=8), .9) == 40


def test_round_to_takes_the_lowest():
    layer = linear(*([v] for v in (5, 1, 4, 2, 3, 6)))
    quietly(Sparsifier(layer, 'row').prune_model, 30, round_to=4)
    assert rows(layer.weight) == [[5], [0], [4], [0], [3], [6]]


def test_round_to_one_layer():
    model = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 16))
    s = Sparsifier(model, 'row')
    quietly(s.prune_layer, '1', 40, round_to=8)
    assert bits(s.masks['0.weight'].all()) and int(s.masks['1.weight'][:, 0].sum()) == 8


@pytest.mark.parametrize('method', ['local', 'global'])
def test_round_to_keeps_the_zeros_that_are_there(method):
    "3 of 16 rows are zero: 16 cannot remain, so 8 do"
    s = Sparsifier(nn.Linear(3, 16), 'row', method)
    quietly(s.prune_model, 3*100/16)
    before = s.masks['weight'].clone()
    quietly(s.prune_model, 20, round_to=8)
    assert not (s.masks['weight'] & ~before).any(), 'zeros came back'
    assert int(s.masks['weight'][:, 0].sum()) == 8


@pytest.mark.parametrize('bad', [0, -4, 2.5, True, '8', math.nan])
def test_bad_round_to_is_refused(bad):
    with pytest.raises(ValueError, match='round_to=.* has to be a whole number of groups, at least 1, such as 8'):
        Sparsifier(nn.Linear(8, 8), 'row').prune_model(50, round_to=bad)


@pytest.mark.parametrize('method', ['local', 'global'])
def test_round_to_larger_than_a_layer_is_refused_and_names_it(method):
    s = Sparsifier(nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 4)), 'row', method)
    with pytest.raises(ValueError, match=r'round_to=8 is larger than these layers \(groups\): 1 \(4\); use a smaller one, or leave them out with exclude='):
        s.prune_model(50, round_to=8)
    assert s.sparsity() == 0
    quietly(s.prune_layer, '0', 50, round_to=8)
    assert s.sparsity() == 100*24/112


# one layer, or each its own

def test_prune_layer_leaves_the_others_alone():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    s = Sparsifier(model)
    s.prune_layer(model[3], 50)
    assert int((model[3].weight == 0).sum()) == 576 == count(s)
    s.prune_layer('0', 75)
    assert int((model[0].weight == 0).sum()) == 162
    for k, v in model.state_dict().items(): assert torch.equal(v, before[k]) or k in ('0.weight', '3.weight')


def test_prune_layer_by_module_layer_name_and_tensor_name():
    for which in (lambda m: m[0], lambda m: '0', lambda m: '0.weight'):
        model = nn.Sequential(linear([1, 2]))
        Sparsifier(model).prune_layer(which(model), 50)
        assert rows(model[0].weight) == [[0, 2]]


def test_prune_layer_meets_its_own_target_with_global_too():
    model = nn.Sequential(linear([1, 2, 3, 4]), linear([1], [1], [1]))
    s = Sparsifier(model, method='global')
    s.prune_layer(model[0], 75)
    assert s.sparsity() == 300/7


@pytest.mark.parametrize('bad', ['nope', '1.*', nn.Linear(2, 2), nn.Linear, 3, None])
def test_prune_layer_refuses_what_is_no_target_and_lists_them(bad):
    with pytest.raises(ValueError, match='is not a layer of this Sparsifier; its layers are 0, 2'):
        Sparsifier(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))).prune_layer(bad, 50)


def test_prune_layer_refuses_a_dict():
    with pytest.raises(ValueError, match='prune_model takes a dict'): Sparsifier(nn.Linear(2, 2)).prune_layer('', {'': 50})


def test_each_layer_its_own_target():
    model = small_net()
    s = Sparsifier(model, method='local')
    s.prune_model({'0': 25, nn.Linear: 75})
    assert [round(r.percent) for r in s.report().layers] == [25, 0, 75]
    s.prune_model({nn.Conv2d: 50, model[3]: 75, (lambda n, m: n == '8'): 100})
    assert [r.percent for r in s.report().layers] == [50, 75, 100]


def test_the_last_key_that_means_a_layer_counts():
    s = Sparsifier(small_net(), method='local')
    s.prune_model({'*': 50, '0': 25})
    assert [r.percent for r in s.report().layers] == [25, 50, 50]


def test_a_dict_says_which_layer_is_off():
    with pytest.warns(SparsityWarning, match='0 has 33.33 % of 40 %'):
        Sparsifier(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4)), 'row', 'local').prune_model({'0': 40, '1': 25})


@pytest.mark.parametrize('criteria', ['large_final', 'random_score'])
def test_several_percentages_are_rankings_of_their_own(criteria):
    "Those that share a percentage compete, as if there were no others"
    torch.manual_seed(0)
    m = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    with torch.no_grad(): m[0].weight.mul_(3)
    alone = copy.deepcopy(m[:2])
    s = Sparsifier(m, criteria=criteria)
    s.prune_model({'0': 50, '1': 50, '2': 75, '3': 75, '4': None})
    gone = [int((k.weight == 0).sum()) for k in m]
    assert gone[0] + gone[1] == 64 and gone[2] + gone[3] == 96 and gone[4] == 0
    if criteria == 'large_final':
        assert gone[0] < gone[1]
        Sparsifier(alone).prune_model(50)
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(alone, m))
    s.prune_model({'*': 80, '4': None})
    assert sum(int((k.weight == 0).sum()) for k in m) == round(.8*256) and (m[4].weight != 0).all()


def test_the_last_key_wins_and_none_leaves_dense():
    s = Sparsifier(small_net(), method='local')
    s.prune_model({'*': 50, '0': None, '3': 25})
    assert [r.percent for r in s.report().layers] == [0, 25, 50]
    with pytest.raises(ValueError, match='leaves all dense'): s.prune_model({'*': None})


@pytest.mark.parametrize('bad,says',
    [({}, 'empty dict; give at least one layer'), ({'nope': 50}, "sparsity key=.nope. matches no layer"),
    ({'1': 50}, "sparsity key '1' means none of the layers to prune, which are 0, 3, 8"),
                                      ({'0': .7}, 'did you mean 70'), ({'0': 'a'}, 'is not a number'), ({'0': {'1': 2}}, 'has to be a percentage'),
                                      ({3: 50}, 'sparsity key=3 selects nothing'), ({'0': 150}, 'out of range')])
def test_bad_dicts_are_refused(bad, says):
    s = Sparsifier(small_net(), method='local')
    with pytest.raises(ValueError, match=says): s.prune_model(bad)
    assert s.sparsity() == 0


# what is there stays

@pytest.mark.parametrize('method', ['local', 'global'])
def test_zeros_that_are_there_are_kept_and_counted(method):
    layer = linear([0, 5, 1, 0, 6, 2, 0, 3])
    s = Sparsifier(layer, method=method)
    assert s.sparsity() == 37.5 and bits(s.masks['weight']) == [[0, 1, 1, 0, 1, 1, 0, 1]]
    s.prune_model(50)
    assert rows(layer.weight) == [[0, 5, 0, 0, 6, 2, 0, 3]]


def test_zeros_of_a_loaded_model_are_kept():
    first = small_net()
    Sparsifier(first).prune_model(60)
    second = small_net()
    second.load_state_dict(first.state_dict())
    s = Sparsifier(second)
    assert s.sparsity() == pytest.approx(60, abs=.04) and all(torch.equal(m, second.get_parameter(n) != 0) for n, m in s.masks.items())


def test_scattered_zeros_are_no_pruned_groups():
    "Row 0 has a zero but lives; row 1 is dead"
    layer = linear([0, 1], [0, 0], [3, 3])
    s = Sparsifier(layer, 'row')
    assert bits(s.masks['weight']) == [[1, 1], [0, 0], [1, 1]]


def test_a_tensor_of_zeros_counts_as_dense():
    "Such as a layer that starts at zero"
    model = nn.Sequential(linear([0, 0], [0, 0]), linear([1, 2], [3, 4]))
    s = Sparsifier(model, method='local')
    assert s.masks['0.weight'].all()
    s.prune_model(50)
    assert [bits(m) for m in s.masks.values()] == [[[0, 0], [1, 1]], [[0, 0], [1, 1]]]


@pytest.mark.parametrize('granularity', ['weight', 'filter', 'kernel'])
@pytest.mark.parametrize('method', ['local', 'global'])
@pytest.mark.parametrize('criteria', ['large_final', 'small_final', 'random_score', 'movement', 'updating_movement'])
def test_masks_nest_under_a_rising_target_while_the_weights_move(criteria, method, granularity):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3))
    s = Sparsifier(model, granularity, method, criteria)
    before = None
    for percent in (10, 30, 50, 70, 90, 99, 100):
        for m in model: m.weight.data.add_(torch.randn_like(m.weight))
        s.apply_masks()
        quietly(s.prune_model, percent)
        assert before is None or all(not (s.masks[n] & ~before[n]).any() for n in before)
        before = {n: m.clone() for n, m in s.masks.items()}


@pytest.mark.parametrize('method', ['local', 'global'])
def test_a_layer_that_was_emptied_on_purpose_stays_empty(method):
    model = nn.Sequential(linear([1, 2, 3, 4]), linear([5, 6], [7, 8]))
    s = Sparsifier(model, method=method)
    s.prune_layer('0', 100)
    quietly(s.prune_model, 75)
    assert not s.masks['0.weight'].any() and s.sparsity() == 100*(6 if method == 'global' else 7)/8


@pytest.mark.parametrize('kind', ['weight', 'row', '1:2'])
@pytest.mark.parametrize('method', ['local', 'global'])
def test_twice_is_once(method, kind):
    model = nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 4), nn.Linear(4, 6))
    s = Sparsifier(model, kind, method)
    quietly(s.prune_model, 50)
    first, weights = {n: m.clone() for n, m in s.masks.items()}, copy.deepcopy(model.state_dict())
    quietly(s.prune_model, 50)
    assert same(first, s.masks) and same(weights, model.state_dict())


def test_a_lower_target_keeps_the_zeros_and_says_so():
    s = Sparsifier(linear([1, 2, 3, 4]))
    s.prune_model(75)
    with pytest.warns(SparsityWarning, match=r'asked for 25 % zeros, got 75 % \(.*\): these zeros were there before'): s.prune_model(25)
    assert s.sparsity() == 75


def test_infinite_scores_do_not_bring_zeros_back():
    "What is pruned stays below everything that is not, even below minus infinity"
    layer = linear([1, 2, 3, -torch.inf])
    s = Sparsifier(layer, criteria='small_final')
    s.prune_model(25)
    assert rows(layer.weight) == [[1, 2, 3, 0]]
    layer.weight.data.copy_(torch.tensor([[torch.inf, torch.inf, 1, 0]]))
    s.prune_model(50)
    assert bits(s.masks['weight']) == [[0, 1, 1, 0]] and rows(layer.weight) == [[0, torch.inf, 1, 0]]


# plans: what the callback does

def test_a_plan_goes_from_what_is_there_to_the_target():
    s = Sparsifier(linear(range(1, 11)))
    plan = s.plan(80)
    assert plan == Plan({'weight': 0}, {'weight': 80}, None)
    assert [s.advance(plan, p) for p in (0, .125, .5, .7, 1)] == [0, 10, 40, 60, 80] or s.sparsity() == 80
    assert s.sparsity() == 80 and s.plan(90).start == {'weight': 80}


def test_advance_tells_what_the_masks_make_zero():
    s = Sparsifier(linear(range(1, 11)))
    assert [s.advance(s.plan(80), p) for p in (.25, .5, 1)] == [20, 40, 80] and s.sparsity() == 80


def test_a_falling_progress_gives_weights_back():
    s = Sparsifier(linear([1, 2, 3, 4]))
    plan = s.plan(75)
    assert [s.advance(plan, p) for p in (1, 1/3, 0)] == [75, 25, 0] and s.masks['weight'].all()
    assert rows(s.model.weight) == [[0, 0, 0, 4]], 'they return at zero'


def test_a_falling_progress_stops_at_what_was_there():
    s = Sparsifier(linear([0, 0, 3, 4]))
    plan = s.plan(75)
    assert [s.advance(plan, p) for p in (1, 0)] == [75, 50]


def test_only_the_end_of_a_plan_warns():
    s = Sparsifier(nn.Linear(3, 3), 'row')
    plan = s.plan(50)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for p in (0, .2, .5, .9): s.advance(plan, p)
    with pytest.warns(SparsityWarning): s.advance(plan, 1)


def test_wanted():
    plan = Plan({'a': 50, 'b': 0}, {'a': 80, 'b': 80})
    assert plan.wanted(.5, {'a': 10, 'b': 100}, together=False) == [5, 40]
    assert plan.wanted(.5, {'a': 10, 'b': 100}, together=True) == [4, 40]
    assert plan.wanted(.01, {'a': 10, 'b': 100}, together=True) == [5, 0]


# masks are applied

def test_nothing_survives_a_mask():
    layer = linear([1, -2, 3, -4, 5])
    s = Sparsifier(layer)
    s.prune_model(80)
    for v in (torch.nan, -1., torch.inf, -torch.inf, -0.):
        layer.weight.data[0, :4] = v
        s.apply_masks()
        assert rows(layer.weight) == [[0, 0, 0, 0, 5]] and not layer.weight.signbit().any()


def test_pruned_negative_weights_are_not_minus_zero():
    layer = linear([-1, -2, -3, 4])
    Sparsifier(layer).prune_model(75)
    assert not layer.weight.signbit().any()


def test_kept_weights_are_untouched_bit_by_bit():
    layer = linear([1, -0., torch.inf, 2, 1e-45])
    s = Sparsifier(layer, criteria=lambda w: torch.tensor([[0., 1, 1, 1, 1]]))
    before = layer.weight.view(torch.int32).tolist()
    s.masks['weight'] = torch.ones(1, 5, dtype=torch.bool)
    s.apply_masks()
    assert layer.weight.view(torch.int32).tolist() == before


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_nan_is_an_error_that_names_the_layer_and_changes_nothing(dtype):
    for method in ('local', 'global'):
        model = small_net().to(dtype)
        s = Sparsifier(model, 'weight', method)
        s.prune_model(20)
        model[3].weight.data[2, 1, 0, 0] = torch.nan
        before, masks = copy.deepcopy(model.state_dict()), {n: m.clone() for n, m in s.masks.items()}
        with pytest.raises(ValueError, match="NaN among the scores of layer '3': its weights hold NaN, or the criterion large_final made it; nothing was pruned"):
            s.prune_model(70)
        assert same(masks, s.masks) and all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in model.state_dict().items())


def test_a_nan_that_the_criterion_makes_is_an_error():
    "inf - inf"
    with pytest.raises(ValueError, match="NaN among the scores of layer ''.*the criterion movement"):
        Sparsifier(linear([1, torch.inf]), criteria='movement').prune_model(50)


def test_infinities_are_ranked():
    layer = linear([1, torch.inf, 2, -torch.inf])
    Sparsifier(layer).prune_model(50)
    assert rows(layer.weight) == [[0, torch.inf, 0, -torch.inf]]
    layer = linear([1, torch.inf], [3, 3])
    Sparsifier(layer, 'row').prune_model(50)
    assert rows(layer.weight) == [[1, torch.inf], [0, 0]]


def test_the_score_of_a_group_is_a_mean_or_what_one_passes():
    weights = [1, 1, 9], [4, 4, 4]
    for g, expected in [('row', [[0]*3, [4]*3]), (Granularity('row', reduce=torch.amax), [[1, 1, 9], [0]*3]), (Granularity('row', reduce=torch.amin), [[0]*3, [4]*3])]:
        layer = linear(*weights)
        Sparsifier(layer, g).prune_model(50)
        assert rows(layer.weight) == expected


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_means_of_16_bit_weights_are_not_rounded_to_16_bits(dtype):
    "1.001 on average is more than 1, though not in 16 bits"
    layer = linear([1.5] + [1]*511, [1]*512).to(dtype)
    Sparsifier(layer, 'row').prune_model(50)
    assert bits(layer.weight[:, 0] != 0) == [1, 0]


def test_means_make_groups_of_different_size_comparable():
    "By their sum the first, large layer would win"
    model = nn.Sequential(linear([2]*8, [3]*8), linear([4], [5], [6], [7]))
    Sparsifier(model, 'row').prune_model(40)
    assert [rows(m.weight)[0] for m in model] == [[0]*8, [4]]


# shared tensors

def tied():
    model = nn.ModuleDict(dict(a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4, bias=False), c=nn.Linear(4, 4, bias=False)))
    model['b'].weight = model['a'].weight
    return model


def test_a_shared_tensor_is_one_target():
    model = tied()
    s = Sparsifier(model)
    assert list(s.targets) == ['a.weight', 'c.weight'] and [t.layer_name for t in find_targets(model, Granularity('weight'))[0]] == ['a', 'c']
    s.prune_model(50)
    assert count(s) == 16 and model['a'].weight is model['b'].weight and len(s.report().layers) == 2


def test_a_shared_tensor_has_both_names():
    model = tied()
    Sparsifier(model).prune_layer(model['b'], 50)
    assert int((model['a'].weight == 0).sum()) == 8
    model = tied()
    Sparsifier(model, method='local').prune_model({'b': 50})
    assert int((model['a'].weight == 0).sum()) == 8


def test_a_shared_tensor_that_one_layer_may_not_lose_is_left_dense():
    assert list(Sparsifier(tied(), exclude='b').targets) == ['c.weight'] == list(Sparsifier(tied(), exclude='a').targets)


def test_a_module_used_twice_is_one_target():
    layer = nn.Linear(3, 3)
    assert list(Sparsifier(nn.Sequential(layer, nn.ReLU(), layer)).targets) == ['0.weight']


# targets

def test_layers_without_the_granularity_are_named():
    s = Sparsifier(small_net(), 'filter')
    assert list(s.targets) == ['0.weight', '3.weight'] and list(s.left_dense) == ['8']
    assert "8 is left dense: Linear has no granularity 'filter', only weight, row, column, layer" in str(s.report())


def test_no_layer_has_the_granularity():
    with pytest.raises(ValueError, match=r"no layer to prune by filter \(0: Linear has no granularity 'filter'.*types Linear, ReLU"):
        Sparsifier(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), 'filter')
    with pytest.raises(ValueError, match='no layer to prune by weight.*types ReLU'): Sparsifier(nn.Sequential(nn.ReLU()))


def test_find_targets():
    targets, dense = find_targets(small_net(), Granularity('kernel'), exclude='0')
    assert [(t.name, t.layer_name, t.groups.n, t.whole_outputs) for t in targets] == [('3.weight', '3', 128, False)] and list(dense) == ['8']


@pytest.mark.parametrize('make,fix', [
    (nn.utils.parametrizations.weight_norm, 'remove_parametrizations'), (nn.utils.parametrizations.spectral_norm, 'remove_parametrizations'),
    (lambda m: torch_prune.l1_unstructured(m, 'weight', .5), 'prune.remove')])
def test_a_computed_weight_is_refused_with_the_fix(make, fix):
    model = nn.Sequential(nn.Linear(4, 4), make(nn.Linear(4, 4)))
    for named in ('1', model[1], ['0', '1']):
        with pytest.raises(ValueError, match=f"weight of layer '1' is computed at each forward.*{fix}.*exclude='1'"): Sparsifier(model, layers=named)
    s = Sparsifier(model)
    assert list(s.targets) == ['0.weight'] and fix in s.left_dense['1'] and '1 is left dense: its weight is computed at each forward' in str(s.report())
    with pytest.raises(ValueError, match=f"weight of layer '0' is computed at each forward.*{fix}"): Sparsifier(nn.Sequential(make(nn.Linear(4, 4))))


def test_the_fixes_for_computed_weights_work():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4))
    assert list(Sparsifier(model, exclude=['1', '2']).targets) == ['0.weight', '3.weight']
    assert list(Sparsifier(model, layers=['0', '3']).targets) == ['0.weight', '3.weight']
    for i in (1, 2): nn.utils.parametrize.remove_parametrizations(model[i], 'weight')
    assert len(Sparsifier(model).targets) == 4


def test_leaving_out_one_computed_weight_does_not_leave_out_another():
    wn = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(nn.Linear(4, 4), *(wn(nn.Linear(4, 4)) for _ in range(6)))
    for i in range(1, 7):
        assert set(Sparsifier(model, exclude=str(i)).left_dense) == set('123456') - {str(i)}
        with pytest.raises(ValueError, match=f"weight of layer '{2 if i == 1 else 1}' is computed at each forward"): Sparsifier(model, layers=[str(k) for k in range(1, 7)], exclude=str(i))
    assert list(Sparsifier(model, exclude=[str(i) for i in range(1, 7)]).targets) == ['0.weight']


def test_torch_prune_leftovers_become_zeros_that_stay():
    model = nn.Sequential(nn.Linear(4, 4))
    torch_prune.l1_unstructured(model[0], 'weight', .5)
    torch_prune.remove(model[0], 'weight')
    assert Sparsifier(model).sparsity() == 50


@pytest.mark.parametrize('granularity', ['weight', '2:4', 'row'])
def test_a_lazy_layer_is_refused_with_the_fix(granularity):
    with pytest.raises(ValueError, match="weight of layer '0' does not exist yet; run one batch"): Sparsifier(nn.Sequential(nn.LazyLinear(4)), granularity)


def test_whole_number_weights_are_left_dense():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    s = Sparsifier(model)
    assert list(s.targets) == ['1.weight'] and 'torch.int8' in s.left_dense['0']


# nothing is left on the model

class Attribute(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.calls = []

    def forward(self, x):
        self.calls.append(x)
        return self.net(x)


@pytest.mark.parametrize('granularity', ['weight', 'filter', 'layer'])
def test_the_model_stays_what_it_was(granularity):
    model = Attribute(small_net()).train()
    model.net[1].eval()
    model.net[0].register_forward_hook(lambda *a: None)
    model.net[3].weight.register_hook(lambda g: g)
    model.net[0].weight.requires_grad_(False)

    def state():
        hooks = [(k, len(v)) for m in model.modules() for k, v in vars(m).items() if 'hooks' in k]
        return (list(model.state_dict()), [(n, id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()],
            [(n, id(b)) for n, b in model.named_buffers()],
                [(n, id(m), type(m), sorted(vars(m)), m.training) for n, m in model.named_modules()], hooks,
                [p._backward_hooks and len(p._backward_hooks) for p in model.parameters()], model.calls)
    before = state()
    s = Sparsifier(model, granularity)
    assert state() == before
    for _ in range(2): quietly(s.prune_model, 50)
    s.apply_masks(), s.report(), s.sparsity(), repr(s), s.load_state_dict(s.state_dict())
    assert state() == before and all(p.grad is None for p in model.parameters())


def test_only_what_is_pruned_changes():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    s = Sparsifier(model, exclude='8')
    s.prune_model(50)
    for k, v in model.state_dict().items(): assert torch.equal(v, before[k]*s.masks.get(k, True))


def test_zero_percent_changes_nothing():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    for g in ('weight', 'filter'): Sparsifier(model, g).prune_model(0)
    assert same(before, model.state_dict())


def test_nothing_is_drawn_from_the_seed_unless_the_criterion_is_random():
    model = small_net()
    before = torch.get_rng_state()
    quietly(Sparsifier(model, 'filter').prune_model, 50)
    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_and_grad_carrying_weights():
    model = small_net()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model[0].requires_grad_(False)
    s = Sparsifier(model)
    s.prune_model(50)
    assert s.sparsity() == 50 and all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())


def test_channels_last():
    model = small_net().to(memory_format=torch.channels_last)
    s = Sparsifier(model)
    s.prune_model(50)
    assert s.sparsity() == 50 and model[3].weight.is_contiguous(memory_format=torch.channels_last)
    plain = small_net()
    plain.load_state_dict(model.state_dict())
    assert same(s.masks, Sparsifier(plain).masks)


def test_a_compiled_model_is_the_model_in_it():
    model = small_net()
    s = Sparsifier(torch.compile(model))
    s.prune_model(50)
    assert s.model is model and list(s.targets) == ['0.weight', '3.weight', '8.weight'] and s.sparsity() == 50


def test_the_model_may_change_its_dtype_afterwards():
    model = small_net()
    s = Sparsifier(model)
    s.prune_model(50)
    model.bfloat16()
    for p in model.parameters(): p.data.fill_(1)
    s.apply_masks()
    assert s.sparsity() == 50


# saving

def stirred(criteria='large_final', granularity='weight'):
    torch.manual_seed(5)
    model = small_net()
    s = Sparsifier(model, granularity, criteria=criteria)
    for m in model: m.weight.data.add_(1) if hasattr(m, 'weight') else None
    quietly(s.prune_model, 40)
    return s


@pytest.mark.parametrize('criteria', ['large_final', 'movement', 'updating_movement', 'random_score', lambda w, initial, previous: w*initial*previous])
@pytest.mark.parametrize('granularity', ['weight', 'filter'])
def test_state_dict_round_trip(criteria, granularity):
    s = stirred(criteria, granularity)
    file = io.BytesIO()
    torch.save(s.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    model = small_net()
    model.load_state_dict(s.model.state_dict())
    other = Sparsifier(model, granularity, criteria=criteria)
    other.load_state_dict(state)
    assert state.keys() == other.state_dict().keys() and all(same(v, other.state_dict()[k]) for k, v in s.state_dict().items()) and same(s.masks, other.masks)
    for x in (s, other):
        torch.manual_seed(1)
        quietly(x.prune_model, 70)
    assert same(s.masks, other.masks) and same(s.model.state_dict(), other.model.state_dict())


def test_state_dict_is_a_copy():
    s = stirred('movement')
    state = s.state_dict()
    for ts in state.values():
        for t in ts.values(): t.zero_()
    assert all(m.any() for m in s.masks.values()) and s.state_dict()['initial']['0.weight'].any()
    s.load_state_dict(good := s.state_dict())
    good['masks']['0.weight'].zero_()
    assert s.masks['0.weight'].any()


def test_loading_applies_the_masks_and_their_followers():
    s = stirred(granularity='filter')
    model = small_net()
    other = Sparsifier(model, 'filter')
    other.load_state_dict(s.state_dict())
    assert other.sparsity() == s.sparsity()
    dead = ~s.masks['0.weight'].flatten(1).any(1)
    assert dead.any() and (model[0].bias[dead] == 0).all() and (model[1].weight[dead] == 0).all() and (model[1].weight[~dead] != 0).all()


@pytest.mark.parametrize('spoil,says', [
    (lambda d: d['masks'].pop('0.weight'), r"masks do not fit the targets: missing \['0.weight'\], too many \[\]"),
    (lambda d: d['masks'].update(x=torch.ones(1)), r"missing \[\], too many \['x'\]"),
    (lambda d: d['masks'].update({'8.weight': torch.ones(3, 3).bool()}), r'masks of 8.weight has shape \(3, 3\), but the weight has \(4, 16\)'),
    (lambda d: d['initial'].pop('8.weight'), 'initial do not fit'),
    (lambda d: d.pop('initial'), r"the state has \['masks'\], but this Sparsifier keeps \['initial', 'masks'\]"),
    (lambda d: d.update(previous={}), 'it has to have the same criteria'), (lambda d: d.clear(), r'the state has \[\]')])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(spoil, says):
    s = stirred('movement')
    before, weights, state = s.state_dict(), copy.deepcopy(s.model.state_dict()), s.state_dict()
    for m in state['masks'].values(): m.zero_()
    spoil(state)
    with pytest.raises(ValueError, match=says): s.load_state_dict(state)
    assert same(before['masks'], s.masks) and same(before['initial'], s.state_dict()['initial']) and same(weights, s.model.state_dict())


# bad input

@pytest.mark.parametrize('bad,says', [
    (-5, 'sparsity=-5 is out of range; it is a percentage from 0 to 100'), (150, 'sparsity=150 is out of range'), (100.001, 'out of range'),
    (.7, r'sparsity=0.7 is less than one percent.*did you mean 70\?'), (.005, r'is less than one percent; sparsity goes from 0 to 100$'),
    (math.nan, 'sparsity=nan is out of range'), (math.inf, 'out of range'), (True, 'sparsity=True is not a number'), (False, 'sparsity=False is not a number'),
    ('abc', "sparsity='abc' is not a number; it is a percentage from 0 to 100 such as 70"),
    ('70', 'is not a number'), (None, 'sparsity=None is not a number'), ([70], 'is not a number'), (70+0j, 'is not a number'), ({}, 'empty dict')])
def test_bad_sparsity_is_refused(bad, says):
    s = Sparsifier(nn.Linear(4, 4), method='local')
    for ask in (check_sparsity, s.prune_model, s.plan):
        with pytest.raises(ValueError, match=says): ask(bad)
    if bad != {}:
        with pytest.raises(ValueError, match=says): s.prune_layer(s.model, bad)
    assert s.sparsity() == 0


@pytest.mark.parametrize('kw,says', [
    (dict(granularity='abc'), "granularity 'abc' is unknown; choose one of weight"), (dict(granularity=None), 'granularity None is unknown'),
    (dict(granularity='4:2'), 'did you mean NM'),
    (dict(method='abc'), "method 'abc' is unknown; choose one of 'local', 'global'"), (dict(criteria='abc'), "criteria 'abc' is unknown; choose one of random_score"),
    (dict(criteria=lambda w, fisher: w), 'fisher'),
    (dict(layers='nope'), "layers='?nope'? matches no layer; the layers are 0, 1"), (dict(exclude='nope'), 'exclude=.*matches no layer'),
    (dict(layers=[]), 'layers=.. is empty'), (dict(layers=nn.BatchNorm1d), 'no layer|matches no layer')])
def test_bad_options_are_refused_at_construction(kw, says):
    with pytest.raises(ValueError, match=says): Sparsifier(small_net(), **kw)


def test_what_is_no_model_is_refused():
    class Learner: model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match='model is a Learner, not a PyTorch module; did you mean learn.model?'): Sparsifier(Learner())
    with pytest.raises(ValueError, match='model is a str, not a PyTorch module$'): Sparsifier('resnet18')


# telling

def test_repr_says_what_it_is():
    s = Sparsifier(small_net(), 'weight', 'global')
    s.prune_model(50)
    assert repr(s) == 'Sparsifier of 3 tensors by weight, global, large_final: 50.00 % zero'


def test_only_print_sparsity_prints(capsys):
    s = Sparsifier(small_net(), 'filter')
    quietly(s.prune_model, 50)
    s.report(), s.state_dict(), s.sparsity()
    assert capsys.readouterr() == ('', '')
    s.print_sparsity()
    assert capsys.readouterr().out == f'{s.report()}\n'


def test_what_is_reported_was_measured():
    s = Sparsifier(linear([1, 2, 3, 4]))
    s.prune_model(75)
    s.model.weight.data.fill_(1)
    assert s.sparsity() == 0 == s.report().sparsity
    s.apply_masks()
    assert s.sparsity() == 75 == s.report().sparsity


def test_a_copy_of_model_and_sparsifier_is_independent():
    s = stirred('movement')
    twin = copy.deepcopy(s)
    assert twin.model is not s.model and same(twin.masks, s.masks)
    quietly(twin.prune_model, 90)
    assert s.sparsity() == pytest.approx(40, abs=.1) and twin.sparsity() == pytest.approx(90, abs=.1)


# lean

def wide_net(): return torch.nn.Sequential(torch.nn.Linear(600, 700, bias=False), torch.nn.Linear(700, 500, bias=False)) # enough for samples and several pieces


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('method', ['local', 'global'])
def test_any_number_of_threads_gives_the_same_masks(method, dtype):
    masks, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            torch.manual_seed(0)
            s = Sparsifier(wide_net().to(dtype), 'weight', method)
            for percent in (10, 70, 90): s.prune_model(percent)
            masks.append(s.masks)
    finally: torch.set_num_threads(threads)
    assert same(masks[0], masks[1]) and same(masks[0], masks[2])
    assert sum(int((~m).sum()) for m in masks[0].values()) == round(.9*770_000)


@pytest.mark.parametrize('dtype', DTYPES)
def test_large_layers_are_pruned_as_one_stable_sort_would(dtype):
    torch.manual_seed(0)
    model = wide_net().to(dtype)
    s, flat = Sparsifier(model), torch.cat([p.detach().abs().flatten() for p in model.parameters()])
    for percent in (40, 41, 90):
        s.prune_model(percent)
        expected = torch.ones(len(flat)).index_fill_(0, flat.float().sort(stable=True).indices[:round(percent*len(flat)/100)], 0).bool()
        assert torch.equal(torch.cat([m.flatten() for m in s.masks.values()]), expected)
        assert s.sparsity() >= percent


def test_elementwise_criteria_never_see_a_whole_layer_and_others_do():
    sizes, masks = [], []
    def whole(w): sizes.append(w.numel()); return w.abs()
    @elementwise
    def pieces(w): sizes.append(w.numel()); return w.abs()
    for criteria, smallest, largest in ((whole, 350_000, 420_000), (pieces, 1, PIECE['cpu']), (large_final, None, None)):
        torch.manual_seed(0)
        s = Sparsifier(wide_net(), criteria=criteria)
        s.prune_model(50), s.prune_model(80)
        masks.append(s.masks)
        if sizes: assert smallest <= min(sizes) and max(sizes) <= largest
        sizes.clear()
    assert same(masks[0], masks[1]) and same(masks[0], masks[2])


@pytest.mark.parametrize('granularity,method', [('weight', 'global'), ('weight', 'local'), ('row', 'global'), ('2:4', 'local')])
def test_a_failing_criterion_in_a_later_layer_changes_nothing(granularity, method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Conv2d(8, 8, 3) for _ in range(3)])
    def criterion(w):
        if w.data_ptr() == model[2].weight.data_ptr(): raise RuntimeError('no scores')
        return w.abs()
    s = Sparsifier(model, granularity, method, criterion)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match='no scores'): s.prune_model(50)
    assert same(before, model.state_dict()) and all(m.all() for m in s.masks.values())


@pytest.mark.parametrize('method', ['local', 'global'])
def test_a_criterion_that_changes_its_mind_is_met_exactly_all_the_same(method):
    torch.manual_seed(0)
    s = Sparsifier(wide_net(), 'weight', method, lambda w: torch.rand_like(w))
    for percent in (30, 80):
        s.prune_model(percent)
        assert sum(int((~m).sum()) for m in s.masks.values()) == percent*7700


@pytest.mark.parametrize('method', ['local', 'global'])
@pytest.mark.parametrize('criteria', ['large_final', 'squared_final', 'movmag'])
def test_what_is_pruned_goes_before_what_became_zero_by_itself(criteria, method):
    layer = nn.Linear(6, 1, bias=False)
    layer.weight.data[0] = torch.tensor([.6, .5, .4, .3, .2, .1])
    s = Sparsifier(layer, 'weight', method, criteria)
    if criteria == 'movmag': layer.weight.data.add_(1)
    s.prune_model(100/3)
    layer.weight.data[0, 0] = 0
    for percent, kept in ((100/3, [1, 1, 1, 1, 0, 0]), (50, [0, 1, 1, 1, 0, 0])):
        s.prune_model(percent)
        assert bits(s.masks['weight'][0]) == kept


def test_pruned_groups_stay_pruned_whatever_the_reduction_makes_of_zeros():
    torch.manual_seed(0)
    s = Sparsifier(nn.Conv2d(2, 8, 3), Granularity('filter', reduce=lambda x, dim: -x.mean(dim)))
    before = s.masks['weight']
    for percent in (25, 50, 75):
        s.prune_model(percent)
        assert not (s.masks['weight'] & ~before).any() and s.sparsity() == percent
        before = s.masks['weight']


def test_in_a_pattern_too_the_pruned_go_before_what_became_zero_by_itself():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data[:] = torch.tensor([4., 3., 2., 1.])
    s = Sparsifier(layer, '2:4')
    s.prune_model(50)
    layer.weight.data[0, 0] = 0
    s.prune_model(50)
    assert bits(s.masks['weight'][0]) == [1, 1, 0, 0]

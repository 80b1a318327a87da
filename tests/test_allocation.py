"How much of each layer: numbers of weights, bounds, budgets per output, outliers, the same for all but the ends"
import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import fastsparse
from core_helpers import LAYERS, linear, rows
from fastsparse import Block, Bounded, Count, MACs, Owl, Sparsifier, SparsityWarning, ends, erk, first_layer, last_layer, uniform
from fastsparse.granularity import Granularity, PerOutput
from fastsparse.method import apportion, settle
from fastsparse.plan import Plan, check_request

few = settings(deadline=None, derandomize=True, max_examples=60, database=None)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        yield


def net(seed=0, tails=False):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    with torch.no_grad():
        if tails: made[2].weight.pow_(5)
        made[6].weight.mul_(.3)
    return made

image = torch.randn(2, 3, 12, 12)
sizes = {'0': 216, '2': 432, '6': 120}
total = sum(sizes.values())

def lost(model): return {n: int((m.weight == 0).sum()) for n, m in model.named_modules() if hasattr(m, 'weight')}

def pruned(sparsity, method='global', granularity='weight', model=None, **kwargs):
    model = net() if model is None else model
    Sparsifier(model, granularity, method, **kwargs).prune_model(sparsity)
    return lost(model)

@pytest.fixture
def told():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        yield said


# shares and bounds, as numbers

amounts = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 20), st.floats(0, 60)), min_size=1, max_size=6)

@few
@given(amounts, st.floats(-20, 20))
def test_settle_keeps_bounds_and_the_total_where_there_is_room(parts, more):
    a, low, high = [p[0] for p in parts], [min(p[1:]) for p in parts], [max(p[1:]) for p in parts]
    goal = sum(a) + more
    x = settle(a, low, high, goal)
    assert all(l - 1e-6 <= v <= h + 1e-6 for v, l, h in zip(x, low, high, strict=True))
    assert sum(x) == pytest.approx(min(max(goal, sum(low)), sum(high)), abs=1e-6)


def test_settle_leaves_alone_what_is_well():
    assert settle([1., 2.], [0, 0], [5, 5], 3) == [1, 2]


@few
@given(st.lists(st.tuples(st.floats(0, 40), st.sampled_from([1, 1, 2, 5])), min_size=1, max_size=6))
def test_apportion_is_the_nearest_sum_and_no_share_is_off_by_a_group(parts):
    a, step = [p[0] for p in parts], [p[1] for p in parts]
    k = apportion(a, step)
    assert all(-1e-6 <= v*s - w + s <= 2*s + 1e-6 for v, w, s in zip(k, a, step, strict=True))
    if set(step) == {1}: assert abs(sum(k) - sum(a)) <= .5 + 1e-6


def test_what_a_large_group_cannot_make_up_for_smaller_ones_do():
    assert apportion([8, 1.2], [20, 4]) == [0, 1] # of 9.2 a group of 20 is too much, and one of 4 is nearer than none
    assert apportion([4, 4, 3], [10, 4, 1]) == [0, 1, 3] # what is whole already is not exceeded


def test_an_example_is_no_part_of_a_pickle():
    small, large = (Sparsifier(net(), exclude=first_layer, example_input=torch.randn(n, 3, 12, 12)) for n in (1, 500))
    assert len(pickle.dumps(large)) < len(pickle.dumps(small)) + 100
    large.prune_model({last_layer: 50}) # it is still there


# so many weights

@few
@given(st.integers(0, total), st.sampled_from(['local', 'global', 'owl']))
def test_a_count_is_exact_to_the_weight(n, method):
    assert sum(pruned(Count(n), method).values()) == n


def test_local_takes_a_count_in_proportion_to_sizes():
    assert pruned(Count(384), 'local') == {'0': 108, '2': 216, '6': 60}
    assert pruned(Count(1), 'local') == {'0': 0, '2': 1, '6': 0}
    assert pruned(Count(total), 'local') == sizes


def test_global_takes_a_count_as_it_takes_a_percentage():
    assert pruned(Count(384)) == pruned(50)


@pytest.mark.parametrize('method', ['local', 'global', 'owl'])
def test_the_layers_of_one_key_lose_a_count_together(method):
    got = pruned({'*': Count(300), '6': 50}, method)
    assert (got['0'] + got['2'], got['6']) == (300, 60)


def test_later_keys_win_and_none_leaves_dense():
    got = pruned({'*': Count(300), '2': None})
    assert (got['2'], got['0'] + got['6']) == (0, 300)


def test_equal_counts_of_layers_of_one_size_are_rankings_of_their_own():
    "One ranking would take all of the small weights"
    def make(): return nn.Sequential(linear([1, 2, 3, 4]), linear(*[[v] for v in (50, 60, 70, 80)]))
    assert pruned({'0': Count(2), '1': Count(2)}, model=make()) == {'0': 2, '1': 2}
    assert pruned({('0', '1'): Count(3)}, model=make()) == {'0': 3, '1': 0}


def test_equal_counts_in_a_count_are_not_ranked_with_an_equal_percentage():
    got = pruned({'0': Count(108), '2': 50, '6': 50})
    assert got['0'] == 108 and got['2'] + got['6'] == (432 + 120)/2


@pytest.mark.parametrize('granularity,step', [('filter', 27), ('kernel', 9)])
def test_a_count_of_groups_is_the_nearest(granularity, step):
    for n in (40, 100, 150):
        got = sum(pruned(Count(n), 'local', granularity, layers='0').values())
        assert got % step == 0 and abs(got - n) <= step/2


def test_a_count_of_coupled_outputs():
    model = net()
    s = Sparsifier(model, 'coupled', 'local', example_input=image)
    s.prune_model(Count(108))
    assert len(s.units) == 2 and abs(sum(s._lost_of.values()) - 108) <= sum(u.groups.step for u in s.units.values())/2


def test_a_count_in_one_layer_and_on_the_way():
    model = net()
    s = Sparsifier(model)
    s.prune_layer('2', Count(77))
    assert lost(model) == {'0': 0, '2': 77, '6': 0}
    plan = s.plan(Count(400))
    got = [round(s.advance(plan, p)*total/100) for p in (0, .3, .5, .99, 1)]
    assert got == [77, 120, 200, 396, 400]


def test_a_count_in_a_dry_run_changes_nothing():
    model = net()
    run = Sparsifier(model).dry_run({'0': Count(50)})
    assert {l.name: l.zeros for l in run.layers} == {'0.weight': 50, '2.weight': 0, '6.weight': 0} and lost(model) == dict.fromkeys(sizes, 0)


@pytest.mark.parametrize('bad,fix', [(.5, 'whole number'), (-1000, r'did you mean Count\(1000\)'), (1e3, r'did you mean Count\(1000\)'), (True, 'whole number'), ('9', 'whole number'), (None, 'whole number')])
def test_a_count_is_a_whole_number(bad, fix):
    with pytest.raises(ValueError, match=fix): Count(bad)


def test_more_than_there_is_is_refused_and_nothing_done():
    model = net()
    with pytest.raises(ValueError, match='0, 2, 6 have 768 weights together'): Sparsifier(model).prune_model(Count(769))
    with pytest.raises(ValueError, match=r'Count\(121\) is more than there is: 6 have 120'): Sparsifier(model).prune_model({'0': 50, '6': Count(121)})
    assert lost(model) == dict.fromkeys(sizes, 0)


def test_a_pattern_has_its_own_number():
    with pytest.raises(ValueError, match='ask for 50'): Sparsifier(net(), '2:4').prune_model(Count(60))
    with pytest.raises(ValueError, match='ask for 50'): Sparsifier(net(), '2:4').prune_model({'6': Count(60)})


# bounds

@few
@given(st.integers(1, 99), st.integers(1, 100), st.sampled_from(['local', 'global', 'owl', 'mine']), st.sampled_from(['weight', 'kernel']))
def test_no_layer_loses_more_than_its_bound_and_the_total_is_kept(percent, cap, method, granularity):
    def mine(scores, n, step, wanted, floor): # all from the first ones
        left, out = sum(wanted), []
        for k, s in zip(n, step, strict=True):
            out.append(min(int(left//s), k))
            left -= out[-1]*s
        return out
    model = net(1)
    s = Sparsifier(model, granularity, Bounded(mine if method == 'mine' else method, cap), layers=nn.Conv2d)
    s.prune_model(percent)
    groups = {t.layer_name: t.groups for t in s.targets.values()}
    got = {n: k for n, k in lost(model).items() if n in groups}
    room = {n: min(int(cap*sizes[n]/100/g.step + 1e-9), g.n - 1)*g.step for n, g in groups.items()}
    assert all(got[n] <= room[n] for n in got)
    wanted, step = percent*sum(sizes[n] for n in got)/100, max(g.step for g in groups.values())
    assert abs(sum(got.values()) - min(wanted, sum(room.values()))) <= (step/2 if step == 1 else step) + 1e-6


def test_what_is_kept_at_least_is_the_same_bound_from_the_other_side():
    assert pruned(70, Bounded('global', 80)) == pruned(70, Bounded('global', min_kept=20)) == pruned(70, Bounded('global', {'*': 80}))
    assert pruned(90, Bounded('global', min_kept={'6': Count(100)}))['6'] == 20
    assert pruned(90, Bounded('global', {'6': Count(30)}, {'*': Count(5), '6': Count(100)}))['6'] == 20
    assert pruned(90, Bounded('global', {'6': 10}, {'6': Count(100)}))['6'] == 12


def test_a_bound_by_hand():
    "Six of the eight lowest are in the first layer, which may lose half of its four"
    def make(): return nn.Sequential(linear([1, 2, 3, 4]), linear(*[[v] for v in (5, 6, 7, 8)]))
    assert pruned(50, 'global', model=make()) == {'0': 3, '1': 1}
    assert pruned(50, Bounded('global', {'0': 25}), model=make()) == {'0': 1, '1': 3}
    assert pruned(50, Bounded('local', {'0': 25}), model=make()) == {'0': 1, '1': 3}


def test_a_bound_that_does_not_bind_changes_nothing():
    for method in ('local', 'global', 'owl'): assert pruned(60, Bounded(method, 99)) == pruned(60, method)


def test_what_cannot_be_reached_is_told_with_the_numbers(told):
    assert sum(pruned(90, Bounded('global', 50)).values()) == total/2
    assert len(told) == 1 and 'asked for 90 % zeros, got 50 % (384 weights, not 691): the bounds of the method leave no more than 384' in str(told[0].message)


def test_who_makes_up_for_a_bound_is_not_emptied():
    assert pruned(90, Bounded('local', {'0': 50})) == pruned(90, Bounded('global', {'0': 50})) == {'0': 108, '2': 431, '6': 119}


def test_a_bound_holds_at_a_hundred_percent_too():
    assert pruned(100, Bounded('global', 75)) == pruned(100, Bounded('local', 75)) == {'0': 162, '2': 324, '6': 90}


def test_layers_of_another_percentage_do_not_make_up_for_a_bound(told):
    assert pruned({'0': 90, '2': 10}, Bounded('local', {'0': 50})) == {'0': 108, '2': 43, '6': 0}
    assert pruned({'0': 90, '2': 10}, Bounded('global', {'0': 50})) == {'0': 108, '2': 43, '6': 0}
    assert all('bounds of the method' in str(w.message) for w in told) and len(told) == 2


def test_bounds_do_not_bring_back_what_is_gone():
    model = net()
    s = Sparsifier(model)
    s.prune_layer('6', 80)
    gone = ~s.masks['6.weight']
    again = Sparsifier(model, method=Bounded('global', {'6': 50}))
    again.prune_model(50)
    assert not again.masks['6.weight'][gone].any() and lost(model)['6'] == 96 and sum(lost(model).values()) == total/2


def test_what_is_gone_beyond_a_bound_counts():
    model = net()
    Sparsifier(model).prune_layer('6', 80)
    assert pruned(Count(420), Bounded('global', 50), model=model) == {'0': 108, '2': 216, '6': 96}


def test_a_bound_that_the_user_set_is_no_reason_to_warn(told):
    pruned(50, Bounded('global', {'6': 55}))
    assert not told


def test_bounds_with_round_to_and_with_a_cost():
    model = net()
    Sparsifier(model, 'filter', Bounded('local', 50)).prune_model(50, round_to=4)
    assert lost(model)['0'] == 4*27
    s = Sparsifier(net(), 'coupled', Bounded('local', 50), example_input=image)
    s.prune_model(MACs(90))
    assert all(int(u.alive(s._mask_now).sum()) >= u.groups.n/2 for u in s.units.values())


@pytest.mark.parametrize('make,what', [
    (lambda: Bounded('global'), 'without a bound'), (lambda: Bounded('globall', 50), "choose one of 'local'"), (lambda: Bounded('global', .95), 'did you mean 95'),
    (lambda: Bounded('global', {}), 'empty dict'), (lambda: Bounded('global', {3: 50}), 'selects nothing'), (lambda: Bounded('global', MACs(50)), 'no percentage and no Count'),
    (lambda: Bounded('global', min_kept=-5), 'min_kept=-5.*out of range'), (lambda: Bounded(Bounded('local', 50), 60), 'has bounds already'),
    (lambda: check_request(50, fastsparse.NM(2, 4), Bounded('global', 50)), 'does not go with 2:4'),
    (lambda: Sparsifier(net(), '2:4', Bounded('global', 50)).prune_model(50), 'does not go with 2:4'),
    (lambda: pruned(50, Bounded('global', {'fc': 50})), "max_sparsity key='fc' matches no layer"),
    (lambda: pruned(50, Bounded('global', {'6': 50}), layers='0'), "max_sparsity key '6' means none of the layers to prune"),
])
def test_bounds_that_make_no_sense_are_refused(make, what):
    with pytest.raises(ValueError, match=what): make()


def test_a_method_of_ones_own_is_kept_off_its_floor():
    def greedy(scores, n, step, wanted, floor): return [n[0], *[0]*(len(n)-1)]
    assert pruned(50, greedy) == {'0': 215, '2': 1, '6': 0} # the floor is one weight


# a budget for each output

def outputs(layer, w): # a row for each output
    if 'Transpose' not in type(layer).__name__: return w.flatten(1)
    i, o = w.shape[:2]
    return w.view(layer.groups, i//layer.groups, o, -1).transpose(1, 2).reshape(layer.groups*o, -1)


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('percent', [30, 50, 80])
def test_each_output_loses_its_lowest_and_all_as_many(kind, percent):
    layer = LAYERS[kind]()
    layer.weight.data += 0 # all different
    dense = outputs(layer, layer.weight.detach().clone())
    Sparsifier(layer, 'weight', 'per_output').prune_model(percent)
    kept = outputs(layer, layer.weight.detach()) != 0
    k = min(round(percent/100*dense.shape[1]), dense.shape[1]-1)
    order = dense.abs().argsort(dim=1, stable=True)
    assert torch.equal(kept, torch.ones_like(kept).scatter(1, order[:, :k], False))


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('granularity', ['kernel', 'row', 'column', 'channel'])
def test_groups_inside_of_outputs_go_evenly(kind, granularity):
    layer = LAYERS[kind]()
    try: groups = PerOutput(Granularity(granularity)).groups(layer)
    except ValueError as e:
        assert 'does not split outputs into several groups' in str(e) or 'has no granularity' in str(e)
        return
    Sparsifier(layer, granularity, 'per_output').prune_model(50)
    zeros = (outputs(layer, layer.weight.detach()) == 0).sum(1)
    assert len(set(zeros.tolist())) == 1 and zeros[0] % groups.size == 0 and zeros[0] == groups.size*min(round(groups.n/2), groups.n-1)


@pytest.mark.parametrize('layer,param,n', [(nn.LSTM(6, 4), 'weight_ih_l0', 16), (nn.GRU(6, 4), 'weight_hh_l0', 12), (nn.RNN(6, 4), 'weight_ih_l0', 4),
    (nn.MultiheadAttention(8, 2), 'in_proj_weight', 24), (nn.Bilinear(3, 4, 5), 'weight', 5), (nn.Embedding(20, 8), 'weight', 20), (nn.LSTM(6, 4, proj_size=2), 'weight_hr_l0', 2)])
def test_outputs_of_other_matrices(layer, param, n):
    layer = copy.deepcopy(layer)
    Sparsifier(layer, 'weight', 'per_output', layers=param).prune_model(50)
    zeros = (getattr(layer, param).detach().view(n, -1) == 0).sum(1)
    assert set(zeros.tolist()) == {round(getattr(layer, param)[0].numel()/2)}


def test_blocks_by_outputs():
    layer = nn.Linear(16, 8)
    Sparsifier(layer, Block(4, 2), 'per_output').prune_model(50)
    assert set((layer.weight == 0).sum(1).tolist()) == {8}


def test_where_no_output_is_split_it_says_so():
    for g in ('filter', 'output', 'coupled', 'shared_kernel', 'layer', 'gate'):
        with pytest.raises(ValueError, match='never splits an output'): Sparsifier(net(), g, 'per_output', example_input=image)
        with pytest.raises(ValueError, match='never splits an output'): check_request(50, fastsparse.granularity.as_granularity(g), fastsparse.method.per_output)
    s = Sparsifier(net(), 'column', 'per_output')
    assert list(s.targets) == ['0.weight', '2.weight'] and 'does not split outputs' in s.left_dense['6']
    with pytest.raises(ValueError, match='row of Linear does not split outputs'): Sparsifier(nn.Linear(4, 4), 'row', 'per_output')


def test_patterns_have_rows_of_their_own():
    layer = nn.Linear(16, 8)
    Sparsifier(layer, '2:4', 'per_output').prune_model(50)
    assert fastsparse.has_pattern(layer, '2:4')


def test_rows_that_are_long_go_with_ties_by_index():
    layer = linear([1.]*40, [2.]*40)
    Sparsifier(layer, method='per_output').prune_model(75)
    assert rows(layer.weight) == [[0]*30 + [1]*10, [0]*30 + [2]*10]


def test_outputs_on_the_way_keep_their_zeros_and_again_is_the_same():
    model = net()
    s, before = Sparsifier(model, method='per_output'), None
    plan = s.plan(80)
    for p in (.2, .5, .7, 1):
        s.advance(plan, p)
        for n, m in s.masks.items():
            assert len(set((~m).flatten(1).sum(1).tolist())) == 1 and (before is None or not (m & ~before[n]).any())
        before = {n: m.clone() for n, m in s.masks.items()}
        with torch.no_grad(): [q.add_(torch.randn_like(q)) for q in model.parameters()]
        s.apply_masks()
    again = Sparsifier(model, method='per_output')
    again.prune_model(80)
    assert all(torch.equal(m, before[n]) for n, m in again.masks.items())


def test_outputs_keep_a_multiple():
    layer = nn.Linear(32, 5)
    Sparsifier(layer, method='per_output').prune_model(60, round_to=8)
    assert set((layer.weight != 0).sum(1).tolist()) == {16}


# outliers

def test_owl_by_hand():
    "Means 2.8 and 1.5: one of ten scores is more than five times the mean, and none; so 50 - 10 and 50 + 10 %"
    def make(): return nn.Sequential(linear([*range(1, 10), 190]), linear(*[[v] for v in range(1, 11)]))
    assert pruned(50, Owl(M=5, spread=10), model=make()) == {'0': 4, '1': 6}
    assert pruned(50, Owl(M=5, spread=0), model=make()) == pruned(50, Owl(M=50), model=make()) == {'0': 5, '1': 5}


def test_owl_weighs_layers_by_their_sizes():
    "D is 1/10 and 0 over 10 and 30 weights, the mean 1/40: deviations 3/40 and -1/40, so 8 points and 8/3"
    model = nn.Sequential(linear([*range(1, 10), 190]), linear(*[[v] for v in range(1, 31)]))
    assert pruned(50, Owl(spread=30), model=model) == {'0': 2, '1': 18}


@few
@given(st.integers(1, 99), st.integers(0, 40), st.integers(0, 5), st.sampled_from(['local', 'per_output']))
def test_owl_stays_within_its_spread_and_keeps_the_total(percent, spread, seed, inner):
    model = net(seed, tails=True)
    s = Sparsifier(model, method=Owl(M=3, spread=spread, method=inner))
    s.prune_model(percent)
    got, off = lost(model), 1 if inner == 'local' else max(t.groups.rows for t in s.targets.values())
    assert all(abs(k/sizes[n] - percent/100) <= spread/100 + off/sizes[n] for n, k in got.items())
    if inner == 'local': assert abs(sum(got.values()) - percent*total/100) <= .5 + 3*(percent > 95) # something stays of each
    else: assert all(len(set((w == 0).flatten(1).sum(1).tolist())) == 1 for w in (model[0].weight, model[2].weight, model[6].weight))


def test_owl_lets_the_layer_with_tails_lose_less():
    "It has 432 of 768 weights, so the others deviate by most, 8 points, and it by 336/432 of that"
    got = pruned(70, 'owl', model=net(tails=True))
    assert got['2'] == round(432*(.7 - .08*336/432)) and got['0']/216 == pytest.approx(.78, abs=.005) and sum(got.values()) == round(.7*total)


def test_owl_goes_with_any_criterion_and_nothing_returns_on_the_way():
    for criteria in ('large_final', 'small_final', 'random_score', 'movement'):
        s = Sparsifier(net(tails=True), method='owl', criteria=criteria)
        plan, before = s.plan(90), None
        for p in (0, .1, .4, .7, .9, 1):
            s.advance(plan, p)
            assert before is None or not any((m & ~before[n]).any() for n, m in s.masks.items())
            before = {n: m.clone() for n, m in s.masks.items()}
            with torch.no_grad(): [q.add_(torch.randn_like(q)*q.abs()) for q in s.model.parameters()]
            s.apply_masks()
        assert sum(lost(s.model).values()) == round(.9*total)


def test_weights_come_back_where_the_total_of_owl_falls():
    s = Sparsifier(net(tails=True), method='owl')
    plan = s.plan(80)
    s.advance(plan, 1)
    s.advance(plan, .5)
    assert s.planned() == pytest.approx(40, abs=.1) # they come back at zero, and free


@pytest.mark.parametrize('bad,what', [(dict(M=-1), 'M=-1 has to be'), (dict(M='5'), 'M='), (dict(spread=200), 'from 0 to 100'), (dict(spread=True), 'spread=True'),
    (dict(method='global'), "choose 'local' or 'per_output'"), (dict(method='owl'), "choose 'local' or 'per_output'"), (dict(method='x'), 'is unknown'),
    (dict(method=Bounded('local', 82)), 'bounds go around Owl')])
def test_owl_refuses_what_makes_no_sense(bad, what):
    with pytest.raises(ValueError, match=what): Owl(**bad)


# shares by shape, and the same for all but the ends

def shaped(): return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(16, 10))

def test_erk_by_hand():
    assert [1 - p/100 for p in erk(shaped(), 80).values()] == pytest.approx([.27027, .112613, .702703], abs=1e-6)


def test_the_power_of_erk():
    "Square roots of 18/288, 30/1152 and 26/160 times 288, 1152 and 160 weigh 72, 185.903 and 64.498; 320 is shared"
    raw = [(18/288)**.5, (30/1152)**.5, (26/160)**.5]
    factor = 320/(raw[0]*288 + raw[1]*1152 + raw[2]*160)
    assert [1 - p/100 for p in erk(shaped(), 80, power=.5).values()] == pytest.approx([factor*r for r in raw])
    assert list(erk(shaped(), 80, power=0).values()) == pytest.approx([80]*3)
    assert erk(shaped(), Count(1280)) == pytest.approx(erk(shaped(), 80))


@pytest.mark.parametrize('bad', [-1, True, 'x', None, float('nan'), float('inf')])
def test_a_power_is_a_number(bad):
    with pytest.raises(ValueError, match='power='): erk(shaped(), 80, power=bad)
    with pytest.raises(ValueError, match='takes one percentage'): erk(shaped(), MACs(50))


def test_uniform_by_hand():
    assert uniform(net(), 40, image) == pytest.approx({'0': 0, '2': 100*.4*768/432, '6': 0})
    assert uniform(net(), 40, image, total=False) == {'0': 0, '2': 40, '6': 0}
    assert uniform(net(), 60, image, last=50) == pytest.approx({'0': 0, '2': 100*(.6*768 - 60)/432, '6': 50})
    assert uniform(net(), 50, image, first=20, last=80) == pytest.approx({'0': 20, '2': 100*(384 - 43.2)/552, '6': 100*(384 - 43.2)/552}) # 61.7 < 80
    assert uniform(net(), Count(384), image, first=20, last=80) == pytest.approx(uniform(net(), 50, image, first=20, last=80))


@few
@given(st.integers(1, 99), st.integers(1, 100), st.integers(1, 100))
def test_uniform_has_the_sum_and_the_caps_or_says_that_it_cannot(percent, first, last):
    reach = (216*first + 432*100 + 120*last)/total
    if percent > reach:
        with pytest.raises(ValueError, match='cannot be reached'): uniform(net(), percent, image, first=first, last=last)
        return
    shares = uniform(net(), percent, image, first=first, last=last)
    assert sum(shares[n]*sizes[n] for n in sizes) == pytest.approx(percent*total)
    assert shares['0'] == min(first, shares['2']) and shares['6'] == min(last, shares['2'])


def test_uniform_needs_to_know_the_ends():
    with pytest.raises(ValueError, match='pass example_input='): uniform(net(), 50)
    model = net()
    ends(model, image)
    assert uniform(model, 40)['0'] == 0
    with pytest.raises(ValueError, match="first=0.2.*did you mean 20"): uniform(net(), 50, image, first=.2)
    with pytest.raises(ValueError, match='not a PyTorch module'): uniform([], 50, image)


# the ends of the flow

class Wide(nn.Module):
    "Two inputs, two heads, a skip around everything, and names in the wrong order"
    def __init__(self):
        super().__init__()
        self.z_in, self.a_head, self.b_head, self.body, self.y_in, self.norm = nn.Linear(4, 8), nn.Linear(12, 2), nn.Linear(12, 3), nn.Linear(8, 8), nn.Linear(5, 8), nn.BatchNorm1d(4)
    def forward(self, x, y):
        h = self.body((self.z_in(self.norm(x)) + self.y_in(y)).relu())
        h = torch.cat([h, x], 1) # reads the input, but not only
        return {'a': self.a_head(h).softmax(1), 'b': [self.b_head(h)], 'features': h}


def test_several_inputs_and_outputs():
    assert ends(Wide(), (torch.randn(2, 4), torch.randn(2, 5))) == (['z_in', 'y_in'], ['a_head', 'b_head'])


def test_a_layer_whose_features_come_out_too_is_not_last():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x):
            h = self.a(x)
            return self.b(h), h
    assert ends(Net(), torch.randn(1, 4)) == (['a'], ['b'])


def test_shared_layers_and_layers_in_place():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        def forward(self, x):
            x = x.clone().mul_(2)
            out = torch.zeros(len(x), 8)
            out[:, :4] = self.b(self.b(self.a(x)).relu_())
            return self.c(out[:, :4])
    assert ends(Loop(), torch.randn(1, 4)) == (['a'], ['c'])


def test_one_layer_is_both_and_a_model_with_none_has_none():
    assert ends(nn.Linear(3, 3), torch.randn(1, 3)) == ([''], [''])
    assert ends(nn.ReLU(), torch.randn(1, 3)) == ([], [])


def test_computed_weights_and_attention_and_rnn():
    p = nn.utils.parametrizations.weight_norm
    assert ends(nn.Sequential(p(nn.Linear(3, 4)), nn.ReLU(), p(nn.Linear(4, 2))), torch.randn(2, 3)) == (['0'], ['2'])
    assert ends(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), torch.randn(1, 4, 8)) == (['self_attn'], ['linear2'])
    class Rnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 6, 2), nn.Linear(6, 2)
        def forward(self, x): return self.head(self.rnn(x)[0])
    assert ends(Rnn(), torch.randn(5, 2, 4)) == (['rnn'], ['head'])


def test_a_model_that_looks_at_its_input_can_be_watched_too():
    class Looks(nn.Sequential):
        def forward(self, x): return super().forward(x if x.sum() > 0 else -x)
    assert ends(Looks(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3)) == (['0'], ['1'])


def test_ends_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    ends(model, image)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize('kwargs,targets', [
    (dict(exclude=first_layer), ['2.weight', '6.weight']), (dict(exclude=[last_layer]), ['0.weight', '2.weight']), (dict(exclude=(first_layer, last_layer)), ['2.weight']),
    (dict(layers=[first_layer, '2']), ['0.weight', '2.weight']), (dict(layers=last_layer), ['6.weight'])])
def test_ends_as_selectors(kwargs, targets):
    assert list(Sparsifier(net(), example_input=image, **kwargs).targets) == targets


def test_ends_as_keys_and_in_bounds():
    s = Sparsifier(net(), 'weight', 'local', example_input=image)
    s.prune_model({'*': 50, (first_layer,): None, last_layer: Count(30)})
    assert lost(s.model) == {'0': 0, '2': 216, '6': 30}
    assert pruned(80, Bounded('global', {first_layer: 10}), example_input=image)['0'] == 21


@pytest.mark.parametrize('use', [lambda m: Sparsifier(m, exclude=first_layer), lambda m: Sparsifier(m, layers=[last_layer], example_input=...), lambda m: Sparsifier(m).prune_model({last_layer: 50})])
def test_without_an_example_the_error_says_how_to_give_one(use):
    with pytest.raises(ValueError, match=r'pass example_input=.*ends\(model, example_input\) first'): use(net())


def test_an_example_that_does_not_fit_is_told_only_where_it_is_needed():
    with pytest.raises(ValueError, match='the model fails on the example'): Sparsifier(net(), exclude=first_layer, example_input=torch.randn(1, 5))
    Sparsifier(net(), example_input=torch.randn(1, 5)).prune_model({"6": 50})


def test_a_new_layer_is_unknown():
    model = net()
    ends(model, image)
    model[6] = nn.Linear(12, 4)
    with pytest.raises(ValueError, match="layer '6' is new"): Sparsifier(model, exclude=last_layer)


def test_selectors_are_the_same_after_a_copy():
    for s in (first_layer, last_layer):
        assert pickle.loads(pickle.dumps(s)) is s and copy.deepcopy(s) is s and repr({s: 50}) == f'{{{s}: 50}}'


def test_watch_tells_the_ends():
    s = Sparsifier(net(), 'filter', 'local', example_input=...)
    s.watch(image)
    s.prune_model({nn.Conv2d: 50, first_layer: None})
    assert lost(s.model)['0'] == 0 and lost(s.model)['2'] == 216


# in a fit

fastai_helpers = pytest.importorskip('fastai_helpers')

def fit(*args, epochs=1, **kwargs):
    from fastai_helpers import sparse_learner
    learn, cb = sparse_learner(*args, epochs=epochs, **kwargs)
    return {n: int((m.weight == 0).sum()) for n, m in learn.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}, cb, learn

def test_a_count_in_a_fit():
    got, cb, _ = fit(Count(700))
    assert sum(got.values()) == 700 and cb.history[-1][1] == pytest.approx(100*700/1384)
    assert fit({'0': Count(10), '3': Count(10), '8': None}, 'weight', 'local')[0] == {'0': 10, '3': 10, '8': 0}


def test_counts_in_the_settings_of_a_plan_are_for_each_line():
    assert fit({'0': dict(sparsity=Count(10)), '3': dict(sparsity=Count(10)), '8': 50})[0] == {'0': 10, '3': 10, '8': 80}
    got = fit({('0', '3'): dict(sparsity=Count(100)), last_layer: None})[0]
    assert got['0'] + got['3'] == 100 and got['8'] == 0


def test_a_fit_that_ends_early_says_the_count(told):
    from fastsparse.schedule import Schedule
    from fastsparse.callback import SparsifyCallback
    from fastai_helpers import learner, fit as run
    from fastai.callback.core import Callback, CancelFitException
    class Stop(Callback):
        def after_batch(self): raise CancelFitException
    run(learner(), 2, cbs=[SparsifyCallback(Count(500), schedule=Schedule(fastsparse.lin.func, .2)), Stop()])
    assert any('before its schedule reached Count(500); train on, or prune the rest with cb.sparsifier.prune_model(Count(500))' in str(w.message) for w in told)


@pytest.mark.parametrize('method', ['per_output', 'owl', Bounded('global', 85), Bounded('local', {last_layer: 50}), Owl(M=2, method='per_output')])
def test_methods_in_a_fit_hold_at_every_step(method):
    from fastai_helpers import Journal, learner, fit as run
    from fastsparse.callback import SparsifyCallback
    learn, cb = learner(), SparsifyCallback(80, 'weight', method, schedule=fastsparse.lin, update_every=1)
    cb = pickle.loads(pickle.dumps(cb))
    journal = Journal(cb)
    run(learn, 2, cbs=[cb, journal])
    assert journal.regrown == 0 == journal.dense_state and journal.steps == sorted(journal.steps)
    weights = [m.weight.detach() for m in learn.model if isinstance(m, (nn.Conv2d, nn.Linear))]
    if 'per_output' in str(method): assert all(len(set((w == 0).flatten(1).sum(1).tolist())) == 1 for w in weights)
    else: assert sum(int((w == 0).sum()) for w in weights) == round(.8*1384)
    if 'last_layer' in str(method): assert int((weights[-1] == 0).sum()) <= 80


def test_ends_in_a_fit_are_those_of_its_first_batch():
    got, cb, learn = fit(80, exclude=[first_layer, last_layer])
    assert got['0'] == 0 == got['8'] and got['3'] == round(.8*1152)
    assert fit({'*': 50, first_layer: None, last_layer: 30})[0]['8'] == 48
    plan = {nn.Conv2d: dict(sparsity=50, granularity='filter', method='local'), last_layer: 80, first_layer: None}
    got, cb, _ = fit(plan)
    assert got == {'0': 0, '3': 576, '8': 128}


def test_ends_in_a_dry_run_and_with_a_head_that_is_replaced():
    from fastai_helpers import learner, fit as run
    from fastsparse.callback import SparsifyCallback
    learn = learner()
    for cb in (SparsifyCallback(80, exclude=last_layer), SparsifyCallback({'*': dict(sparsity=80), last_layer: None})):
        run_ = {l.name: l.zeros for l in cb.dry_run(learn).layers}
        assert run_['8.weight'] == 0 and run_['0.weight'] + run_['3.weight'] == round(.8*1224)
    run(learn, cbs=SparsifyCallback(80, exclude=last_layer))
    learn.model[8] = nn.Linear(16, 10)
    learn.opt = None
    run(learn, cbs=SparsifyCallback(80, exclude=last_layer))
    assert int((learn.model[8].weight == 0).sum()) == 0


def test_ends_take_nothing_from_the_fit():
    "The same weights as with the layers named, shuffled data and all"
    from fastai_helpers import learner, loaders, fit as run, seed, state_of, same
    from fastsparse.callback import SparsifyCallback
    def trained(exclude):
        seed(3)
        learn = learner(dls=loaders(shuffle=True))
        run(learn, 2, cbs=SparsifyCallback(80, exclude=exclude))
        return state_of(learn.model)
    assert same(trained(['0', '8']), trained([first_layer, last_layer]))


def test_shares_in_a_fit():
    from fastai_helpers import learner, fit as run
    from fastsparse.callback import SparsifyCallback
    from fastsparse.learner import first_inputs
    learn = learner()
    cb = SparsifyCallback(uniform(learn.model, 70, first_inputs(learn)), method='local')
    run(learn, cbs=cb)
    assert [l.zeros for l in cb.report.layers] == [0, round(.7*1384), 0]


def test_a_plan_tells_what_is_ranked_together():
    plan = Plan(start={}, end={'a': 50, 'b': 50, 'c': 20, 'd': 50}, apart={'d': 3})
    assert plan.rankings() == [['a', 'b'], ['c'], ['d']]

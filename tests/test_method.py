import pytest
import torch

from core_helpers import bits, linear, rows
from fastsparse.method import allocate, as_method, available_methods, global_, local
from fastsparse.plan import erk
from fastsparse.sparsifier import Sparsifier
from torch import nn


def scores(*layers): return [torch.tensor([s], dtype=torch.float32) for s in layers]


def share(method, layers, wanted, step=None, **kw):
    step = step or [1]*len(layers)
    return allocate(method, scores(*layers), [len(s) for s in layers], step, wanted, **kw)


def spread(budget, layers, step=None, **kw):
    "Shares of `budget` as one percentage for all layers makes them"
    step = step or [1]*len(layers)
    sizes = [len(l)*s for l, s in zip(layers, step, strict=True)]
    return share(global_, layers, [budget*k/sum(sizes) for k in sizes], step, **kw)


# local

@pytest.mark.parametrize('wanted,expected', [(0, 0), (1.4, 1), (1.6, 2), (2, 2), (3, 3), (3.9, 3), (4, 4)])
def test_local_is_the_nearest_number_and_one_stays_below_100_percent(wanted, expected):
    assert share(local, [[1, 2, 3, 4]], [wanted]) == [expected]


def test_local_counts_groups_by_their_weights():
    assert share(local, [[1, 2, 3, 4], [1, 2]], [18, 9], step=[9, 10]) == [2, 1]


def test_local_without_a_floor_may_empty_a_layer():
    assert share(local, [[1]], [.7], floor=0) == [1]


def test_local_does_not_read_the_scores():
    assert allocate(local, None, [4, 8], [1, 1], [2, 2]) == [2, 2]


# global

def test_global_is_one_ranking():
    assert share(global_, [[1, 2, 30, 40], [3, 4, 5, 6]], [2, 2]) == [2, 2]
    assert share(global_, [[1, 2, 3, 40], [30, 4, 50, 60]], [2, 2]) == [3, 1]


def test_only_the_sum_counts():
    assert share(global_, [[1, 2, 3, 4], [5, 6, 7, 8]], [0, 3]) == [3, 0]


def test_ties_go_by_layer_then_by_index():
    assert share(global_, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], [2, 2, 2]) == [3, 3, 0]


def test_no_layer_is_emptied_and_the_others_make_up_for_it():
    assert spread(5, [[1, 1, 1, 1], [9, 8, 7, 6]]) == [3, 2]
    assert spread(5, [[1, 1], [2, 2], [9, 8, 7, 6]]) == [1, 1, 3]
    assert spread(7, [[1, 1], [2, 2], [9, 8, 7, 6]]) == [1, 1, 3]


def test_everything_wanted_leaves_nothing():
    assert share(global_, [[1, 2], [3, 4, 5]], [2, 3]) == [2, 3] == share(local, [[1, 2], [3, 4, 5]], [2, 3])
    assert spread(4.99, [[1, 2], [3, 4, 5]]) == [1, 2]


def test_nothing_wanted_takes_nothing():
    assert share(global_, [[1, 2], [3, 4]], [0, 0]) == [0, 0] == share(local, [[1, 2], [3, 4]], [0, 0], round_to=2)


@pytest.mark.parametrize('budget,expected', [(8, [2, 0]), (9, [2, 0]), (10, [2, 0]), (11, [2, 1]), (14, [2, 1]), (19, [2, 2]), (26, [2, 2]), (27, [3, 3])])
def test_groups_of_different_size_are_counted_in_weights(budget, expected):
    "Ranked: two of 4, then three of 5, but one of each layer has to stay"
    assert spread(budget, [[1, 2, 9], [3, 4, 5]], step=[4, 5]) == expected


def test_mixed_sizes_tie_by_layer():
    assert share(global_, [[1, 1, 1], [1, 1, 1]], [5, 5], step=[4, 5]) == [2, 0]


def test_what_is_pruned_stays_first_in_line():
    inf = float('inf')
    assert share(global_, [[-inf, 1, 2, 9], [-inf, -inf, 9, 9]], [2, 2]) == [2, 2]
    assert spread(9.5, [[-inf, 1, 2, 9], [-inf, -inf, 9, 9]], step=[2, 3]) == [2, 2]


def naive(layers, k, floor=1):
    "Take the lowest one by one, unless its layer has no more to give"
    lost = [0]*len(layers)
    for _, i, _ in sorted((s, i, j) for i, l in enumerate(layers) for j, s in enumerate(l)):
        if sum(lost) < k and lost[i] < len(layers[i])-floor: lost[i] += 1
    return lost


@pytest.mark.parametrize('seed', range(5))
def test_global_agrees_with_taking_them_one_by_one(seed):
    torch.manual_seed(seed)
    layers = [torch.randint(0, 5+3*i, (int(torch.randint(1, 30, ())),)).tolist() for i in range(6)]
    total = sum(map(len, layers))
    for k in range(1, total): assert spread(k, layers) == naive(layers, k), k


def test_dtypes_may_differ():
    "1.006 is less than the bf16 number 1.0078, also where it would round to it"
    model = nn.Sequential(linear([1.0078125, 5, 6]).bfloat16(), linear([1.006, 5, 6]))
    Sparsifier(model).prune_model(100/6)
    assert [bits(m.weight != 0) for m in model] == [[[1, 1, 1]], [[0, 1, 1]]]


# round_to

@pytest.mark.parametrize('wanted,expected', [(1, 4), (2, 4), (7, 4), (9, 12), (15, 12), (17, 12), (20, 12)])
def test_what_remains_is_a_multiple_and_at_least_one(wanted, expected):
    "Of 20: 16 remain, or 8"
    assert share(local, [list(range(20))], [wanted], round_to=8) == [expected]


def test_a_layer_of_which_nothing_is_wanted_stays_whole():
    assert share(local, [range(12), range(12)], [0, 6], round_to=8) == [0, 4]


def test_round_to_one_is_no_rounding():
    assert share(local, [range(12)], [5], round_to=1) == [5] == share(local, [range(12)], [5])


def test_global_round_to_ranks_bundles_by_their_mean():
    "The odd one of the second layer goes first; then bundles of two with means 1.5, 4 (twice), 6, 9"
    layers = [[1, 2, 3, 5, 9, 9], [0, 4, 4, 6, 6]]
    assert share(global_, layers, [1.5, 1.5], round_to=2) == [2, 1]
    assert share(global_, layers, [2.5, 2.5], round_to=2) == [4, 1]
    assert share(global_, layers, [3.5, 3.5], round_to=2) == [4, 3]
    assert share(global_, layers, [5, 5], round_to=2) == [4, 3]


# in a model

def test_global_and_local_differ():
    def net(): return nn.Sequential(linear([1, 2, 3, 4]), linear(*[[v] for v in (5, 6, 7, 8)]))
    a, b = net(), net()
    Sparsifier(a, method='local').prune_model(50)
    Sparsifier(b, method='global').prune_model(50)
    assert [rows(m.weight) for m in a] == [[[0, 0, 3, 4]], [[0], [0], [7], [8]]]
    assert [rows(m.weight) for m in b] == [[[0, 0, 0, 4]], [[0], [6], [7], [8]]]


def test_a_method_of_ones_own():
    "All that is wanted from the last layer"
    model = nn.Sequential(linear([1, 2]), linear([1], [2], [3]))
    s = Sparsifier(model, method=lambda scores, n, step, wanted, floor: [0]*(len(n)-1) + [round(sum(wanted))])
    s.prune_model(40)
    assert {n: bits(m) for n, m in s.masks.items()} == {'0.weight': [[1, 1]], '1.weight': [[0], [0], [1]]}


@pytest.mark.parametrize('answer', [[1], [1, 1, 1], [-1, 1], [0, 5]])
def test_an_impossible_answer_is_refused(answer):
    def mine(scores, n, step, wanted, floor): return answer
    with pytest.raises(ValueError, match=r"method 'mine' asked layers of \[2, 4\] groups to lose .*one number for each"): allocate(mine, None, [2, 4], [1, 1], [1, 1])


def test_names():
    assert available_methods() == ['local', 'global', 'per_output', 'owl', 'erk'] and as_method('local') is local and as_method('global') is global_ and as_method(local) is local


@pytest.mark.parametrize('bad', ['abc', 'Global', None, 3, dict])
def test_an_unknown_method_is_refused_with_the_names(bad):
    with pytest.raises(ValueError, match="is unknown; choose one of 'local', 'global', 'per_output', 'owl', 'erk', or pass a function"): as_method(bad)


# shares by shape

def _shares(net, percent, **selectors):
    shares, sizes = erk(net, percent, **selectors), {n: m.weight.numel() for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return shares, sum(shares[n]*sizes[n] for n in shares)/sum(sizes[n] for n in shares)


def test_erk_is_the_rule_of_evci():
    "Two layers, both below 1: what they keep is as (64+64)/(64*64) to (64+32+3+3)/(64*32*9)"
    net = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(64, 32, 3))
    shares, total = _shares(net, 90)
    assert total == pytest.approx(90)
    assert (100-shares['0'])/(100-shares['1']) == pytest.approx((128/4096)/(102/18432))


@pytest.mark.parametrize('percent', [1, 30, 50, 80, 90, 98, 99.9, 100])
def test_erk_keeps_the_sum_and_leaves_dense_what_would_keep_more_than_all(percent):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 10))
    shares, total = _shares(net, percent)
    assert total == pytest.approx(percent) and all(p == 0 or 1 <= p <= 100 for p in shares.values())
    assert shares['0'] <= shares['1'] <= shares['2']
    s = Sparsifier(net, method='local')
    s.prune_model(shares)
    assert s.sparsity() == pytest.approx(percent, abs=.1) or percent > 99.5


def test_erk_of_some_layers_of_none_and_of_bad_requests():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 64, 3), nn.Linear(64, 10))
    assert set(erk(net, 50, layers=nn.Conv2d)) == {'0', '1'} and set(erk(net, 50, exclude='0')) == {'1', '2'}
    assert set(erk(net, 0).values()) == {0}
    with pytest.raises(ValueError, match='did you mean 90'): erk(net, .9)
    with pytest.raises(ValueError, match='one percentage for all'): erk(net, {'0': 50})

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from core_helpers import CRITERIA, DTYPES, invent, same
from fastsparse.granularity import NM, available_granularities
from fastsparse.mask import Scores, keep_mask
from fastsparse.schedule import Schedule, Steps, available_schedules, as_schedule
from fastsparse.sparsifier import Sparsifier, SparsityWarning

few, some, many = (settings(deadline=None, derandomize=True, max_examples=n, database=None) for n in (60, 100, 150))


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SparsityWarning)
        yield


@st.composite
def layers(draw):
    "Any convolution or Linear, small, its weights all different, of a few values, or with zeros"
    make, sizes = draw(st.sampled_from([nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])), st.integers(1, 5)
    if make is nn.Linear: layer = nn.Linear(draw(sizes), draw(sizes))
    else:
        groups, kernel = draw(st.sampled_from([1, 1, 2, 3])), st.integers(1, 3)
        layer = make(groups*draw(sizes), groups*draw(sizes), [draw(kernel) for _ in range(int(make.__name__[-2]))], groups=groups)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    w = torch.randn(layer.weight.shape, generator=generator)
    look = draw(st.sampled_from(['different', 'few', 'equal', 'zeros']))
    layer.weight.data.copy_(w if look == 'different' else w.sign() + w.round() if look == 'few' else torch.full_like(w,
        .1) if look == 'equal' else w*(torch.rand(w.shape, generator=generator) < .6))
    return layer


@st.composite
def sparsifiers(draw, names=None):
    model = nn.Sequential(*draw(st.lists(layers(), min_size=1, max_size=4))).to(draw(st.sampled_from(DTYPES)))
    common = [n for n in available_granularities() if any(n in available_granularities(m) for m in model)]
    torch.manual_seed(draw(st.integers(0, 99)))
    s = invent(Sparsifier(model, draw(st.sampled_from(common)), draw(st.sampled_from(['local', 'global'])), draw(st.sampled_from(CRITERIA))))
    move(s, draw(st.floats(0, 1)))
    return s


def move(s, by=1.):
    "A step of training"
    for m in s.model: m.weight.data.add_(torch.randn_like(m.weight)*by)
    s.apply_masks()


percents = st.one_of(st.sampled_from([0, 1, 10, 50, 70, 90, 99, 100]), st.floats(1, 100), st.integers(1, 100))


def gone(s): return {n: int((~m).sum()) for n, m in s.masks.items()}
def copied(masks): return {n: m.clone() for n, m in masks.items()}


@many
@given(sparsifiers(), percents)
def test_the_count_is_the_nearest_that_can_be_reached(s, percent):
    targets, had = list(s.targets.values()), gone(s)
    s.prune_model(percent)
    now, floor = gone(s), percent < 100 and str(s.granularity) != 'layer'
    if s.method.__name__ == 'local':
        for t in targets:
            size, want = t.groups.size, max(percent*t.weight.numel()/100, had[t.name])
            best = min(abs(k*size - want) for k in range(t.groups.n + 1 - (floor and had[t.name] < t.weight.numel())))
            assert abs(now[t.name] - want) == pytest.approx(best, abs=1e-6)
    else:
        want = max(percent*sum(t.weight.numel() for t in targets)/100, sum(had.values()))
        most = sum(t.weight.numel() - t.groups.size*floor for t in targets)
        largest = max(t.groups.size for t in targets)
        assert abs(sum(now.values()) - min(want, most)) <= largest/2 + 1e-6
    assert all(not w[~s.masks[t.name]].any() for t in targets for w in [t.weight])


@some
@given(sparsifiers(), percents)
def test_whole_groups_only(s, percent):
    s.prune_model(percent)
    for t in s.targets.values():
        alive = t.groups.alive(s.masks[t.name])
        assert torch.equal(t.groups.expand(alive), s.masks[t.name]) and alive.shape == (t.groups.rows, t.groups.n)


@some
@given(sparsifiers(), st.lists(percents, min_size=2, max_size=5), st.booleans())
def test_masks_nest_under_a_rising_target(s, steps, moving):
    before = copied(s.masks)
    for percent in sorted(steps):
        s.prune_model(percent)
        assert all(not (s.masks[n] & ~before[n]).any() for n in before), 'a weight came back'
        before = copied(s.masks)
        if moving: move(s)


@some
@given(sparsifiers(), st.floats(1, 100), st.sampled_from(available_schedules()), st.integers(1, 7))
def test_a_schedule_takes_the_masks_to_the_target_in_nested_steps(s, percent, schedule, batches):
    once = copy.deepcopy(s)
    torch.manual_seed(1)
    once.prune_model(percent)
    plan, schedule = s.plan(percent), as_schedule('agp' if schedule == 'dsd' else schedule)
    before = copied(s.masks)
    for i in range(batches):
        torch.manual_seed(1)
        s.advance(plan, schedule((i+1)/batches))
        assert all(not (s.masks[n] & ~before[n]).any() for n in before)
        before = copied(s.masks)
    if s.method.__name__ == 'local': assert gone(s) == gone(once)
    else: assert abs(sum(gone(s).values()) - sum(gone(once).values())) <= max(t.groups.size for t in s.targets.values())


@some
@given(sparsifiers(), percents)
def test_pruned_twice_is_pruned_once(s, percent):
    s.prune_model(percent)
    first, weights = copied(s.masks), copy.deepcopy(s.model.state_dict())
    s.prune_model(percent)
    assert same(first, s.masks) and same(weights, s.model.state_dict())


@some
@given(sparsifiers(), percents)
def test_what_is_masked_is_zero_and_the_rest_is_untouched(s, percent):
    before = copy.deepcopy(s.model.state_dict())
    s.prune_model(percent)
    for n, m in s.masks.items(): assert torch.equal(s.model.state_dict()[n], torch.where(m, before[n], torch.zeros_like(before[n])))
    zeros, weights = (sum(map(f, s.targets.values())) for f in (lambda t: int((t.weight == 0).sum()), lambda t: t.weight.numel()))
    assert s.sparsity() == s.report().sparsity == pytest.approx(100*zeros/weights)


@few
@given(sparsifiers(), percents, percents)
def test_load_state_dict_of_state_dict_is_the_identity(s, first, second):
    s.prune_model(first)
    state, weights = s.state_dict(), copy.deepcopy(s.model.state_dict())
    s.load_state_dict(state)
    assert all(same(v, state[k]) for k, v in s.state_dict().items()) and same(weights, s.model.state_dict())
    other = Sparsifier(copy.deepcopy(s.model), s.granularity, s.method, s.criteria)
    other.load_state_dict(state)
    for x in (s, other):
        torch.manual_seed(2)
        x.prune_model(max(first, second))
    assert same(s.masks, other.masks) and same(s.model.state_dict(), other.model.state_dict())


@few
@given(sparsifiers(), percents)
def test_the_same_is_pruned_the_same(s, percent):
    other = copy.deepcopy(s)
    for x in (s, other):
        torch.manual_seed(3)
        x.prune_model(percent)
    assert same(s.masks, other.masks)


@few
@given(st.lists(layers(), min_size=1, max_size=3), st.sampled_from(DTYPES), st.sampled_from([(1, 2), (2, 4), (1, 3), (3, 5)]), st.sampled_from(CRITERIA))
def test_nm_loses_exactly_as_many_of_each_block(made, dtype, nm, criteria):
    model, pattern = nn.Sequential(*made).to(dtype), NM(*nm)
    fits = [i for i, m in enumerate(model) if (m.in_features if isinstance(m, nn.Linear) else m.in_channels//m.groups) % pattern.m == 0]
    if not fits:
        with pytest.raises(ValueError, match='do not divide'): Sparsifier(model, pattern)
        return
    s = invent(Sparsifier(model, pattern, criteria=criteria))
    s.prune_model(pattern.percent)
    assert list(s.targets) == [f'{i}.weight' for i in fits] and set(s.left_dense) == {str(i) for i in range(len(made))} - set(map(str, fits))
    for t in s.targets.values(): assert (t.groups.alive(s.masks[t.name]).sum(-1) == pattern.n).all()


@few
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 9), st.floats(1, 100), st.sampled_from(['local', 'global']))
def test_round_to(sizes, round_to, percent, method):
    s = Sparsifier(nn.Sequential(*(nn.Linear(3, n) for n in sizes)), 'row', method)
    if round_to > min(sizes):
        with pytest.raises(ValueError, match='is larger than these layers'): s.prune_model(percent, round_to)
        return
    s.prune_model(percent, round_to)
    kept = [int(m.any(1).sum()) for m in s.masks.values()]
    if round_to > 1: assert all(k % round_to == 0 and k >= round_to for k in kept)
    if method == 'local' and round_to > 1:
        for k, n in zip(kept, sizes, strict=True):
            assert abs(k - n*(1-percent/100)) == pytest.approx(min(abs(m - n*(1-percent/100)) for m in range(round_to, n+1, round_to)))


scores = st.lists(st.one_of(st.integers(-3, 3).map(float), st.sampled_from([float('inf'), -float('inf'), 0., -0.]), st.floats(-1, 1, width=32)), min_size=1, max_size=40)


@many
@given(scores, st.data())
def test_keep_mask_is_a_stable_sort(values, data):
    t, k = torch.tensor(values), data.draw(st.integers(0, len(values)))
    lost = sorted(range(len(values)), key=values.__getitem__)[:k]
    expected = torch.tensor([i not in lost for i in range(len(values))])
    assert torch.equal(keep_mask(t, k), expected) and torch.equal(keep_mask(torch.stack([t, t]), k), torch.stack([expected, expected]))


@many
@given(st.lists(scores, min_size=1, max_size=5), st.integers(1, 8), st.data())
def test_the_lowest_of_all_layers_are_those_of_one_stable_sort(parts, sample, data):
    flat,owner = [v for p in parts for v in p],[i for i,p in enumerate(parts) for _ in p]
    k = data.draw(st.integers(0, len(flat)))
    lost = [owner[i] for i in sorted(range(len(flat)), key=flat.__getitem__)[:k]]
    assert Scores([torch.tensor([p]) for p in parts], sample).lowest(k) == [lost.count(i) for i in range(len(parts))]


@some
@given(st.sampled_from(available_schedules()), st.floats(0, 1), st.floats(0, 1), st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_schedules(name, a, b, positions):
    s = Schedule(as_schedule(name).func, min(a, b), max(a, b))
    values = [s(p) for p in sorted(positions)]
    assert all(0 <= v <= 1 for v in values) and s(1) == (0 if name == 'dsd' else 1) and (s(0) == 0 or s.end_pct == 0)
    if name != 'dsd': assert all(x <= y + 1e-12 for x, y in zip(values, values[1:], strict=False))


@few
@given(st.integers(1, 50), st.floats(0, 1))
def test_steps(n, p):
    assert Steps(n)(p)*n == pytest.approx(round(Steps(n)(p)*n)) and 0 <= Steps(n)(p) - p + 1e-9 <= 1/n + 2e-9

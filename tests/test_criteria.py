import functools

import pytest
import torch
from torch import nn

from core_helpers import linear, rows
from fastsparse import criteria as C
from fastsparse.criteria import EVIDENCE, as_criterion, available_criteria, evidence_of, register_criterion
from fastsparse.sparsifier import Sparsifier

W, W0 = [-3., 1., -1., 2.], [1., -2., -1., 0.5]

FORMULAS = dict(
    large_final=[3, 1, 1, 2], squared_final=[9, 1, 1, 4], small_final=[-3, -1, -1, -2],
    large_init=[1, 2, 1, .5], small_init=[-1, -2, -1, -.5],
    large_init_large_final=[1, 1, 1, .5], small_init_small_final=[-3, -2, -1, -2],
    magnitude_increase=[2, -1, 0, 1.5], movement=[4, 3, 0, 1.5], movmag=[12, 3, 0, 3])
FORMULAS |= {f'updating_{n}': FORMULAS[n] for n in ('magnitude_increase', 'movement', 'movmag')}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', FORMULAS)
def test_formula(name, dtype):
    f, w, w0 = as_criterion(name), torch.tensor(W, dtype=dtype), torch.tensor(W0, dtype=dtype)
    assert rows(f(w, **{e: w0 for e in evidence_of(f)})) == FORMULAS[name]
    assert rows(w) == W and rows(w0) == W0, 'a criterion changes nothing'


@pytest.mark.parametrize('name', [n for n in FORMULAS if n not in ('large_final', 'small_final', 'squared_final')])
def test_what_a_criterion_reads(name):
    assert evidence_of(as_criterion(name)) == (('previous',) if name.startswith('updating') else ('initial',))


def test_what_the_others_read():
    assert evidence_of(C.large_final) == evidence_of(C.squared_final) == evidence_of(C.small_final) == () and evidence_of(C.random_score) == ('generator',)


OF_EVIDENCE = dict(snip=('grad',), taylor=('grad',), gate=('grad',), mest=('grad',), fisher=('grad_squared',), movement_signed=('moved',), wanda=('inputs',), grasp=('hessian_grad',), synflow=('synaptic_flow',),
    slimming=('gamma',), fpgm=('layer', 'name')) # see test_evidence.py


def test_the_names_are_those_of_the_formulas_and_a_few_more():
    assert set(available_criteria()) == {*FORMULAS, *OF_EVIDENCE, 'random_score', 'lamp'}
    assert {n: evidence_of(as_criterion(n)) for n in OF_EVIDENCE} == OF_EVIDENCE
    assert all(as_criterion(n) is getattr(C, n) for n in available_criteria())


def test_random_scores_are_uniform_and_given_by_the_generator():
    w = torch.zeros(100, 100, dtype=torch.bfloat16)
    s = C.random_score(w, torch.Generator().manual_seed(3))
    assert s.shape == w.shape and s.dtype == torch.float32 and 0 <= s.min() and s.max() < 1 and abs(s.mean() - .5) < .02
    assert torch.equal(s, C.random_score(w, torch.Generator().manual_seed(3)))
    assert not torch.equal(s, C.random_score(w, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize('name', ['squared_final', 'movmag', 'updating_movmag'])
def test_products_of_small_16_bit_weights_do_not_vanish(name):
    f, w = as_criterion(name), torch.tensor([1e-4, 2e-4, 3e-4], dtype=torch.float16)
    s = f(w, **{e: torch.zeros_like(w) for e in evidence_of(f)})
    assert 0 < s[0] < s[1] < s[2]


def test_squares_of_large_16_bit_weights_do_not_overflow():
    s = C.squared_final(torch.tensor([300., 600.], dtype=torch.float16))
    assert s[0] < s[1] < torch.inf


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lamp_divides_each_square_by_those_that_are_not_smaller(dtype):
    w = torch.tensor([[-3., 1, -1], [2, 0, 0]], dtype=dtype)
    assert torch.allclose(C.lamp(w).double(), torch.tensor([[1, 1/15, 1/14], [4/13, 0, 0]], dtype=torch.double), rtol=1e-6)
    assert rows(w) == [[-3, 1, -1], [2, 0, 0]] and evidence_of(C.lamp) == ()
    assert not C.lamp(torch.zeros(2, 3, dtype=dtype)).any()


@pytest.mark.parametrize('scale', [1e-30, 1e-3, 1., 1e30])
def test_lamp_does_not_depend_on_the_scale_of_a_layer(scale):
    w = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(C.lamp(w*scale), C.lamp(w), rtol=1e-4)


@pytest.mark.parametrize('percent', [50, 90, 99])
def test_lamp_prunes_by_magnitude_within_a_layer_and_alike_where_layers_differ_in_scale_only(percent):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50, bias=False), nn.Linear(50, 40, bias=False))
    with torch.no_grad(): model[1].weight.copy_(model[0].weight.T*100)
    magnitudes = model[0].weight.detach().abs().clone()
    Sparsifier(model, criteria='lamp').prune_model(percent)
    kept = model[0].weight != 0
    assert torch.equal(model[1].weight != 0, kept.T) and kept.sum() == round(20*(100-percent))
    assert magnitudes[kept].min() >= magnitudes[~kept].max()


# what a Sparsifier keeps for them

@pytest.mark.parametrize('name', available_criteria())
def test_evidence_is_kept_only_if_read(name):
    kept = set(Sparsifier(linear(W), criteria=name).state_dict()) - {'masks'}
    if name in ('fpgm', 'slimming'): assert kept == set()
    elif name in OF_EVIDENCE: assert kept == {'steps', 'scores' if name in ('taylor', 'gate') else OF_EVIDENCE[name][0]}
    else: assert kept == set(evidence_of(as_criterion(name))) - {'generator'}


def test_initial_is_the_weight_at_construction():
    layer = linear([1, 2, 3, 4])
    s = Sparsifier(layer, criteria='large_init')
    layer.weight.data.copy_(torch.tensor([[4., 3, 2, 1]]))
    s.prune_model(50)
    assert rows(layer.weight) == [[0, 0, 2, 1]]


def test_updating_criteria_compare_with_the_previous_mask_update():
    "Moved since the beginning: 5 5 6 6. Moved since the last update: 4 1 1 2"
    layer = linear([1, 1, 1, 1])
    s, whole = Sparsifier(layer, criteria='updating_movement'), Sparsifier(linear([1, 1, 1, 1]), criteria='movement')
    for values in ([2, 5, 6, 5], [6, 6, 7, 7]):
        for x in (s, whole): x.model.weight.data.copy_(torch.tensor([values]))
        if values == [2, 5, 6, 5]: s.prune_model(0)
    s.prune_model(50)
    whole.prune_model(50)
    assert rows(layer.weight) == [[6, 0, 0, 7]]
    assert rows(whole.model.weight) == [[0, 0, 7, 7]]


def test_the_first_update_compares_with_the_weight_at_construction():
    layer = linear([1, 1, 1, 1])
    s = Sparsifier(layer, criteria='updating_movement')
    layer.weight.data.copy_(torch.tensor([[1., 4, 3, 2]]))
    s.prune_model(50)
    assert rows(layer.weight) == [[0, 4, 3, 0]]


def test_random_score_follows_the_seed_and_does_not_repeat_itself():
    def mask(seed):
        torch.manual_seed(seed)
        s = Sparsifier(nn.Linear(16, 16, bias=False), criteria='random_score')
        s.prune_model(50)
        return s.masks['weight']
    assert torch.equal(mask(1), mask(1)) and not torch.equal(mask(1), mask(2))
    two = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    s = Sparsifier(two, criteria='random_score')
    s.prune_model(50)
    assert not torch.equal(*s.masks.values()), 'each layer draws its own'


# one's own

def test_a_function_of_the_weight_is_a_criterion():
    layer = linear([-3, 1, 2, -4])
    Sparsifier(layer, criteria=lambda w: w).prune_model(50)
    assert rows(layer.weight) == [[0, 1, 2, 0]]


@pytest.mark.parametrize('f', [torch.abs, functools.partial(torch.mul, other=-1), lambda w, scale=2: w*scale, lambda w, *rest, **more: w.abs()])
def test_what_needs_nothing_but_the_weight(f):
    assert evidence_of(f) == () and as_criterion(f) is f


def test_a_function_may_read_any_evidence():
    assert evidence_of(lambda w, previous, initial: w) == ('previous', 'initial')
    assert evidence_of(lambda w, *, initial: w) == ('initial',)
    layer = linear([1, 2, 3, 4])
    s = Sparsifier(layer, criteria=lambda w, initial: w*initial)
    layer.weight.data.copy_(torch.tensor([[9., 1, 1, 1]]))
    s.prune_model(50)
    assert rows(layer.weight) == [[9, 0, 0, 1]]


def test_whole_number_scores_are_fine():
    layer = linear([1, 1, 1, 1])
    Sparsifier(layer, criteria=lambda w: torch.tensor([[3, 1, 2, 4]])).prune_model(50)
    assert rows(layer.weight) == [[1, 0, 0, 1]]


def test_missing_evidence_is_an_error_that_lists_what_there_is():
    with pytest.raises(ValueError, match=rf"mine asks for \['hessian'\].*{EVIDENCE[0]}"):
        def mine(w, hessian): return w
        as_criterion(mine)
    with pytest.raises(ValueError, match='takes no parameter'): as_criterion(lambda: 1)


@pytest.mark.parametrize('bad', ['abc', 'Large_final', 3, None, nn.Linear])
def test_an_unknown_criterion_is_refused_with_the_names(bad):
    with pytest.raises(ValueError, match=r'is unknown; choose one of .*large_final.*movmag.*function of the weight'): as_criterion(bad)


@pytest.mark.parametrize('f', [lambda w: w.sum(), lambda w: w[:1], lambda w: 3., lambda w: None])
def test_scores_of_another_shape_are_refused_with_the_layer(f):
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"for layer '0'; it has to give one score for each weight, of shape \(2, 3\)"): Sparsifier(model, criteria=f).prune_model(50)
    assert (model[0].weight != 0).all()


def test_registered_under_its_own_name(monkeypatch):
    monkeypatch.setattr(C, '_criteria', dict(C._criteria))

    @register_criterion
    def by_sign(w): return w.sign()
    assert available_criteria()[-1] == 'by_sign' and as_criterion('by_sign') is by_sign
    layer = linear([1, -1, 1, -1])
    Sparsifier(layer, criteria='by_sign').prune_model(50)
    assert rows(layer.weight) == [[1, 0, 1, 0]]

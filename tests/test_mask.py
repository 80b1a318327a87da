import pytest
import torch
from hypothesis import given, settings, strategies as st

from core_helpers import bits
from fastsparse.mask import PIECE, MaskHolder, Scores, ZeroHolder, apply_mask, bury, count, keep_mask


@pytest.mark.parametrize('scores,k,expected', [
    ([1, 2, 3, 4], 0, [1, 1, 1, 1]),
    ([1, 2, 3, 4], 1, [0, 1, 1, 1]),
    ([4, 3, 2, 1], 2, [1, 1, 0, 0]),
    ([1, 2, 3, 4], 4, [0, 0, 0, 0]),
    ([5, 5, 5, 5], 2, [0, 0, 1, 1]),
    ([5, 1, 5, 5], 2, [0, 0, 1, 1]),
    ([5, 1, 5, 5], 3, [0, 0, 0, 1]),
    ([2, 1, 2, 1], 1, [1, 0, 1, 1]),
    ([2, 1, 2, 1], 3, [0, 0, 1, 0]),
    ([0., -0., 1, 0.], 1, [0, 1, 1, 1]),
    ([-torch.inf, torch.inf, 0, -torch.inf], 1, [0, 1, 1, 1]),
    ([-torch.inf, torch.inf, 0, -torch.inf], 3, [0, 1, 0, 0]),
    ([torch.inf]*3, 1, [0, 1, 1]),
    ([7], 0, [1]), ([7], 1, [0])])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_keep_all_but_the_lowest_of_ties_the_first_go_first(scores, k, expected, dtype):
    scores = torch.tensor(scores, dtype=dtype)
    assert bits(keep_mask(scores, k)) == expected
    assert bits(keep_mask(scores[None], k)) == [expected]


def test_each_row_competes_for_itself():
    scores = torch.tensor([[1., 2, 3, 4], [9, 8, 7, 6], [5, 5, 5, 5], [0, 1, 0, 1]])
    assert bits(keep_mask(scores, 2)) == [[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]


@pytest.mark.parametrize('k', [-1, 5])
def test_more_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f'cannot lose {k} of 4'): keep_mask(torch.ones(4), k)


def test_the_scores_are_left_alone():
    scores = torch.tensor([3., 1, 2])
    keep_mask(scores, 2)
    assert scores.tolist() == [3, 1, 2]


LARGE = 270_000 # enough for the sample to be used
SCORES = dict(
    random=lambda: torch.randn(LARGE).abs(),
    bf16=lambda: torch.randn(LARGE).abs().bfloat16(),
    fp16=lambda: torch.randn(LARGE).abs().half(),
    equal=lambda: torch.full((LARGE,), .5),
    two_values=lambda: torch.randint(0, 2, (LARGE,)).float(),
    rising=lambda: torch.arange(LARGE).float(),
    falling=lambda: -torch.arange(LARGE).float(),
    pruned=lambda: torch.where(torch.rand(LARGE) < .6, -torch.inf, torch.randn(LARGE)),
    periodic=lambda: torch.arange(LARGE).remainder(4).float(), # every 4th looks alike: the sample sees one value only
    one_apart=lambda: torch.zeros(LARGE).index_fill_(0, torch.tensor([7]), -1.))


@pytest.mark.parametrize('name', SCORES)
def test_many_scores_are_selected_as_a_stable_sort_would(name):
    scores = SCORES[name]()
    order = scores.sort(stable=True).indices
    for k in (1, LARGE//2, LARGE*9//10+1, LARGE-1): assert torch.equal(keep_mask(scores, k), torch.ones(LARGE).index_fill_(0, order[:k], 0).bool()), k


@pytest.mark.parametrize('sample', [1, 4, 64, 10_000])
@pytest.mark.parametrize('name', ['random', 'equal', 'rising', 'falling', 'periodic', 'one_apart', 'pruned'])
def test_the_lowest_of_several_layers_with_any_sample(name, sample):
    flat = SCORES[name]()[:2000]
    layers = flat.split([1, 699, 1300])
    owner = torch.tensor([0]*1 + [1]*699 + [2]*1300)
    order = flat.sort(stable=True).indices
    for k in (0, 1, 2, 17, 1000, 1999, 2000):
        scores = Scores([s[None] for s in layers], sample)
        lost = scores.lowest(k)
        assert lost == owner[order[:k]].bincount(minlength=3).tolist(), k
        kept = torch.cat([scores.keep(i, n)[0] for i,n in enumerate(lost)]) # by the threshold that was found for all
        assert torch.equal(kept, torch.ones(2000).index_fill_(0, order[:k], 0).bool()), k
        assert torch.equal(scores.keep(2, 7)[0], keep_mask(layers[2], 7)) # and by one that fits no more


@pytest.mark.parametrize('sample', [1, 16, 10_000])
def test_groups_of_different_size_are_taken_until_the_sum_is_nearest(sample):
    torch.manual_seed(0)
    layers, step = [torch.randint(0, 50, (1, n)).float() for n in (400, 30, 600)], [9, 200, 1]
    flat, weight = torch.cat(layers, 1)[0], torch.cat([torch.full((n,), s) for n,s in zip((400, 30, 600), step)])
    owner = torch.cat([torch.full((n,), i) for i,n in enumerate((400, 30, 600))])
    order = flat.sort(stable=True).indices
    zeros = torch.cat([torch.zeros(1), weight[order].cumsum(0)])
    for budget in (.4, 3, 999.5, 5000, 7300, 10199.6):
        taken = int((zeros - budget).abs().argmin())
        assert Scores(layers, sample).lowest(budget, step) == owner[order[:taken]].bincount(minlength=3).tolist(), budget


def test_only_some_of_the_layers():
    assert Scores([torch.tensor([[1., 5]]), torch.tensor([[0., 0]]), torch.tensor([[2., 3]])]).lowest(3, among=[0, 2]) == [1, 2]


def test_pieces_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    layers = [torch.randint(0, 9, (1, 1000)).float(), torch.randn(1, 77)]
    whole = Scores(layers, 16)
    expected = whole.lowest(500), whole.keep(0, 480)
    monkeypatch.setitem(PIECE, 'cpu', 7)
    cut = Scores(layers, 16)
    assert cut.lowest(500) == expected[0] and torch.equal(cut.keep(0, 480), expected[1])


class Aside(Scores):
    "Says what is alive, and has any scores for the rest"
    def __init__(self, layers, alive, sample): super().__init__(layers, sample); self.bools = alive
    def alive(self, i): return self.bools[i]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32-1), st.sampled_from([3, 50]), st.sampled_from([1, 40, 10**6]), st.sampled_from([0., .3, .9, 1.]), st.floats(0, 1.1))
def test_what_is_not_alive_ranks_as_what_is_buried(seed, values, sample, dead, share):
    gen = torch.Generator().manual_seed(seed)
    layers = [torch.randint(-values, values, (1, n), generator=gen).float() for n in (400, 1, 77)]
    alive = [torch.rand(s.shape[1], generator=gen) >= dead for s in layers]
    aside,buried = Aside(layers, alive, sample),Scores([bury(s, a) for s,a in zip(layers, alive)], sample)
    lost = aside.lowest(share*478)
    assert lost == buried.lowest(share*478)
    for i,k in enumerate(lost):
        assert torch.equal(aside.keep(i, k), buried.keep(i, k))
        assert aside.level(i) == buried.level(i)


@pytest.mark.parametrize('mask', [torch.rand(3, 4, 5) > .5, (torch.rand(4, 6, 3, 3) > .5).to(memory_format=torch.channels_last), (torch.rand(6, 8) > .5)[::2, 1:5],
                                  torch.ones(5).bool(), torch.zeros(0).bool(), torch.tensor(True), torch.tensor([True]).expand(3, 4)])
def test_count_counts(mask): assert count(mask) == int(mask.sum())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_buried_is_below_everything(dtype):
    scores = torch.tensor([1., -0., torch.inf, -5, 7], dtype=dtype)
    assert bury(scores, torch.tensor([1, 0, 0, 0, 1]).bool()).tolist() == [1, -torch.inf, -torch.inf, -torch.inf, 7]
    assert scores.tolist() == [1, 0, torch.inf, -5, 7]


# writing the zeros

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_whatever_stood_there_is_plus_zero(dtype):
    t = torch.tensor([1, -1, torch.nan, -torch.inf, torch.inf, -0., 3], dtype=dtype)
    apply_mask(t, torch.tensor([0, 0, 0, 0, 0, 0, 1]).bool())
    assert t.tolist() == [0, 0, 0, 0, 0, 0, 3] and not t.signbit().any()


def test_what_is_kept_keeps_its_bits():
    t = torch.tensor([torch.nan, -0., torch.inf, -1e-45])
    before = t.view(torch.int32).tolist()
    apply_mask(t, torch.ones(4, dtype=torch.bool))
    assert t.view(torch.int32).tolist() == before


def test_a_parameter_is_changed_in_place():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    there = p.data_ptr()
    apply_mask(p, torch.tensor([1, 0, 1]).bool())
    assert p.tolist() == [1, 0, 1] and p.data_ptr() == there and p.requires_grad and p.is_leaf and p.grad.tolist() == [1, 1, 1]


def test_memory_formats_and_views():
    t = torch.ones(2, 4, 3, 3).to(memory_format=torch.channels_last)
    mask = torch.rand(t.shape) > .5
    apply_mask(t, mask)
    assert torch.equal(t, mask.float()) and t.is_contiguous(memory_format=torch.channels_last)
    base = torch.ones(4, 4)
    apply_mask(base.t()[1:3], torch.zeros(2, 4).bool())
    assert base.tolist() == [[1, 0, 0, 1]]*4


# keeping them

class One(MaskHolder):
    def __init__(self, t, *mask): self.t, self.mask = t, torch.tensor(mask).bool()
    def pairs(self): yield self.t, self.mask


def test_a_holder_masks_tensor_gradient_and_optimizer_state():
    p = torch.nn.Parameter(torch.tensor([1., torch.nan, 3]))
    p.grad = torch.tensor([4., torch.inf, 6])
    state = dict(momentum=torch.tensor([1., torch.nan, 3]), step=torch.tensor(5.), count=torch.tensor([1, 2, 3]), other=torch.ones(2), name='x')
    holder = One(p, 1, 0, 1)
    holder.apply_masks(), holder.mask_gradients(), holder.mask_state(lambda t: state if t is p else {})
    assert p.tolist() == [1, 0, 3] and p.grad.tolist() == [4, 0, 6] and state['momentum'].tolist() == [1, 0, 3]
    assert state['step'] == 5 and state['count'].tolist() == [1, 2, 3] and state['other'].tolist() == [1, 1]


def test_no_gradient_and_no_state_are_fine():
    holder = One(torch.nn.Parameter(torch.ones(2)), 0, 1)
    holder.mask_gradients(), holder.mask_state(lambda t: {})
    assert holder.t.tolist() == [1, 1] and holder.t.grad is None


def test_a_holder_of_zeros_holds_what_is_zero_when_it_is_made():
    "But not tensors that are zero altogether, such as fresh biases"
    layer = torch.nn.Linear(3, 2)
    layer.weight.data.copy_(torch.tensor([[1., 0, 3], [-0., 5, 6]]))
    layer.bias.data.zero_()
    holder = ZeroHolder(layer)
    for p in layer.parameters(): p.data.fill_(7)
    holder.apply_masks()
    assert layer.weight.tolist() == [[7, 0, 7], [0, 7, 7]] and layer.bias.tolist() == [7, 7] and [t is layer.weight for t, _ in holder.pairs()] == [True]

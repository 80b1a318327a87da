import pytest
import torch
from torch import nn

from core_helpers import EACH, LAYERS, KEPT, bits, linear, naive_groups, rows
from fastsparse import granularity as G
from fastsparse.granularity import NM, Granularity, as_granularity, available_granularities, layer_type, output_groups, register_layer


def picture(groups):
    "The number of each weight's group"
    pic = torch.full(groups.shape, -1)
    for g in range(groups.n):
        one = torch.zeros(1, groups.n, dtype=torch.bool)
        one[0, g] = True
        mask = groups.expand(one)
        assert (pic[mask] == -1).all(), 'a weight in two groups'
        pic[mask] = g
    return pic


def text(pic): return ' '.join(''.join('0123456789abcdef'[v] for v in k.flatten()) for f in pic for k in f)


# two filters of two kernels of 2×2, written as  filter 0: [kh kw of channel 0] [channel 1]   filter 1: ...
PICTURES = dict(
    weight                 ='0123 4567 89ab cdef',
    kernel                 ='0000 1111 2222 3333',
    filter                 ='0000 0000 1111 1111',
    row                    ='0011 2233 4455 6677',
    column                 ='0101 2323 4545 6767',
    channel                ='0123 0123 4567 4567',
    vertical_slice         ='0101 0101 2323 2323',
    horizontal_slice       ='0011 0011 2233 2233',
    shared_weight          ='0123 4567 0123 4567',
    shared_kernel          ='0000 1111 0000 1111',
    shared_channel         ='0123 0123 0123 0123',
    shared_row             ='0011 2233 0011 2233',
    shared_column          ='0101 2323 0101 2323',
    shared_vertical_slice  ='0101 0101 0101 0101',
    shared_horizontal_slice='0011 0011 0011 0011',
    layer                  ='0000 0000 0000 0000')


@pytest.mark.parametrize('name', PICTURES)
def test_picture_of_each_conv2d_granularity(name):
    assert text(picture(Granularity(name).groups(nn.Conv2d(2, 2, 2)))) == PICTURES[name]


def test_the_names_for_conv2d_are_those_of_the_pictures():
    assert set(available_granularities(nn.Conv2d)) == set(PICTURES)


@pytest.mark.parametrize('name,expected', [('filter', '0000 1111 0000 1111'), ('kernel', '0000 1111 2222 3333'), ('shared_kernel', '0000 0000 1111 1111'),
                                           ('row', '0011 2233 4455 6677'), ('channel', '0123 4567 0123 4567'), ('shared_weight', '0123 0123 4567 4567')])
def test_picture_of_a_transposed_convolution(name, expected):
    "Its weight is input first"
    assert text(picture(Granularity(name).groups(nn.ConvTranspose2d(2, 2, 2)))) == expected


@pytest.mark.parametrize('name,expected', [('weight', [[0, 1, 2], [3, 4, 5]]), ('row', [[0, 0, 0], [1, 1, 1]]), ('column', [[0, 1, 2], [0, 1, 2]]), ('layer', [[0]*3]*2)])
def test_picture_of_a_linear_layer(name, expected):
    assert rows(picture(Granularity(name).groups(nn.Linear(3, 2)))) == expected


def test_a_grouped_convolution_shares_only_inputs_that_it_has_in_common():
    "Four filters that see inputs 0 1, 0 1, 2 3, 2 3"
    layer = nn.Conv2d(4, 4, 1, groups=2)
    assert rows(picture(Granularity('shared_kernel').groups(layer))[:, :, 0, 0]) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert rows(picture(Granularity('shared_channel').groups(layer))[:, :, 0, 0]) == [[0, 0]]*4


def test_outputs_of_a_grouped_transposed_convolution():
    "Inputs 0 1 make outputs 0 1 2, inputs 2 3 make outputs 3 4 5"
    assert rows(picture(output_groups(nn.ConvTranspose1d(4, 6, 1, groups=2)))[:, :, 0]) == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


@pytest.mark.parametrize('kind,name', EACH)
def test_groups_of_every_layer_type_agree_with_counting_by_hand(kind, name):
    layer = LAYERS[kind]()
    groups, naive = Granularity(name).groups(layer), naive_groups(layer, name)
    assert torch.equal(picture(groups), naive)
    assert (groups.n, groups.size, groups.rows) == (int(naive.max())+1, layer.weight.numel()//(int(naive.max())+1), 1)
    scores = torch.randint(0, 9, layer.weight.shape).float()
    mean = torch.zeros(groups.n).index_add_(0, naive.flatten(), scores.flatten())/groups.size
    torch.testing.assert_close(groups.scores(scores), mean[None])
    one = torch.zeros(layer.weight.shape, dtype=torch.bool)
    one.view(-1)[-1] = True
    assert groups.alive(one)[0].nonzero().flatten().tolist() == [naive.flatten()[-1]]


@pytest.mark.parametrize('kind', LAYERS)
def test_every_layer_type_has_the_names_that_make_sense_for_it(kind):
    layer = LAYERS[kind]()
    assert set(available_granularities(layer)) == set(KEPT[layer.weight.dim()-2]) == set(available_granularities(type(layer)))


def test_all_names():
    assert set(available_granularities()) == {n for kept in KEPT.values() for n in kept} | {'unit', 'gate', 'head'}


def test_a_subclass_is_what_its_base_is():
    class Mine(nn.Conv2d): pass
    assert layer_type(Mine) == layer_type(nn.Conv2d) and layer_type(Mine(1, 1, 1)) == layer_type(nn.Conv2d)
    assert layer_type(nn.ReLU()) is None and output_groups(nn.ReLU()) is None


# reducers

def test_the_score_of_a_group_is_the_mean_of_its_scores():
    scores = torch.tensor([[1., 2., 6.], [4., 4., 4.]])
    layer = nn.Linear(3, 2)
    assert rows(Granularity('row').groups(layer).scores(scores)) == [[3, 4]]
    assert rows(Granularity('column').groups(layer).scores(scores)) == [[2.5, 3, 5]]
    assert rows(Granularity('layer').groups(layer).scores(scores)) == [[3.5]]


def test_another_reducer():
    scores = torch.tensor([[1., 2., 6.], [4., 4., 4.]])
    assert rows(Granularity('row', reduce=torch.amax).groups(nn.Linear(3, 2)).scores(scores)) == [[6, 4]]
    assert rows(Granularity('column', reduce=torch.sum).groups(nn.Linear(3, 2)).scores(scores)) == [[5, 6, 10]]


def test_the_reducer_is_also_asked_for_groups_of_one_weight():
    "Else a 1×1 kernel would be ranked by another rule than a 3×3 one"
    minus = Granularity('kernel', reduce=lambda s, dim: -s.mean(dim))
    assert rows(minus.groups(nn.Conv2d(2, 1, 1)).scores(torch.tensor([1., 2.]).view(1, 2, 1, 1))) == [[-1, -2]]
    assert rows(minus.groups(nn.Conv2d(2, 1, (1, 2))).scores(torch.tensor([1., 1., 2., 2.]).view(1, 2, 1, 2))) == [[-1, -2]]


def test_a_group_with_one_survivor_is_alive():
    mask = torch.tensor([[0, 0, 0], [0, 1, 0]]).bool()
    layer = nn.Linear(3, 2)
    assert bits(Granularity('row').groups(layer).alive(mask)) == [[0, 1]]
    assert bits(Granularity('column').groups(layer).alive(mask)) == [[0, 1, 0]]
    assert bits(Granularity('weight').groups(layer).alive(mask)) == [[0, 0, 0, 0, 1, 0]]


# N:M

def test_nm_cuts_the_inputs_of_each_output_into_blocks():
    layer = linear(range(8), range(8, 16))
    groups = NM(2, 4).groups(layer)
    assert (groups.rows, groups.n, groups.size, groups.step) == (4, 4, 1, 4)
    assert rows(groups.scores(layer.weight)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


@pytest.mark.parametrize('kind', ['Conv1d', 'Conv2d', 'Conv2d grouped', 'Conv3d', 'ConvTranspose1d', 'ConvTranspose2d grouped', 'ConvTranspose3d', 'Linear'])
def test_nm_blocks_run_along_the_inputs_and_come_back_in_place(kind):
    layer = LAYERS[kind]()
    groups, ids = NM(1, 2).groups(layer), torch.arange(layer.weight.numel()).view(layer.weight.shape)
    assert torch.equal(groups.expand(groups.scores(ids)), ids)
    inputs, outputs = ('column', 'row') if kind == 'Linear' else ('shared_kernel', 'filter')
    first, second = naive_groups(layer, inputs).flatten()[groups.scores(ids)].T
    assert (second == first+1).all() and (first % 2 == 0).all()
    first, second = naive_groups(layer, outputs).flatten()[groups.scores(ids)].T
    assert (second == first).all(), 'a block has one output'


def test_nm_percent():
    assert (NM(2, 4).percent, NM(1, 4).percent, NM(4, 5).percent, str(NM(2, 4))) == (50, 75, 20, '2:4')


@pytest.mark.parametrize('layer,inputs', [(nn.Linear(6, 4), 6), (nn.Conv2d(3, 4, 4), 3), (nn.Conv2d(8, 8, 4, groups=4), 2), (nn.ConvTranspose1d(6, 4, 4), 6)])
def test_nm_says_why_a_layer_has_no_blocks(layer, inputs):
    with pytest.raises(ValueError, match=f'{inputs} inputs do not divide into blocks of 4'): NM(2, 4).groups(layer)


@pytest.mark.parametrize('n,m,says',
    [(4, 2, r'did you mean NM\(2, 4\)'), (0, 4, 'at least 1'), (4, 4, 'less than m'), (-1, 4, 'at least 1'), (2., 4, 'whole number'), (True, 2, 'whole number'),
    ('2', 4, 'whole number')])
def test_bad_nm_is_refused(n, m, says):
    with pytest.raises(ValueError, match=says): NM(n, m)


@pytest.mark.parametrize('n,m', [(0, 4), (4, 4), (-1, 4)])
def test_bad_nm_is_not_told_to_try_the_same_or_another_illegal_pattern(n, m):
    with pytest.raises(ValueError) as e: NM(n, m)
    assert f'did you mean NM({min(n, m)}, {max(n, m)})' not in str(e.value)


# names and objects

def test_a_name_a_pattern_and_an_object_are_granularities():
    assert as_granularity('filter') == Granularity('filter') and as_granularity('2:4') == NM(2, 4)
    g = Granularity('row', reduce=torch.amax)
    assert as_granularity(g) is g


@pytest.mark.parametrize('bad', ['abc', 'filters', '2:4:8', '', 5, None, NM, nn.Conv2d(4, 4, 1, groups=2)])
def test_an_unknown_granularity_is_refused_with_the_names(bad):
    with pytest.raises(ValueError, match=r"is unknown; choose one of .*filter.*2:4"): as_granularity(bad)


def test_a_pattern_is_checked_as_its_object_is():
    with pytest.raises(ValueError, match=r'did you mean NM\(2, 4\)'): as_granularity('4:2')


def test_a_reducer_has_to_be_a_function():
    with pytest.raises(ValueError, match='reduce=3 cannot reduce scores; pass a function'): Granularity('filter', reduce=3)


def test_a_layer_without_the_granularity_lists_those_that_it_has():
    with pytest.raises(ValueError, match="Linear has no granularity 'filter', only weight, row, column, layer"): Granularity('filter').groups(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='ReLU is not a prunable layer.*register_layer.*Conv2d'): available_granularities(nn.ReLU())


# registration

class Table(nn.Module):
    "Entries of a dictionary, one row each"
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1., 7).view(3, 2))


@pytest.fixture
def registry():
    before = dict(G._layer_types)
    yield
    G._layer_types.clear()
    G._layer_types.update(before)


def test_one_registration_adds_a_layer_type(registry):
    from fastsparse.sparsifier import Sparsifier
    register_layer(Table, 'entry feature', dict(weight='entry feature', entry='entry'))
    model = nn.Sequential(Table())
    assert available_granularities(Table) == ['weight', 'entry'] and 'entry' in available_granularities()
    Sparsifier(model, 'entry').prune_model(100/3)
    assert rows(model[0].weight) == [[0, 0], [3, 4], [5, 6]]


def test_a_layer_without_outputs_has_no_filters_and_no_nm(registry):
    register_layer(Table, 'entry feature', dict(weight='entry feature'))
    assert output_groups(Table()) is None
    with pytest.raises(ValueError, match='Table has no input axis'): NM(1, 2).groups(Table())


def test_a_registration_that_names_no_axis_is_refused(registry):
    with pytest.raises(ValueError, match=r"'entry' of Table keeps \['rows'\].*\['entry', 'feature'\]"): register_layer(Table, 'entry feature', dict(entry='rows'))
    assert layer_type(Table) is None

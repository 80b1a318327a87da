import dataclasses

import pytest
import torch
from torch import nn

from core_helpers import linear, small_net, zeros
from fastsparse.report import LayerReport, SparsityReport, sparsity_report
from fastsparse.sparsifier import Sparsifier


def toy():
    "Two layers: 5 of 6 zero with one dead row, and 1 of 4"
    model = nn.Sequential(linear([0, 0, 0], [0, 0, 7]), nn.ReLU(), nn.Linear(2, 2))
    model[2].weight.data.copy_(torch.tensor([[1., 2], [0, 3]]))
    model[2].bias.data.copy_(torch.tensor([0., 1]))
    return model


def test_counts_by_hand():
    r = sparsity_report(toy())
    assert r.layers == (LayerReport('0', 'Linear', (2, 3), 5, 6, 2, 1, 4), LayerReport('2', 'Linear', (2, 2), 1, 4, 2, 0, 4))
    assert [x.percent for x in r.layers] == [500/6, 25]
    assert (r.zeros, r.weights, r.sparsity, r.all_zeros, r.all_weights) == (6, 10, 60, 7, 12)


def test_bytes():
    r = sparsity_report(toy())
    assert r.bytes_dense == 40 and r.bytes_compressed == (1*4 + 1) + (3*4 + 1)
    assert sparsity_report(toy().bfloat16()).bytes_dense == 20


@pytest.mark.parametrize('granularity', ['weight', 'filter', 'kernel'])
def test_counts_agree_with_counting_one_by_one(granularity):
    model = small_net()
    s = Sparsifier(model, granularity, exclude=nn.Linear)
    s.prune_model(75)
    r = s.report()
    for x, m in zip(r.layers, (model[0], model[3]), strict=True):
        values = m.weight.flatten(1).tolist()
        assert x.zeros == sum(v == 0 for row in values for v in row) and x.weights == m.weight.numel() and x.filters == len(values)
        assert x.dead_filters == sum(all(v == 0 for v in row) for row in values)
    assert r.all_zeros == zeros(model) and r.all_weights == sum(p.numel() for p in model.parameters())
    assert (r.zeros, r.weights, r.sparsity) == (sum(x.zeros for x in r.layers), 216+1152, s.sparsity())


@pytest.mark.parametrize('layer,dead',
    [(nn.ConvTranspose2d(4, 6, 2, groups=2), [0, 4]), (nn.ConvTranspose1d(2, 6, 2), [3]), (nn.Conv3d(2, 6, 2), [5]), (nn.Conv1d(4, 6, 2, groups=2), [1, 2])])
def test_dead_filters_are_outputs_that_put_out_nothing(layer, dead):
    bias = layer.bias.detach().clone()
    per = layer.weight.shape[1]
    for o in dead:
        if 'Transpose' in type(layer).__name__: layer.weight.data[o//per*2:o//per*2+2, o % per] = 0
        else: layer.weight.data[o] = 0
    with torch.no_grad(): out = layer(torch.randn(2, layer.in_channels, *[4]*(layer.weight.dim()-2))) - bias.view(1, -1, *[1]*(layer.weight.dim()-2))
    assert [o for o in range(6) if (out[:, o] == 0).all()] == dead and sparsity_report(layer).layers[0].dead_filters == len(dead)


def test_minus_zero_is_zero_and_nan_is_not():
    assert sparsity_report(linear([-0., torch.nan, torch.inf, 1e-45])).zeros == 1


def test_only_the_targets_are_listed_but_all_parameters_count():
    model = toy()
    r = Sparsifier(model, layers='0').report()
    assert [x.name for x in r.layers] == ['0'] and (r.weights, r.all_weights) == (6, 12)
    assert [x.name for x in sparsity_report(model).layers] == ['0', '2']
    assert [x.name for x in sparsity_report(model, {'two': model[2]}).layers] == ['two']


def test_a_shared_tensor_counts_once():
    model = nn.Sequential(linear([0, 1], [2, 3]), linear([0, 0], [0, 0]))
    model[1].weight = model[0].weight
    for r in (Sparsifier(model).report(), sparsity_report(model)): assert (r.zeros, r.weights, r.sparsity, r.all_zeros, r.all_weights) == (1, 4, 25, 1, 4)


def test_a_model_without_layers():
    r = sparsity_report(nn.ReLU())
    assert (r.sparsity, r.weights, r.all_weights) == (0, 0, 0) and 'all targets' in str(r)


def test_it_is_a_value():
    r = sparsity_report(toy())
    assert r == sparsity_report(toy()) and hash(r.layers[0]) == hash(sparsity_report(toy()).layers[0])
    with pytest.raises(dataclasses.FrozenInstanceError): r.all_zeros = 3


def test_counting_changes_nothing():
    model = toy()
    r, again = sparsity_report(model), sparsity_report(model)
    assert r == again and model[0].weight.requires_grad and model[0].weight.grad is None


def test_the_table_by_hand():
    assert str(sparsity_report(toy())) == '''\
layer           type    shape  zeros  weights  sparsity  dead filters
---------------------------------------------------------------------
0               Linear  2×3        5        6   83.33 %        1 of 2
2               Linear  2×2        1        4   25.00 %        0 of 2
---------------------------------------------------------------------
all targets                        6       10   60.00 %
all parameters                     7       12   58.33 %

Targets take 0.04 kB dense, 0.02 kB compressed (one bit a weight, and the weights that are not zero).'''


def test_a_table_is_its_own_repr_and_large_numbers_are_readable():
    r = sparsity_report(nn.Linear(2000, 1000))
    assert repr(r) == str(r) and '2,000,000' in str(r) and '8.00 MB' in str(r) and '1000×2000' in str(r) and '(the model)' in str(r)


def test_notes_are_in_text_and_html():
    r = sparsity_report(toy(), notes=('8 is left dense: because.',))
    assert str(r).endswith('\n8 is left dense: because.') and '8 is left dense: because.' in r._repr_html_()


def test_html_has_the_same_cells():
    from html.parser import HTMLParser

    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.rows = []

        def handle_starttag(self, tag, attrs):
            if tag == 'tr': self.rows.append([])
            if tag in ('td', 'th'): self.rows[-1].append('')

        def handle_data(self, data):
            if self.lasttag in ('td', 'th'): self.rows[-1][-1] += data
    cells = Cells()
    cells.feed(sparsity_report(toy())._repr_html_())
    assert [r[:7] for r in cells.rows] == [['layer', 'type', 'shape', 'zeros', 'weights', 'sparsity', 'dead filters'],
        ['0', 'Linear', '2×3', '5', '6', '83.33 %', '1 of 2'],
                                           ['2', 'Linear', '2×2', '1', '4', '25.00 %', '0 of 2'], ['all targets', '', '', '6', '10', '60.00 %', ''],
                                           ['all parameters', '', '', '7', '12', '58.33 %', '']]


def test_html_shows_what_a_reason_says_literally():
    "Error messages hold such things as <class 'int'>, which a browser would swallow"
    html = sparsity_report(toy(), notes=("TypeError: <class 'int'> & more",))._repr_html_()
    assert "<class 'int'>" not in html and '&lt;class' in html and '&amp; more' in html


def test_dataframe_has_numbers():
    pd = pytest.importorskip('pandas')
    r = sparsity_report(toy())
    df = r.to_dataframe()
    assert isinstance(df, pd.DataFrame) and list(df.columns) == ['layer', 'type', 'shape', 'zeros', 'weights', 'percent', 'filters', 'dead_filters']
    assert df.zeros.sum() == r.zeros and df.percent.tolist() == [x.percent for x in r.layers] and df.layer.tolist() == ['0', '2'] and df['shape'].tolist() == [(2, 3),
        (2, 2)]


def test_an_empty_report():
    r = SparsityReport((), 0, 0)
    assert r.sparsity == 0 and r.bytes_dense == r.bytes_compressed == 0 and r._repr_html_() and len(r.to_dataframe()) == 0

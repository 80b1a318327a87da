import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from core_helpers import LAYERS, linear, small_net
from fastsparse.plot import plot_kernels, plot_schedule, plot_sparsity
from fastsparse.report import sparsity_report
from fastsparse.schedule import agp
from fastsparse.sparsifier import Sparsifier


def image(ax):
    "What is drawn, blank places as NaN"
    return np.ma.filled(np.ma.asarray(ax.images[0].get_array(), float), np.nan)


@pytest.mark.parametrize('kind', LAYERS)
def test_every_layer_can_be_drawn_on_a_given_axis_or_a_new_one(kind):
    layer = LAYERS[kind]()
    fig, ax = plt.subplots()
    assert plot_kernels(layer, ax=ax) is ax and len(ax.images) == 1
    other = plot_kernels(layer)
    assert other is not ax and other.figure is not fig and len(other.images) == 1
    fig.canvas.draw()


@pytest.mark.parametrize('kind', LAYERS)
def test_every_weight_is_drawn_and_every_zero_is_blank(kind):
    layer = LAYERS[kind]()
    drawn, values = image(plot_kernels(layer)), layer.weight.detach().numpy()
    if drawn.ndim == 3: drawn = None # colours are tested below
    else:
        np.testing.assert_allclose(np.sort(drawn[~np.isnan(drawn)]), np.sort(values.ravel()))
        layer.weight.data[torch.rand(layer.weight.shape) < .5] = 0
        again, values = image(plot_kernels(layer)), layer.weight.detach().numpy()
        assert again.shape == drawn.shape and np.isnan(again).sum() == np.isnan(drawn).sum() + (values == 0).sum() and not (again == 0).any()


def test_a_linear_layer_by_hand():
    np.testing.assert_equal(image(plot_kernels(linear([1, 0, -2], [0, 3, 4]))), [[1, np.nan, -2], [np.nan, 3, 4]])


def test_kernels_by_hand():
    "Two filters of two kernels of 1×2: a row each, a gap between"
    layer = nn.Conv2d(2, 2, (1, 2))
    layer.weight.data.copy_(torch.tensor([1., 2, 0, 4, 5, 6, 7, 0]).view(2, 2, 1, 2))
    nan = np.nan
    np.testing.assert_equal(image(plot_kernels(layer)), [[1, 2, nan, nan, 4], [nan]*5, [5, 6, nan, 7, nan]])


def test_rows_are_outputs_also_where_the_weight_is_input_first():
    layer = nn.ConvTranspose2d(2, 1, 1)
    layer.weight.data.copy_(torch.tensor([1., 2]).view(2, 1, 1, 1))
    np.testing.assert_equal(image(plot_kernels(layer)), [[1, np.nan, 2]])


def test_three_channels_are_a_colour_image_and_dead_pixels_see_through():
    layer = nn.Conv2d(3, 4, 2, bias=False)
    layer.weight.data.fill_(1)
    layer.weight.data[0] = 0
    layer.weight.data[1, :, 0, 0] = 0
    layer.weight.data[2, 0] = -1
    layer.weight.data[3, 1:] = 0
    ax = plot_kernels(layer)
    drawn = np.asarray(ax.images[0].get_array())
    cols = 3 # of a grid wide enough for four
    assert drawn.shape == (2*3-1, cols*3-1, 4) and 0 <= drawn.min() and drawn.max() <= 1
    tile = lambda i: drawn[i//cols*3:i//cols*3+2, i % cols*3:i % cols*3+2] # noqa: E731
    assert (tile(0)[..., 3] == 0).all(), 'a dead filter is blank'
    assert tile(1)[..., 3].tolist() == [[0, 1], [1, 1]] and (tile(1)[0, 1, :3] == 1).all()
    assert tile(2)[0, 0].tolist() == [0, 1, 1, 1]
    assert tile(3)[0, 0].tolist() == [1, .5, .5, 1]
    assert (drawn[..., 3].sum(), (drawn[2, :, 3] == 0).all()) == (3+4+4, True), 'gaps are blank'


def test_blank_is_not_the_colour_of_any_weight():
    "Also not of a very small one"
    image = plot_kernels(linear([1, 0, -1, 1e-9])).images[0]
    colours = image.cmap(image.norm(image.get_array()))[0]
    on_white = colours[:, :3]*colours[:, 3:] + 1 - colours[:, 3:]
    assert on_white[1].tolist() == [1, 1, 1] and (on_white[3] < .5).all() and len({tuple(c) for c in on_white.tolist()}) == 4


def test_the_colours_are_centred_on_zero():
    ax = plot_kernels(linear([1, -4, 2]))
    assert ax.images[0].norm.vmin == -4 and ax.images[0].norm.vmax == 4


@pytest.mark.parametrize('layer', [nn.Conv2d(3, 4, 2), nn.Conv2d(2, 4, 2), nn.Linear(3, 2), nn.Conv1d(2, 2, 2)])
@pytest.mark.parametrize('value', [0., torch.nan, torch.inf])
def test_layers_without_a_single_number_can_be_drawn(layer, value):
    layer.weight.data.fill_(value)
    plot_kernels(layer).figure.canvas.draw()


@pytest.mark.parametrize('layer', [nn.Conv2d(3, 4, 2), nn.Linear(3, 2)])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_16_bit_weights_can_be_drawn(layer, dtype):
    plot_kernels(layer.to(dtype)).figure.canvas.draw()


@pytest.mark.parametrize('make,kw,shape,says', [
    (lambda: nn.Conv2d(30, 70, 3), {}, (16*4-1, 28*4-1), 'the first 16 of 70 outputs, 28 of 30 inputs'),
    (lambda: nn.Conv2d(30, 70, 3), dict(max_filters=2, max_channels=3), (7, 11), 'the first 2 of 70 outputs, 3 of 30 inputs'),
    (lambda: nn.Linear(5, 200), dict(max_filters=20), (20, 5), 'the first 20 of 200 outputs, 5 of 5 inputs'),
    (lambda: nn.Conv2d(30, 70, 3), dict(max_filters=70, max_channels=30), (279, 119), None)])
def test_large_layers_are_cut_and_say_so(make, kw, shape, says):
    ax = plot_kernels(make(), **kw)
    assert image(ax).shape == shape and (says in ax.get_title() if says else 'first' not in ax.get_title())


def test_filters_with_one_channel_are_pictures_in_a_grid():
    "Three filters of 1×1 in a grid of three columns at most"
    layer = nn.Conv2d(3, 3, 1, groups=3)
    layer.weight.data.copy_(torch.tensor([1., 0, 3]).view(3, 1, 1, 1))
    assert sorted(image(plot_kernels(layer))[~np.isnan(image(plot_kernels(layer)))].tolist()) == [1, 3]


def test_the_title_says_what_it_is():
    layer = nn.Conv2d(2, 4, 5)
    layer.weight.data[1] = 0
    assert plot_kernels(layer).get_title() == 'Conv2d 4×2×5×5, 25.0 % zero' and plot_kernels(layer, title='mine').get_title() == 'mine'


def test_what_has_no_weight_is_refused():
    with pytest.raises(ValueError, match='str has no kernels to draw'): plot_kernels('conv1')
    with pytest.raises(ValueError, match=r'BatchNorm2d has no kernels to draw; pass a convolution or a Linear, such as model.conv1'): plot_kernels(nn.BatchNorm2d(3))


def test_drawing_changes_nothing():
    layer = nn.Conv2d(3, 4, 2)
    before = layer.weight.detach().clone()
    plot_kernels(layer)
    assert torch.equal(layer.weight, before) and layer.weight.grad is None


# sparsity by layer

def bars(ax): return [round(p.get_width(), 6) for p in ax.patches]


@pytest.mark.parametrize('what', [sparsity_report, lambda model: model])
def test_sparsity_by_layer(what):
    model = small_net()
    s = Sparsifier(model, method='local')
    s.prune_model({'0': 25, '3': 50, '8': 75})
    fig, ax = plt.subplots()
    assert plot_sparsity(what(model), ax=ax) is ax
    assert bars(ax) == [100]*3 + [25, 50, 75] and [t.get_text() for t in ax.get_yticklabels()] == ['0', '3', '8']
    assert ax.lines[0].get_xdata()[0] == s.sparsity() and f'{s.sparsity():.2f}' in ax.get_xlabel()
    assert ax.get_ylim()[0] > ax.get_ylim()[1], 'the first layer is on top'
    assert plot_sparsity(what(model)) is not ax
    fig.canvas.draw()


def test_sparsity_of_a_sparsifiers_report():
    s = Sparsifier(small_net(), layers=nn.Linear)
    s.prune_model(50)
    assert bars(plot_sparsity(s.report())) == [100, 50]


# schedules

def test_what_was_reached_over_what_was_planned():
    _, ax = plt.subplots()
    assert plot_schedule(agp, [(0, 0), (.5, 70), (1, 70)], sparsity=70, ax=ax) is ax
    planned, reached = ax.lines
    assert max(planned.get_ydata()) == 70 and list(reached.get_xdata()) == [0, .5, 1] and list(reached.get_ydata()) == [0, 70, 70]
    assert len(plot_schedule(agp).lines) == 1 and plot_schedule(agp) is not ax

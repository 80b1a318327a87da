import pytest
from torch import nn

from fastsparse.select import check_selector, select_layers
from fastsparse.sparsifier import Sparsifier


def net():
    block = lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)) # noqa: E731
    return nn.ModuleDict(dict(stem=nn.Conv2d(3, 4, 3), layer1=block(), layer2=nn.Sequential(block(), block()), head=nn.Linear(4, 2)))


LAYERS = ['stem', 'layer1.0', 'layer1.2', 'layer2.0.0', 'layer2.0.2', 'layer2.1.0', 'layer2.1.2', 'head']
SELECTORS = [
    (nn.Linear, ['head']), (nn.Conv2d, LAYERS[:-1]), ((nn.Linear, nn.Conv2d), LAYERS), (nn.Sequential, LAYERS[1:-1]),
    ('stem', ['stem']), ('layer1.0', ['layer1.0']), ('layer1', ['layer1.0', 'layer1.2']), ('layer2.*', LAYERS[3:7]), ('layer2.0', ['layer2.0.0', 'layer2.0.2']),
    ('layer[12]', LAYERS[1:7]), ('*.2', ['layer1.2', 'layer2.0.2', 'layer2.1.2']), ('*', LAYERS), ('?ead', ['head']),
    (lambda n, m: isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3), ['stem', 'layer1.2', 'layer2.0.2', 'layer2.1.2']),
    (lambda n, m: n.endswith('.0') and 'layer1' in n, ['layer1.0']),
    (['stem', 'head'], ['stem', 'head']), (['layer1', nn.Linear], ['layer1.0', 'layer1.2', 'head']), (['layer2.0', ['stem']], ['stem', 'layer2.0.0', 'layer2.0.2'])]


@pytest.mark.parametrize('selector,expected', SELECTORS)
def test_every_kind_of_selector(selector, expected):
    targets = [t.layer_name for t in Sparsifier(net(), layers=selector).targets.values()]
    assert sorted(targets) == sorted(expected)


@pytest.mark.parametrize('selector,expected', [(s, e) for s, e in SELECTORS if e != LAYERS])
def test_exclude_takes_the_same_selectors(selector, expected):
    targets = [t.layer_name for t in Sparsifier(net(), exclude=selector).targets.values()]
    assert targets == [n for n in LAYERS if n not in expected]


def test_a_module_selects_itself_and_what_is_in_it():
    model = net()
    names = lambda s: [t.layer_name for t in Sparsifier(model, layers=s).targets.values()] # noqa: E731
    assert names(model['stem']) == ['stem'] and names(model['layer2'][1]) == ['layer2.1.0', 'layer2.1.2'] and names([model['stem'], model['head']]) == ['stem', 'head']
    assert names(model) == names(None) == LAYERS


def test_exclude_wins():
    assert [t.layer_name for t in Sparsifier(net(), layers=['layer1', 'head'], exclude=nn.Linear).targets.values()] == ['layer1.0', 'layer1.2']


def test_all_modules_that_are_meant_containers_included():
    assert [n for n, _ in select_layers(net(), 'layer1')] == ['layer1', 'layer1.0', 'layer1.1', 'layer1.2']


def test_a_model_that_is_one_layer():
    layer = nn.Linear(4, 4)
    for selector in (None, layer, nn.Linear, lambda n, m: True): assert list(Sparsifier(layer, layers=selector).targets) == ['weight']


@pytest.mark.parametrize('what', ['layers', 'exclude'])
@pytest.mark.parametrize('selector,shown',
    [('layer3.*', 'layer3'), (nn.Conv1d, 'Conv1d'), (lambda n, m: False, '<lambda>'), (nn.Linear(4, 2), 'Linear'), (['stem', 'nope'], 'nope')])
def test_a_selector_that_means_nothing_is_refused_with_what_there_is(selector, shown, what):
    with pytest.raises(ValueError, match=rf'{what}=.*{shown}.* matches no layer; the layers are stem, layer1.0, .*of types BatchNorm2d, Conv2d, Linear'):
        Sparsifier(net(), **{what: selector})


@pytest.mark.parametrize('selector', ['layer1.1', nn.BatchNorm2d])
def test_a_selector_that_means_nothing_prunable_is_refused(selector):
    with pytest.raises(ValueError, match='no layer to prune by weight'): Sparsifier(net(), layers=selector)


def test_leaving_everything_out_is_refused():
    with pytest.raises(ValueError, match='no layer to prune by weight.*left out'): Sparsifier(net(), exclude=(nn.Conv2d, nn.Linear))


@pytest.mark.parametrize('what', ['layers', 'exclude'])
@pytest.mark.parametrize('bad,says',
    [([], 'is empty'), ((), 'is empty'), (3, 'selects nothing; pass a type such as nn.Conv2d'), (True, 'selects nothing'), ({'a': 1}, 'selects nothing'),
                                      (int, 'int is not a type of layer'), ([nn.Conv2d, 3], 'selects nothing'), (['stem', []], 'is empty')])
def test_what_selects_no_layer_is_refused(bad, says, what):
    with pytest.raises(ValueError, match=f'{what}=.*{says}'): Sparsifier(net(), **{what: bad})
    with pytest.raises(ValueError, match=f'{what}=.*{says}'): check_selector(bad, what)

"A smaller model with the same outputs, or the reason why not"
import copy
import io
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from attention_helpers import (Bert, GPT2, Llama, NanoGPT, Packed, RMS, Relative, Scaled, Separate, ViT,
                               batches_of_heads, behead, by_hand, causal, einsum, fused, in_steps, linear_attention, padded, three_axes)
from torch import nn

from fastsparse.compact import compact, dead_classes, rebuild, relative_difference
from fastsparse.flow import flow
from fastsparse.sparsifier import Sparsifier


class Forward(nn.Module):
    "Modules, and a forward that is a function of them and the input"
    def __init__(self, forward, **modules):
        super().__init__()
        for n, m in modules.items(): setattr(self, n, m)
        self._run = forward

    def forward(self, *x): return self._run(self, *x)


@torch.no_grad()
def stir(m):
    "No parameter and no statistic is a round number"
    for b in m.modules():
        if isinstance(b, nn.modules.batchnorm._NormBase):
            if b.weight is not None: b.weight.uniform_(.5, 1.5); b.bias.uniform_(-.5, .5)
            if b.running_mean is not None: b.running_mean.uniform_(-.2, .2); b.running_var.uniform_(.5, 1.5)
    return m.eval()


@torch.no_grad()
def halve(m, norms=True):
    "Zero the first half of the outputs of each layer, with bias and norm"
    for k in m.modules():
        if isinstance(k, (nn.modules.conv._ConvNd, nn.Linear)):
            axis = 1 if getattr(k, 'transposed', False) else 0
            k.weight.narrow(axis, 0, k.weight.shape[axis]//2).zero_()
            if k.bias is not None: k.bias[:len(k.bias)//2] = 0
        elif norms and isinstance(k, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)) and k.weight is not None:
            k.weight[:len(k.weight)//2] = 0
            k.bias[:len(k.bias)//2] = 0
    return m


def outputs(m, x): return m.eval()(*x) if isinstance(x, tuple) else m.eval()(x)


@torch.no_grad()
def equal(m, small, x):
    torch.manual_seed(7)
    other = tuple(torch.randn_like(t) for t in x) if isinstance(x, tuple) else torch.randn_like(x) if x.is_floating_point() else x
    return all(relative_difference(outputs(small, e), outputs(m, e)) <= 1 for e in (x, other))


def check(m, x, shrinks=True):
    state, modes = copy.deepcopy(m.state_dict()), [k.training for k in m.modules()]
    c = compact(m, x)
    assert modes == [k.training for k in m.modules()] == [k.training for k in c.model.modules()]
    assert all(map(torch.equal, state.values(), m.state_dict().values()))
    assert not {p.data_ptr() for p in m.parameters()} & {p.data_ptr() for p in c.model.parameters()}
    assert equal(m, c.model, x)
    assert shrinks is None or (c.weights[1] < c.weights[0]) == shrinks, c
    assert c.weights[1] == sum(p.numel() for p in c.model.parameters())
    return c


conv = lambda i=3, o=8, k=3, **kw: nn.Conv2d(i, o, k, padding=k//2, **kw)  # noqa: E731
image = torch.randn(2, 3, 8, 8)


def test_sizes_by_hand():
    m = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6*64, 4))
    halve(m[:4])
    c = check(m, image)
    assert {n: s for n, s in c.shapes.items() if 'num' not in n} == {
        '0.weight': (4, 3, 3, 3), '0.bias': (4,), '1.weight': (4,), '1.bias': (4,), '1.running_mean': (4,), '1.running_var': (4,),
        '3.weight': (3, 4, 3, 3), '3.bias': (3,), '6.weight': (4, 192), '6.bias': (4,)}
    assert c.macs == (2*64*(27*8 + 72*6) + 2*384*4, 2*64*(27*4 + 36*3) + 2*192*4)
    assert (c.model[0].out_channels, c.model[1].num_features, c.model[3].in_channels, c.model[6].in_features) == (4, 4, 4, 192)


def chunked(m, x):
    a, b = m.a(x).chunk(2, 1)
    return m.b(a*b.sigmoid())


def written_slice(m, x):
    y = m.a(x)
    y[:, :4] += 1
    return m.b(y)


def filled(m, x):
    y = torch.empty(x.shape[0], 8, *x.shape[2:])
    y[:, :4] = m.a(x)
    y[:, 4:] = m.c(x)
    return m.b(y)


def unflattened(m, x): return m.b(m.l(x.mean((2, 3))).view(len(x), -1, 4, 4))


CUT = {
    'inputs nobody reads': lambda: nn.Sequential(conv(), conv(8, 4), nn.Flatten(1), nn.Linear(256, 2)),
    'flatten into BatchNorm1d': lambda: nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), stir(nn.BatchNorm1d(8*64)), nn.Linear(8*64, 2)),
    'PReLU': lambda: nn.Sequential(conv(), nn.PReLU(8), conv(8, 2)),
    'transposed convolution': lambda: nn.Sequential(conv(), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU(), conv(6, 2)),
    'shared module': lambda: Forward(lambda m, x: m.b(m.c(m.c(m.a(x)))), a=conv(), c=conv(8, 8), b=conv(8, 2)),
    'chunk': lambda: Forward(chunked, a=conv(3, 16), b=conv(8, 2)),
    'depthwise': lambda: nn.Sequential(conv(), conv(8, 8, groups=8, bias=False), nn.ReLU(), conv(8, 2)),
    'depth multiplier': lambda: nn.Sequential(conv(), conv(8, 16, groups=8, bias=False), nn.ReLU(), conv(16, 2)),
    'pixel shuffle': lambda: nn.Sequential(conv(3, 16), nn.PixelShuffle(2), nn.ReLU(), conv(4, 2)),
    'free parameter as a gate': lambda: Forward(lambda m, x: m.b(m.a(x)*m.g), a=conv(), b=conv(8, 2), g=nn.Parameter(torch.randn(8, 1, 1))),
    'squeeze and excitation': lambda: Forward(lambda m, x: (lambda y: m.b(y*m.e(m.s(y.mean((2, 3), keepdim=True)).relu()).sigmoid()))(m.a(x)),
                                              a=conv(), s=conv(8, 4, 1), e=conv(4, 8, 1), b=conv(8, 2)),
    'concatenation': lambda: Forward(lambda m, x: m.b(torch.cat([m.a(x), x, m.c(x)], 1)), a=conv(), c=conv(3, 4), b=conv(15, 2)),
    'buffer for each channel': lambda: Forward(lambda m, x: m.b(m.a(x)*m.s), a=conv(), b=conv(8, 2), s=nn.Buffer(torch.rand(8, 1, 1))),
    'several axes of one view': lambda: Forward(unflattened, l=nn.Linear(3, 128), b=conv(8, 2)),
    'weight that is transposed': lambda: Forward(lambda m, x: F.linear(F.linear(x.mean((2, 3)), m.w), m.w.t()), w=nn.Parameter(torch.cat([torch.zeros(4, 3), torch.randn(4, 3)]))),
    'instance norm': lambda: nn.Sequential(conv(), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 2)),
    'functional norm': lambda: Forward(lambda m, x: m.b(F.batch_norm(m.a(x), m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias)), a=conv(), n=nn.BatchNorm2d(8), b=conv(8, 2)),
    'in place through a view of all': lambda: Forward(lambda m, x: m.b(m.a(x).flatten(2).relu_().unflatten(2, (8, 8))), a=conv(), b=conv(8, 2)),
    'an output in the middle': lambda: Forward(lambda m, x: (lambda y: [m.b(y), {'c': m.c(y)}])(m.a(x)), a=conv(), b=conv(8, 2), c=conv(8, 3)),
    'sigmoid, a constant': lambda: nn.Sequential(conv(), nn.Sigmoid(), conv(8, 2)),
    'shuffled groups': lambda: nn.Sequential(conv(), conv(8, 8, 1, groups=2), nn.ChannelShuffle(2), conv(8, 8, groups=8, bias=False), conv(8, 2, 1)),
}
KEPT = {
    'softmax over channels': lambda: nn.Sequential(conv(), nn.Softmax(1), conv(8, 2)),
    'constant that counts channels': lambda: Forward(lambda m, x: m.b(m.a(x) + torch.arange(8.).view(8, 1, 1)), a=conv(), b=conv(8, 2)),
    'write into a slice': lambda: Forward(written_slice, a=conv(), b=conv(8, 2)),
    'parts of an empty tensor': lambda: Forward(filled, a=conv(3, 4), c=conv(3, 4), b=conv(8, 2)),
    'GroupNorm': lambda: nn.Sequential(conv(), nn.GroupNorm(2, 8), conv(8, 2)),
    'LayerNorm': lambda: nn.Sequential(conv(), nn.LayerNorm([8, 8, 8]), conv(8, 2)),
    'a part by number': lambda: Forward(lambda m, x: m.b(m.a(x)[:, 1:7]), a=conv(), b=conv(6, 2)),
    'an operation nobody knows': lambda: Forward(lambda m, x: m.b(torch.cummax(m.a(x), 1)[0]), a=conv(), b=conv(8, 2)),
    'the output itself': lambda: nn.Sequential(conv()),
    'maximum over channels': lambda: Forward(lambda m, x: m.a(x).amax(1), a=conv()),
}


@pytest.mark.parametrize('name', CUT)
def test_what_can_go_goes(name):
    m = CUT[name]()
    halve(m[:-1] if isinstance(m, nn.Sequential) else m)
    check(m, image)


@pytest.mark.parametrize('name', KEPT)
def test_what_cannot_go_stays(name):
    m = KEPT[name]()
    halve(m[:-1] if isinstance(m, nn.Sequential) and len(m) > 1 else m)
    check(m, image, shrinks=False)


def test_sizes_in_the_code_leave_that_part_whole_and_name_it():
    m = Forward(lambda m, x: m.f(m.b(m.a(x)).view(-1, 4*64)), a=conv(3, 8), b=conv(8, 4), f=nn.Linear(256, 2))
    halve(nn.ModuleList([m.a, m.b]))
    c = check(m, image)
    assert c.shapes['a.weight'][0] == 4 and c.shapes['b.weight'][0] == 4
    assert any('b.weight' in n and 'fails' in n for n in c.notes), c.notes


def test_a_scale_that_depends_on_the_width_is_noticed():
    m = Forward(lambda m, x: (lambda q, k: (q@k.transpose(1, 2))*q.shape[-1]**-.5)(m.q(x), m.k(x)), q=nn.Linear(6, 8), k=nn.Linear(6, 8))
    c = check(halve(m), torch.randn(2, 5, 6), shrinks=False)
    assert any('q.weight' in n and 'differ' in n for n in c.notes), c.notes


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    m = stir(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4), nn.Flatten(), nn.Linear(256, 2))).to(dtype)
    halve(m[:4])
    assert next(check(m, image.to(dtype)).model.parameters()).dtype == dtype


def test_constant_channels_are_merged_with_padding():
    m = stir(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Hardswish(), conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2)))
    nn.init.uniform_(m[1].bias, .5, 1)
    nn.init.uniform_(m[4].bias, .5, 1)
    nn.init.constant_(m[1].running_mean, -.1)
    halve(m[:-1], norms=False)
    c = check(m, image)
    assert c.shapes['0.weight'][0] == 5 and c.shapes['3.weight'][:2] == (5, 5)


def test_a_layer_that_dies_altogether_keeps_one_channel():
    m = stir(nn.Sequential(conv(), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 2)))
    for p in m[2].parameters(): nn.init.zeros_(p)
    c = check(m, image)
    assert c.shapes['2.weight'] == (1, 1, 3, 3) and c.shapes['0.weight'][0] == 1


def test_tied_weights_are_cut_together():
    m = Forward(lambda m, x: m.c(m.a(x).relu() + m.b(x.flip(3)).relu()), a=conv(), b=conv(), c=conv(8, 2))
    m.b.weight = m.a.weight
    halve(nn.ModuleList([m.a, m.b]))
    c = check(m, image)
    assert c.model.a.weight is c.model.b.weight and c.model.b.out_channels == 4


def test_a_weight_that_is_used_for_two_things():
    m = Forward(lambda m, x: m.w@(m.w@x), w=nn.Parameter(torch.randn(8, 8)))
    with torch.no_grad(): m.w[:, :4] = 0
    check(m, torch.randn(8, 2), shrinks=False)


def test_channels_last_stays():
    m = halve(nn.Sequential(conv(), nn.ReLU(), conv(8, 8), conv(8, 8)).to(memory_format=torch.channels_last))
    c = check(Forward(lambda m, x: m.b(m.a(x)), a=m, b=conv(8, 2)), image)
    assert c.model.a[2].weight.is_contiguous(memory_format=torch.channels_last) and not c.model.a[2].weight.is_contiguous()


def keeps(m, x):
    m.feat = m.bn(m.c(x)).relu()
    return m.d(m.feat)


@pytest.mark.parametrize('run', [False, True])
@pytest.mark.parametrize('lock', [False, True])
def test_a_model_that_keeps_an_activation_or_a_lock(run, lock):
    m = Forward(keeps, c=conv(), bn=nn.BatchNorm2d(8), d=conv(8, 2))
    if lock: m.lock = threading.Lock()
    if run: m(image)
    kept = getattr(m, 'feat', None)
    halve(nn.ModuleList([m.c, m.bn]))
    c = check(m.eval(), image)
    assert c.shapes['c.weight'][0] == 4
    if run:
        small = compact(m, image).model
        assert small.feat is None and m.feat is not kept and m.feat.shape[1] == 8
        with torch.no_grad(): m(image)
        assert compact(m, image).model.feat is None


def test_a_hook_that_changes_an_output():
    m = nn.Sequential(conv(), nn.ReLU(), conv(8, 2))
    m[0].register_forward_hook(lambda m, a, o: o + 1)
    halve(m[:1])
    c = check(m, image)
    assert c.shapes['0.weight'][0] == 5 # constant channels, of which one stands for all


def test_attention_and_transformers():
    m = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False).eval()
    for layer in m.layers: halve(layer.linear1)
    c = check(m, torch.randn(2, 5, 16))
    assert c.shapes['layers.0.linear1.weight'] == (16, 16) and c.shapes['layers.1.linear2.weight'] == (16, 16)
    assert flow(m, torch.randn(2, 5, 16)).why('layers.0.norm1.weight').startswith('add in layers.0, beside numbers')


def test_recurrent_layers_are_pinned_and_what_is_around_them_is_cut():
    m = Forward(lambda m, x: m.b(m.l(m.c(m.a(x)))[0]), a=nn.Linear(6, 8), c=nn.Linear(8, 5), l=nn.LSTM(5, 8, batch_first=True), b=nn.Linear(8, 2))
    halve(m.a)
    c = check(m, torch.randn(2, 4, 6))
    assert c.shapes['a.weight'] == (4, 6) and c.shapes['l.weight_hh_l0'] == (32, 8)


def test_embeddings():
    m = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 2))
    with torch.no_grad(): m[0].weight[:, :4] = 0
    c = check(m, torch.randint(0, 10, (3, 5)))
    assert c.shapes == {'0.weight': (10, 4), '1.weight': (2, 4), '1.bias': (2,)} and c.model[0].embedding_dim == 4


def test_several_inputs_by_position_and_by_name():
    m = Forward(lambda m, x, y: (m.c(m.a(x).relu() + m.b(y).relu()), m.b(y).mean()), a=nn.Linear(4, 8), b=nn.Linear(3, 8), c=nn.Linear(8, 2))
    halve(nn.ModuleList([m.a, m.b]))
    check(m, (torch.randn(2, 4), torch.randn(2, 3)), shrinks=False) # the mean over channels needs them all

    class Named(nn.Module):
        def __init__(self): super().__init__(); self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 2)
        def forward(self, x, y): return {'out': self.c(self.a(x).relu()*y)}
    m = Named()
    halve(m.a)
    c = compact(m, {'x': torch.randn(2, 4), 'y': torch.randn(2, 1)})
    assert c.shapes['a.weight'] == (4, 4)


def test_the_result_trains_saves_copies_and_loads_into_a_new_model():
    build = lambda: nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, groups=8), conv(8, 4), nn.Flatten(), nn.Linear(256, 2))  # noqa: E731
    m = build()
    Sparsifier(m, 'filter', 'local').prune_model(50)
    halve(m[3])
    m[0].weight.requires_grad_(False)
    c = check(m.train(), image)
    small = c.model
    opt = torch.optim.SGD(small.parameters(), lr=.1)
    before = [p.detach().clone() for p in small.parameters()]
    small(image).square().sum().backward()
    opt.step()
    assert not small[0].weight.requires_grad and torch.equal(before[0], small[0].weight) and any(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
    f = io.BytesIO()
    torch.save({'shapes': c.shapes, 'model': small.state_dict()}, f)
    f.seek(0)
    saved = torch.load(f, weights_only=True)
    new = rebuild(build(), saved['shapes'])
    new.load_state_dict(saved['model'])
    assert torch.equal(new.eval()(image), small.eval()(image)) and torch.equal(copy.deepcopy(small)(image), small(image))
    exported = torch.export.export(small, (image,)).module()
    assert relative_difference(exported(image), small(image)) <= 1
    with pytest.raises(ValueError, match='another model'): rebuild(nn.Linear(2, 2), c.shapes)


def test_wrappers():
    m = nn.Sequential(conv(), nn.ReLU(), conv(8, 2))
    halve(m[:1])
    for wrapped in (nn.DataParallel(m), torch.compile(m)):
        c = compact(wrapped, image)
        assert type(c.model) is nn.Sequential and c.shapes['0.weight'][0] == 4 and equal(m, c.model, image)


def test_a_compiled_submodule():
    m = nn.Sequential(torch.compile(nn.Sequential(conv(), nn.ReLU())), conv(8, 2))
    halve(m[0])
    c = compact(m, image)
    assert c.shapes['1.weight'][1] == 4


def test_fastai_tensors_and_frozen_models():
    from fastai.vision.all import TensorImage
    m = nn.Sequential(conv(), nn.ReLU(), conv(8, 2)).requires_grad_(False)
    halve(m[:1])
    assert compact(m, TensorImage(image)).shapes['0.weight'][0] == 4


def test_random_state_and_gradients_are_left_alone():
    m = nn.Sequential(conv(), nn.Dropout(), conv(8, 2)).train()
    halve(m[:1])
    m(image).sum().backward()
    grads = [p.grad.clone() for p in m.parameters()]
    seed = torch.get_rng_state()
    compact(m, image)
    assert torch.equal(seed, torch.get_rng_state()) and all(torch.equal(p.grad, g) for p, g in zip(m.parameters(), grads, strict=True))
    assert all(k.training for k in m.modules()) and torch.is_grad_enabled()


def test_a_model_that_another_input_takes_another_way_is_refused():
    m = Forward(lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.b(m.a(x).sigmoid()), a=conv(), b=conv(8, 2))
    with pytest.raises(ValueError, match='depends on the input'): compact(m, image)


def test_bad_input():
    m = nn.Sequential(conv(), conv(8, 2))
    state = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match='no example_input'): compact(m, None)
    with pytest.raises(ValueError, match=r'fails on the example \(2×4×8×8\)'): compact(m, torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match='example is on meta'): compact(m, image.to('meta'))
    with pytest.raises(ValueError, match='scripted'): compact(torch.jit.script(m), image)
    with pytest.raises(ValueError, match='learn.model'): compact(type('Learner', (), {'model': m})(), image)
    nn.utils.prune.l1_unstructured(m[0], 'weight', .5)
    with pytest.raises(ValueError, match=r"torch.nn.utils.prune.remove\(model.0, 'weight'\)"): compact(m, image)
    nn.utils.prune.remove(m[0], 'weight')
    m[0].weight.data.copy_(state['0.weight'])
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        q = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    with pytest.raises(ValueError, match='quantized'): compact(q, torch.randn(2, 4))


def test_nothing_to_cut():
    m = nn.Sequential(conv(), nn.ReLU(), conv(8, 2))
    c = check(m, image, shrinks=False)
    assert c.macs[0] == c.macs[1] and c.model is not m and dead_classes(flow(m, image)) == set()


def test_the_report():
    m = stir(nn.Sequential(conv(), nn.ReLU(), conv(8, 8), nn.GroupNorm(2, 8), conv(8, 2)))
    halve(m[:3])
    c = check(m, image)
    assert [(t.name, t.before, t.after, t.zeros) for t in c.tensors] == [
        ('0.weight', (8, 3, 3, 3), (4, 3, 3, 3), 0), ('2.weight', (8, 8, 3, 3), (8, 4, 3, 3), 4), ('4.weight', (2, 8, 3, 3), (2, 8, 3, 3), 0)]
    assert 'native_group_norm in 3' in c.tensors[1].why and c.tensors[1].why in str(c) and '8×3×3×3' in c._repr_html_()
    assert c.to_dataframe().zeros.tolist() == [0, 4, 0] and 'times fewer' in str(c)


@pytest.mark.parametrize('name, kind', [('resnet18', 'filter'), ('mobilenet_v3_small', 'filter'), ('shufflenet_v2_x0_5', 'coupled'), ('regnet_y_400mf', 'coupled')])
def test_models(name, kind, size=32):
    import torchvision
    m = stir(getattr(torchvision.models, name)(weights=None))
    x = torch.randn(2, 3, size, size)
    if kind == 'filter': Sparsifier(m, 'filter', 'local').prune_model(50)
    else: zero_groups(m, x)
    c = check(m, x, shrinks=None)
    if kind == 'coupled': assert c.weights[1] < .5*c.weights[0]
    if (kind, name) == ('filter', 'mobilenet_v3_small'): return # constants of the running statistics are merged, which are others in training
    a, b = (copy.deepcopy(k).double().train() for k in (m, c.model))
    for k in (*a.modules(), *b.modules()):
        if isinstance(k, nn.Dropout): k.p = 0
    y = torch.randn(3, 3, size, size, dtype=torch.double)
    with torch.no_grad(): assert relative_difference(b(y), a(y)) <= 1 # as it trains, with the statistics of the batch


@torch.no_grad()
def zero_groups(m, x, percent=50):
    "Zero this share of the classes of each set of axes"
    sets, named = {}, dict(m.named_parameters())
    for items in flow(m, x).groups().values(): sets.setdefault(min((n, d) for n, d, _ in items), []).append(items)
    gone = {}
    for classes in sets.values():
        for items in classes[:len(classes)*percent//100]:
            for n, d, i in items: gone.setdefault((n, d), []).extend(i)
    for (n, d), i in gone.items():
        if n in named: named[n].index_fill_(d, torch.tensor(i), 0.)


# fastai

def learner(splitter=None):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD
    import fastai.callback.progress  # noqa: F401
    import fastsparse.learner  # noqa: F401
    data = [(torch.randn(3, 8, 8), torch.tensor(i % 2)) for i in range(32)]
    m = nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)))
    kw = {} if splitter is None else dict(splitter=splitter)
    return Learner(DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device='cpu'), halve(m[0]) and m, nn.CrossEntropyLoss(), opt_func=SGD, **kw)


def quiet_fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)


@pytest.mark.parametrize('fitted', [False, True])
def test_a_learner_goes_on_with_the_smaller_model(fitted):
    learn = learner(lambda m: [list(m[0].parameters()), list(m[1].parameters())])
    if fitted:
        learn.create_opt()
        learn.freeze()
    old = learn.model
    seeds = torch.get_rng_state(), learn.dls.train.rng.getstate()
    c = learn.compact()
    assert torch.equal(seeds[0], torch.get_rng_state()) and seeds[1] == learn.dls.train.rng.getstate()
    assert learn.model is c.model is not old and c.shapes['0.0.weight'] == (4, 3, 3, 3) and equal(old, c.model, image)
    if fitted: assert learn.opt.frozen_idx == 1 and len(learn.opt.param_lists) == 2 and not learn.model[0][0].weight.requires_grad
    before = copy.deepcopy(learn.model.state_dict())
    quiet_fit(learn)
    changed = {n for n, v in learn.model.state_dict().items() if not torch.equal(v, before[n])}
    assert '1.2.weight' in changed and ('0.0.weight' in changed) != fitted


def test_a_splitter_that_knows_the_old_parameters_is_refused():
    learn = learner()
    groups = [list(learn.model[0].parameters()), list(learn.model[1].parameters())]
    learn.splitter, old = lambda m: groups, learn.model
    with pytest.raises(ValueError, match='splitter'): learn.compact()
    assert learn.model is old


def test_heads_and_bodies_of_fastai():
    import torchvision
    from fastai.vision.learner import create_body, create_vision_model
    from fastai.vision.models.unet import DynamicUnet
    unet = stir(DynamicUnet(create_body(torchvision.models.resnet18(), n_in=3, pretrained=False), 2, (32, 32)))
    unet(torch.randn(1, 3, 32, 32)) # its hooks hold a graph now
    head = stir(create_vision_model(torchvision.models.resnet18, 5, pretrained=False))
    for m in (unet, head):
        x = torch.randn(1, 3, 32, 32)
        zero_groups(m, x)
        c = check(m, x)
        assert c.weights[1] < .3*c.weights[0] and not c.notes


def test_compact_of_a_learner_with_plain_loaders_takes_nothing_from_the_random_state():
    import random
    from fastai_helpers import fit, learner, loaders
    from fastsparse.callback import SparsifyCallback
    from fastsparse import learner as _ # noqa: F401 (learn.compact)
    learn = learner(dls=loaders(shuffle=True))
    fit(learn, 1, cbs=SparsifyCallback(50, 'filter', 'local', layers=torch.nn.Conv2d))
    before, states = learn.validate(), (torch.get_rng_state(), random.getstate(), learn.dls.train.rng.getstate())
    result = learn.compact()
    after = (torch.get_rng_state(), random.getstate(), learn.dls.train.rng.getstate())
    assert torch.equal(states[0], after[0]) and states[1:] == after[1:]
    assert sum(p.numel() for p in learn.model.parameters()) < 1000 and result.model is learn.model
    assert learn.validate()[0] == pytest.approx(before[0], rel=1e-4)


tokens = torch.randn(2, 5, 16)
HEADS = {
    'one Linear': lambda: Packed(), 'one Linear without bias': lambda: Packed(bias=False), 'by hand': lambda: Packed(attn=by_hand),
    'einsum': lambda: Packed(attn=einsum), 'causal by hand': lambda: Packed(attn=causal), 'samples and heads on one axis': lambda: Packed(attn=batches_of_heads),
    'three axes': lambda: Packed(attn=three_axes), 'linear attention': lambda: Packed(attn=linear_attention),
    'width found out': lambda: Packed(out='free'), 'width called dim': lambda: Packed(d=12, out='width'), 'dropout': lambda: Packed(drop=.5),
    'LayerNorm of queries': lambda: Packed(norm=nn.LayerNorm), 'RMSNorm of queries': lambda: Packed(norm=nn.RMSNorm), 'RMSNorm by hand': lambda: Packed(norm=RMS),
    'RMSNorm, all by hand': lambda: Packed(norm=RMS, attn=by_hand), 'three Linears': lambda: Separate(), 'three Linears by hand': lambda: Separate(attn=by_hand),
    'number of heads found out': lambda: Separate(count=False), 'rotary': lambda: Separate(count=False, turn=True), 'rotary by hand': lambda: Separate(turn=True, attn=by_hand),
    'causal': lambda: Separate(is_causal=True), 'another scale': lambda: Separate(scale=.3), 'BERT': lambda: Bert(),
    'width padded': lambda: Packed(attn=padded), 'a scale for each place': lambda: Scaled(), 'a scale for each place, by hand': lambda: Scaled(attn=by_hand),
    'operation by operation': lambda: Packed(attn=in_steps), 'Llama': lambda: Llama(), 'Llama by hand': lambda: Llama(attn=by_hand),
    'relative positions': lambda: Relative(),
}


@pytest.mark.parametrize('name', HEADS)
def test_heads_are_cut(name):
    m = HEADS[name]()
    x = torch.randn(2, 5, 12) if name == 'width called dim' else tokens
    behead(m, 1)
    c = check(m, x)
    lost = sum(4*layer.in_features + (0 if layer.bias is None else 4) for layer, *_ in m.rows()) + 4*x.shape[-1] + (9 if 'relative' in name else 0)
    assert c.weights[0] - c.weights[1] == lost and not c.notes, c
    c = check(behead(m, 3), x)
    assert c.weights[0] - c.weights[1] == 2*lost and not c.notes, c
    opt = torch.optim.SGD(c.model.train().parameters(), lr=.1)
    before = copy.deepcopy(c.model.state_dict())
    c.model(x).square().sum().backward()
    opt.step()
    assert not any(torch.equal(v, before[n]) for n, v in c.model.named_parameters() if v.dim() == 2)
    new = rebuild(HEADS[name](), c.shapes)
    new.load_state_dict(c.model.state_dict())
    assert torch.equal(new.eval()(x), c.model.eval()(x))


@pytest.mark.parametrize('attn, more', [(fused, {}), (by_hand, {}), (by_hand, {'turn': True}), (fused, {'repeat': False}), (fused, {'count': False})])
def test_a_group_of_queries_goes_with_its_keys_and_values(attn, more):
    m = Separate(heads=6, kv=3, attn=attn, **more)
    c = check(behead(m, 1), tokens)
    assert [c.shapes[f'{n}.weight'] for n in 'qkvo'] == [(16, 16), (8, 16), (8, 16), (16, 16)] and not c.notes
    c = check(behead(Llama(kv=2, attn=attn), 1), tokens)
    assert [c.shapes[f'{n}.weight'] for n in 'qkvo'] == [(8, 16), (4, 16), (4, 16), (16, 8)] and not c.notes
    m = Separate(heads=6, kv=3, attn=attn, **more)
    with torch.no_grad(): m.o.weight[:, :4] = 0 # one of the queries of a group
    check(m, tokens, shrinks=False)


def test_one_head_of_keys_for_all_queries():
    m = Separate(kv=1, repeat=False)
    with torch.no_grad(): m.o.weight[:, 4:8] = 0
    c = check(m, tokens)
    assert [c.shapes[f'{n}.weight'] for n in 'qkvo'] == [(12, 16), (4, 16), (4, 16), (16, 12)]
    for m in (Separate(kv=1), Separate(kv=1, attn=by_hand), Separate(kv=1, attn=by_hand, turn=True)):
        with torch.no_grad(): m.o.weight[:, 4:8] = 0
        check(m, tokens, shrinks=False)
        check(halve(m.v) and m, tokens, shrinks=None)


@pytest.mark.parametrize('attn', [fused, by_hand])
def test_what_makes_a_head_dead(attn):
    rows = lambda m: check(m, tokens, shrinks=None).shapes['q.weight'][0]  # noqa: E731
    zero = lambda m, *parts: [p[:4].zero_() for n in parts for p in getattr(m, n).parameters()]  # noqa: E731
    with torch.no_grad():
        m = Separate(attn=attn)
        zero(m, 'q', 'k')
        assert rows(m) == 16 # it puts out the mean of its values
        zero(m, 'v')
        assert rows(m) == 12
        m = Separate(attn=attn)
        zero(m, 'v')
        assert rows(m) == 12 # whatever its queries and keys are
        m.v.bias[1] = 1
        assert rows(m) == 16
        m.o.weight[:, :4] = 0
        assert rows(m) == 12 # whatever its values are
        m = Separate(attn=attn)
        for n in 'qkv': zero(m, n)
        m.q.weight[4:8, :], m.v.weight[8:11], m.v.bias[8:11] = 0, 0, 0 # a part of a head
        assert rows(m) == 12


@pytest.mark.parametrize('attn', [fused, by_hand])
@pytest.mark.parametrize('mask, cut', [(torch.randn(5, 5), True), (torch.randn(2, 1, 5, 5), True), (torch.randn(2, 4, 5, 5), False), (torch.randn(4, 1, 1), False)])
def test_masks(attn, mask, cut):
    c = check(behead(Separate(attn=attn), 1), (tokens, mask), shrinks=cut)
    assert cut or not c.notes


@pytest.mark.parametrize('make', [NanoGPT, lambda: Packed(out='input')])
def test_heads_of_a_forward_that_takes_their_width_from_the_input_stay_whole(make):
    m = nn.Sequential(behead(make(), 1), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    halve(m[1])
    c = check(m, tokens)
    assert c.shapes['1.weight'] == (4, 16) and c.weights[0] - c.weights[1] == 4*16 + 4 + 4*3
    assert any('Left whole: 0.' in n and 'fails' in n for n in c.notes) and not c.numbers


def test_heads_of_gpt2():
    m = GPT2()
    with torch.no_grad():
        for i in range(3): m.c_attn.weight[:, 16*i+4:16*i+8], m.c_attn.bias[16*i+4:16*i+8] = 0, 0
    c = check(m, tokens)
    assert c.shapes['c_attn.weight'] == (16, 36) and c.shapes['c_proj.weight'] == (12, 16) and not c.notes
    assert c.numbers['split_size'] == 12 and c.numbers['c_attn.nf'] == 36 and 'c_proj.nf' not in c.numbers


def test_heads_of_torch_stay_and_the_rest_is_cut():
    m = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False).eval()
    for layer in m.layers:
        halve(layer.linear1)
        with torch.no_grad(): layer.self_attn.in_proj_weight[32:40], layer.self_attn.in_proj_bias[32:40] = 0, 0
    c = check(m, tokens)
    assert c.shapes['layers.1.linear1.weight'] == (16, 16) and c.shapes['layers.1.self_attn.in_proj_weight'] == (48, 16)
    why = [t.why for t in c.tensors if 'in_proj' in t.name]
    assert why == [f'layers.{i}.self_attn is an nn.MultiheadAttention, whose heads are together as wide as its input' for i in range(2)]
    assert not c.notes
    m = nn.MultiheadAttention(16, 4, kdim=6, vdim=6, batch_first=True)
    with torch.no_grad(): m.v_proj_weight[:4], m.in_proj_bias[32:36] = 0, 0
    x = (tokens, torch.randn(2, 3, 6), torch.randn(2, 3, 6))
    assert compact(m, x).shapes['v_proj_weight'] == (16, 6) and 'is an nn.Multi' in flow(m, x).why('v_proj_weight')


@pytest.mark.parametrize('attn', [fused, by_hand])
def test_a_vision_transformer_loses_heads_in_each_block_and_is_rebuilt(attn):
    m, x = ViT(attn), torch.randn(2, 3, 8, 8)
    behead(m.blocks[0].attn, 0, 3)
    behead(m.blocks[1].attn, 2)
    for b in m.blocks: halve(b.mlp[0])
    c = check(m, x)
    a, b = c.model.blocks
    assert (a.attn.num_heads, a.attn.attn_dim, b.attn.num_heads, b.attn.attn_dim) == (2, 8, 3, 12)
    assert (a.attn.window_size, a.attn.head_dim, a.attn.dim, m.blocks[0].attn.num_heads) == (16, 4, 16, 4)
    assert c.shapes['blocks.0.attn.qkv.weight'] == (24, 16) and c.shapes['blocks.1.attn.proj.weight'] == (16, 12) and c.shapes['blocks.1.mlp.0.weight'] == (16, 16)
    assert 'blocks.0.attn.num_heads = 2' in str(c) and not c.notes
    f = io.BytesIO()
    torch.save({'shapes': c.shapes, 'model': c.model.state_dict()}, f)
    f.seek(0)
    saved = torch.load(f, weights_only=True)
    new = rebuild(ViT(attn), saved['shapes'])
    new.load_state_dict(saved['model'])
    assert torch.equal(new.eval()(x), c.model.eval()(x))
    with pytest.raises(ValueError, match="another model.*too many .'blocks.0.attn.heads'"): rebuild(ViT(attn), c.shapes | {'blocks.0.attn.heads': 2})
    again = compact(c.model, x)
    assert again.shapes == {n: s for n, s in c.shapes.items() if n not in c.numbers} and not again.numbers


def test_all_heads_but_one_and_a_head_of_which_all_is_zero():
    m = behead(Packed(), 0, 1, 2, 3)
    c = check(m, tokens)
    assert c.shapes['proj.weight'] == (16, 4) and c.model.num_heads == 1


def test_one_head_loses_values():
    m = Packed(d=4, heads=1)
    with torch.no_grad(): m.qkv.weight[8:10], m.qkv.bias[8:10] = 0, 0
    check(m, torch.randn(2, 5, 4), shrinks=False) # queries, keys and values are one tensor
    m = Separate(heads=1, count=False)
    with torch.no_grad(): m.v.weight[:2], m.v.bias[:2] = 0, 0
    run = lambda o, x: o.o(fused(*(t(x)[:, None] for t in (o.q, o.k, o.v)))[:, 0])  # noqa: E731
    assert check(Forward(run, q=m.q, k=m.k, v=m.v, o=m.o), tokens).shapes['o.weight'] == (16, 2)


def test_where_one_attention_stays_whole_the_others_lose_heads():
    m = nn.Sequential(*(behead(make(), 1) for make in (Packed, NanoGPT, Separate, lambda: Packed(out='input'), lambda: Packed(out='free'))))
    c = check(m, tokens)
    assert c.numbers == {'0.num_heads': 3, '0.attn_dim': 12, '2.n_heads': 3, '2.n_kv_heads': 3, '4.num_heads': 3} and len(c.notes) == 2
    new = rebuild(nn.Sequential(Packed(), NanoGPT(), Separate(), Packed(out='input'), Packed(out='free')), c.shapes)
    new.load_state_dict(c.model.state_dict())
    assert torch.equal(new(tokens), c.model(tokens))


def test_what_only_a_dead_head_reads_goes_after_it():
    m = nn.Sequential(nn.Linear(16, 16), Packed())
    with torch.no_grad():
        m[1].proj.weight[:, :4] = 0
        m[1].qkv.weight.view(3, 4, 4, 16)[:, 1:, :, 5] = 0
    c = check(m, tokens)
    assert c.shapes['0.weight'] == (15, 16) and c.shapes['1.qkv.weight'] == (36, 15) and c.numbers == {'1.num_heads': 3, '1.attn_dim': 12}

"Layers that leave zeros out: the same outputs, whatever the shape; and what stays dense, and why"
import copy
import importlib
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastsparse import Sparsifier, accelerate, has_pattern
from fastsparse.accelerate import CSR, SemiStructured, SparseConv, SparseLinear
from fastsparse.benchmark import multiply_adds, stored_bytes
from fastsparse.timing import Timing

module = importlib.import_module('fastsparse.accelerate') # the function has the same name


def emptied(layer, zeros=.9):
    with torch.no_grad():
        for m in layer.modules():
            if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)): m.weight[torch.rand_like(m.weight) < zeros] = 0
    return layer.eval()


def rows(result): return {l.name: l for l in result.layers}

def why(model, x=None, **kwargs): return {n: l.why for n,l in rows(accelerate(model, x, **{'gain': 0, 'seconds': 0, **kwargs})).items()}

def turned(result): return [l.name for l in result.layers if l.done]


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape and a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- the layers

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_convolution_is_the_same_for_any_shape(data):
    draw = lambda *values: data.draw(st.sampled_from(values))
    dims,groups,mode = draw(1, 2, 3),draw(1, 2, 3),draw('zeros', 'reflect', 'replicate', 'circular')
    make = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    kernel = tuple(draw(1, 2, 3) for _ in range(dims))
    padding = draw('same', 'valid', tuple(draw(0, 1, 2) for _ in range(dims)))
    stride = 1 if padding == 'same' else tuple(draw(1, 2, 3) for _ in range(dims))
    conv = make(groups*draw(1, 2), groups*draw(1, 3), kernel, stride, padding, tuple(draw(1, 2) for _ in range(dims)), groups, draw(True, False), mode)
    conv = emptied(conv, draw(0., .5, .9, 1.)).requires_grad_(False)
    if draw(True, False): conv.double()
    x = torch.randn(draw(0, 1, 3), conv.in_channels, *(draw(5, 6, 9) for _ in range(dims)), dtype=conv.weight.dtype)
    if dims == 2 and draw(True, False): x = x.to(memory_format=torch.channels_last)
    if draw(True, False): x = x[..., ::1].transpose(-1, -2).contiguous().transpose(-1, -2) if dims > 1 else x
    sparse = SparseConv(conv)
    if len(x): close(sparse(x[0]), conv(x[0]))
    out = sparse(x)
    if len(x) or mode == 'zeros': close(out, conv(x))
    assert out.is_contiguous() and len(sparse.values) == int(conv.weight.count_nonzero())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 5]), max_size=3), st.sampled_from([0., .9, 1.]), st.booleans(), st.booleans(), st.integers(1, 40), st.integers(1, 40))
def test_a_linear_is_the_same_for_any_shape(shape, zeros, bias, double, i, o):
    layer = emptied(nn.Linear(i, o, bias), zeros).requires_grad_(False)
    if double: layer.double()
    x = torch.randn(*shape, i, dtype=layer.weight.dtype)
    sparse = SparseLinear(layer)
    close(sparse(x), layer(x))
    assert sparse(x).is_contiguous()
    if len(shape) == 2: close(sparse(x.transpose(0, 1)), layer(x.transpose(0, 1)))


def test_a_wrong_input_is_refused_as_by_the_dense_layer():
    linear,conv = SparseLinear(nn.Linear(8, 4)),SparseConv(nn.Conv2d(4, 2, 3))
    for layer,x in [(linear, torch.randn(2, 4)), (linear, torch.randn(2, 16)), (conv, torch.randn(1, 5, 6, 6)), (conv, torch.randn(1, 3, 6, 6)),
                    (conv, torch.randn(1, 4, 2, 6)), (conv, torch.randn(4, 6)), (linear, torch.randn(2, 8).double())]:
        with pytest.raises(RuntimeError): layer(x)
    for x,said in [(torch.randn(1, 5, 6, 6), 'samples of 4 channels'), (torch.randn(4, 6), 'samples of 4'), (torch.randn(1, 4, 2, 6), 'does not fit')]:
        with pytest.raises(RuntimeError, match=said): conv(x)


def test_a_result_can_be_viewed_and_written_into():
    net = accelerate(emptied(nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 4))), torch.randn(3, 8), gain=0, seconds=0).model
    assert net(torch.randn(5, 8)).view(-1).shape == (20,)


def test_it_is_for_inference():
    layer = SparseLinear(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match='for inference'): layer(torch.randn(2, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match='KeepSparsityCallback'): layer.train()(torch.randn(2, 4))
    layer.eval()
    with torch.no_grad(): layer(torch.randn(2, 4, requires_grad=True))


def test_autocast_is_left_out():
    layer = emptied(nn.Linear(8, 4))
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        out = SparseLinear(layer)(torch.randn(3, 8).bfloat16())
    assert out.dtype == torch.float32


def test_subclasses_of_tensors_go_through():
    from fastai.torch_core import TensorImage
    net = emptied(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))).requires_grad_(False)
    x = torch.randn(2, 3, 6, 6)
    fast = accelerate(net, TensorImage(x), gain=0, seconds=0)
    assert turned(fast) == ['0', '2']
    close(fast.model(TensorImage(x)).as_subclass(torch.Tensor), net(x))


# -- the model

class Branches(nn.Module):
    "A layer that is used twice, two that have one weight, and one that a plain list holds too"
    def __init__(self):
        super().__init__()
        self.stem,self.twice = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 8, 3, padding=1)
        self.again,self.a,self.b = self.twice,nn.Linear(8, 8, bias=False),nn.Linear(8, 8)
        self.b.weight = self.a.weight
    def forward(self, x):
        x = self.again(self.twice(self.stem(x).relu()).relu()).mean((2, 3))
        return self.b(self.a(x))


def test_the_model_is_as_it_was_and_the_copy_is_right_for_other_sizes():
    net = emptied(Branches()).train()
    state,kinds = copy.deepcopy(net.state_dict()),[type(m) for m in net.modules()]
    result = accelerate(net, torch.randn(2, 3, 6, 6), gain=0, seconds=0)
    assert net.training and not result.model.training and [type(m) for m in net.modules()] == kinds
    assert all(torch.equal(a, b) for a,b in zip(state.values(), net.state_dict().values())) and all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks for m in [*net.modules(), *result.model.modules()])
    theirs = {t.data_ptr() for t in net.state_dict().values()}
    assert not theirs & {t.data_ptr() for t in result.model.state_dict().values() if t.numel()}
    net.eval()
    with torch.no_grad():
        for shape in [(1, 3, 6, 6), (5, 3, 9, 7)]: close(result.model(x := torch.randn(shape)), net(x))


def test_what_is_shared_is_turned_once():
    net = emptied(Branches())
    result = accelerate(net, torch.randn(2, 3, 6, 6), gain=0, seconds=0)
    fast = result.model
    assert turned(result) == ['stem', 'twice', 'a', 'b'] and fast.again is fast.twice and isinstance(fast.twice, SparseConv)
    assert fast.a.values is fast.b.values and fast.a.bias is None and fast.b.bias is not None
    assert len(result.layers) == 4


def test_copies_pickles_files_and_moves():
    net = emptied(Branches())
    x = torch.randn(2, 3, 6, 6)
    fast = accelerate(net, x, gain=0, seconds=0).model
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    loaded = copy.deepcopy(fast)
    for b in loaded.buffers(): b.zero_()
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), loaded, copy.deepcopy(fast).to('cpu')): assert torch.equal(other(x), fast(x))
    close(copy.deepcopy(fast).double()(x.double()).float(), fast(x))
    assert all(t.layout == torch.strided for t in fast.state_dict().values()) and fast.stem.starts.dtype == torch.int32
    assert fast.stem.weight.layout == torch.sparse_csr and 'weights' in repr(fast.stem)


def test_only_what_is_faster_by_a_tenth_is_turned_over(monkeypatch):
    times = iter([(1., 1/1.2), (1., 1/1.05), (1., 2.), (1., .1)])
    def clock(calls, *args, **kwargs): return [Timing((t,)*5) for t in next(times)]
    monkeypatch.setattr(module, 'take_turns', clock)
    net = emptied(nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]))
    result = accelerate(net, torch.randn(2, 8))
    assert turned(result) == ['0', '3']
    found = rows(result)
    assert found['1'].why == 'faster by less than 1.1 times' and found['2'].why == 'not faster' and found['0'].why == ''
    assert '1.20×' in str(result) and '0.50×' in result._repr_html_() and list(result.to_dataframe().done) == ['CSR', '', '', 'CSR']


def test_nothing_turned_over_is_said():
    result = accelerate(nn.Sequential(nn.Linear(4, 4)), torch.randn(1, 4))
    assert result.timings is None and 'No layer was turned over.' in str(result) and rows(result)['0'].why == 'fewer than 50 % zeros'


def test_a_layer_with_other_outputs_is_turned_back(monkeypatch):
    product = SparseLinear._product
    monkeypatch.setattr(SparseLinear, '_product', lambda self, x: product(self, x) + (self.out_features == 5))
    net = emptied(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 4)), .6)
    result = accelerate(net, x := torch.randn(2, 8), gain=0, seconds=0)
    assert turned(result) == ['0', '2'] and rows(result)['1'].why == 'its outputs would differ'
    with torch.no_grad(): close(result.model(x), net(x))


class Peeks(nn.Module):
    "Wants the dense weight of one of its layers"
    def __init__(self): super().__init__(); self.a,self.b,self.c = (nn.Linear(8, 8) for _ in range(3))
    def forward(self, x): return self.c(self.b(self.a(x))) + self.b.weight.reshape(-1)[:8]


def test_a_layer_whose_weight_is_wanted_is_turned_back():
    net = emptied(Peeks())
    result = accelerate(net, x := torch.randn(2, 8), gain=0, seconds=0)
    assert turned(result) == ['a', 'c'] and rows(result)['b'].why.startswith('with it the model fails')
    with torch.no_grad(): close(result.model(x), net(x))


# -- what stays dense

class Mine(nn.Linear):
    def forward(self, x): return super().forward(x).relu()


def test_reasons():
    hooked,patched = nn.Linear(8, 8),nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    patched.forward = lambda x: x
    layers = dict(few=nn.Linear(8, 8), hooked=hooked, patched=patched, mine=Mine(8, 8), computed=parametrizations.weight_norm(nn.Linear(8, 8)),
                  up=nn.ConvTranspose1d(8, 8, 1), idle=nn.Linear(8, 8), good=nn.Linear(8, 8))
    class Net(nn.ModuleDict):
        def forward(self, x):
            for n,m in self.items():
                if n != 'idle': x = m(x) if n != 'up' else m(x.t()[None])[0].t()
            return x
    net = emptied(Net(layers))
    nn.init.ones_(net['few'].weight)
    found = why(net, torch.randn(3, 8))
    assert found == dict(few='fewer than 50 % zeros', hooked='it has hooks', patched='it has a forward of its own', mine='it has a forward of its own',
                         computed='its weight is computed', up='CSR is for Linear, Conv1d, Conv2d, Conv3d', idle='the example does not call it', good='')


def test_attention_that_reads_weights_by_itself_is_left_alone():
    net = emptied(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)).eval()
    found = why(net, torch.randn(2, 5, 16))
    assert {v for k,v in found.items() if 'linear' in k} == {'TransformerEncoderLayer reads its weight by itself'}
    assert all(found.values())


def test_dtypes_that_torch_cannot_multiply():
    for dtype in (torch.bfloat16, torch.float16):
        net = emptied(nn.Sequential(nn.Linear(8, 8))).to(dtype)
        assert 'torch multiplies CSR in float32' in why(net, torch.randn(2, 8).to(dtype))['0']
    assert why(emptied(nn.Sequential(nn.Linear(8, 8))).double(), torch.randn(2, 8).double()) == {'0': ''}


def test_a_single_layer_and_wrappers():
    layer = emptied(nn.Linear(8, 8))
    assert isinstance(accelerate(layer, torch.randn(2, 8), gain=0, seconds=0).model, SparseLinear)
    assert turned(accelerate(nn.DataParallel(layer), torch.randn(2, 8), gain=0, seconds=0)) == ['']


def test_inputs_of_every_kind():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = nn.Linear(8, 8),nn.Linear(8, 8)
        def forward(self, x, y): return self.a(input=x) + self.b(y)
    net = emptied(Two())
    x,y = torch.randn(2, 2, 8)
    for example in [(x, y), dict(x=x, y=y)]: assert turned(accelerate(net, example, gain=0, seconds=0)) == ['a', 'b']


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match='not a PyTorch module'): accelerate('model')
    with pytest.raises(ValueError, match='meta'): accelerate(nn.Linear(4, 4, device='meta'))


def test_nothing_to_time_it_on():
    result = accelerate(emptied(nn.Linear(8, 8)))
    assert not turned(result) and result.layers[0].why == 'there is nothing to time it on' and 'pass example_input' in str(result)


def test_no_warning_of_torch_comes_through(recwarn):
    accelerate(emptied(nn.Linear(8, 8)), torch.randn(2, 8), gain=0, seconds=0)
    assert not [w for w in recwarn if 'beta' in str(w.message)]


# -- 2:4, with a GPU that is not there

def semi(o=32, i=64, dtype=torch.float16):
    layer = nn.Linear(i, o)
    Sparsifier(layer, '2:4').prune_model(50)
    return layer.to(dtype)

A100,RTX,H100,OLD = (8, 0),(8, 6),(9, 0),(7, 5)

@pytest.mark.parametrize('layer,capability,cusparselt,reason', [
    (semi(), A100, True, None), (semi(), H100, True, None), (semi(), RTX, False, None), (semi(dtype=torch.bfloat16), A100, False, None),
    (semi(16, 16), A100, True, None), (semi(16, 16), A100, False, 'multiples of 32 and 64'), (semi(24, 64), A100, True, 'multiples of 16 and 16'),
    (semi(32, 40), A100, True, 'multiples of 16 and 16'),
    (semi(), OLD, True, '8.0 or newer, and it has 7.5'), (semi(), None, True, '8.0 or newer, and none is here'), (semi(), H100, False, 'without cuSPARSELt'),
    (semi(dtype=torch.float32), A100, True, 'float32: 2:4 needs half precision'), (nn.Linear(64, 32).half(), A100, True, 'does not hold 2:4'),
    (nn.Linear(62, 32).half(), A100, True, 'does not hold 2:4')])
def test_what_a_gpu_can_take(layer, capability, cusparselt, reason):
    found = SemiStructured(capability, cusparselt).why_not(layer)
    assert found is None if reason is None else reason in found


@pytest.fixture
def gpu(monkeypatch):
    "The kernels of CUTLASS on a CPU: torch packs there, and the product is that of the dense weight"
    cls = torch.sparse.SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(cls, '_validate_device_dim_dtype_shape', classmethod(lambda cls, t: None))
    def product(self, b, *, bias=None, should_transpose_dense=False, **kwargs):
        return (b if should_transpose_dense else b.t()) @ cls.to_dense(self).t() + (0 if bias is None else bias)
    monkeypatch.setattr(cls, '_mm', product)
    return SemiStructured(A100, False)


@pytest.mark.filterwarnings('ignore:.*SparseSemiStructured')
def test_a_model_on_a_gpu(gpu):
    net = nn.Sequential(semi(64, 64), nn.ReLU(), nn.Linear(64, 64).half(), semi(32, 64), nn.Conv1d(4, 4, 1).half()).eval()
    net[4].forward = lambda x: x
    x = torch.randn(4, 64).half()
    result = accelerate(net, x, engine=gpu, gain=0, seconds=0)
    assert turned(result) == ['0', '3'] and rows(result)['2'].why == 'it does not hold 2:4' and rows(result)['4'].why == '2:4 is for Linear'
    assert isinstance(result.model[0].weight, torch.sparse.SparseSemiStructuredTensorCUTLASS) and has_pattern(net[0], '2:4')
    with torch.no_grad(): close(result.model(x), net(x), 1e-2)
    assert '2:4' in str(result) and result.timings is not None
    with pytest.raises(RuntimeError, match='for inference'): result.model[0].train()(x)
    fast,wide = result.model.eval(),x[:, None].expand(4, 3, 64).transpose(0, 1) # which has no view as a matrix
    with torch.no_grad(): close(fast(wide), net(wide), 1e-2)
    assert multiply_adds(fast, x) == multiply_adds(net, x) - 4*64*64//2 - 4*32*64//2
    assert stored_bytes(fast) < stored_bytes(net) and '2:4' in repr(result)


@pytest.mark.filterwarnings('ignore:.*SparseSemiStructured')
def test_a_gpu_needs_no_example(gpu):
    result = accelerate(nn.Sequential(semi()), engine=gpu, gain=0, seconds=0)
    assert turned(result) == ['0'] and '128 random rows' in str(result) and result.timings is None


def test_where_there_is_no_gpu_it_is_said():
    told = str(accelerate(nn.Sequential(semi(dtype=torch.float32)), torch.randn(2, 64)))
    if not torch.cuda.is_available(): assert 'Layers that hold 2:4: 1.' in told and 'here is none: accelerate(model.half().cuda()' in told
    assert SemiStructured.here().capability is None or torch.cuda.is_available()


def test_engines_are_values():
    assert CSR() == CSR(50) and CSR(95).why_not(emptied(nn.Linear(50, 50), .9)) == 'fewer than 95 % zeros'
    layer = nn.Linear(4, 4)
    assert F.linear(torch.ones(4), CSR().make(emptied(layer)).weight).shape == (4,)

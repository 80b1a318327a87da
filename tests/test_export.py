"Export: equal outputs, zeros at their places, and nothing written where that is not so"
import copy
import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fastai.torch_core import TensorImage
from fastai.vision.models.unet import DynamicUnet
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import QuantType
from torch import nn
from torchvision.models import resnet18

import fastsparse.export
import fastsparse.learner  # noqa: F401 (learn.export_onnx)
from core_helpers import small_net
from fastai_helpers import BATCHES, On, fit, learner, net, percent, quiet, samples, throw
from fastsparse import OnnxModel, SparseLinear, Sparsifier, compact, export_onnx, fake_int8, quantize_onnx
from fastsparse.callback import KeepSparsityCallback, SparsifyCallback
from fastsparse.export import _rounded_input, _rounded_weight
from fastsparse.flow import flow

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')


def stirred(model, seed=0):
    "Norms that make a difference"
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.weight, .5, 1.5); nn.init.normal_(m.bias); nn.init.normal_(m.running_mean); nn.init.uniform_(m.running_var, .5, 2)
    return model.eval()


def initialisers(path): return {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(str(path)).graph.initializer}


def outputs(path, *inputs):
    "What a plain session returns, as a list"
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs)})


def matrices(model): return {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}


# -- equal outputs, zeros kept

def by_weight(m, x): Sparsifier(m, method='local').prune_model(80)
def by_filter(m, x): Sparsifier(m, 'filter', 'local', exclude=nn.Linear).prune_model(50)
def by_pattern(m, x): Sparsifier(m, '2:4', 'local', layers=['3', '8']).prune_model(50)
def by_channel(m, x): Sparsifier(m, 'coupled', 'local', example_input=x).prune_model(50)


@pytest.mark.parametrize('smaller', [False, True], ids=['masked', 'compacted'])
@pytest.mark.parametrize('prune', [by_weight, by_filter, by_pattern, by_channel])
def test_outputs_and_zeros_of_a_convolutional_net(prune, smaller, tmp_path):
    m, x = stirred(small_net()), torch.randn(2, 3, 12, 12)
    prune(m, x)
    if smaller: m = compact(m, x).model.eval()
    file = export_onnx(m, x, tmp_path/'m.onnx')
    there = initialisers(file.path)
    for n, w in matrices(m).items():
        zero = (w == 0).numpy()
        assert not there[n][zero].any() # BatchNorm is folded in: other numbers, zeros at the same places
        assert file.zeros.get(n, (0, 0)) == (zero.sum(), zero.sum())
    for b in (1, 2, 7):
        some = torch.randn(b, 3, 12, 12)
        np.testing.assert_allclose(outputs(file.path, some)[0], m(some).detach().numpy(), atol=1e-5)
    assert file.bytes == file.path.stat().st_size and file.difference < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ['m.onnx']


class Attends(nn.Module):
    def __init__(self): super().__init__(); self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    def forward(self, x): return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind): super().__init__(); self.rnn = kind(8, 6, batch_first=True)
    def forward(self, x): return self.rnn(x)[0]


class Tied(nn.Module):
    def __init__(self): super().__init__(); self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False); self.head.weight = self.embed.weight
    def forward(self, x): return self.head(self.embed(x))


tokens, words = torch.randn(2, 5, 8), torch.randint(0, 20, (2, 4))
LAYERS = {
    'Linear, two axes': (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(3, 8)),
    'Linear, three axes': (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), tokens), # square, transposed and renamed
    'Linear and BatchNorm': (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), torch.randn(3, 8)),
    'Conv1d': (lambda: nn.Sequential(nn.Conv1d(5, 6, 3), nn.BatchNorm1d(6)), tokens),
    'ConvTranspose2d': (lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6)), torch.randn(2, 3, 8, 8)),
    'grouped': (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), torch.randn(2, 4, 8, 8)),
    'TransformerEncoderLayer': (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), tokens),
    'MultiheadAttention': (Attends, tokens),
    'Embedding': (lambda: nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 20)), words),
    'tied': (Tied, words),
}


@pytest.mark.parametrize('name', LAYERS)
def test_zeros_of_renamed_and_transposed_tensors_are_found(name, tmp_path):
    make, x = LAYERS[name]
    m = stirred(make())
    with torch.no_grad():
        for w in matrices(m).values(): w[torch.rand(w.shape) < .6] = 0
    file = export_onnx(m, x, tmp_path/'m.onnx')
    assert file.zeros == {n: (z, z) for n, w in matrices(m).items() if (z := int((w == 0).sum()))}
    there = sorted(int((a == 0).sum()) for a in initialisers(file.path).values() if a.ndim > 1)
    assert there == sorted([z for z, _ in file.zeros.values()]*(2 if name == 'tied' else 1)) # a tied one is written twice
    np.testing.assert_allclose(outputs(file.path, x)[0], m(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU])
def test_gates_that_are_reordered_are_found(kind, tmp_path):
    m = Recurrent(kind).eval()
    with torch.no_grad():
        for w in matrices(m).values(): w[torch.rand(w.shape) < .6] = 0
    file = export_onnx(m, tokens, tmp_path/'m.onnx')
    np.testing.assert_allclose(outputs(file.path, tokens)[0], m(tokens).detach().numpy(), atol=1e-5)
    assert file.zeros == {n: (z, z) for n, w in matrices(m).items() if (z := int((w == 0).sum()))}
    assert len(file.zeros) == 2 and not any(tuple(w.shape) == a.shape for w in matrices(m).values() for a in initialisers(file.path).values())


def test_resnet(tmp_path):
    m = stirred(resnet18())
    Sparsifier(m).prune_model(90)
    x = torch.randn(1, 3, 64, 64)
    file = export_onnx(m, x, tmp_path/'m.onnx')
    assert sum(z for z, _ in file.zeros.values()) == sum(int((p == 0).sum()) for p in matrices(m).values())
    assert list(file.inputs) == ['x'] and isinstance(file.inputs['x'][0], str) # the example has one picture, the file takes any number
    assert 'takes x any×3×64×64' in str(file)


# -- inputs

class Two(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)
    def forward(self, picture, table=None, scale=1.): return dict(sum=self.a(picture)*scale + self.b(table), again=[picture*2])


class Many(Two):
    def forward(self, *xs): return super().forward(*xs)['sum']


class Nested(Two):
    def forward(self, batch): return super().forward(batch['picture'], batch['rest'][0])['sum']


a, b = torch.randn(2, 3), torch.randn(2, 5)
INPUTS = {'tuple': (Two, (a, b)), 'number': (Two, (a, b, 2.)), 'dict by keyword': (Two, dict(table=b, picture=a)), 'dict with a number': (Two, dict(table=b, picture=a, scale=3.)),
          'varargs': (Many, (a, b)), 'dict as the argument': (Nested, dict(picture=a, rest=[b]))}


@pytest.mark.parametrize('name', INPUTS)
def test_inputs_of_every_form(name, tmp_path):
    from fastsparse.watch import call, tensors_in
    kind, x = INPUTS[name]
    m = kind().eval()
    file = export_onnx(m, x, tmp_path/'m.onnx')
    assert sorted(s[1] for s in file.inputs.values()) == [3, 5]
    for out, ref in zip(tensors_in(call(OnnxModel(file.path), x)), tensors_in(call(m, x)), strict=True): torch.testing.assert_close(out, ref)


def test_an_input_that_is_returned_as_it_is(tmp_path):
    class Returns(nn.Linear):
        def forward(self, x, y): return super().forward(x), y
    export_onnx(Returns(3, 2), (a, b), tmp_path/'m.onnx')
    assert torch.equal(OnnxModel(tmp_path/'m.onnx')(a, b)[1], b)


def test_wrong_number_of_inputs(tmp_path):
    export_onnx(Two(), (a, b), tmp_path/'m.onnx')
    with pytest.raises(ValueError, match='takes picture, table; 1 tensors were given'): OnnxModel(tmp_path/'m.onnx')(a)


def test_subclasses_of_tensors(tmp_path):
    x = TensorImage(torch.randn(2, 3, 12, 12))
    m = small_net().eval()
    export_onnx(m, x, tmp_path/'m.onnx')
    torch.testing.assert_close(OnnxModel(tmp_path/'m.onnx')(x), m(x.as_subclass(torch.Tensor)).detach(), atol=1e-5, rtol=0)


def test_the_learner_exports_and_validates_the_file(tmp_path):
    learn = learner()
    fit(learn, 2, cbs=SparsifyCallback(80))
    with quiet(learn): before = learn.validate()
    file = learn.export_onnx(tmp_path/'m.onnx')
    learn.model = OnnxModel(file.path)
    with quiet(learn): after = learn.validate()
    assert list(before) == pytest.approx(list(after), abs=1e-5)
    assert sum(z for z, _ in file.zeros.values()) > 0 and len(learn.get_preds()[0]) == 32


# -- sizes

def test_sizes_are_free_or_fixed_as_asked(tmp_path):
    m = small_net().eval()
    x = torch.randn(2, 3, 12, 12)
    assert export_onnx(m, x, tmp_path/'m.onnx', dynamic_axes=()).inputs['input'] == (2, 3, 12, 12)
    free = export_onnx(m, x, tmp_path/'m.onnx', dynamic_axes=(0, 2, 3))
    assert [isinstance(s, str) for s in free.inputs['input']] == [True, False, True, True]
    some = torch.randn(5, 3, 20, 16)
    np.testing.assert_allclose(outputs(free.path, some)[0], m(some).detach().numpy(), atol=1e-5)


def test_a_model_that_takes_one_size_only(tmp_path):
    m, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0), nn.Unflatten(0, (2, 144))), torch.randn(2, 3, 8, 8)
    export_onnx(m, x, tmp_path/'m.onnx')
    np.testing.assert_allclose(outputs(tmp_path/'m.onnx', x)[0], m(x).detach().numpy(), atol=1e-5)


class Unrolled(nn.Linear):
    def forward(self, x): return torch.stack([super(Unrolled, self).forward(x[i]) for i in range(len(x))])


def test_a_batch_that_the_exporter_fixes_is_seen(tmp_path):
    with pytest.raises(ValueError, match=r'onnxruntime fails for inputs of \S+, which the model takes.*dynamic_axes=\(\)'):
        export_onnx(Unrolled(3, 2), torch.randn(2, 3), tmp_path/'m.onnx')
    assert not list(tmp_path.iterdir())
    export_onnx(Unrolled(3, 2), torch.randn(2, 3), tmp_path/'m.onnx', dynamic_axes=())


# -- the model as it was

class Busy(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.drop, self.kept, self.log = nn.Conv2d(3, 4, 3), nn.Dropout(.5), None, []
    def forward(self, x): self.kept = self.conv(x); self.log.append(1); return self.drop(self.kept).mean((2, 3))


def test_the_model_is_as_it_was(tmp_path):
    m = nn.Sequential(Busy(), nn.BatchNorm1d(4)).train()
    m[1].eval()
    before, state = {k: v.clone() for k, v in m.state_dict().items()}, torch.random.get_rng_state()
    parameters = [id(p) for p in m.parameters()]
    export_onnx(m, torch.randn(4, 3, 8, 8), tmp_path/'m.onnx')
    torch.random.set_rng_state(state) # of the example
    assert m.training and m[0].drop.training and not m[1].training and m[0].kept is None and m[0].log == []
    assert [id(p) for p in m.parameters()] == parameters and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


@pytest.mark.parametrize('make', [lambda m: nn.DataParallel(m), lambda m: torch.compile(m)], ids=['DataParallel', 'compile'])
def test_wrappers_are_unwrapped(make, tmp_path):
    m = small_net()
    file = export_onnx(make(m), torch.randn(2, 3, 12, 12), tmp_path/'m.onnx')
    assert '0.weight' in initialisers(file.path)


# -- what is refused, and leaves nothing behind

class Noisy(nn.Linear):
    def forward(self, x): return nn.functional.linear(x, self.weight.detach() + 1e-9, self.bias)


class Decides(nn.Linear):
    def forward(self, x): return super().forward(x if x.sum() > 0 else -x)


class Stretched(nn.Linear):
    "Half of its weight is dense in another order, so that it cannot be found"
    def forward(self, x): return nn.functional.linear(x, (self.weight.detach()*2)[:, :4], self.bias)


def zeroed(m):
    with torch.no_grad(): m.weight[:2] = 0
    return m


@pytest.mark.parametrize('shape', [(2, 8), (2, 3, 8)]) # under its name or transposed under another
def test_lost_zeros_are_refused_and_the_old_file_stays(shape, tmp_path):
    (tmp_path/'m.onnx').write_text('old')
    with pytest.raises(ValueError, match="only 0 of the 16 zeros of 'weight'"): export_onnx(zeroed(Noisy(8, 4)), torch.randn(shape), tmp_path/'m.onnx')
    assert (tmp_path/'m.onnx').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_what_was_taken_apart_is_named(tmp_path):
    file = export_onnx(zeroed(Stretched(8, 4)), torch.randn(2, 4), tmp_path/'m.onnx')
    assert file.zeros == {'weight': (16, None)} and 'not compared: weight' in str(file)


def fails(match, model, x, path, error=ValueError, **kwargs):
    before = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else None
    with pytest.raises(error, match=match): export_onnx(model, x, path, **kwargs)
    if before is not None: assert sorted(p.name for p in path.parent.iterdir()) == before


def test_what_torch_cannot_export(tmp_path): fails('torch cannot export this model: .*data-dependent', Decides(3, 2), a, tmp_path/'m.onnx')
def test_an_engine_that_cannot_run_it(tmp_path): fails('model.float', small_net().bfloat16(), torch.randn(2, 3, 12, 12).bfloat16(), tmp_path/'m.onnx')
def test_a_learner_is_no_model(tmp_path): fails('did you mean learn.model', learner(), a, tmp_path/'m.onnx')
def test_what_is_made_for_one_machine(tmp_path):
    model = small_net()
    fails('made by accelerate', nn.Sequential(*model[:-1], SparseLinear(model[-1])).eval(), a, tmp_path/'m.onnx')


def test_a_unet_and_what_its_hooks_hold(tmp_path):
    model = DynamicUnet(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()), 2, (16, 16)).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(): model(x)
    stored = [h.stored for h in model.sfs]
    assert export_onnx(model, x, tmp_path/'m.onnx').difference < 1e-4
    assert all(h.stored is s for h, s in zip(model.sfs, stored, strict=True)) and copy.deepcopy(model)(x).shape == (2, 2, 16, 16)


def test_no_example(tmp_path): fails('no example_input', small_net(), None, tmp_path/'m.onnx')
def test_no_folder(tmp_path): fails('is not a folder', Two(), (a, b), tmp_path/'none'/'m.onnx', FileNotFoundError)


def test_too_large(tmp_path):
    with pytest.raises(ValueError, match='external_data=True'): fastsparse.export._check_size(small_net(), 100)


def test_other_outputs_are_refused(tmp_path, monkeypatch):
    right = OnnxModel.forward
    monkeypatch.setattr(OnnxModel, 'forward', lambda self, x: right(self, x) + 1e-2)
    fails('other outputs than the model', small_net(), torch.randn(2, 3, 12, 12), tmp_path/'m.onnx')


def test_other_outputs_of_another_batch_are_refused(tmp_path, monkeypatch):
    right = OnnxModel.forward
    monkeypatch.setattr(OnnxModel, 'forward', lambda self, x: right(self, x) + (1e-2 if len(x) == 3 else 0))
    fails('for inputs of 3×3×12×12', small_net(), torch.randn(2, 3, 12, 12), tmp_path/'m.onnx')


@pytest.mark.parametrize('missing', ['onnx', 'onnxruntime', 'onnxscript'])
def test_the_extra_is_named(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    fails(rf"{missing}.*pip install 'fastsparse\[export\]'", Two(), (a, b), tmp_path/'m.onnx', ImportError)
    with pytest.raises(ImportError, match=r'fastsparse\[export\]'): OnnxModel(tmp_path/'m.onnx')


# -- int8

pictures = [torch.randn(16, 3, 12, 12) for _ in range(2)]


def pruned(model=None):
    m = stirred(model or small_net())
    Sparsifier(m, method='local').prune_model(80)
    return m


@pytest.mark.parametrize('settings', [{}, dict(per_channel=False), dict(reduce_range=True), dict(weight_type=QuantType.QUInt8), dict(weight_type=QuantType.QUInt8, per_channel=False),
                                      dict(activation_type=QuantType.QInt8)], ids=str)
def test_int8_keeps_zeros(settings, tmp_path):
    m = pruned()
    export_onnx(m, pictures[0][:2], tmp_path/'m.onnx')
    file = quantize_onnx(tmp_path/'m.onnx', tmp_path/'q.onnx', pictures, **settings)
    there = initialisers(file.path)
    for n, w in matrices(m).items():
        q, point = there[f'{n}_quantized'], there[f'{n}_zero_point']
        assert q.dtype == (np.uint8 if 'weight_type' in settings else np.int8) and point.size == (1 if settings.get('per_channel') is False else len(w))
        away = q.astype(int) - point.astype(int).reshape([-1] + [1]*(w.dim()-1) if point.ndim else ())
        assert not away[(w == 0).numpy()].any() and away.any()
        assert file.zeros[n] == (int((w == 0).sum()),)*2
    assert file.agreement > 80 and 0 < file.difference < 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['m.onnx', 'q.onnx']
    assert len(OnnxModel(file.path)(torch.randn(3, 3, 12, 12))) == 3


@pytest.mark.parametrize('name', ['Linear, three axes', 'ConvTranspose2d', 'grouped', 'TransformerEncoderLayer'])
def test_int8_keeps_zeros_of_other_layers(name, tmp_path):
    make, x = LAYERS[name]
    m = stirred(make())
    with torch.no_grad():
        for w in matrices(m).values(): w[torch.rand(w.shape) < .6] = 0
    export_onnx(m, x, tmp_path/'m.onnx')
    file = quantize_onnx(tmp_path/'m.onnx', tmp_path/'q.onnx', [x])
    assert sum(z for z, _ in file.zeros.values()) == sum(int((w == 0).sum()) for w in matrices(m).values())
    assert any(n.endswith('_quantized') for n in initialisers(file.path)) and None not in dict(file.zeros.values())


def test_a_channel_without_weights_stays_empty(tmp_path):
    m = stirred(small_net())
    with torch.no_grad(): m[3].weight[5] = 0; m[0].weight[2] = 0
    export_onnx(m, pictures[0], tmp_path/'m.onnx')
    q = initialisers(quantize_onnx(tmp_path/'m.onnx', tmp_path/'q.onnx', pictures).path)
    assert not q['3.weight_quantized'][5].any() and not q['0.weight_quantized'][2].any()


def test_int8_that_loses_zeros_is_refused(tmp_path, monkeypatch):
    import onnxruntime.quantization as theirs
    right = theirs.quantize_static
    def shifted(before, after, *args, **kwargs):
        right(before, after, *args, **kwargs)
        m = onnx.load(after)
        for i in m.graph.initializer:
            if i.name == '3.weight_quantized': i.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(i) | 1, i.name))
        onnx.save(m, after)
    export_onnx(pruned(), pictures[0], tmp_path/'m.onnx')
    monkeypatch.setattr(theirs, 'quantize_static', shifted)
    with pytest.raises(ValueError, match="zeros of '3.weight' are zero"): quantize_onnx(tmp_path/'m.onnx', tmp_path/'q.onnx', pictures)
    assert [p.name for p in tmp_path.iterdir()] == ['m.onnx']


def test_int8_needs_batches_and_says_nothing(tmp_path, capfd, caplog):
    export_onnx(pruned(), pictures[0], tmp_path/'m.onnx')
    with pytest.raises(ValueError, match='no batches'): quantize_onnx(tmp_path/'m.onnx', tmp_path/'q.onnx', [])
    with pytest.raises(ValueError, match='takes input'): quantize_onnx(tmp_path/'m.onnx', tmp_path/'q.onnx', [(a, b)])
    assert [p.name for p in tmp_path.iterdir()] == ['m.onnx']
    capfd.readouterr()
    quantize_onnx(tmp_path/'m.onnx', tmp_path/'q.onnx', pictures)
    assert capfd.readouterr() == ('', '') and not [r for r in caplog.records if r.levelname != 'DEBUG']


def test_int8_of_several_inputs(tmp_path):
    m = zeroed_two()
    export_onnx(m, dict(table=b, picture=a), tmp_path/'m.onnx')
    for batches in ([(b, a)], [dict(picture=a, table=b)]): # in the order of the file, or by name
        file = quantize_onnx(tmp_path/'m.onnx', tmp_path/'q.onnx', batches)
        assert file.zeros == {'a.weight': (6, 6)} and file.difference < .1


def zeroed_two():
    m = Two()
    zeroed(m.a)
    return m.eval()


def test_torchao_pt2e_keeps_zeros():
    pytest.importorskip('torchao')
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    m = pruned()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(m, (pictures[0],)).module(), quantizer)
    prepared(pictures[0])
    held = [t for _, t in convert_pt2e(prepared).named_buffers() if t.dtype == torch.int8]
    assert len(held) == 3
    for q, w in zip(held, matrices(m).values()): assert q.shape == w.shape and not q[w == 0].any() and q.any()


# -- training that knows of int8

weights = st.integers(0, 2**31).map(lambda seed: torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(seed)))


@settings(max_examples=50, deadline=None)
@given(w=weights, share=st.sampled_from([0, .3, .9, 1]), factor=st.sampled_from([1e-30, 1e-3, 1, 1e6]), axis=st.integers(0, 1))
def test_zero_rounds_to_zero(w, share, factor, axis):
    w = (w*factor).masked_fill(torch.rand(w.shape) < share, 0)
    q = _rounded_weight(w, axis)
    assert not q[w == 0].any() and q.isfinite().all()
    step = w.abs().amax([d for d in range(3) if d != axis], keepdim=True)/127
    assert ((q - w).abs() <= step*.501 + 1e-12).all()
    x = _rounded_input(w)
    assert not x[w == 0].any() and ((x - w).abs() <= (w.amax().clamp(0) - w.amin().clamp(max=0))/255*1.01 + 1e-12).all()


def test_what_is_rounded_is_what_the_file_holds(tmp_path):
    m = pruned()
    export_onnx(m, pictures[0], tmp_path/'m.onnx')
    q = initialisers(quantize_onnx(tmp_path/'m.onnx', tmp_path/'q.onnx', pictures).path)
    for n, w in matrices(m).items():
        scale = w.flatten(1).abs().amax(1).view(-1, *[1]*(w.dim()-1))/127
        away = (_rounded_weight(w, 0)/scale).round() - torch.tensor(q[f'{n}_quantized'])
        assert away.abs().max() <= 1 and (away != 0).float().mean() < .01 # halves may go either way


def test_gradients_pass_and_nothing_stays():
    m, x = small_net(), pictures[0]
    plain = m(x)
    with fake_int8(m): out = m(x)
    assert not torch.equal(out, plain) and torch.equal(m(x), plain)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters()) and m[0].weight.grad.any()
    with pytest.raises(RuntimeError), fake_int8(m): m(torch.randn(2, 5, 12, 12))
    assert torch.equal(m(x), plain)


def test_another_model_is_left_alone():
    m, teacher, x = small_net().eval(), small_net().eval(), pictures[0]
    exact = teacher(x)
    with fake_int8(m): assert torch.equal(teacher(x), exact)


def test_who_looks_at_the_model_sees_it_as_it_is(tmp_path):
    m, x = stirred(small_net()), pictures[0][:2]
    with fake_int8(m):
        assert flow(m, x).macs() > 0
        Sparsifier(m, 'coupled', 'local', example_input=x).prune_model(50)
        small = compact(m, x)
        file = export_onnx(m, x, tmp_path/'m.onnx')
    assert small.weights[1] < small.weights[0]
    np.testing.assert_allclose(outputs(file.path, x)[0], m(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize('model', [net, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))], ids=['convolutions', 'Linears'])
def test_callbacks_hold_zeros_in_int8_training(model):
    learn, cb, log = learner(model()), SparsifyCallback(80), []
    watch = On(after_batch=lambda learn: log.append(sum(int((learn.model.get_parameter(n)[~m] != 0).sum()) for n, m in cb.sparsifier.masks.items())), order=200)
    with fake_int8(learn.model): fit(learn, 2, cbs=[cb, watch])
    assert len(log) >= 2*BATCHES and not any(log) and abs(percent(learn.model) - 80) < .1
    zeros = {n: p == 0 for n, p in matrices(learn.model).items()}
    before = copy.deepcopy(learn.model.state_dict())
    with fake_int8(learn.model): fit(learn, 1, cbs=KeepSparsityCallback())
    assert not any(learn.model.get_parameter(n)[z].any() for n, z in zeros.items())
    assert any(not torch.equal(v, before[k]) for k, v in learn.model.state_dict().items() if k.endswith('weight'))


def test_a_fit_that_breaks_leaves_float32():
    learn = learner()
    x = learn.dls.one_batch()[0]
    with pytest.raises(KeyError), fake_int8(learn.model): fit(learn, 1, cbs=On(after_pred=throw(KeyError('x'))))
    model = learn.model.eval()
    exact = model(x)
    with fake_int8(model): assert not torch.equal(model(x), exact)
    assert torch.equal(model(x), exact)


def test_coupled_channels_in_int8_training():
    learn = learner()
    with fake_int8(learn.model): fit(learn, 2, cbs=SparsifyCallback(50, 'coupled', 'local'))
    assert learn.compact().weights[1] < .5*sum(p.numel() for p in net().parameters())


# -- models that others prepared

def test_torchao_qat_of_linears():
    pytest.importorskip('torchao')
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    m = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    quantize_(m, QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int8, 'per_channel'), step='prepare'))
    learn = learner(m)
    fit(learn, 2, cbs=SparsifyCallback(80))
    quantize_(learn.model, QATConfig(step='convert'))
    assert abs(percent(learn.model) - 80) < .1


def test_an_exported_program_is_held_and_cannot_be_pruned(): # as PT2E trains it: layers are gone, parameters are there
    m = net().train()
    Sparsifier(m, method='local').prune_model(80)
    x = torch.stack([x for x, _ in samples(16)])
    program = torch.export.export(m, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    program.train = program.eval = lambda mode=True: program # what torchao's allow_exported_model_train_eval is for
    learn = learner(program)
    with pytest.raises(ValueError, match='no layer to prune'): fit(learn, 1, cbs=SparsifyCallback(80))
    zeros, before = {n: p == 0 for n, p in matrices(program).items()}, copy.deepcopy(program.state_dict())
    assert sum(int(z.sum()) for z in zeros.values()) == sum(int((p == 0).sum()) for p in matrices(m).values())
    fit(learn, 1, cbs=KeepSparsityCallback())
    assert not any(program.get_parameter(n)[z].any() for n, z in zeros.items())
    assert all(not torch.equal(program.get_parameter(n), before[n]) for n in zeros)


def test_eager_qat_of_torch_ao():
    tq = pytest.importorskip('torch.ao.quantization')
    m = net().train()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m.qconfig = tq.get_default_qat_qconfig('x86')
        tq.prepare_qat(m, inplace=True)
        learn = learner(m)
        fit(learn, 2, cbs=(cb := SparsifyCallback(80)))
        assert abs(percent(learn.model) - 80) < .1
        tq.convert(learn.model.eval(), inplace=True)
    for n, mask in cb.sparsifier.masks.items():
        q = learn.model.get_submodule(n.removesuffix('.weight')).weight().int_repr()
        assert not q[~mask].any()

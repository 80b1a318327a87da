"Small files: every bit comes back, and whatever is wrong with a file is refused"
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from core_helpers import small_net
from fastsparse import Sparsifier, load_sparse, save_sparse
from fastsparse.files import _deflate, pack_tensor, unpack_tensor

DTYPES = [getattr(torch, n) for n in (
    'float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'uint16', 'uint32', 'uint64', 'bool', 'complex32', 'complex64',
    'complex128', 'float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'float8_e5m2fnuz', 'float8_e8m0fnu', 'float4_e2m1fn_x2', 'bits8', 'bits16', 'uint4',
    ) if hasattr(torch, n)]
pytestmark = pytest.mark.filterwarnings('ignore:.*Complex.*:UserWarning')


def raw(t): return t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a, b): return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def any_bits(dtype, shape, zeros, seed=0):
    "A tensor of any bits at all, NaN and -0.0 among them, of which this share of elements is zero"
    rng = np.random.default_rng(seed)
    n = int(np.prod(shape))
    b = rng.integers(0, 2 if dtype == torch.bool else 256, (n, dtype.itemsize), np.uint8)
    b[rng.random(n) < zeros] = 0
    return torch.from_numpy(b.reshape(-1)).view(dtype).reshape(shape)


# -- round trips

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('zeros', [0, .5, .95, 1])
def test_every_dtype_comes_back_bit_by_bit(dtype, zeros, tmp_path):
    state = {str(shape): any_bits(dtype, shape, zeros) for shape in [(), (0,), (3, 0, 2), (1,), (7,), (65, 33), (4, 3, 5, 3)]}
    saved = save_sparse(state, tmp_path/'f')
    back = load_sparse(tmp_path/'f')
    assert list(back) == list(state)
    assert all(same_bits(back[n], t) for n, t in state.items())
    assert (saved.packed == 0) == (zeros == 0) or dtype == torch.bool # half of which is zero in any case


shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
tensors = st.builds(any_bits, st.sampled_from(DTYPES), shapes, st.sampled_from([0., .2, .4, .9, 1.]), st.integers(0, 2**32))
names = st.text(st.characters(exclude_categories=['Cs']), max_size=12).filter(lambda n: n != '__metadata__')
plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=['Cs']), max_size=5),
                     lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(names, tensors | plain, max_size=6))
def test_any_state_comes_back(state, tmp_path):
    save_sparse(state, tmp_path/'f')
    back = load_sparse(tmp_path/'f')
    assert list(back) == list(state)
    for n, v in state.items(): assert same_bits(back[n], v) if isinstance(v, torch.Tensor) else back[n] == v and type(back[n]) is type(v)


def test_minus_zero_and_nan_are_not_zero():
    t = torch.zeros(640)
    t[:2] = torch.tensor([-0., float('nan')])
    t.view(torch.int32)[2] = 0x7fc01234 # a NaN with something in it
    back = unpack_tensor(*pack_tensor(t))
    assert back[0].signbit() and back[1].isnan() and back.view(torch.int32)[2] == 0x7fc01234


LAYOUTS = {'negative view': torch._neg_view, 'channels_last': lambda t: t.to(memory_format=torch.channels_last), 'transposed': lambda t: t.transpose(0, 3), 'strided': lambda t: t[:, ::2],
           'expanded': lambda t: t[:1].expand(9, -1, -1, -1), 'conj': lambda t: torch.complex(t, t).conj(), 'neg': lambda t: torch.complex(t, t).conj().imag,
           'flipped': lambda t: t.flip(0), 'part': lambda t: t[1:3], 'parameter': lambda t: nn.Parameter(t)}

@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('zeros', [0, .9])
def test_layouts(layout, zeros, tmp_path):
    t = LAYOUTS[layout](torch.randn(4, 6, 5, 3)*(torch.rand(4, 6, 5, 3) >= zeros))
    save_sparse({'t': t}, tmp_path/'f')
    back = load_sparse(tmp_path/'f')['t']
    assert same_bits(back, t) and back.is_contiguous() and type(back) is torch.Tensor


@pytest.mark.parametrize('zeros', [0, .9])
def test_shared_tensors(zeros, tmp_path):
    w = torch.randn(20, 30)*(torch.rand(20, 30) >= zeros)
    state = {'a': w, 'tied': w.view(20, 30), 'transposed': w.T, 'part': w[:5], 'flat': w.view(-1), 'equal': w.clone()}
    saved = save_sparse(state, tmp_path/'f')
    back = load_sparse(tmp_path/'f')
    assert all(same_bits(back[n], t) for n, t in state.items())
    assert back['tied'] is back['a'] and back['equal'] is not back['a'] and back['flat'].data_ptr() != back['a'].data_ptr()
    assert saved.bytes_dense == 4*600*4 + 4*150 # written once
    back['a'].zero_()
    assert back['equal'].any()
    save_sparse({'none': torch.empty(0), 'nor here': torch.empty(0)}, tmp_path/'f')
    back = load_sparse(tmp_path/'f')
    assert back['none'] is not back['nor here']


def test_a_model_goes_through_and_stays_as_it_is(tmp_path):
    model = small_net()
    Sparsifier(model).prune_model(80)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    save_sparse(model, tmp_path/'f')
    assert all(same_bits(t, before[n]) for n, t in model.state_dict().items())
    other = small_net()
    other.load_state_dict(load_sparse(tmp_path/'f'))
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert load_sparse(tmp_path/'f')['1.num_batches_tracked'].shape == ()


def test_one_line_of_a_learner(tmp_path, monkeypatch):
    from fastai_helpers import net, sparse_learner
    learn, cb = sparse_learner(80)
    learn.path = tmp_path
    saved = learn.save_sparse('small')
    assert saved.path == tmp_path/'models'/'small.safetensors' and saved.bytes < saved.bytes_dense and 'values' not in str(saved)
    back = load_sparse(saved.path)
    assert all(same_bits(back[n], t) for n, t in learn.model.state_dict().items()) and all(not back[n][~m].any() for n, m in cb.sparsifier.masks.items())
    net().load_state_dict(back)
    assert learn.save_sparse('half', values='float16').values == 'float16'
    monkeypatch.setattr('fastsparse.callback.rank_distrib', lambda: 1)
    learn.save_sparse('from another process')
    monkeypatch.undo()
    assert learn.save_sparse('small.safetensors').path == saved.path
    assert sorted(p.name for p in (tmp_path/'models').iterdir()) == ['half.safetensors', 'small.safetensors']


def test_extra_state(tmp_path):
    class Counts(nn.Linear):
        def get_extra_state(self): return {'seen': [1, 2], 'why': None}
        def set_extra_state(self, state): self.loaded = state
    save_sparse(Counts(2, 2), tmp_path/'f')
    other = Counts(2, 2)
    other.load_state_dict(load_sparse(tmp_path/'f'))
    assert other.loaded == {'seen': [1, 2], 'why': None}


def test_equal_weights_make_equal_files(tmp_path):
    model = small_net()
    for n in 'ab': save_sparse(model, tmp_path/n)
    assert (tmp_path/'a').read_bytes() == (tmp_path/'b').read_bytes()


def test_what_is_loaded_does_not_follow_the_file(tmp_path):
    t = torch.randn(1000)
    save_sparse({'t': t}, tmp_path/'f')
    back = load_sparse(tmp_path/'f')
    with open(tmp_path/'f', 'rb+') as f: f.write(bytes(os.path.getsize(tmp_path/'f')))
    assert same_bits(back['t'], t)


# -- how small

def test_mostly_dense_tensors_are_left_to_other_readers(tmp_path):
    state = {f'{p}': any_bits(torch.float32, (100, 100), p/100) for p in (0, 25, 35, 99)} | {'few': torch.zeros(2)}
    saved = save_sparse(state, tmp_path/'f')
    theirs = load_file(tmp_path/'f')
    assert [n for n in state if theirs[n].dtype == torch.float32] == ['0', '25', 'few']
    assert same_bits(theirs['25'], state['25']) and (saved.packed, saved.dense) == (2, 3)


@pytest.mark.parametrize('zeros, most', [(.9, .105), (.98, .027)])
def test_as_small_as_promised(zeros, most, tmp_path):
    t = torch.randn(1_000_000).masked_fill(torch.rand(1_000_000) < zeros, 0)*.02
    saved = save_sparse({'t': t}, tmp_path/'f')
    assert saved.bytes < most*saved.bytes_dense and saved.bytes == os.path.getsize(tmp_path/'f')
    entropy = -sum(p*np.log2(p) for p in (zeros, 1-zeros))*1_000_000/8
    assert entropy < pack_tensor(t)[1]['mask'] < (1.15 if zeros == .9 else 1.4)*entropy # searching for repetitions, zlib needs 1.2 at 90 %


def test_zeros_that_are_negative_are_kept_and_mentioned(tmp_path):
    t = torch.zeros(1000)
    t[:7] = -0.
    t[7] = 3
    saved = save_sparse({'t': t, 'half': t.bfloat16(), 'int': t.int(), 'fp8': t.to(torch.float8_e4m3fn)}, tmp_path/'f')
    assert saved.minus_zeros == 14 and '14 values are -0.0, and t.add_(0.) would make them 0' in str(saved)
    assert load_sparse(tmp_path/'f')['t'].signbit().sum() == 7
    assert '-0.0' not in str(save_sparse({'t': t.add_(0.)}, tmp_path/'f'))


def test_structure_in_the_mask_is_found():
    t = torch.randn(64, 64, 3, 3).masked_fill(torch.rand(1, 64, 1, 1) > .5, 0)
    _, about = pack_tensor(t)
    assert about['mask'] < 64*64*9/8/10


# -- half precision, in words

@pytest.mark.parametrize('values', ['float16', 'bfloat16'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_rounding_only_where_it_is_asked_for(values, dtype, tmp_path):
    t = any_bits(dtype, (50, 50), .9)
    if dtype in (torch.float32, torch.float64): t = t.nan_to_num().clamp(-9, 9)
    save_sparse({'t': t, 'dense': torch.randn(9, 9)}, tmp_path/'f', values=values)
    back = load_sparse(tmp_path/'f')
    wide = dtype in (torch.float32, torch.float64)
    assert same_bits(back['t'], t.to(getattr(torch, values)).to(dtype) if wide else t)
    with safe_open(tmp_path/'f', 'pt') as f: about = json.loads(f.metadata()['fastsparse'])['tensors']
    assert about['t'].get('values') == (values if wide else None) and 'values' not in about['dense']


def test_half_precision_must_not_make_infinities(tmp_path):
    t = torch.zeros(100)
    t[0], t[1] = 1e5, float('inf')
    with pytest.raises(ValueError, match=r"'w' cannot be written: a weight of 100000 is too large for values='float16'.*bfloat16"):
        save_sparse({'w': t}, tmp_path/'f', values='float16')
    save_sparse({'w': t}, tmp_path/'f', values='bfloat16')
    with pytest.raises(ValueError, match="values='half' is unknown; choose 'float16' or 'bfloat16'"): save_sparse({'w': t}, tmp_path/'f', values='half')


# -- without the package

def test_ten_lines_of_numpy_are_enough(tmp_path):
    "As in the notebook, in a process that has neither torch nor fastsparse"
    model = small_net()
    Sparsifier(model).prune_model(90)
    model.tied = model[0]
    save_sparse(model, tmp_path/'f', values='float16')
    np.savez(tmp_path/'expected.npz', **{n: t.numpy() for n, t in load_sparse(tmp_path/'f').items()})
    code = f'''
import json, sys, zlib, numpy as np
from safetensors import safe_open
state = {{}}
with safe_open({str(tmp_path/'f')!r}, framework='np') as f:
    for name,a in json.loads(f.metadata()['fastsparse'])['tensors'].items():
        if 'same' in a or 'json' in a: state[name] = state[a['same']] if 'same' in a else a['json']; continue
        data,dtype = f.get_tensor(name),np.dtype(a.get('values', a['dtype']))
        if 'mask' in a:
            mask,planes = (np.frombuffer(zlib.decompress(z), np.uint8) for z in (data[:a['mask']], data[a['mask']:]))
            data = np.zeros(a['shape'], a['dtype'])
            data.flat[np.unpackbits(mask, count=data.size).nonzero()] = planes.reshape(dtype.itemsize, -1).T.copy().view(dtype)[:,0]
        state[name] = data
expected = np.load({str(tmp_path/'expected.npz')!r})
assert list(state) == list(expected) and len(state) > 10
for n in state: assert state[n].dtype == expected[n].dtype and np.array_equal(state[n], expected[n]), n
assert 'torch' not in sys.modules and 'fastsparse' not in sys.modules
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    for f in (lambda: save_sparse({}, tmp_path/'f'), lambda: load_sparse(tmp_path/'f')):
        with pytest.raises(ImportError, match=r"pip install 'fastsparse\[files\]'"): f()


# -- refused when saved

REFUSED = {
    'nested': (lambda: {'model': {'w': torch.ones(2)}}, "pass state\\['model'\\]"), 'object': (lambda: {'x': object()}, "'x' is a object, which is neither"),
    'tuple': (lambda: {'x': (1, 2)}, "'x' is a tuple"), 'nan': (lambda: {'x': float('nan')}, "'x' is a float"), 'keys': (lambda: {'x': {1: 2}}, "'x' is a dict"),
    'int key': (lambda: {1: torch.ones(2)}, '1 cannot be a name'), 'reserved': (lambda: {'__metadata__': torch.ones(2)}, 'cannot be a name'),
    'sparse': (lambda: {'x': torch.eye(3).to_sparse()}, 'to_dense'), 'csr': (lambda: {'x': torch.eye(3).to_sparse_csr()}, 'to_dense'),
    'meta': (lambda: {'x': torch.ones(2, device='meta')}, 'on meta'), 'lazy': (lambda: nn.LazyLinear(3), "run one batch through"),
    'learner': (lambda: type('Learner', (), {'model': 1})(), 'did you mean learn.model'), 'path': (lambda: 'model.pth', 'neither a PyTorch module nor a state dict'),
}

@pytest.mark.filterwarnings('ignore:Lazy modules')
@pytest.mark.filterwarnings('ignore:Sparse CSR')
@pytest.mark.parametrize('what', REFUSED)
def test_refused_when_saved_and_nothing_is_touched(what, tmp_path):
    (tmp_path/'f').write_bytes(b'before')
    make, why = REFUSED[what]
    with pytest.raises(ValueError, match=why): save_sparse(make(), tmp_path/'f')
    assert os.listdir(tmp_path) == ['f'] and (tmp_path/'f').read_bytes() == b'before'


@pytest.mark.filterwarnings('ignore')
def test_quantized_tensors_are_refused(tmp_path):
    q = torch.quantize_per_tensor(torch.randn(9), .1, 0, torch.qint8)
    with pytest.raises(ValueError, match='dequantize'): save_sparse({'q': q}, tmp_path/'f')


# -- whole or not at all

@pytest.mark.parametrize('error', [OSError('disk full'), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_interrupted_while_writing(error, tmp_path, monkeypatch):
    save_sparse({'w': torch.ones(3)}, tmp_path/'f')
    before = (tmp_path/'f').read_bytes()
    def half(tensors, path, metadata):
        assert path.parent.parent == tmp_path # a move from elsewhere could stop half-way
        path.write_bytes(b'half')
        raise error
    monkeypatch.setattr('safetensors.torch.save_file', half)
    with pytest.raises(type(error)): save_sparse({'w': torch.zeros(3)}, tmp_path/'f')
    assert os.listdir(tmp_path) == ['f'] and (tmp_path/'f').read_bytes() == before


def test_overwritten_and_readable_like_any_new_file(tmp_path):
    (tmp_path/'other').touch()
    for n in (3, 4): save_sparse({'w': torch.ones(n)}, tmp_path/'f')
    assert len(load_sparse(tmp_path/'f')['w']) == 4
    assert stat.S_IMODE(os.stat(tmp_path/'f').st_mode) == stat.S_IMODE(os.stat(tmp_path/'other').st_mode)


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path/'precious').write_bytes(b'precious')
    (tmp_path/'f').symlink_to(tmp_path/'precious')
    save_sparse({'w': torch.ones(3)}, tmp_path/'f')
    assert (tmp_path/'precious').read_bytes() == b'precious' and not (tmp_path/'f').is_symlink()


def test_names_are_never_paths(tmp_path):
    folder = tmp_path/'a'/'b'
    folder.mkdir(parents=True)
    state = {n: torch.ones(2) for n in ('../../evil', str(tmp_path/'evil'), '..', '')}
    save_sparse(state, folder/'f')
    assert list(load_sparse(folder/'f')) == list(state)
    assert [p.name for p in tmp_path.rglob('*')] == ['a', 'b', 'f']


def test_wrong_places(tmp_path):
    with pytest.raises(FileNotFoundError, match='is not a folder; make it'): save_sparse({}, tmp_path/'no'/'f')
    for f in (lambda: save_sparse({}, tmp_path), lambda: load_sparse(tmp_path)):
        with pytest.raises(IsADirectoryError, match='add the name of a file'): f()
    with pytest.raises(FileNotFoundError): load_sparse(tmp_path/'f')


# -- files that lie

def forge(path, tensors, about, **more):
    "A file with a checksum that fits, as an attacker would write it"
    from fastsparse.files import _digest
    text = about if isinstance(about, str) else json.dumps(dict(format=1, sha256=_digest(about, {n: tensors[n] for n in about if n in tensors}), tensors=about) | more)
    save_file(tensors, path, {'fastsparse': text})
    return path


def packed(mask_bytes, values): # two streams, as bytes
    mask = _deflate(mask_bytes)
    return torch.frombuffer(bytearray(mask + _deflate(values)), dtype=torch.uint8), len(mask)


GOOD_MASK, GOOD_VALUES = b'\x80\x01', b'\1\2\3\4\5\6\7\x08' # elements 0 and 15 of 16, in planes


def attempt(tmp_path, mask=GOOD_MASK, values=GOOD_VALUES, **about):
    "Load a file with these streams and this description; `mask_` and `values_` are what it says"
    t, n = packed(mask, values)
    about = dict(dtype='float32', shape=[16], mask=n) | {k.rstrip('_'): v for k, v in about.items()}
    return load_sparse(forge(tmp_path/'f', {'w': t}, {'w': about}))


def test_the_forger_can_write_a_good_file(tmp_path):
    back = attempt(tmp_path)['w']
    assert raw(back)[:4] == bytes([1, 3, 5, 7]) and raw(back)[-4:] == bytes([2, 4, 6, 8]) and back.count_nonzero() == 2


LIES = {
    'mask too short': (dict(mask=b'\x80'), 'a stream that does not hold the 2 bytes'), 'mask too long': (dict(mask=b'\x80\x01\x00'), 'not hold the 2 bytes'),
    'larger shape': (dict(shape=[17]), 'not hold the 3 bytes'), 'bit beyond the end': (dict(shape=[15], values=b'1234'), 'a mask that is longer'),
    'too few values': (dict(values=GOOD_VALUES[:-1]), 'not hold the 8 bytes'), 'too many values': (dict(values=GOOD_VALUES + b'1'), 'not hold the 8 bytes'),
    'more bits than values': (dict(mask=b'\x81\x01'), 'not hold the 12 bytes'), 'wider dtype': (dict(dtype='float64'), 'not hold the 16 bytes'),
    'no such dtype': (dict(dtype='Tensor'), "'w' of dtype 'Tensor'"), 'a function': (dict(dtype='load'), 'of dtype'), 'no dtype': (dict(dtype=None), 'of dtype None'),
    'quantized': (dict(dtype='qint8'), 'of dtype'), 'list of dtypes': (dict(dtype=['float32']), 'of dtype'), 'negative shape': (dict(shape=[-4, -4]), r"'w' of shape \[-4, -4\]"),
    'fractions': (dict(shape=[16.]), 'of shape'), 'bools': (dict(shape=[True]), 'of shape'), 'a number': (dict(shape=16), 'of shape'),
    'terabytes': (dict(shape=[10**12]), 'tensors of 4,000,000,000,000 bytes, more than'), 'past 64 bits': (dict(shape=[2**62, 4, 2**62]), 'more than the'),
    'past 64 bits, but empty': (dict(shape=[2**62, 2**62, 0], mask=b'', values=b''), ''), 'mask length': (dict(mask_=10**6), 'not what its description says'),
    'negative mask': (dict(mask_=-1), 'not what its'), 'mask of text': (dict(mask_='1'), 'not what its'), 'half of ints': (dict(dtype='int32', values_='float16'), 'with values'),
    'no such half': (dict(values_='float8_e5m2'), "with values 'float8_e5m2'"), 'list of values': (dict(values_=['float16']), 'with values'),
}

@pytest.mark.parametrize('lie', LIES)
def test_lies_about_a_tensor(lie, tmp_path):
    about, why = LIES[lie]
    with pytest.raises(ValueError, match=f'/f holds .*{why}'): attempt(tmp_path, **about)


def test_streams_end_where_they_should():
    t = torch.zeros(100)
    t[3] = 1
    data, about = pack_tensor(t)
    for wrong in (data + b'x', data[:-1], data[:-4]):
        with pytest.raises(ValueError, match='a stream that does not hold the 4 bytes'): unpack_tensor(wrong, about)
    with pytest.raises(ValueError, match='a damaged stream'): unpack_tensor(b'y' + data[1:], about)


W = '"w": {"dtype": "float32", "shape": [2]}'
DESCRIPTIONS = {
    'not ours': (None, 'nothing that save_sparse wrote'), 'no JSON': ('{', 'no JSON'), 'too deep': ('['*10**5, 'no JSON'), 'a number': ('3', 'without tensors'),
    'nothing': ('{}', 'without tensors'), 'a list': ('{"format": 1, "tensors": []}', 'without tensors'), 'later format': ('{"format": 2, "tensors": {%s}}' % W, 'format 2, and this'),
    'entry is a list': ('{"format": 1, "tensors": {"w": []}}', 'nothing sensible about'), 'missing': ('{"format": 1, "tensors": {}}', r"other tensors than it describes: \['w'\]"),
    'one too many': ('{"format": 1, "tensors": {%s, "v": {"dtype": "float32", "shape": [2]}}}' % W, r"describes: \['v'\]"),
    'same as itself': ('{"format": 1, "tensors": {%s, "v": {"same": "v"}}}' % W, "'v' the same as 'v', which is not before it"),
    'same as a list': ('{"format": 1, "tensors": {%s, "v": {"same": ["w"]}}}' % W, 'the same as'),
    'no checksum': ('{"format": 1, "tensors": {%s}}' % W, 'another checksum'), 'other shape': ('{"format": 1, "tensors": {%s}}' % W.replace('2]', '3]'), 'not what its description says'),
    'other dtype': ('{"format": 1, "tensors": {%s}}' % W.replace('float', 'int'), 'not what its'), 'a mask': ('{"format": 1, "tensors": {%s, "mask": 1}}}' % W[:-1], 'not what its'),
    'huge number': ('{"format": 1, "tensors": {%s}}' % W.replace('2]', '9'*10**5 + ']'), 'no JSON|more than'),
}

@pytest.mark.parametrize('what', DESCRIPTIONS)
def test_descriptions_that_make_no_sense(what, tmp_path):
    text, why = DESCRIPTIONS[what]
    save_file({'w': torch.ones(2)}, tmp_path/'f', None if text is None else {'fastsparse': text})
    with pytest.raises(ValueError, match=f'/f holds .*({why})'): load_sparse(tmp_path/'f')


def header(h): return struct.pack('<Q', len(h)) + h


FOREIGN = {
    'empty': b'', 'text': b'hello, world, this is a text', 'zip': b'PK\x03\x04'*9, 'pickle': pickle.dumps({'w': 1}), 'claims an exabyte': struct.pack('<Q', 2**60) + b'{}',
    'terabytes': header(json.dumps({'w': dict(dtype='F32', shape=[10**12], data_offsets=[0, 4*10**12])}).encode()),
    'overlap': header(json.dumps({n: dict(dtype='U8', shape=[4], data_offsets=[0, 4]) for n in 'ab'}).encode()) + b'1234',
    'trailing': header(json.dumps({'w': dict(dtype='U8', shape=[4], data_offsets=[0, 4])}).encode()) + b'12345',
}

@pytest.mark.parametrize('what', FOREIGN)
def test_foreign_files(what, tmp_path):
    (tmp_path/'f').write_bytes(FOREIGN[what])
    with pytest.raises(ValueError, match='/f is no safetensors file, or it is damaged'): load_sparse(tmp_path/'f')


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    state = {'w': torch.randn(5, 20)*(torch.rand(5, 20) > .6), 'dense': torch.randn(2, 2), 'twin': torch.ones(2, 2), 'x': 'text'}
    save_sparse(state, tmp_path/'f')
    good = (tmp_path/'f').read_bytes()
    for i in range(len(good)):
        for data in (good[:i] + bytes([good[i] ^ (1 << i%8)]) + good[i+1:], good[:i]):
            (tmp_path/'g').write_bytes(data)
            try: back = load_sparse(tmp_path/'g')
            except ValueError as e: assert str(tmp_path/'g') in str(e)
            else: assert len(data) == len(good) and all(same_bits(back[n], t) if n != 'x' else back[n] == t for n, t in state.items()) # such as a blank in the header


def test_tensors_that_changed_places_are_noticed(tmp_path):
    save_sparse({'a': torch.ones(2), 'b': torch.full((2,), 2.)}, tmp_path/'f')
    data = (tmp_path/'f').read_bytes()
    swapped = data.replace(b'"a":{"dtype":"F32"', b'"?":{"dtype":"F32"').replace(b'"b":{"dtype":"F32"', b'"a":{"dtype":"F32"').replace(b'"?":', b'"b":')
    assert swapped != data
    (tmp_path/'f').write_bytes(swapped)
    with pytest.raises(ValueError, match='another checksum'): load_sparse(tmp_path/'f')


def loaded(path):
    "What `load_sparse` says to a file, and the most memory in MB that Python, zlib and numpy held in the meantime"
    tracemalloc.start()
    try: said = sum(t.numel() for t in load_sparse(path).values())
    except ValueError as e: said = str(e)
    peak = tracemalloc.get_traced_memory()[1]/1e6
    tracemalloc.stop()
    return said, peak


def test_bombs_do_not_go_off(tmp_path):
    bomb = zlib.compress(bytes(10**8), 9) # 100 MB of zeros in 100 kB
    def file(first, second, n):
        t = torch.frombuffer(bytearray(first + second), dtype=torch.uint8)
        return forge(tmp_path/'f', {'w': t}, {'w': dict(dtype='float32', shape=[n], mask=len(first))})
    said, peak = loaded(file(bomb, zlib.compress(b''), 8*10**8)) # an honest mask for 3.2 GB of floats
    assert 'tensors of 3,200,000,000 bytes, more than the 1,073,741,824 allowed' in said and 'max_bytes=3200000000' in said and peak < 5
    said, peak = loaded(file(bomb, zlib.compress(b''), 1000)) # a mask much longer than it says
    assert 'does not hold the 125 bytes' in said and peak < 5
    said, peak = loaded(file(zlib.compress(b'\x80'), bomb, 8)) # and values
    assert 'does not hold the 4 bytes' in said and peak < 5
    said, peak = loaded(file(zlib.compress(bytes(10**6), 9), zlib.compress(b''), 8*10**6))
    assert said == 8*10**6 and peak > 32 # so much for the measuring


def test_trusted_in_words(tmp_path):
    t = torch.zeros(10**6)
    t[0] = 1
    save_sparse({'w': t}, tmp_path/'f')
    with pytest.raises(ValueError, match='tensors of 4,000,000 bytes, more than the 3,999,999 allowed'): load_sparse(tmp_path/'f', max_bytes=3_999_999)
    assert same_bits(load_sparse(tmp_path/'f', max_bytes=4_000_000)['w'], t)


def test_nothing_is_executed(tmp_path):
    "A pickle that would write a file when it is loaded, whatever it is called and wherever it hides"
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/executed',)
    evil = pickle.dumps(Evil())
    (tmp_path/'evil.safetensors').write_bytes(evil)
    torch.save({'w': Evil()}, tmp_path/'evil.pth')
    save_file({'w': torch.frombuffer(bytearray(evil), dtype=torch.uint8)}, tmp_path/'inside', {'fastsparse': evil.hex()})
    for name in ('evil.safetensors', 'evil.pth', 'inside'):
        with pytest.raises(ValueError): load_sparse(tmp_path/name)
    assert not (tmp_path/'executed').exists()
    pickle.loads(evil) # it would have
    assert (tmp_path/'executed').exists()

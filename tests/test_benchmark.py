"Timings and what may be said of them, with a clock that is set by hand; and what is counted beside time"
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastsparse import Sparsifier, accelerate, benchmark, compact
from fastsparse.benchmark import Benchmark, Measured, multiply_adds, peak_memory, stored_bytes
from fastsparse.timing import Timing, evaluating, ratios, take_turns, threads, time_models, verdict


class Clock:
    "A clock, and things that take as long as they say"
    def __init__(self): self.now,self.order,self.waits = 0.,[],0
    def __call__(self): return self.now
    def takes(self, seconds, name=None):
        times = iter(seconds) if isinstance(seconds, list) else None
        def run():
            self.order.append(name)
            self.now += next(times) if times else seconds
        return run


# -- in turns

def test_rounds_alternate_after_a_warm_up_that_does_not_count():
    clock = Clock()
    first = [100., 7., 7.] + [1.]*15
    a,b = take_turns([clock.takes(first, 'a'), clock.takes(2., 'b')], 0, clock=clock)
    assert a.seconds == (1.,)*15 and b.seconds == (2.,)*15
    assert clock.order[-8:] == ['a', 'b', 'b', 'a']*2


def test_short_calls_are_measured_many_times_in_a_row():
    clock = Clock()
    short,long = take_turns([clock.takes(1e-5, 'short'), clock.takes(1., 'long')], 0, rounds=(3, 3), block=1e-3, clock=clock)
    assert clock.order.count('short') == 3 + 3*100 and clock.order.count('long') == 3 + 3
    assert short.median == pytest.approx(1e-5) and len(long.seconds) == 3


@pytest.mark.parametrize('seconds,rounds', [(0, 15), (16, 15), (160, 40), (1e9, 200)])
def test_as_many_rounds_as_fit(seconds, rounds):
    clock = Clock()
    assert len(take_turns([clock.takes(1.), clock.takes(3.)], seconds, clock=clock)[0].seconds) == rounds


def test_a_gpu_is_waited_for_before_the_clock_is_read():
    clock = Clock()
    def wait(): clock.now += 5
    assert take_turns([clock.takes(1.)], 0, wait=wait, clock=clock)[0].median == 6


def test_no_garbage_is_collected_meanwhile_and_again_after_an_error():
    seen = []
    take_turns([lambda: seen.append(gc.isenabled())], 0, rounds=(1, 1))
    def fails(): raise KeyError
    with pytest.raises(KeyError): take_turns([fails])
    assert gc.isenabled() and set(seen) == {False}


# -- what may be said

def steady(*times): return Timing(tuple(t for t in times for _ in range(8)))

def noisy(scale, *, n=40, by=.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Timing(tuple((scale*(1 + by*torch.randn(n, generator=g))).tolist()))


def test_medians_and_quartiles():
    t = Timing((4., 1., 2., 3., 100.))
    assert t.median == 3 and t.quartiles == (2., 4.) and str(t) == '3e+03 ms (2e+03–4e+03)'
    assert Timing((2.,)).quartiles == (2., 2.) and verdict(Timing((2.,)), Timing((1.,))) == '2.00× faster (2.00–2.00)'


@given(st.integers(0, 100))
def test_noise_is_no_gain_and_a_large_gain_is_one(seed):
    base = noisy(1., seed=seed)
    assert verdict(base, noisy(1., seed=seed + 1000)).startswith('no gain here')
    assert verdict(base, noisy(.5, seed=seed + 1000)).startswith(('1.9', '2.0')) and verdict(base, noisy(2., seed=seed + 1)).endswith(')')
    assert 'slower' in verdict(base, noisy(2., seed=seed + 1000))


def test_less_than_the_unrest_of_the_first_is_no_gain():
    base = Timing((1., 1.1)*10)
    assert verdict(base, Timing((.98, 1.08)*10)).startswith('no gain here') # always faster, but by less than it differs from itself
    assert verdict(base, Timing((.8, .88)*10)).startswith('1.25× faster')


def test_a_disturbance_that_hits_all_alike_hides_no_gain():
    base,other = steady(1., 5., 1.2),steady(.5, 2.5, .6)
    assert base.quartiles[0] < other.quartiles[1] # the times themselves overlap
    assert verdict(base, other) == '2.00× faster (2.00–2.00)' and verdict(other, base) == '2.00× slower (2.00–2.00)' and ratios(base, other)[0] == 2


@given(st.lists(st.floats(.1, 10), min_size=1, max_size=9))
def test_nothing_is_faster_than_itself(times): assert verdict(Timing(tuple(times)), Timing(tuple(times))).startswith('no gain here (1.00–1.00')

def test_equal_is_no_gain(): assert verdict(steady(1.), steady(1.)) == 'no gain here (1.00–1.00, unrest 1.00)'


# -- models

def test_models_are_timed_in_evaluation_mode_and_are_as_they_were():
    modes,net = [],nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    net[1].eval()
    net[0].register_forward_hook(lambda m, *_: modes.append((m.training, torch.is_grad_enabled())))
    time_models([net, net], torch.randn(2, 4), 0)
    assert set(modes) == {(False, False)} and [m.training for m in net.modules()] == [True, True, False]
    with pytest.raises(KeyError), evaluating([net]): raise KeyError
    assert net.training and torch.is_grad_enabled()


def test_threads():
    n = torch.get_num_threads()
    assert threads() == f'{n} thread' + 's'*(n > 1)


def test_peak_memory_is_what_lives_at_once():
    x = torch.zeros(1000)
    class Net(nn.Module):
        def forward(self, x):
            a = x + 1 # 4,000
            b = torch.cat([a, a]) # 12,000
            del a
            c = b[:500].view(-1) # no memory of its own
            return c.clone() + x[:500] # 8,000 + 2,000 + 2,000
    assert peak_memory(Net(), x) == 12_000
    assert peak_memory(nn.Identity(), x) == 0 and peak_memory(nn.Flatten(0), x) == 0 and peak_memory(nn.ReLU(inplace=True), x) == 0


def test_multiply_adds_are_those_of_stored_weights():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(5, 2, 4, 4)
    with torch.no_grad():
        net[0].weight[:, :, 1:] = 0
        net[3].weight[:, 4:] = 0
    fast = accelerate(net, x, gain=0, seconds=0).model
    assert multiply_adds(net, x) == 5*(4*9*4 + 16*3) and multiply_adds(fast, x) == 5*(4*3*4 + 4*3)
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert multiply_adds(attention, torch.randn(1, 3, 8)) == 3*(4*8*8 + 2*8*16) + 2*3*3*8 and torch.backends.mha.get_fastpath_enabled()


def test_bytes_in_memory():
    net = nn.Sequential(nn.Linear(10, 5), nn.Linear(10, 5))
    net[1].weight = net[0].weight
    assert stored_bytes(net) == 4*(50 + 5 + 5)


@pytest.fixture(scope='module')
def pruned():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 2)).eval()
    x = torch.randn(2, 3, 6, 6)
    Sparsifier(net, 'coupled', 'local', example_input=x).prune_model(50)
    return net,x


def test_one_model_in_all_forms(pruned):
    net,x = pruned
    state = {k: v.clone() for k,v in net.state_dict().items()}
    b = benchmark(net, x, seconds=0)
    rows = {r.name: r for r in b.rows}
    assert list(rows)[:3] == ['dense', 'masked', 'compacted'] and all(torch.equal(v, state[k]) for k,v in net.state_dict().items())
    assert rows['compacted'].macs < rows['masked'].macs == rows['dense'].macs and rows['compacted'].bytes < rows['masked'].bytes
    assert len(b.to_dataframe()) == len(b.rows) and 'compacted' in str(b) and '2×3×6×6' in b._repr_html_() and b.samples == 2
    if rows['dense'].file: assert rows['masked'].file < rows['dense'].file
    assert len(b.plot().patches) == len(b.rows)


def test_forms_that_bring_nothing_are_named():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert [r.name for r in benchmark(net, torch.randn(1, 8), 0).rows] == ['dense']
    net[0].weight.data[0, 0] = 0
    b = benchmark(net, torch.randn(1, 8), 0)
    assert [r.name for r in b.rows] == ['dense', 'masked'] and 'no channel is zero' in str(b) and 'no layer is faster' in str(b)


def test_models_by_name_and_what_holds_them(pruned):
    net,x = pruned
    b = benchmark({'a': net, 'b': compact(net, x), 'c': accelerate(net, x, gain=0, seconds=0)}, (x,), 0)
    assert [r.name for r in b.rows] == ['a', 'b', 'c'] and b.rows[2].macs < b.rows[0].macs
    assert b.rows[2].bytes != b.rows[0].bytes


def test_mistakes(pruned):
    net,x = pruned
    for models,said in [({}, 'no models'), ({'a': 3}, 'neither a PyTorch module'), ('a', 'neither a PyTorch module')]:
        with pytest.raises(ValueError, match=said): benchmark(models, x)
    with pytest.raises(ValueError, match='no example_input'): benchmark(net, None)


def test_what_cannot_be_counted_is_a_dash():
    row = Measured('a', steady(.002), None, None, 10**6, None)
    b = Benchmark((row, Measured('b', steady(.002), 10, 10**6, 2000, 5)), 4)
    assert str(b).splitlines()[2].split() == ['a', '2', 'ms', '2–2', '2,000', '—', '—', '1.00', 'MB', '—'] and 'no gain here' in str(b)

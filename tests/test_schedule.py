import copy
import math
import pickle

import pytest

from fastsparse import schedule as S
from fastsparse.schedule import Rate, Schedule, Steps, agp, as_schedule, available_schedules, constant, constant_rate, cos, dsd, iterative, lin, one_cycle, one_shot, taper

ALL = dict(one_shot=one_shot, iterative=iterative, taper=taper, agp=agp, one_cycle=one_cycle, cos=cos, lin=lin, dsd=dsd, constant_rate=constant_rate, constant=constant)
RISING = [n for n in ALL if n != 'dsd']
GRID = [i/997 for i in range(998)]


def test_names():
    assert available_schedules() == list(ALL) and all(as_schedule(n) is s for n, s in ALL.items())


@pytest.mark.parametrize('name', ALL)
def test_exact_at_both_ends(name):
    assert ALL[name](0) == ALL[name](0.) == 0
    assert ALL[name](1) == ALL[name](1.) == (0 if name == 'dsd' else 1)


@pytest.mark.parametrize('start,end', [(0, 1), (.2, .7), (.1, .3), (0, .5), (.5, 1), (1/3, 2/3)])
@pytest.mark.parametrize('name', ALL)
def test_exact_wherever_it_starts_and_ends(name, start, end):
    s = Schedule(ALL[name].func, start, end)
    assert s(0) == s(start) == 0 and s(end) == s(1) == (0 if name == 'dsd' else 1)


@pytest.mark.parametrize('start,end', [(0, 1), (.2, .7), (.5, 1)])
@pytest.mark.parametrize('name', RISING)
def test_never_falls_and_stays_within_0_and_1(name, start, end):
    s = Schedule(ALL[name].func, start, end)
    values = [s(p) for p in GRID]
    assert values == sorted(values) and values[0] == 0 and values[-1] == 1


def test_the_gradual_ones_end_before_training_does():
    for name in ('taper', 'agp', 'one_cycle', 'cos', 'lin', 'constant_rate'): assert ALL[name](.75) == 1 and ALL[name](.25) < 1
    assert one_shot(.75) == iterative(.95) == 1


@pytest.mark.parametrize('func,p,expected', [
    (S._lin, .3, .3), (S._cos, .5, .5), (S._cos, 1/3, .25), (S._agp, .5, .875), (S._agp, .1, .271), (S._taper, .5, 63/64), (S._taper, .1, 1-.9**6),
    (S._dsd, .25, .5), (S._dsd, .5, 1), (S._dsd, .75, .5)])
def test_formula(func, p, expected): assert func(p) == pytest.approx(expected, abs=1e-12)


def test_one_cycle_is_the_logistic_curve_of_hubens():
    logistic = lambda t: 1/(1 + math.exp(-14*t + 6)) # noqa: E731
    lo, hi = logistic(0), logistic(1)
    for t in (.1, 6/14, .5, .9): assert S._one_cycle(t) == pytest.approx((logistic(t)-lo)/(hi-lo), abs=1e-12)
    assert max(abs(S._one_cycle(p)-logistic(p)) for p in GRID) < 3e-3, 'scaling it changes little'


def test_one_shot_and_iterative_are_stairs():
    assert [one_shot(p) for p in (0, .5, .51, 1)] == [0, 0, 1, 1]
    assert [iterative(p) for p in (0, .25, .26, .5, .51, .75, .76, 1)] == pytest.approx([0, 0, 1/3, 1/3, 2/3, 2/3, 1, 1])
    five = Schedule(Steps(5))
    assert sorted({five(p) for p in GRID}) == [0, .2, .4, .6, .8, 1]
    assert [five(i/5) for i in range(6)] == [0, .2, .4, .6, .8, 1]


@pytest.mark.parametrize('n', [1, 2, 3, 7, 49])
def test_a_stair_has_as_many_steps_as_asked_for(n):
    assert len({Schedule(Steps(n), .1, .9)(p) for p in GRID}) == n+1
    assert [Steps(n)(i/n) for i in range(n+1)] == [i/n for i in range(n+1)]


@pytest.mark.parametrize('start,end', [(.1, .9), (.25, 1), (.2, .7), (1/3, 2/3)])
def test_a_step_does_not_come_early_by_a_rounding_error(start, end):
    for n in range(1, 30):
        s = Schedule(Steps(n), start, end)
        assert [s(start + (end-start)*i/n) for i in range(1, n)] == [i/n for i in range(1, n)]


def test_rounds():
    assert (one_shot.rounds, iterative.rounds, Schedule(Steps(7)).rounds, constant_rate.rounds, Schedule(Rate(50, 2)).rounds) == (1, 3, 7, 10, 2)
    assert agp.rounds is one_cycle.rounds is cos.rounds is lin.rounds is dsd.rounds is None


@pytest.mark.parametrize('rate,n', [(20, 10), (20, 1), (50, 3), (90.5, 4), (1, 100), (99, 3)])
def test_each_round_takes_the_same_share_of_what_is_left(rate, n):
    r = Rate(rate, n)
    left = [100 - r.sparsity*r(i/n) for i in range(n+1)]
    assert left == pytest.approx([100*(1 - rate/100)**k for k in range(n+1)], abs=1e-9)
    assert r(0) == 0 and r(1) == 1 and len({Schedule(r)(p) for p in GRID}) == n+1


def test_constant_rate_by_hand():
    "Frankle & Carbin 2019: 20 % a round; 80, 64, 51.2 % are left"
    r = Rate(20, 3)
    assert r.sparsity == pytest.approx(48.8) and [r(p) for p in (0, .01, 1/3, .34, .67, 1)] == pytest.approx([0, 20/48.8, 20/48.8, 36/48.8, 1, 1])
    assert constant_rate.func.sparsity == pytest.approx(100*(1 - .8**10)) and constant_rate(.1) == 0 < constant_rate(.11)


@pytest.mark.parametrize('args,message', [((.2, 5), 'did you mean 20?'), ((0, 5), 'from 1 to below 100'), ((100, 5), 'from 1 to below 100'), ((True, 5), 'rate=True'),
    (('20', 5), "rate='20'"), ((float('nan'), 5), 'rate=nan'), ((20, 0), 'at least 1'), ((20, 2.), 'whole number')])
def test_a_rate_that_cannot_be_meant_is_refused(args, message):
    with pytest.raises(ValueError) as e: Rate(*args)
    assert message in str(e.value)


def test_dsd_comes_back():
    up, down = [dsd(p) for p in GRID if p <= .5], [dsd(p) for p in GRID if p >= .5]
    assert up == sorted(up) and down == sorted(down, reverse=True) and dsd(.5) == 1


@pytest.mark.parametrize('name', ALL)
def test_a_value_that_can_be_compared_pickled_copied_printed_and_not_changed(name):
    s = ALL[name]
    assert pickle.loads(pickle.dumps(s)) == s == copy.deepcopy(s) and hash(s) == hash(copy.deepcopy(s))
    assert s == Schedule(s.func, s.start_pct, s.end_pct) != Schedule(s.func, s.start_pct, .99)
    assert 'start_pct=' in repr(s)
    with pytest.raises(AttributeError): s.start_pct = .3
    before = [s(p) for p in GRID]
    assert [s(p) for p in reversed(GRID)] == before[::-1], 'no state'


def test_they_all_differ():
    assert len(set(ALL.values())) == len(ALL) and Schedule(Steps(3)) == Schedule(Steps(3)) != Schedule(Steps(4))


def test_a_function_of_ones_own():
    s = as_schedule(lambda p: p**2)
    assert (s(0), s(.5), s(1), s.start_pct, s.end_pct, s.rounds) == (0, .25, 1, 0, 1, None)
    assert Schedule(lambda p: p**2, .5)(.75) == .25
    assert as_schedule(agp) is agp


def test_start_and_end_may_meet():
    s = Schedule(S._lin, .5, .5)
    assert (s(0), s(.49), s(.51), s(1)) == (0, 0, 1, 1)
    assert Schedule(S._lin, 0, 0)(1) == 1 and Schedule(S._lin, 1, 1)(0) == 0 and Schedule(S._lin, 1, 1)(1) == 1


@pytest.mark.parametrize('start,end,says', [
    (.7, .3, r'starts at 0.7, after its end at 0.3; did you mean start_pct=0.3, end_pct=0.7'), (-.1, 1, 'start_pct=-0.1 has to be a fraction of training, from 0 to 1'),
    (0, 50, r'end_pct=50 .*from 0 to 1; did you mean 0.5\?'), (0, 1.5, 'end_pct=1.5'), (math.nan, 1, 'start_pct=nan'), (True, 1, 'start_pct=True'),
    ('0', 1, "start_pct='0'"), (0, None, 'end_pct=None')])
def test_bad_positions_are_refused(start, end, says):
    with pytest.raises(ValueError, match=says): Schedule(S._lin, start, end)


@pytest.mark.parametrize('func,says',
    [(lambda p: 1-p, r'func\(0\) is 1.0; it has to be exactly 0'), (lambda p: 2*p, r'func\(1.0\) is 2.0; .*within 0 and 1'), (lambda p: -p, 'within 0 and 1'),
                                       (lambda p: p*math.nan, 'exactly 0'), (3, r'func=3 is not a function of the position')])
def test_bad_functions_are_refused(func, says):
    with pytest.raises(ValueError, match=says): Schedule(func)


def test_a_function_that_leaves_its_range_half_way_is_refused_when_it_does():
    s = Schedule(lambda p: 4*p*(1-p)*2)
    with pytest.raises(ValueError, match=r'func\(0.5\) is 2.0'): s(.5)


@pytest.mark.parametrize('n', [0, -1, 2.5, True, '3', None])
def test_bad_steps_are_refused(n):
    with pytest.raises(ValueError, match=r'has to be a whole number, at least 1'): Steps(n)


@pytest.mark.parametrize('bad', ['abc', 'AGP', None, .5, Schedule])
def test_an_unknown_schedule_is_refused_with_the_names(bad):
    with pytest.raises(ValueError, match='is unknown; choose one of one_shot, .*constant_rate, constant, or pass a Schedule or a function'): as_schedule(bad)


@pytest.mark.parametrize('name', ALL)
def test_plot_draws_the_schedule(name):
    import matplotlib.pyplot as plt
    _, ax = plt.subplots()
    assert ALL[name].plot(sparsity=80, ax=ax) is ax
    line, = ax.lines
    xs, ys = line.get_data()
    assert (xs[0], xs[-1]) == (0, 1) and ys == pytest.approx([80*ALL[name](x) for x in xs]) and max(ys) == 80
    other = ALL[name].plot()
    assert other is not ax and other.lines

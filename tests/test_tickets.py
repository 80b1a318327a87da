"Rounds, controls, resuming, and what is left of a Learner when something goes wrong"
import json, random, warnings
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.learner import Learner
from torch import nn

from fastai_helpers import On, fit, learner, loaders, net, percent, quiet, same, state_of
from fastsparse.allocation import Bounded
from fastsparse.callback import KeepSparsityCallback, SparsifyCallback
from fastsparse.distill import DistillCallback
from fastsparse.measure import measure
from fastsparse.method import Owl
from fastsparse.tickets import LotteryReport, lottery_ticket


def shuffled(**kwargs): return learner(dls=loaders(shuffle=True), **kwargs)

def tickets(learn, folder, rounds=2, epochs=2, **kwargs):
    with quiet(learn): return lottery_ticket(learn, rounds, epochs, folder=folder, **kwargs)

def remembered(state): return state.keys() - {'do_wd', 'force_train'}

def load(folder, name): return torch.load(folder/f'{name}.pth', weights_only=True)


# -- what a round is

@pytest.mark.parametrize('rate,rounds', [(20, 3), (50, 2)])
def test_each_round_takes_its_share_of_what_is_left(rate, rounds, tmp_path):
    report = tickets(shuffled(), tmp_path, rounds, 1, rate=rate, controls=())
    n = sum(m.weight.numel() for m in net().modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    zeros = [round(r['sparsity']*n/100) for r in report.rows]
    assert zeros == [round((1 - (1 - rate/100)**k)*n) for k in range(rounds+1)] and [r['arm'] for r in report.rows] == ['dense'] + rounds*['ticket']
    masks = [load(tmp_path, f'masks_{k:02}') for k in range(1, rounds+1)]
    for a, b in zip(masks, masks[1:]): assert not any((b[n] & ~a[n]).any() for n in a), 'pruned stays pruned'


@pytest.mark.parametrize('rewind', [0, 1])
def test_a_ticket_begins_where_the_dense_network_was(rewind, tmp_path):
    "All of its tensors, BatchNorm's too, but for the zeros"
    learn, seen = shuffled(), []
    begin = On(before_train=lambda l: seen.append((l.epoch, state_of(l.model), any(map(remembered, l.opt.state_dict()['state'])))), order=-20)
    tickets(learn, tmp_path, 2, 2, rewind_epoch=rewind, controls=(), cbs=begin)
    epochs = [e for e, _, _ in seen]
    assert epochs == [0, 1] + 2*list(range(rewind, 2))
    dense = seen[rewind][1]
    assert same(dense, load(tmp_path, 'rewind')) and same(seen[0][1], load(tmp_path, 'start'))
    for k, at in ((1, 2), (2, 2 + 2 - rewind)):
        masks, ticket = load(tmp_path, f'masks_{k:02}'), load(tmp_path, f'ticket_{k:02}')
        assert same(ticket, seen[at][1]) and not seen[at][2] and seen[1][2], 'the optimizer remembers nothing'
        for n, t in ticket.items(): assert torch.equal(t, dense[n]*masks[n] if n in masks else dense[n])


@pytest.mark.parametrize('zeros', [False, True])
def test_masks_go_by_the_trained_weights(zeros, tmp_path):
    "And not by zeros that are there by initialisation"
    model = net()
    with torch.no_grad(): model[3].weight[:, ::2] *= not zeros
    tickets(shuffled(model=model), tmp_path, 2, 2, rate=30, controls=('random mask',))
    for k in (1, 2):
        masks, trained = load(tmp_path, f'masks_{k:02}'), load(tmp_path, f'trained_{k-1:02}')
        kept = torch.cat([trained[n][m].abs() for n, m in masks.items()])
        gone = torch.cat([trained[n][~m].abs() for n, m in masks.items()])
        assert kept.min() >= gone.max()


def test_zeros_stay_and_zero_biases_train(tmp_path):
    "What is zero at the beginning by initialisation is no part of a mask"
    learn, model = shuffled(), net()
    nn.init.zeros_(model[8].bias)
    learn.model = model
    tickets(learn, tmp_path, 1, 2, rate=50)
    masks, trained = load(tmp_path, 'masks_01'), load(tmp_path, 'trained_01')
    assert all((trained[n][~m] == 0).all() for n, m in masks.items()) and trained['8.bias'].count_nonzero() == 10 == (trained['1.bias'] != 0).sum() + 2


def test_learning_rates_are_those_of_the_later_epochs(tmp_path):
    learn, rates = shuffled(), []
    tickets(learn, tmp_path, 1, 3, lr=.1, rewind_epoch=1, controls=(), cbs=On(after_step=lambda l: rates.append(l.opt.hypers[-1]['lr']), order=-5))
    assert len(rates) == 12 + 8 and rates[12:] == pytest.approx(rates[4:12])


# -- the controls

def test_controls_have_the_counts_and_the_masks_they_should(tmp_path):
    learn, seen = shuffled(), []
    begin = On(before_train=lambda l: seen.append((l.epoch, state_of(l.model))) if l.train_iter == 0 else None, order=-20)
    report = tickets(learn, tmp_path, 1, 2, rate=50, rewind_epoch=1, cbs=begin)
    assert [r['arm'] for r in report.rows] == ['dense', 'ticket', 'random weights', 'random mask'] and [r['epochs'] for r in report.rows] == [2, 1, 2, 1]
    assert {r['sparsity'] for r in report.rows[1:]} == {report.rows[1]['sparsity']}
    (_, dense), (at_a, a), (at_b, b), (at_c, c) = seen
    masks, rewind = load(tmp_path, 'masks_01'), load(tmp_path, 'rewind')
    assert (at_a, at_b, at_c) == (1, 0, 1)
    for n, m in masks.items():
        assert (a[n] == 0).sum() == (~m).sum() and not torch.equal(a[n] != 0, m) and torch.equal(a[n], rewind[n]*(a[n] != 0)), 'random mask'
        assert torch.equal(b[n] != 0, m) and not (b[n][m] == dense[n][m]).any(), 'random weights'
        assert torch.equal(c[n] != 0, m), 'the ticket'
    assert all(torch.equal(a[n], rewind[n]) for n in rewind if n not in masks) and (b['1.running_mean'] == 0).all()


@pytest.mark.parametrize('granularity,criteria', [('filter', 'large_final'), ('coupled', 'large_final'), ('kernel', 'random_score'), ('weight', 'movement')])
def test_any_granularity_and_criterion(granularity, criteria, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        report = tickets(shuffled(), tmp_path, 2, 1, rate=30, granularity=granularity, criteria=criteria, method='local')
    by = {(r['round'], r['arm']): r['sparsity'] for r in report.rows}
    assert by[2, 'ticket'] == by[2, 'random mask'] == by[2, 'random weights'] > by[1, 'ticket'] > 10


def test_all_arms_of_a_round_see_the_same_batches(tmp_path):
    learn, seen = shuffled(), []
    tickets(learn, tmp_path, 2, 1, cbs=On(before_batch=lambda l: seen.append(float(l.xb[0].sum())) if l.training else None))
    rounds = [seen[i:i+4] for i in range(0, 28, 4)]
    assert rounds[1] == rounds[2] == rounds[3] != rounds[4] == rounds[5] == rounds[6] and rounds[0] not in (rounds[1], rounds[4])


def test_new_weights_by_a_builder(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.fc = nn.Parameter(torch.ones(1)), nn.Linear(64, 10)
        def forward(self, x): return self.fc(x.flatten(1))*self.scale
    learn = shuffled(model=Own())
    with pytest.raises(ValueError, match=r"cannot renew Own, .*pass init="): tickets(learn, tmp_path)
    with pytest.raises(ValueError, match='builds the model anew'): tickets(learn, tmp_path, init=net)
    with pytest.raises(ValueError, match='builds the model anew'): tickets(learn, tmp_path, init=3)
    assert not list(tmp_path.iterdir())
    assert len(tickets(learn, tmp_path, 1, 1, init=Own).rows) == 4


# -- interrupted and resumed

class Stop(BaseException): pass

def stop_at(fit, batch=2):
    "Interrupts the nth fit, in a batch of its last epoch"
    count = [0]
    def begin(l): count[0] += 1
    def step(l):
        if count[0] == fit and l.epoch == l.n_epoch-1 and l.iter == batch: raise Stop('interrupted')
    return On(before_fit=begin, after_step=step)


@pytest.mark.parametrize('at', [1, 2, 3, 4, 6, 7])
def test_interrupted_and_resumed_is_as_if_it_had_not_been(at, tmp_path):
    whole = tickets(shuffled(), tmp_path/'a', cbs=On())
    learn = shuffled()
    learn.create_opt()
    randoms = lambda: (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), learn.dls.train.rng.getstate())
    before, opt, cbs, states = state_of(learn.model), learn.opt, sorted(cb.name for cb in learn.cbs), randoms()
    with pytest.raises(Stop): tickets(learn, tmp_path/'b', cbs=stop_at(at))
    assert same(before, state_of(learn.model)) and learn.opt is opt and sorted(cb.name for cb in learn.cbs) == cbs and states == randoms()
    fit(learn)
    assert len(json.loads((tmp_path/'b/state.json').read_text())['rows']) == at-1 and not list((tmp_path/'b').glob('*.part'))
    other = shuffled(value=7)
    resumed = tickets(other, tmp_path/'b', cbs=On(), resume=True)
    assert resumed.rows == whole.rows
    for f in (tmp_path/'a').glob('*.pth'): assert same(load(tmp_path/'a', f.stem), load(tmp_path/'b', f.stem))
    assert same(state_of(other.model), load(tmp_path/'a', 'trained_02'))


def test_random_criteria_go_on_with_their_own_random_numbers(tmp_path):
    first = tickets(shuffled(), tmp_path, 1, 1, criteria='random_score')
    state = json.loads((tmp_path/'state.json').read_text())
    (tmp_path/'state.json').write_text(json.dumps({**state, 'rows': state['rows'][:1]}))
    for f in tmp_path.glob('*_01.pth'): f.unlink()
    learn = shuffled()
    torch.manual_seed(99)
    assert tickets(learn, tmp_path, 1, 1, criteria='random_score', resume=True).rows == first.rows


def test_more_rounds_and_other_controls_go_on(tmp_path):
    short = tickets(shuffled(), tmp_path/'a', 1, controls=())
    longer = tickets(shuffled(), tmp_path/'a', 2, resume=True)
    assert longer.rows == tickets(shuffled(), tmp_path/'b', 2).rows and longer.rows[:2] == short.rows
    assert tickets(shuffled(), tmp_path/'b', 1, controls=(), resume=True).rows == short.rows


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, learn = tickets(shuffled(), tmp_path), shuffled(value=3)
    learn.model.forward = None
    with pytest.raises(TypeError): learn.model(torch.zeros(1))
    del learn.model.forward
    trained = []
    assert tickets(learn, tmp_path, resume=True, cbs=[]).rows == first.rows and not trained
    assert list(measure(learn).values()) == [first.rows[-3][k] for k in ('valid_loss', 'accuracy')]


@pytest.mark.parametrize('kwargs,said', [(dict(rate=30), 'rate was 20.0 and is 30.0'), (dict(rewind_epoch=1), 'rewind_epoch was 0 and is 1'), (dict(epochs=3), 'epochs was 2 and is 3'),
    (dict(lr=.1), "lr was 'None' and is '0.1'"), (dict(fit='fit'), "fit was 'fit_one_cycle' and is 'fit'"), (dict(seed=1), 'seed was 0 and is 1'), (dict(granularity='filter'), 'granularity was'),
    (dict(criteria='small_final'), "criteria was 'large_final' and is 'small_final'"), (dict(method='local'), 'method was'), (dict(exclude='8'), 'targets was'), (dict(method=Owl(M=4)), 'M=4'), (dict(cbs=On()), 'cbs was')])
def test_another_run_is_refused(kwargs, said, tmp_path):
    tickets(shuffled(), tmp_path, 1, 2, controls=())
    files = {f: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(ValueError, match='is another one: ') as e: tickets(shuffled(), tmp_path, **{**dict(rounds=1, epochs=2, controls=(), resume=True), **kwargs})
    assert said in str(e.value) and files == {f: f.read_bytes() for f in tmp_path.iterdir()}


def test_another_bound_is_refused_and_the_same_goes_on(tmp_path):
    bound = lambda p: Bounded('local', {lambda n, m: isinstance(m, nn.Linear): p})
    first = tickets(shuffled(), tmp_path, 1, 1, controls=(), method=bound(10))
    with pytest.raises(ValueError, match='method was .*: 10.* and is .*: 15'): tickets(shuffled(), tmp_path, 1, 1, controls=(), method=bound(15), resume=True)
    assert tickets(shuffled(), tmp_path, 1, 1, controls=(), method=bound(10), resume=True).rows == first.rows


def test_another_model_or_optimizer_is_refused(tmp_path):
    tickets(shuffled(), tmp_path, 1, 1, controls=())
    from fastai.optimizer import Adam
    for learn, said in ((shuffled(model=net(width=4)), 'tensors was'), (shuffled(opt_func=Adam), "optimizer was 'momentum' and is 'Adam'"), (learner(dls=loaders(5)), 'batches was 4 and is 5')):
        with pytest.raises(ValueError, match=said): tickets(learn, tmp_path, 1, 1, controls=(), resume=True)


def test_nothing_is_overwritten_unasked(tmp_path):
    tickets(shuffled(), tmp_path, 1, 1, controls=())
    with pytest.raises(ValueError, match='holds a run already; go on with it by resume=True'): tickets(shuffled(), tmp_path, 1, 1, controls=())
    (tmp_path/'state.json').unlink()
    with pytest.raises(ValueError, match='no state.json'): tickets(shuffled(), tmp_path, 1, 1, controls=())


# -- the Learner in the end

def test_the_learner_has_the_last_ticket_trained_and_a_new_optimizer(tmp_path):
    learn = shuffled()
    states = torch.get_rng_state(), random.getstate(), learn.dls.train.rng.getstate()
    report = tickets(learn, tmp_path)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1:] == (random.getstate(), learn.dls.train.rng.getstate())
    last = next(r for r in report.rows if (r['round'], r['arm']) == (2, 'ticket'))
    assert same(state_of(learn.model), load(tmp_path, 'trained_02')) and measure(learn) == {k: last[k] for k in ('valid_loss', 'accuracy')}
    assert not any(map(remembered, learn.opt.state_dict()['state'])) and percent(learn.model) == pytest.approx(36, abs=.1)
    fit(learn, 1, cbs=KeepSparsityCallback())
    assert percent(learn.model) >= last['sparsity']


def test_frozen_groups_stay_frozen(tmp_path):
    learn = shuffled(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])
    learn.freeze()
    before = learn.model[0].weight.detach().clone()
    report = tickets(learn, tmp_path, 1, 1, controls=('random mask',))
    assert learn.opt.frozen_idx == 1 and torch.equal(before, learn.model[0].weight) and set(load(tmp_path, 'masks_01')) == {'0.weight', '3.weight', '8.weight'} and report


@pytest.mark.parametrize('how', ['fit', 'fit_one_cycle', 'fit_flat_cos', partial(Learner.fit_one_cycle, pct_start=.1)])
def test_ways_to_fit(how, tmp_path): assert len(tickets(shuffled(), tmp_path, 1, 2, lr=.01, fit=how).rows) == 4


def test_default_folder(tmp_path):
    learn = shuffled(path=tmp_path)
    with quiet(learn): report = lottery_ticket(learn, 1, 1, controls=())
    assert report.folder == tmp_path/'models'/'lottery' and (report.folder/'state.json').exists()


def test_a_dense_fit_that_ends_too_early(tmp_path):
    learn = shuffled()
    before = state_of(learn.model)
    with pytest.raises(RuntimeError, match='ended before the epoch 2'):
        tickets(learn, tmp_path, 1, 3, rewind_epoch=2, cbs=EarlyStoppingCallback(min_delta=100, patience=1))
    assert same(before, state_of(learn.model))


# -- the report

def made(*losses, control=.5):
    rows = [dict(round=0, arm='dense', sparsity=0., epochs=3, valid_loss=.1, accuracy=.9)]
    for k, v in enumerate(losses, 1):
        rows += [dict(round=k, arm=a, sparsity=100*(1 - .8**k), epochs=3, valid_loss=v + d, accuracy=1-v-d) for a, d in (('ticket', 0), ('random mask', control))]
    return LotteryReport(tuple(rows), 'somewhere')


def test_smallest_is_the_sparsest_that_loses_no_more():
    report = made(.1, .09, .104, .2)
    assert report.smallest(5)['round'] == 3 and report.smallest(1)['round'] == 2 and report.smallest(100)['round'] == 4 and report.smallest(15, by='accuracy')['round'] == 4
    assert made(.2).smallest() is None
    with pytest.raises(ValueError, match='choose one of valid_loss, accuracy'): report.smallest(by='f1')


def test_shown(tmp_path):
    report = made(.1, .2)
    lines = str(report).splitlines()
    assert lines[0].split() == ['round', 'arm', 'sparsity', 'epochs', 'valid_loss', 'accuracy'] and lines[3].split()[:4] == ['1', 'ticket', '20.00', '%'] and lines[-1].endswith('somewhere.')
    assert report._repr_html_().count('<tr>') == 6 and len(report.to_dataframe()) == 5
    ax = report.plot('accuracy')
    assert [line.get_label() for line in ax.lines] == ['ticket', 'random mask', 'dense'] and list(ax.lines[0].get_xdata()) == pytest.approx([80, 64])


def test_load(tmp_path):
    report, learn = tickets(shuffled(), tmp_path), shuffled(value=9)
    masks = report.load(learn, 1, trained=False)
    assert same(state_of(learn.model), load(tmp_path, 'ticket_01')) and same(masks, load(tmp_path, 'masks_01'))
    report.load(learn)
    assert same(state_of(learn.model), load(tmp_path, 'trained_02'))
    with pytest.raises(ValueError, match=r'round=3 has no ticket; choose one of \[1, 2\]'): report.load(learn, 3)


# -- mistakes, before anything is trained

@pytest.mark.parametrize('kwargs,message', [(dict(rounds=0), 'rounds=0'), (dict(rounds=1.5), 'rounds=1.5'), (dict(epochs=0), 'epochs=0'), (dict(rate=.2), 'did you mean 20?'), (dict(rate=100), 'below 100'),
    (dict(rewind_epoch=2), 'only the epochs 0 to 1'), (dict(rewind_epoch=-1), 'rewind_epoch=-1'), (dict(fit='fine_tune'), "fit='fine_tune'"), (dict(fit='fit_flat_cos', rewind_epoch=1), 'takes no start_epoch'),
    (dict(fit=Learner.fit_flat_cos, rewind_epoch=1), 'takes no start_epoch'), (dict(controls='random mask'), 'in a list'), (dict(controls=['dense']), "choose some of 'random mask'"),
    (dict(cbs=SparsifyCallback(50)), 'leave SparsifyCallback out'), (dict(cbs=DistillCallback()), 'pass a trained one as teacher='), (dict(granularity='2:4'), 'so there are no rounds of it'),
    (dict(criteria='magnitudes'), 'is unknown'), (dict(layers='conv9'), 'matches no layer'), (dict(rounds=2, percent=5), 'no argument')])
def test_mistakes_are_told_before_anything_is_trained(kwargs, message, tmp_path):
    learn = shuffled(cbs=On(before_train=lambda l: pytest.fail('trained')))
    before = state_of(learn.model)
    with pytest.raises((ValueError, TypeError)) as e: tickets(learn, tmp_path, **kwargs)
    assert message in str(e.value) and same(before, state_of(learn.model)) and not list(tmp_path.iterdir())


def test_nothing_is_printed_but_a_bar(tmp_path, capsys):
    tickets(shuffled(), tmp_path, 1, 1)
    assert not capsys.readouterr().out

"A validation that leaves no trace"
import math, random

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger
from fastai.callback.rnn import rnn_cbs
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import AvgMetric, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import Perplexity, accuracy
from torch import nn

from fastai_helpers import fit, learner, loaders, quiet, samples, same, state_of
from fastsparse.callback import SparsifyCallback
from fastsparse.measure import measure, with_bar, worse_by


def language_learner():
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import get_language_model
    model = get_language_model(AWD_LSTM, 20, dict(emb_sz=8, n_hid=12, n_layers=2, pad_token=1, bidir=False, output_p=.1, hidden_p=.15, input_p=.25, embed_p=.02, weight_p=.2,
        tie_weights=True, out_bias=True))
    x = torch.randint(0, 20, (32, 9))
    dl = lambda: DataLoader([(a[:-1], a[1:]) for a in x], bs=8)
    return Learner(DataLoaders(dl(), dl()), model, loss_func=CrossEntropyLossFlat(), cbs=rnn_cbs(alpha=2, beta=1), metrics=[accuracy, Perplexity()])


@pytest.mark.parametrize('make', [lambda: fit(learner()), lambda: learner(metrics=None), lambda: fit(language_learner()), lambda: learner(cbs=MixedPrecision())])
def test_it_says_what_validate_says(make):
    learn = make()
    found = measure(learn)
    with quiet(learn): expected = learn.validate()
    assert list(found) == ['valid_loss', *learn.metrics.attrgot('name')] and list(found.values()) == pytest.approx(list(expected), rel=1e-5)


class Odd(nn.Module):
    "State that a forward changes, in attributes and in buffers"
    def __init__(self):
        super().__init__()
        self.fc, self.calls, self.seen = nn.Linear(64, 10), 0, [1]
        self.register_buffer('n', torch.zeros(()))
    def forward(self, x):
        self.calls += 1
        self.seen.append(2)
        self.n += 1
        return self.fc(x.flatten(1)) + torch.rand(1) + random.random() + float(np.random.rand())


def everything(learn):
    cbs = {cb.name: {k: v for k, v in vars(cb).items() if k != 'learn'} for cb in learn.cbs}
    mine = {k: v for k, v in vars(learn).items() if k not in ('lock', 'model', 'dls', 'cbs', *cbs)}
    return repr((mine, [cb.name for cb in learn.cbs], cbs, [vars(m) for m in learn.metrics], [m.training for m in learn.model.modules()], vars(learn.model), learn.model.state_dict(),
        learn.dls.valid.rng.getstate(), random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('n', [None, 1])
def test_all_is_as_it_was(training, n):
    learn = fit(learner(Odd(), dls=loaders(valid=32, shuffle=True)))
    learn.model.train(training)
    before = everything(learn)
    a, b = measure(learn, n_batches=n), measure(learn, n_batches=n)
    assert everything(learn) == before and a == b, 'the same random numbers each time'


def test_and_so_it_is_after_an_error():
    learn = fit(learner(Odd()))
    def wrong(*_): raise RuntimeError('metric')
    learn.metrics = [AvgMetric(wrong)]
    before = everything(learn)
    with pytest.raises(RuntimeError, match='metric'): measure(learn)
    assert everything(learn) == before and not learn.lock.locked()


def test_hidden_states_of_recurrent_models_stay():
    learn = fit(language_learner())
    learn.model.eval()(torch.randint(0, 20, (8, 3)))
    hidden = [t for h in learn.model[0].hidden for t in h]
    was = [t.clone() for t in hidden]
    measure(learn)
    now = [t for h in learn.model[0].hidden for t in h]
    assert all(a is b for a, b in zip(hidden, now)) and all(torch.equal(a, b) for a, b in zip(was, now)) and any(t.abs().sum() for t in now)


def test_callbacks_that_save_load_or_hold_have_no_part(tmp_path):
    learn = learner(path=tmp_path)
    learn.add_cbs([SaveModelCallback(), CSVLogger(), SparsifyCallback(50)])
    fit(learn)
    csv, cb = (tmp_path/'history.csv').read_text(), learn.sparsify
    with torch.no_grad():
        for p in learn.model.parameters(): p.zero_()
    before, holder, values = state_of(learn.model), cb.sparsifier, list(learn.recorder.values)
    assert measure(learn)['valid_loss'] == pytest.approx(math.log(10), rel=1e-5), 'not those of the best model'
    assert same(before, state_of(learn.model)) and cb.sparsifier is holder and (tmp_path/'history.csv').read_text() == csv and learn.recorder.values == values


def test_callbacks_that_change_outputs_have_theirs():
    class Half(Callback):
        def after_pred(self): self.learn.pred = self.pred*0
    learn = learner(cbs=Half())
    assert measure(learn)['valid_loss'] == pytest.approx(math.log(10), rel=1e-6)


def test_other_data_and_part_of_it():
    learn = learner()
    dl = DataLoader(samples(48), bs=16)
    one = DataLoader(samples(16), bs=16)
    assert measure(learn, dl, 1) == measure(learn, one) != measure(learn, dl) and measure(learn, dl, 3) == measure(learn, dl, 30) == measure(learn, dl)


@pytest.mark.parametrize('n', [0, -1, 1.5, True, 'all'])
def test_what_is_no_number_of_batches_is_refused(n):
    with pytest.raises(ValueError, match='n_batches='): measure(learner(), n_batches=n)


def test_data_that_cannot_be_measured_on_is_refused():
    learn = learner()
    with pytest.raises(ValueError, match='no validation data'): measure(learn, DataLoader([], bs=4))
    with pytest.raises(ValueError, match='no validation data'): measure(learner(dls=DataLoaders(learn.dls.train)))
    learn.dls.n_inp = 1
    with pytest.raises(ValueError, match='no targets'): measure(learn, DataLoader([(s[0],) for s in samples(8)], bs=4))
    with learn.lock, pytest.raises(RuntimeError, match='from within'): measure(learn)


def test_a_metric_that_is_no_number_is_nan():
    learn = learner(metrics=[AvgMetric(lambda *_: torch.zeros(3)), accuracy])
    learn.metrics[0].func.__name__ = 'vector'
    found = measure(learn)
    assert math.isnan(found['vector']) and 0 <= found['accuracy'] <= 1


@pytest.mark.parametrize('now,dense,name,higher,expected', [(.11, .1, 'valid_loss', None, 10), (.9, 1., 'accuracy', None, 10), (.2, .1, 'error_rate', None, 100), (2, 1, 'mse', None, -100),
    (2, 1, 'mse', False, 100), (-.5, -1, 'score', True, -50), (0, 0, 'dice', None, 0), (-1, 0, 'dice', None, math.inf), (math.nan, 1, 'accuracy', None, math.inf)])
def test_worse_by(now, dense, name, higher, expected): assert worse_by(now, dense, name, higher) == pytest.approx(expected)


def test_a_bar_only_where_there_is_one(capsys):
    learn = learner()
    assert list(with_bar(learn, [1, 2], str)) == [1, 2] and capsys.readouterr().out
    with learn.no_bar(): assert list(with_bar(learn, [1, 2], str)) == [1, 2] and not capsys.readouterr().out

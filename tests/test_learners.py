"Every Learner that fastai users make: what is pruned, what is zero where the forward uses it, what can be cut"
import warnings
from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.callback.schedule import LRFinder
from fastai.callback.tracker import SaveModelCallback
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import (
    AWD_LSTM,
    awd_lstm_clas_config,
    awd_lstm_clas_split,
    awd_lstm_lm_config,
    get_language_model,
    get_text_classifier,
)
from fastai.vision.all import vision_learner
from fastai.vision.gan import FixedGANSwitcher, GANLearner, basic_critic, basic_generator
from fastai.vision.models.unet import DynamicUnet
from fastai_helpers import Callback, On, conv, quiet, regrown, seed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import VisionTransformer, squeezenet1_1
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from fastsparse.callback import KeepSparsityCallback, SparsifyCallback
from fastsparse.compact import relative_difference
from fastsparse.dependants import dependants
from fastsparse.learner import first_inputs, whole
from fastsparse.plan import MACs
from fastsparse.select import changes_weight, find_targets
from fastsparse.sparsifier import Sparsifier
from fastsparse.watch import tensors_in

timm = pytest.importorskip('timm')
transformers = pytest.importorskip('transformers')


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


# -- Learners, small, with data of noise

class Pick:
    "A transform that can be pickled"
    def __init__(self, xs): self.xs = xs
    def __call__(self, i): return self.xs[i]


def loaders(xs, ys, bs=4):
    parts = [list(range(8, len(xs))), list(range(8))]
    return Datasets(range(len(xs)), [[Pick(xs)], [Pick(ys)]], splits=parts).dataloaders(bs=bs, num_workers=0, device='cpu')


def pictures(size=32): return loaders(torch.randn(24, 3, size, size), torch.arange(24) % 2)


def words(target): return loaders(ids := torch.randint(1, 60, (32, 12)), target(ids), bs=8)


def classifier(model, **kwargs): return Learner(pictures(**kwargs), model, loss_func=CrossEntropyLossFlat())


class Logits(Callback):
    def after_pred(self): self.learn.pred = self.pred.logits


class WithTargets(Callback):
    def before_batch(self): self.learn.xb = (*self.xb, *self.yb)


def sum_of_losses(out, *_): return sum(out.values()) if isinstance(out, dict) else torch.tensor(0.)


def detection(model):
    items = [(torch.rand(3, 64, 64), dict(boxes=torch.tensor([[15., 10., 50., 40.]]), labels=torch.tensor([1]))) for _ in range(8)]
    part = lambda items: DataLoader(items, bs=2, create_batch=lambda b: tuple(map(list, zip(*b))))
    return Learner(DataLoaders(part(items), part(items[:4])), model, loss_func=sum_of_losses, cbs=WithTargets())


class Backbone(nn.Sequential):
    out_channels = 16
    def __init__(self): super().__init__(*conv(3, 8, stride=4), *conv(8, 16, stride=2))
    def forward(self, x): return OrderedDict(a=super().forward(x))


anchors = lambda: AnchorGenerator(sizes=((16,),), aspect_ratios=((1.,),))


def faster_rcnn():
    return FasterRCNN(Backbone(), rpn_anchor_generator=anchors(), box_roi_pool=MultiScaleRoIAlign(['a'], 3, 2), box_head=TwoMLPHead(144, 32),
                      box_predictor=FastRCNNPredictor(32, 2), min_size=64, max_size=64, box_detections_per_img=5)


def gan(**kwargs):
    learn = GANLearner.wgan(loaders(torch.randn(24, 10), torch.rand(24, 3, 16, 16)*2 - 1), basic_generator(16, 3, 10, n_features=8), basic_critic(16, 3, n_features=8),
                            switcher=FixedGANSwitcher(n_crit=1, n_gen=1), **kwargs)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    return learn


def text(model, dls, **kwargs): return Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=[ModelResetter, RNNCallback], **kwargs)


small = dict(emb_sz=16, n_hid=24, n_layers=2)


def text_classifier():
    model = get_text_classifier(AWD_LSTM, 60, 2, config=dict(awd_lstm_clas_config, **small), lin_ftrs=[20])
    return text(model, words(lambda x: x.sum(1) % 2), splitter=awd_lstm_clas_split)


def tabular():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=64), b=rng.normal(size=64), c=rng.integers(0, 4, 64).astype(str), y=rng.normal(size=64)))
    dls = TabularDataLoaders.from_df(df, cat_names=['c'], cont_names=['a', 'b'], y_names='y', procs=[Categorify, Normalize], bs=16)
    return tabular_learner(dls, layers=[32, 16], n_out=1)


def collab(**kwargs):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(0, 20, 200), title=rng.integers(0, 30, 200), rating=rng.integers(1, 6, 200).astype(float)))
    return collab_learner(CollabDataLoaders.from_df(df, bs=32), y_range=(0, 5.5), **kwargs)


def bert():
    cfg = transformers.BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32, num_labels=2)
    return Learner(words(lambda x: x.sum(1) % 2), transformers.BertForSequenceClassification(cfg), loss_func=CrossEntropyLossFlat(), cbs=Logits())


def gpt2(**kwargs):
    cfg = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0, **kwargs)
    return Learner(words(lambda x: x.roll(-1, 1)), transformers.GPT2LMHeadModel(cfg), loss_func=CrossEntropyLossFlat(), cbs=Logits())


def timm_model(name, **kwargs): return timm.create_model(name, pretrained=False, num_classes=2, **kwargs)


def bit(): # BiT's blocks, small
    from functools import partial

    from timm.layers import GroupNormAct, StdConv2d
    from timm.models.resnetv2 import ResNetV2
    return ResNetV2(layers=(1, 1), channels=(32, 64), stem_chs=16, num_classes=2, stem_type='same', conv_layer=StdConv2d, norm_layer=partial(GroupNormAct, num_groups=4))


def unet():
    ys = (torch.randn(24, 32, 32) > 0).long()
    body = nn.Sequential(*conv(3, 16, stride=2), *conv(16, 32, stride=2))
    return Learner(loaders(torch.randn(24, 3, 32, 32), ys), DynamicUnet(body, 2, (32, 32), self_attention=True), loss_func=CrossEntropyLossFlat(axis=1))


def timm_vision_learner():
    return vision_learner(pictures(), 'test_resnet', n_out=2, pretrained=False, loss_func=CrossEntropyLossFlat(), normalize=False)


LEARNERS = {
    'vision': lambda: vision_learner(pictures(), squeezenet1_1, n_out=2, pretrained=False, loss_func=CrossEntropyLossFlat(), normalize=False),
    'unet, self-attention': unet,
    'vit': lambda: classifier(VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=2)),
    'language model': lambda: text(get_language_model(AWD_LSTM, 60, config=dict(awd_lstm_lm_config, **small)), words(lambda x: x.roll(-1, 1))),
    'text classifier': text_classifier, 'tabular': tabular, 'collab': lambda: collab(n_factors=8), 'collab, nn': lambda: collab(use_nn=True, layers=[16]),
    'gan': gan, 'faster rcnn': lambda: detection(faster_rcnn()),
    'retinanet': lambda: detection(RetinaNet(Backbone(), 2, anchor_generator=anchors(), min_size=64, max_size=64)),
    'timm vit': lambda: classifier(timm_model('vit_tiny_patch16_224', img_size=32, depth=2, embed_dim=48, patch_size=8)),
    'timm convnext': lambda: classifier(timm_model('convnext_atto', depths=(1, 1, 1, 1), dims=(16, 32, 48, 64))),
    'timm bit': lambda: classifier(bit()), 'timm in vision_learner': timm_vision_learner,
    'timm, padded as TensorFlow does': lambda: classifier(timm_model('test_efficientnet', pad_type='same')),
    'bert': bert, 'gpt2': gpt2, 'gpt2 without cache': lambda: gpt2(use_cache=False),
}
each = pytest.mark.parametrize('kind', LEARNERS)


def make(kind, tmp_path):
    seed()
    learn = LEARNERS[kind]()
    learn.path = tmp_path
    return learn


def fit(learn, cbs, epochs=1, lr=1e-3):
    with quiet(learn): learn.fit(epochs, lr, cbs=cbs)
    return learn


def predict(learn): # tensors that the model returns
    model, inputs = learn.model.eval(), first_inputs(learn)
    if hasattr(model, 'reset'): model.reset()
    with torch.no_grad(), whole(model): return [t.detach().clone() for t in tensors_in(model(*inputs))]


# -- zeros

class Operands(TorchDispatchMode):
    "Where in memory the operands of products and look-ups lie"
    names = 'convolution addmm mm bmm linear mkldnn_rnn_layer lstm embedding _transformer_encoder_layer_fwd _native_multi_head_attention'.split()

    def __init__(self):
        super().__init__()
        self.at, self.alive = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.names:
            self.alive += (given := [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)])
            self.at |= {t.untyped_storage().data_ptr() for t in given}
        return func(*args, **(kwargs or {}))


def check_used(learn, cb): # the weights that a forward multiplies with are the pruned ones, or computed from them with all zeros
    with Operands() as seen: predict(learn)
    for n, t in cb.sparsifier.targets.items():
        if t.param.endswith('_raw'):
            computed = getattr(t.layer.module, t.param.removesuffix('_raw'))
            assert not computed[~cb.sparsifier.masks[n]].any()
        else: assert t.weight.untyped_storage().data_ptr() in seen.at, n


def watching(cb, log): # the regrown weights, whenever one could look
    note = lambda learn: log.append(regrown(cb)) if cb.sparsifier is not None and learn.train_iter else None
    return On(order=200, after_batch=note, before_validate=note, after_epoch=note)


@each
def test_zeros_are_exact_in_the_weights_that_are_used(kind, tmp_path):
    learn, cb, log = make(kind, tmp_path), SparsifyCallback(80), []
    fit(learn, [cb, watching(cb, log), SaveModelCallback(monitor='train_loss', fname='best')], 2)
    assert len(log) > 8 and not any(log)
    groups = sum(t.size for t in cb.sparsifier.targets.values())
    assert abs(cb.report.sparsity - 80) <= 50/groups + (2 if groups < 500 else .01)
    check_used(learn, cb)
    fit(learn, KeepSparsityCallback())
    assert not regrown(cb)


@each
def test_zeros_survive_files_and_searches(kind, tmp_path):
    learn = make(kind, tmp_path)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    fit(learn, [SparsifyCallback(80), LRFinder(num_it=4)])
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
    fit(learn, cb := SparsifyCallback(80))
    learn.save('a')
    other = make(kind, tmp_path).load('a')
    assert not regrown(cb, other.model)
    if kind in ('gan', 'faster rcnn', 'retinanet'): return # fastai does not export these, with or without zeros
    learn.export('a.pkl')
    assert not regrown(cb, load_learner(tmp_path/'a.pkl').model)


@each
def test_fine_tune_and_half_precision(kind, tmp_path):
    learn, cb, log = make(kind, tmp_path), SparsifyCallback(70, method='local'), []
    with quiet(learn): learn.fine_tune(1, 1e-3, cbs=[cb, watching(cb, log)])
    assert not any(log) and all(abs(l.percent - 70) <= 51/(l.weights**.5) for l in cb.report.layers)
    check_used(learn, cb)
    if kind == 'gan': return # its averages of losses are float32
    cast = torch.autocast('cpu', dtype=torch.bfloat16)
    half = On(order=10, before_batch=lambda learn: cast.__enter__(), after_loss=lambda learn: cast.__exit__(None, None, None))
    fit(make(kind, tmp_path), [half, cb := SparsifyCallback(70)])
    assert not regrown(cb) and abs(cb.current_sparsity - 70) < 1


# -- what is foreseen, and what can be cut

REFUSED = { # by granularity, Learners, and what the error says
    'filter': {'collab': 'only weight, row', 'collab, nn': 'only weight, row', 'tabular': 'only weight, row', 'language model': 'only weight, row', 'text classifier': 'only weight, row',
               'bert': 'only weight, row', 'gpt2': 'only weight, row', 'gpt2 without cache': 'only weight, row'},
    '2:4': {'collab': 'no input axis'},
    'coupled': {'collab': 'outputs of Embedding are not coupled', 'language model': 'outputs of LSTM are not coupled', 'text classifier': 'reads a number out of a tensor', 'timm bit': 'outputs of the model'},
}
REFUSED['macs'] = REFUSED['coupled']
ASKED = {'weight': (60, 'weight'), 'filter': (60, 'filter'), '2:4': (50, '2:4'), 'coupled': (40, 'coupled'), 'macs': (MACs(30), 'coupled')}


@pytest.mark.parametrize('what', ASKED)
@each
def test_a_dry_run_foresees_the_fit(kind, what, tmp_path):
    percent, granularity = ASKED[what]
    learn, cb = make(kind, tmp_path), SparsifyCallback(percent, granularity, 'local')
    if kind in REFUSED.get(what, ()):
        with pytest.raises(ValueError, match=REFUSED[what][kind]): cb.dry_run(learn)
        with pytest.raises(ValueError, match=REFUSED[what][kind]): fit(learn, cb)
        return
    run = {l.name: l for l in cb.dry_run(learn).layers}
    fit(learn, cb)
    assert {n for n, l in run.items() if l.plan} == set(cb.sparsifier.targets)
    for n, mask in cb.sparsifier.masks.items():
        assert what == 'macs' or int(cb.sparsifier.targets[n].groups.alive(mask).sum()) == run[n].groups[0], n # which weights are small, changes in a fit; how many go, does not
    dense = {n for n, l in run.items() if not l.plan}
    assert all(run[n].why for n in dense) and not regrown(cb)


@each
def test_coupled_outputs_are_cut_out(kind, tmp_path):
    if kind in REFUSED['coupled']: pytest.skip('has none')
    learn, cb = make(kind, tmp_path), SparsifyCallback(40, 'coupled', 'local')
    fit(learn, cb)
    before, zeros = predict(learn), [int((~m).sum()) for m in cb.sparsifier.masks.values()]
    result = learn.compact()
    assert relative_difference(predict(learn), before) <= 1
    pruned = {t.name: t for t in result.tensors if t.name in cb.sparsifier.masks}
    assert any(zeros) and all(np.prod(t.after) < np.prod(t.before) and not t.zeros for t in pruned.values())
    fit(learn, again := SparsifyCallback(50))
    assert abs(again.report.sparsity - 50) < 1 and len(learn.opt.all_params()) == len(list(learn.model.parameters()))


# -- two networks that take turns

def test_both_networks_of_a_gan_are_pruned(tmp_path):
    learn, cb = make('gan', tmp_path), SparsifyCallback(80, method='local')
    for _ in range(2): # the second fit starts with the frozen network of the first
        fit(learn, cb)
        assert not cb.sparsifier.frozen and cb.sparsifier.reach() == 100
        assert all(abs(l.percent - 80) < 1 for l in cb.report.layers)


@pytest.mark.parametrize('selected,pruned', [(dict(layers='generator'), 'generator'), (dict(exclude='generator'), 'critic')])
@pytest.mark.parametrize('granularity', ['weight', 'filter', 'coupled'])
def test_one_network_of_a_gan_is_pruned(granularity, selected, pruned, tmp_path):
    learn = make('gan', tmp_path)
    fit(learn, cb := SparsifyCallback(40, granularity, **selected))
    assert {n.split('.')[0] for n in cb.sparsifier.targets} == {pruned}


def test_a_plan_for_both_networks_of_a_gan(tmp_path):
    learn = make('gan', tmp_path)
    fit(learn, cb := SparsifyCallback({'generator': dict(sparsity=50), 'critic': 80}))
    percent = lambda of: 100*np.mean(np.concatenate([t.weight.flatten() == 0 for p in cb.parts for n, t in p.sparsifier.targets.items() if n.startswith(of)]))
    assert abs(percent('generator') - 50) < .1 and abs(percent('critic') - 80) < .1


@pytest.mark.parametrize('first', [False, True])
@pytest.mark.parametrize('granularity', ['filter', 'coupled'])
def test_pruned_filters_of_both_networks_are_silent(granularity, first, tmp_path):
    learn = make('gan', tmp_path)
    learn.gan_trainer.gen_first = first
    fit(learn, cb := SparsifyCallback(40, granularity, 'local'), 2)
    masks, model = cb.sparsifier.masks, learn.model.eval()
    assert 'generator.3.weight' not in masks and 'forward' not in vars(model) # colours are no filters
    for name, upto, x, dims in [('generator.1.0', model.generator[:2], torch.randn(2, 10), (0, 2, 3)), ('critic.1.0', model.critic[:2], torch.rand(2, 3, 16, 16), (1, 2, 3))]:
        dead = ~masks[f'{name}.weight'].amax(dims)
        assert dead.any() and not upto(x)[:, dead].any()


def test_a_smaller_gan_trains_both_networks(tmp_path):
    learn = make('gan', tmp_path)
    fit(learn, SparsifyCallback(40, 'coupled', 'local'))
    learn.compact()
    assert learn.loss_func.gan_model is learn.model and 'forward' not in vars(learn.model)
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    fit(learn, None, 2)
    moved = {n.split('.')[0] for n, p in learn.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {'generator', 'critic'}


def test_what_is_not_used_in_the_watched_forward_is_said():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Sequential(*conv(3, 8)), nn.Sequential(*conv(3, 8))
        def forward(self, x): return self.a(x).mean()
    model = Two()
    s = Sparsifier(model, 'filter', 'local', example_input=torch.randn(2, 3, 8, 8))
    s.prune_model(50)
    assert any('b.0' in n and 'does not use' in n for n in s.flow_notes())
    assert dependants(model, {'a.0.weight': model.a[0]}, torch.randn(2, 3, 8, 8)).idle == ()


# -- lists, targets

def test_lists_are_samples():
    learn = LEARNERS['faster rcnn']()
    (images,) = first_inputs(learn)
    assert [tuple(x.shape) for x in images] == [(3, 64, 64)]*2


def test_a_model_that_needs_its_targets(tmp_path):
    class Teacher(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(8, 16), nn.Linear(17, 2)
        def forward(self, x, y): return self.b(torch.cat([self.a(x).relu(), y[:, None].float()], 1))
    learn = Learner(loaders(torch.randn(24, 8), torch.arange(24) % 2), Teacher(), loss_func=CrossEntropyLossFlat(), cbs=WithTargets())
    fit(learn, cb := SparsifyCallback(50, 'coupled'))
    assert list(cb.sparsifier.targets) == ['a.weight'] and cb.report.sparsity == 50


# -- weights that are not used as they stand

def test_standardised_weights_stay_dense():
    from timm.layers import ScaledStdConv2d, StdConv2d
    for layer in (StdConv2d(8, 8, 3), ScaledStdConv2d(8, 8, 3), ScaledStdConv2d(8, 8, 3, gain_init=0.)): # with a gain of zero all is zero
        assert 'makes something else of its zeros' in changes_weight(layer)
        assert not (kept := dict(layer.state_dict())) or all(torch.equal(v, layer.state_dict()[k]) for k, v in kept.items())
    assert not changes_weight(timm.layers.Conv2dSame(8, 8, 3))
    targets, dense = find_targets(bit(), SparsifyCallback(50).granularity)
    assert [t.name for t in targets] == ['head.fc.weight'] and len(dense) > 5


# -- transformers

def test_a_tied_head_is_one_target(tmp_path):
    learn = make('gpt2', tmp_path)
    fit(learn, cb := SparsifyCallback(80))
    assert not any('wte' in n or 'lm_head' in n for n in cb.sparsifier.targets) and learn.model.transformer.wte.weight.all()
    fit(learn, cb := SparsifyCallback(80, layers='lm_head'))
    assert list(cb.sparsifier.targets) == ['transformer.wte.weight'] and learn.model.lm_head.weight is learn.model.transformer.wte.weight
    assert abs(cb.report.sparsity - 80) < .1


def test_widths_that_gpt2_has_written_down_are_set_anew(tmp_path):
    learn = make('gpt2 without cache', tmp_path)
    fit(learn, cb := SparsifyCallback(50, 'coupled', 'local'))
    assert {n.split('.')[-2] for n in cb.sparsifier.targets} == {'c_fc', 'c_attn'}
    learn.compact()
    assert [(m.nx, m.nf) for m in (learn.model.transformer.h[0].mlp.c_fc, learn.model.transformer.h[0].mlp.c_proj)] == [(32, 64), (64, 32)]


def test_norms_that_start_at_zero_and_sums_in_place():
    x = torch.randn(2, 3, 32, 32)
    dense = lambda **kwargs: set(Sparsifier(timm_model('resnet10t', **kwargs), 'coupled', example_input=x).left_dense)
    assert dense() == dense(zero_init_last=False) == {'fc'}


# -- gradual unfreezing

@pytest.mark.parametrize('anew', [False, True])
@pytest.mark.parametrize('method', ['local', 'global'])
def test_gradual_unfreezing(method, anew, tmp_path):
    learn, cb, log, gone = make('text classifier', tmp_path), SparsifyCallback(80, method=method), [], {}
    frozen = []
    for depth in (-1, -2, -3, 0):
        learn.freeze_to(depth)
        if anew: cb = SparsifyCallback(80, method=method)
        fit(learn, [cb, watching(cb, log)], lr=1e-2)
        s = cb.sparsifier
        frozen.append(len(s.frozen))
        assert not any(log) and abs(cb.report.sparsity - 80) < .5
        assert all(s.targets[n].weight.all() for n in s.frozen)
        for n, m in gone.items(): assert not s.targets[n].weight[m].any() # pruned stays pruned
        gone = {n: t.weight == 0 for n, t in s.targets.items() if n not in s.frozen}
        check_used(learn, cb)
    assert frozen == [4, 2, 0, 0]

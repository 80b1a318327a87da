"The task: a ResNet-20 pretrained on CIFAR-10 is fine-tuned for two epochs on half of the training images"
import io, random, tarfile
from functools import partial
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD

MEAN,STD = torch.tensor([0.485, 0.456, 0.406]).view(3,1,1),torch.tensor([0.229, 0.224, 0.225]).view(3,1,1)

class Block(nn.Module):
    "Two 3x3 convolutions and a shortcut without parameters (He et al. 2015, section 4.2, option A)"
    def __init__(self, ni, no, stride):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(ni, no, 3, stride, 1, bias=False),nn.BatchNorm2d(no)
        self.conv2,self.bn2 = nn.Conv2d(no, no, 3, 1, 1, bias=False),nn.BatchNorm2d(no)
        self.stride,self.pad = stride,(no-ni)//2

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.stride != 1: x = F.pad(x[:,:,::2,::2], (0,0,0,0,self.pad,self.pad))
        return (x+y).relu()

class ResNet20(nn.Module):
    "The ResNet-20 for CIFAR-10 of He et al. 2015, section 4.2"
    def __init__(self):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False),nn.BatchNorm2d(16)
        def stage(ni, no): return nn.Sequential(Block(ni, no, no//ni), Block(no, no, 1), Block(no, no, 1))
        self.layer1,self.layer2,self.layer3 = stage(16, 16),stage(16, 32),stage(32, 64)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2,3)))

class Images:
    "Images as bytes with their labels"
    def __init__(self, x, y): self.x,self.y = x,y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i],self.y[i]

def _files(path): # names and contents of all JPEGs, in a folder or a tar file
    if path.is_dir():
        for f in path.rglob('*.jpg'): yield f.relative_to(path).as_posix(),f.read_bytes()
    else:
        with tarfile.open(path) as t:
            for m in t:
                if m.name.endswith('.jpg'): yield m.name,t.extractfile(m).read()

def load_images(path:Path) -> dict[str,Images]:
    "The images of `train` and `test`, sorted by name"
    decoded = {'train': [], 'test': []}
    for name,data in _files(path):
        split,label,_ = name.split('/')[-3:]
        decoded[split].append((name, label, np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))))
    labels = sorted({label for _,label,_ in decoded['train']})
    def images(rows):
        rows.sort(key=lambda r: r[0])
        return Images(torch.from_numpy(np.stack([a for *_,a in rows])).permute(0,3,1,2).contiguous(), torch.tensor([labels.index(label) for _,label,_ in rows]))
    return {k: images(v) for k,v in decoded.items()}

def _normalise(b): return (b[0].float().div(255).sub(MEAN).div(STD).contiguous(memory_format=torch.channels_last), b[1])

def _augment(b, pad=4): # each image is flipped and moved by a draw of its own
    x,n,side = b[0],len(b[0]),b[0].shape[-1]
    x = torch.where((torch.rand(n) < .5).view(-1,1,1,1), x.flip(-1), x)
    windows = F.pad(x, (pad,)*4).unfold(2, side, 1).unfold(3, side, 1)
    dy,dx = torch.randint(2*pad+1, (2,n))
    return windows[torch.arange(n), :, dy, dx],b[1]

def vit_learner(seed:int) -> Learner:
    "A small vision transformer, its classifier zero as torchvision initialises it, on digits"
    from fastai.torch_core import set_seed
    from sklearn.datasets import load_digits
    from torchvision.models import VisionTransformer
    set_seed(seed, reproducible=True)
    digits = load_digits()
    items = list(zip(torch.tensor(digits.images/16, dtype=torch.float32)[:,None].expand(-1, 3, -1, -1), torch.tensor(digits.target)))
    dls = DataLoaders(DataLoader(items[:1400], bs=64, shuffle=True), DataLoader(items[1400:], bs=256))
    return Learner(dls, VisionTransformer(8, 2, 2, 4, 32, 64, num_classes=10), loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def make_learner(images:dict[str,Images], weights:dict, seed:int, n_train:int=25_000) -> Learner:
    "A Learner with everything fixed but what is fitted; `seed` decides order, flips and crops"
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
    chosen = torch.randperm(len(images['train']), generator=torch.Generator().manual_seed(0))[:n_train]
    train = Images(images['train'].x[chosen], images['train'].y[chosen])
    dls = DataLoaders(DataLoader(train, bs=128, shuffle=True, drop_last=True, num_workers=0, after_batch=lambda b: _normalise(_augment(b))),
                      DataLoader(images['test'], bs=500, num_workers=0, after_batch=_normalise))
    model = ResNet20()
    model.load_state_dict(weights)
    return Learner(dls, model.to(memory_format=torch.channels_last), loss_func=CrossEntropyLossFlat(), opt_func=partial(SGD, mom=.9), lr=.05, wd=1e-4, moms=(.9,.9,.9), metrics=accuracy)

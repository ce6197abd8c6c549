"""One process of a job that takes the gradient of fused backbones; run by path, with the capitals below given."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from synco_fast.kernels.norm import native
from synco_fast.models.encoder import build_backbone
from synco_fast.models.fusion import fuse_batch_norm

given = globals()
RANK: int = given["RANK"]
WORLD: int = given["WORLD"]
#: Parts of a process's share, whose gradients are added up.
PARTS: int = given["PARTS"]
FOLDER: Path = given["FOLDER"]

BATCH, GROUPS = 16, 8
SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "zero_init_last": False}

torch.set_num_threads(1)
native.CACHED = 1 << 16
if WORLD > 1:
    distributed.init_process_group("gloo", init_method=f"file://{FOLDER / 'store'}", rank=RANK, world_size=WORLD)
found = {}
for backend in ("auto", "triton"):
    torch.manual_seed(0)
    backbone, features = build_backbone("timm/resnet18", arguments=SMALL)
    fuse_batch_norm(backbone, GROUPS // (WORLD * PARTS), backend)
    backbone.to(torch.float64, memory_format=torch.channels_last)
    images, up = torch.randn(BATCH, 3, 64, 64).double(), torch.randn(BATCH, features).double()
    images = images.to(memory_format=torch.channels_last)
    model = DistributedDataParallel(backbone) if WORLD > 1 else backbone
    shares = list(zip(images.chunk(WORLD * PARTS), up.chunk(WORLD * PARTS), strict=True))
    for number, (x, upward) in enumerate(shares[RANK * PARTS : (RANK + 1) * PARTS]):
        last = number == PARTS - 1
        with nullcontext() if last or WORLD == 1 else model.no_sync():
            ((model(x) * upward).sum(dim=1).mean() / PARTS).backward()
    for name, value in backbone.named_parameters():
        found[f"{backend}: {name}"] = value.grad
    model.eval()
    with torch.no_grad():
        y = model(images)
    assert torch.equal(y, backbone(images))
torch.save(found, FOLDER / f"gradients-{WORLD}-{RANK}.pt")
if WORLD > 1:
    distributed.destroy_process_group()

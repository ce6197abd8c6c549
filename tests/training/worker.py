"""One process of a test's job; run by path, with the capitals below given."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch
from rich.console import Console

from synco_fast.config import read_config
from synco_fast.runtime.distributed import Place, joined
from synco_fast.runtime.errors import DataError, UserError
from synco_fast.training.loop import Trainer

given = globals()
VARIABLES: dict[str, str] = given["VARIABLES"]
FOLDER: Path = given["FOLDER"]
RESUME: bool = given["RESUME"]
ACT: str = given["ACT"]

os.environ.update(VARIABLES)
torch.set_num_threads(1)
place = Place.find()
words = (FOLDER / f"rank{place.rank}.txt").open("w")
try:
    with joined(place, "cpu", timeout=15) as control:
        config = read_config(FOLDER / "job.yaml")
        console = Console(file=words, width=200)
        trainer = Trainer(config, FOLDER, resume=FOLDER if RESUME else None, console=console, control=control)
        step = trainer._train_step

        def act_and_step(batch, epoch):
            exec(ACT, {"trainer": trainer, "rank": place.rank, "step": trainer.step, "os": os, "torch": torch})
            step(batch, epoch)

        trainer._train_step = act_and_step  # type: ignore[method-assign]
        trainer.run()
        torch.save({"step": trainer.step, **trainer.method.module().state_dict()}, FOLDER / f"rank{place.rank}.pt")
except (UserError, DataError) as error:
    words.write(f"error: {error}\n")
    words.close()
    sys.stdout.flush()
    os._exit(2)
except BaseException:
    words.write(traceback.format_exc())
    words.close()
    os._exit(1)
words.close()

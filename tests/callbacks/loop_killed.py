"""Run by torchrun with one restart: rank 1 is killed within step 3, and all begin anew."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import onlinesel
from onlinesel.strategies import SelectiveBackprop
from tests.callbacks.loop_hosts import make_loader, make_model, sgd, token_losses
from tests.launching import begin, leave

KILLED_IN = 3

if __name__ == "__main__":
    begin()
    folder, attempt = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    core = make_model()
    checkpoint = folder / "checkpoint.pt"
    options = {"candidates": 2, "accumulate": 2}
    model = DistributedDataParallel(core)
    steps = onlinesel.steps(make_loader(1), model, SelectiveBackprop(), **options)
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        core.load_state_dict(saved["model"])
        steps.load_state_dict(saved["steps"])
    optimizer = sgd(core)
    log = (folder / f"log-{attempt}-{rank}.jsonl").open("w")
    for step in steps:
        candidates = step.decisions[0][0].row_ids().tolist()
        print(json.dumps({"planned": step.index, "candidates": candidates}), file=log, flush=True)
        for micro in step:
            micro.loss(token_losses(model, micro.batch)).backward()
            if attempt == 0 and rank == 1 and step.index == KILLED_IN:
                os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            state = {"steps": steps.state_dict(), "model": core.state_dict()}
            torch.save(state, folder / "writing.pt")
            os.replace(folder / "writing.pt", checkpoint)
        else:
            steps.state_dict()  # finishes the step, as on rank 0
        print(json.dumps({"trained": step.index}), file=log, flush=True)
    leave()

"""Two processes in data parallelism end with the gates of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_trainer
from models import FAMILIES, outputs_of


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Output folder of one launch that trained every family."""
    output = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("ddp_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, output]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_same_gates_as_in_one_process(family, two_processes, tmp_path, stock_peft):
    folder = two_processes / family["name"]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [found["world"] for found in ranks] == [2, 2]
    assert ranks[0] == ranks[1]
    single = make_trainer(family, tmp_path)
    single.train()
    scores, is_open = single.gates.scores, single.gates.open_mask
    margin = scores[is_open].min() - scores[~is_open].max()
    assert margin > 1e-4, "too close for rounding not to decide"
    assert ranks[0]["open"] == is_open.tolist()
    torch.testing.assert_close(torch.tensor(ranks[0]["scores"]), scores, atol=1e-4, rtol=0)
    outputs = torch.tensor(ranks[0]["outputs"])
    torch.testing.assert_close(outputs, outputs_of(family, single.model), atol=1e-4, rtol=1e-4)
    for directory in (folder / "folded", folder / "checkpoint-16"):
        torch.testing.assert_close(stock_peft(FAMILIES[family["name"]], directory), outputs, atol=1e-5, rtol=1e-5)

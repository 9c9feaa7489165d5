"""Started by `test_ddp.py` in every process: trains each family and writes what the gates came to."""

import json
import os
import sys
from pathlib import Path

from conftest import make_trainer
from models import FAMILIES, outputs_of

output, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for name, family in FAMILIES.items():
    folder = output / name
    trainer = make_trainer(family, folder, per_device_train_batch_size=8 // world, save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.gates.save_folded(folder / "folded")
    found = {
        "world": trainer.args.world_size,
        "scores": trainer.gates.scores.tolist(),
        "open": trainer.gates.open_mask.tolist(),
        "outputs": outputs_of(family, trainer.model).tolist(),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))

"""States of a training loop of one's own: the gates in `accelerator.save_state` and `load_state`."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..adapters.checkpoint import read_state
from .controller import GateController

FOLDER = "adapter"  # in the folder of a state


def checkpoint_gates(accelerator: Accelerator, gates: GateController) -> None:
    """Let `accelerator.save_state` save the gates, and `load_state` restore them before it loads the model.

    Without it a state from after the freeze does not load, and one from before it starts without its penalty. Call it
    after `accelerator.prepare`. The gates lie in `adapter/` beside the state: a stock PEFT adapter of that moment.
    After `load_state`, `gates.steps` is the number of steps that were done.

    Args:
        accelerator: of the loop, on one process or under DDP.
        gates: of its model.

    Raises:
        ValueError: under DeepSpeed and FSDP, which only `GatedLoraTrainer` resumes; in `load_state`, where the state is
            without gates, of a run with another model or configuration, or from elsewhere than gates that froze.
    """
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ValueError(
            f"Under {accelerator.distributed_type.value} the state of a loop of one's own cannot be resumed with its "
            "gates. Train with GatedLoraTrainer, which resumes there."
        )

    def save(models, weights, output_dir):
        gates.save_pretrained(
            Path(output_dir) / FOLDER,
            selected_adapters=[gates.adapter_name],
            is_main_process=accelerator.is_main_process,
        )

    def load(models, input_dir):
        folder = Path(input_dir) / FOLDER
        gates.check_resumable(folder)
        if not gates.frozen:
            for optimizer in accelerator._optimizers:  # closed blocks leave it, as they did in the one that was saved
                gates.watch(optimizer.optimizer)
            gates.restore(folder)
            return
        state, _, _ = read_state(folder)
        if not torch.equal(state["open"].bool(), gates.open_mask):
            raise ValueError(
                f"{input_dir} has other open blocks than these gates, which are frozen. Load it into a new model, with "
                "new gates."
            )
        gates.progress, gates.steps = float(state["progress"]), int(state["steps"])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)

"""Checkpoints of an Accelerate loop: the gates in `accelerator.save_state` and `load_state`."""

from pathlib import Path

from accelerate import Accelerator

from ..gates.engines import engine_for
from . import saving
from .controller import GateController

FOLDER = "adapter"  # in the folder of a state


def checkpoint_gates(accelerator: Accelerator, gates: GateController) -> None:
    """Let `accelerator.save_state` save the gates, and `load_state` restore them before it loads the model.

    Without it a state from after the freeze does not load, and one from before it loses its schedule. Call it after
    `accelerator.prepare`. The gates are saved as a stock PEFT adapter in `adapter/` beside the state. After
    `load_state`, `gates.steps` is the number of finished steps.

    Args:
        accelerator: of the loop, on one process or under DDP.
        gates: of its model.

    Raises:
        ValueError: under DeepSpeed and FSDP, which only `GatedLoraTrainer` resumes; in `load_state`, if the state has
            no gates, is of another model or configuration, or has other open blocks than gates that are frozen.
    """
    if engine_for(accelerator).manages:
        raise ValueError(
            f"Under {accelerator.distributed_type.value} a loop's state cannot be resumed with its gates. "
            "Train with GatedLoraTrainer, which resumes there."
        )

    def save(models, weights, output_dir):
        saving.save_pretrained(
            gates,
            Path(output_dir) / FOLDER,
            selected_adapters=[gates.adapter_name],
            is_main_process=accelerator.is_main_process,
        )

    def load(models, input_dir):
        folder = Path(input_dir) / FOLDER
        saving.check_resumable(gates, folder)
        for optimizer in accelerator._optimizers:  # closed blocks leave it, as they left the one that was saved
            gates.watch(optimizer.optimizer)
        saving.restore(gates, folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
